"""The table of towers: recipes after one another, and one language model for all of them."""

import argparse
import importlib.util
from pathlib import Path

import pytest
from tiny_recipes import ROOT

from modeling_ehm.training.tasks import load_recipe


@pytest.fixture
def alignment(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as when it is run
    spec = importlib.util.spec_from_file_location("alignment", ROOT / "benchmarks" / "alignment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_first_recipe_names_a_language_model_and_no_later_one(alignment):
    for recipes in alignment.TASKS.values():
        heads = [load_recipe(ROOT / "configs" / f"{recipe}.yaml").head for recipe in recipes]
        assert [head.language_model is not None for head in heads] == [True] + [False] * (len(heads) - 1)


def test_stages_go_on_from_each_other(alignment, monkeypatch, tmp_path):
    """The second starts from the first's folder; only the first is given the language model; both may be blind."""
    runs = []

    def run_one(recipe, start, seed, folder, overrides):
        runs.append((recipe, start, overrides))
        return {"wall_seconds": 2.0, "figures": {"exact_match": len(runs)}}

    monkeypatch.setattr(alignment, "run_one", run_one)
    results = alignment.run_task("easy_vqa", "blind", Path("tower"), Path("lm"), 0, tmp_path, ["training.max_steps=1"])
    first, second = runs
    assert first[1] == Path("tower") and second[1] == tmp_path / "blind" / "align-easy_vqa_projector" / "seed-0"
    assert first[2] == ["training.max_steps=1", "data.blind=true", "head.language_model=lm"]
    assert second[2] == ["training.max_steps=1", "data.blind=true"]
    assert results == {"wall_seconds": 4.0, "figures": {"exact_match": 2}}


@pytest.mark.parametrize(
    "given, message",
    [
        (["outputs/ehm"], "'outputs/ehm' must be NAME=CHECKPOINT_DIR"),
        (["EHM=a", "EHM=b"], "'EHM=b': 'EHM' was given before"),
        (["blind=a"], "'blind=a': 'blind' is the name of a column that is added"),
    ],
)
def test_towers_without_a_name_of_their_own_are_refused(alignment, capsys, given, message):
    with pytest.raises(SystemExit):
        alignment.parse_checkpoints(argparse.ArgumentParser(), given, added=["blind"])
    assert message in capsys.readouterr().err
