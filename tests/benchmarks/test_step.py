"""Steps and trees are timed side by side, on equal work."""

import importlib
import math

import pytest
import torch
from tiny_recipes import ROOT
from transformers import ViTMAEForPreTraining


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("step")


@pytest.fixture
def tree(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("tree")


@pytest.fixture
def small(step):
    """A shape of four images of 16 patches, on the CPU in float32."""
    return step.Shape(4, 32, 8, 32, 2, 2, 32, 2, 2), step.Setting(torch.device("cpu"), torch.float32, "sdpa", False)


def test_operations_are_those_counted_by_hand(step):
    """ViT-B/16 at 224 with MAE's decoder: 58.5 billion an image, by the count of its matrices."""
    assert step.SHAPES["base"].flops() / 1e9 == pytest.approx(58.46, abs=0.01)
    layer = 2 * (4 * 5 * 8**2 + 2 * 5 * 8 * 32) + 2 * 2 * 5**2 * 8  # five tokens, eight wide
    assert step.layer_flops(5, 8) == layer


def test_loss_is_that_of_vit_mae(step, small, tmp_path):
    shape, setting = small
    step.save_vit_mae(shape, tmp_path, "sdpa")
    positions = ViTMAEForPreTraining.from_pretrained(tmp_path).vit.embeddings.position_embeddings
    assert positions.abs().max() > 0.5  # a ViTMAE made from a config has none
    assert step.loss_difference(tmp_path, shape, setting) < 1e-6


def test_every_variant_trains_on_as_many_masks(step, small, tmp_path):
    shape, setting = small
    step.save_vit_mae(shape, tmp_path, "sdpa")
    for name in (step.REFERENCE, "random masks", "EHM, default"):
        model = step.load(name, tmp_path, setting)
        arguments = step.some_images(model, shape, setting, number=3)
        assert len(model(**arguments).mask) == shape.batch_size
    fields = {"mask_policy": "random", "masks_per_image": 4}
    model.config.update(fields)
    arguments = step.some_images(model, shape, setting, number=3)
    assert len(arguments["pixel_values"]) == 1 and len(model(**arguments).mask) == shape.batch_size


def test_steps_take_turns_and_warm_up(step, small, tmp_path, monkeypatch):
    shape, setting = small
    step.save_vit_mae(shape, tmp_path, "sdpa")
    models = {name: step.load(name, tmp_path, setting) for name in (step.REFERENCE, "random masks")}
    before = {name: next(model.parameters()).clone() for name, model in models.items()}
    seconds = step.time_steps(models, shape, 3, setting)
    assert {name: len(own) for name, own in seconds.items()} == dict.fromkeys(models, 3)
    assert all(second > 0 for own in seconds.values() for second in own)
    assert all(not torch.equal(before[name], next(model.parameters())) for name, model in models.items())


def test_a_machine_whose_speed_moves_is_refused(step, small, monkeypatch):
    speeds = iter([1.0, 1.2])
    monkeypatch.setattr(step, "matmul_peak", lambda setting: next(speeds))
    with pytest.raises(RuntimeError, match="a matrix product ran at 1 before and 1.2 after; use an idle machine"):
        step.measure(small[0], ["random masks"], small[1], rounds=1)


def test_exponent(tree):
    """What is below 196 patches has no part in it."""
    times = {n: 3.0 * n**2.5 for n in (196, 576, 1024)}
    assert tree.exponent({64: 1e6} | times) == pytest.approx(2.5)


def test_trees_are_timed_and_tabled(tree, monkeypatch):
    setting = tree.Setting(torch.device("cpu"), torch.float32, "sdpa", False)
    times = tree.measure(tree.smooth_affinity(2, 4, 0), setting, rounds=1)
    assert times.keys() == {"ours", "scipy", "rounds in torch", "EPM's clustering", "cut and draw", tree.SHARE}
    assert all(time > 0 and math.isfinite(time) for time in times.values())
    monkeypatch.setattr(tree, "SIDES", (14, 28))
    table = tree.as_markdown(
        {"smooth": {196: {"ours": 1.0, "ours / scipy": 0.5}, 784: {"ours": 4.0, "ours / scipy": 0.25}}}
    )
    assert "| smooth | ours | 1.0000 | 4.0000 | 1.00 | 1.00 |" in table
    assert "| smooth | ours / scipy | 0.50 | 0.25 | | |" in table
