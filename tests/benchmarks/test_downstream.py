"""The table of downstream tasks: figures where they belong, and nothing run twice."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
from tiny_recipes import ROOT

from modeling_ehm.training.tasks import TASKS

SPEC = importlib.util.spec_from_file_location("downstream", ROOT / "benchmarks" / "downstream.py")
downstream = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(downstream)


def results(top1, seconds=60.0, **more):
    figures = {"top1": top1, "top5": 90.0, "loss": 1.5} | more
    return {"figures": figures, "references": {"top1": 20.1}, "steps": 10, "wall_seconds": seconds}


TABLE = {
    "classify/tin40": {
        "EHM": [results(50.0), results(54.0)],
        "MAE": [results(51.0), results(51.0)],
        "untrained": [results(30.0, 120.0), results(30.0, 60.0)],
    }
}
COLUMNS = ["EHM", "MAE", "untrained"]


def test_headlines_and_other_figures_are_two_tables():
    """Columns from untrained to EHM, means and deviations over seeds, and the difference of the first two."""
    lines = downstream.as_markdown(TABLE, COLUMNS, headline=True).splitlines()
    assert lines[0] == "| recipe | figure | reference | untrained | MAE | EHM | EHM less MAE |"
    row = "| classify/tin40 | top1 | 20.10 | 30.00 ± 0.00 | 51.00 ± 0.00 | 52.00 ± 2.83 | +1.00 |"
    assert lines[2] == row and "| top5 |  | 90.00" in lines[3] and len(lines) == 4
    others = downstream.as_markdown(TABLE, COLUMNS, headline=False).splitlines()
    assert len(others) == 3 and others[2].startswith("| classify/tin40 | loss |")


def test_draws_are_compared_in_pairs():
    """By hand: gains 3, 1, -1 have mean 1 and standard error 2 / sqrt(3); a recipe without draws has no row."""
    draws = {"EHM": [33.0, 41.0, 24.0], "untrained": [30.0, 40.0, 25.0]}
    table = {"low_shot/x": {c: [results(1.0) | {"draws": {"frozen_1_shot": d}}] for c, d in draws.items()}} | TABLE
    lines = downstream.draws_table(table, list(draws)).splitlines()
    assert lines[0] == "| recipe | figure | EHM less untrained |"
    assert lines[2:] == ["| low_shot/x | frozen_1_shot | +1.00 ± 1.15 (2 of 3) |"]


def test_times_are_minutes():
    last = downstream.times_table(TABLE, COLUMNS).splitlines()[-1]
    assert last == "| classify/tin40 | 10 | 1.5 | 1.0 | 1.0 |"


def test_every_recipe_of_the_table_exists_and_every_task_has_headlines():
    assert all((ROOT / "configs" / f"{recipe}.yaml").exists() for recipe in downstream.RECIPES)
    assert {recipe.split("/")[0] for recipe in downstream.RECIPES} == set(downstream.HEADLINES) - {"align"}
    assert set(downstream.HEADLINES) == set(TASKS) - {"pretrain"}


@pytest.mark.parametrize(
    "task, name, expected",
    [
        ("low_shot", "frozen_5_shot", True),
        ("low_shot", "frozen_5_shot_sd", False),
        ("retrieve", "map_crop60", True),
        ("retrieve", "map_jpeg5", False),
        ("detect", "ap_RBC", False),
    ],
)
def test_what_is_a_headline(task, name, expected):
    assert downstream.is_headline(task, name) is expected


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    """The same recipe, weights, seed and overrides read the results; another seed or weights run anew."""
    (tmp_path / "checkpoint").mkdir()
    weights = tmp_path / "checkpoint" / "model.safetensors"
    weights.write_bytes(b"weights")
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        folder = Path(next(c for c in command if c.startswith("training.output_dir=")).partition("=")[2])
        assert not (folder / "checkpoint-9").exists()  # of a run with another key, from which this one would go on
        (folder / "checkpoint-9").mkdir()
        (folder / "results.json").write_text(json.dumps({"pretrained": str(tmp_path), "figures": {"top1": 1.0}}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(downstream.subprocess, "run", run)
    arguments = "classify/tin40", tmp_path / "checkpoint"
    first = downstream.run_one(*arguments, 0, tmp_path / "out", [])
    assert downstream.run_one(*arguments, 0, tmp_path / "out", []) == first and len(commands) == 1
    assert "pretrained" not in first and first["wall_seconds"] >= 0
    assert f"model.pretrained={tmp_path / 'checkpoint'}" in commands[0] and "training.seed=0" in commands[0]
    downstream.run_one(*arguments, 1, tmp_path / "out", [])
    downstream.run_one(*arguments, 1, tmp_path / "out", ["training.max_steps=2"])
    weights.write_bytes(b"others")
    downstream.run_one(*arguments, 1, tmp_path / "out", ["training.max_steps=2"])
    assert len(commands) == 4


def test_untrained_weights_are_of_the_architecture(tmp_path, make_config):
    """Another architecture is another folder; the same one is made once."""
    one, other = (downstream.make_untrained(make_config(hidden_size=width), tmp_path, 0) for width in (64, 32))
    assert one != other and one.is_dir() and other.is_dir()
    before = (one / "model.safetensors").stat().st_mtime_ns
    assert downstream.make_untrained(make_config(), tmp_path, 0) == one
    assert (one / "model.safetensors").stat().st_mtime_ns == before


def test_tables_are_put_between_their_marks(tmp_path):
    path = tmp_path / "table.md"
    downstream.write_tables(path, "first")
    path.write_text(f"# Title\n\n{path.read_text()}\nWhat we read from it.\n")
    downstream.write_tables(path, "second")
    text = path.read_text()
    assert text.startswith("# Title") and text.endswith("What we read from it.\n")
    assert "second" in text and "first" not in text and text.count(downstream.BEGIN) == 1


def test_a_page_without_marks_keeps_its_text(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# Title\n")
    downstream.write_tables(path, "first")
    assert path.read_text() == f"# Title\n{downstream.BEGIN}\n\nfirst\n{downstream.END}\n"


def test_a_failed_run_names_its_log(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(downstream.subprocess, "run", lambda command, **kwargs: subprocess.CompletedProcess(command, 1))
    with pytest.raises(RuntimeError, match=r"classify/tin40 from .* failed; see .*log.txt"):
        downstream.run_one("classify/tin40", tmp_path, 0, tmp_path / "out", [])


def test_a_failed_run_costs_its_own_row_alone(capsys):
    """The others are run, told and tabled, seeds in the order asked for; the failure is told with its reason."""

    def fail():
        raise RuntimeError("see log.txt")

    keys = [(name, column, seed) for name in ("a", "b") for column in ("EHM", "MAE") for seed in (0, 1)]
    jobs = {key: (lambda key=key: results(float(key[2]))) for key in keys} | {("b", "MAE", 1): fail}
    done, failures = downstream.run_all(jobs, at_a_time=3)
    assert failures == ["see log.txt"] and done.keys() == set(keys) - {("b", "MAE", 1)}
    printed = capsys.readouterr().out
    assert "FAILED b, MAE, seed 1: see log.txt" in printed and "a, EHM, seed 0: 1.0 minutes" in printed
    tables = downstream.complete(done, ["a", "b"], ["EHM", "MAE"], [1, 0])
    assert tables.keys() == {"a"} and [one["figures"]["top1"] for one in tables["a"]["MAE"]] == [1.0, 0.0]


def test_a_run_is_told_by_what_its_recipe_says_not_by_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(downstream, "ROOT", tmp_path)
    (tmp_path / "configs").mkdir()
    keys = []
    for number, text in enumerate(["# one\na: 1\n", "# another\n\na: 1  # of these\n", "a: 2\n"]):
        (tmp_path / "configs" / f"{number}.yaml").write_text(text)
        keys.append(downstream.key_of(str(number), None, 0, []))
    assert keys[0] == keys[1] != keys[2]
