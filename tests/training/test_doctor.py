"""The doctor: sound runs pass, and each disease is named with what to do."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_recipes import write_recipe

from modeling_ehm.training import doctor
from modeling_ehm.training.checkpoints import MARK
from modeling_ehm.training.doctor import effective_rank, examine, interpolate
from modeling_ehm.training.tasks import load_recipe, pretrain


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 30 steps whose loss falls below that of the patches' means."""
    folder = tmp_path_factory.mktemp("doctor")
    training = {"max_steps": 30, "save_strategy": "steps", "save_steps": 15, "base_learning_rate": 0.3}
    recipe = write_recipe(folder / "recipe.yaml", training=training)
    pretrain.execute(pretrain.prepare(load_recipe(recipe)))
    return folder / "out"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it to spoil, its log made to look healthy."""
    shutil.copytree(finished, tmp_path / "out")
    edit_log(tmp_path / "out", loss=0.6, mask_compactness=0.7, data_wait_share=0.01)
    return tmp_path / "out"


def edit_log(run, **values):
    path = run / "trainer_state.json"
    state = json.loads(path.read_text())
    for row in state["log_history"]:
        if "loss" in row:
            row.update(values)
    path.write_text(json.dumps(state))


def advice_of(run) -> dict[str, str]:
    return {finding.what: finding.advice for finding in examine(run) if finding.advice is not None}


def test_a_sound_run_passes(run, capsys):
    assert advice_of(run) == {}
    doctor.main([str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all(line.startswith("ok ") for line in lines)


def test_a_run_that_is_not_finished_is_seen_by_its_newest_checkpoint(run):
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "checkpoint-30")
    found = {finding.what: finding.measured for finding in examine(run)}
    assert found["loss"].endswith("at 50 % of training") and found["checkpoints"] == "1 whole"


def collapse(run):
    weights = load_file(run / "model.safetensors")
    weights["ehm.layernorm.weight"].zero_()
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})


def skip_some(run):
    line = {"position": 3, "sample_id": 3, "pass": 0, "error": "UnidentifiedImageError: no image"}
    (run / "skipped_images.jsonl").write_text(json.dumps(line) + "\n")


DISEASES = {
    "loss": (lambda run: edit_log(run, loss=0.99), "no better than each patch's mean: raise"),
    "masks": (lambda run: edit_log(run, mask_compactness=0.6), "no different from random ones: set num_nodes_end"),
    "features": (collapse, "collapsed: all images look alike"),
    "data": (lambda run: edit_log(run, data_wait_share=0.4), "raise training.dataloader_num_workers"),
    "skipped images": (skip_some, r"\(UnidentifiedImageError\); mend or remove"),
    "checkpoints": (lambda run: (run / "checkpoint-15" / MARK).unlink(), "harmless if the run was killed"),
    "pushes": (
        lambda run: (run / "failed_pushes.jsonl").write_text('{"what": "step 1", "error": "503"}\n'),
        "python -m modeling_ehm.training.push",
    ),
}


@pytest.mark.parametrize("disease", DISEASES)
def test_each_disease_is_named_alone(run, disease, capsys):
    spoil, words = DISEASES[disease]
    spoil(run)
    advice = advice_of(run)
    assert list(advice) == [disease]
    assert re.search(words, advice[disease])
    with pytest.raises(SystemExit, match=f"to look at: {disease}"):
        doctor.main([str(run)])
    assert f"LOOK {disease}" in capsys.readouterr().out


def test_a_loss_that_was_not_a_number_is_told(run):
    """As long as no checkpoint has got past that step."""
    last = json.loads((run / "trainer_state.json").read_text())["global_step"]
    (run / f"nonfinite-step-{last}-process-0.json").write_text("{}")
    assert advice_of(run) == {}
    (run / f"nonfinite-step-{last + 1}-process-0.json").write_text("{}")
    assert f"nonfinite-step-{last + 1}-process-0.json tells of a loss" in advice_of(run)["checkpoints"]


def test_shipped_recipes_have_bands(run):
    """As if it were the demo's: 0.63 is expected at the end; random masks have no band."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"recipe": "configs/pretrain/demo_synthetic.yaml"}))
    assert advice_of(run) == {}
    edit_log(run, loss=0.4)
    assert "more than 15 % off" in advice_of(run)["loss"]


def test_what_is_no_run_is_refused(tmp_path, run):
    with pytest.raises(ValueError, match="has no recipe.yaml; it is not the output folder"):
        examine(tmp_path)
    for path in run.glob("checkpoint-*"):
        shutil.rmtree(path)
    (run / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no whole checkpoint yet; look again after the first save"):
        examine(run)
    with pytest.raises(SystemExit, match="error: .*holds no whole checkpoint"):
        doctor.main([str(run)])


def test_effective_rank_by_hand():
    """Equal singular values in k directions have rank k; one direction has 1; equal features none to speak of."""
    assert effective_rank(torch.eye(8) * 2) == pytest.approx(7)
    assert effective_rank(torch.arange(5.0)[:, None] * torch.ones(1, 3)) == pytest.approx(1)
    assert effective_rank(torch.ones(4, 3)) == pytest.approx(1)


def test_interpolation():
    points = ((0.2, 1.0), (0.6, 0.5), (1.0, 0.7))
    assert [interpolate(points, x) for x in (0.2, 0.4, 0.6, 0.8, 1.0)] == pytest.approx([1.0, 0.75, 0.5, 0.6, 0.7])
