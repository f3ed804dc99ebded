"""Other teachers' trees are held against those of all layers."""

import importlib

import pytest
import torch
from conftest import tiny_config
from tiny_recipes import PROBES, ROOT, run_task, write_recipe

from modeling_ehm import EHMForPreTraining
from modeling_ehm.modeling_ehm import sincos_positions


@pytest.fixture
def teachers(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("teachers")


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("bfloat16", (0, 1, 2, 3)),
        ("first layer", (0,)),
        ("second layer", (1,)),
        ("first three layers", (0, 1, 2)),
        ("last layer", (3,)),
        ("keys of the last layer", (3,)),
        ("complete linkage", (0, 1, 2, 3)),
    ],
)
def test_teachers_read_the_layers_of_their_names(teachers, tmp_path, name, layers):
    EHMForPreTraining(tiny_config(num_hidden_layers=4)).save_pretrained(tmp_path)
    assert teachers.load(tmp_path, teachers.TEACHERS[name]).config.resolved_affinity_layers == layers


def test_coarse_affinities_hold_for_the_patches_they_cover(teachers):
    """2 x 4 patches in squares of side 2: patches 0, 1, 4, 5 are the first, the others the second."""
    coarse = torch.tensor([[[0.5, 0.25], [0.25, 0.125]]])
    fine = teachers.spread(coarse, (2, 4), reduction=2)
    cover = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    for a in range(8):
        for b in range(8):
            assert fine[0, a, b] == (1.5 if cover[a] == cover[b] else 0.25)


def test_agreement(teachers):
    nodes = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]])
    assert teachers.agreement(nodes, nodes) == {"ari": 1.0, "largest": (3 / 4 + 2 / 4) / 2}
    crossed = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 1]])  # of the second image: worse than by chance
    assert teachers.agreement(crossed, nodes)["ari"] == pytest.approx((1 - 0.5) / 2)


def test_coarse_teacher_stands_where_its_patches_lie(teachers, tmp_path):
    config = tiny_config()
    EHMForPreTraining(config).save_pretrained(tmp_path)
    model = teachers.load(tmp_path, teachers.Teacher(reduction=2))
    rows, columns = config.grid_size
    fine = sincos_positions(config.grid_size, config.hidden_size)[0, 1:].reshape(rows, columns, -1)
    coarse = model.ehm.embeddings.positions((rows // 2, columns // 2))[0]
    torch.testing.assert_close(coarse[1], fine[:2, :2].mean((0, 1)))
    torch.testing.assert_close(coarse[-1], fine[-2:, -2:].mean((0, 1)))
    assert not coarse[0].any()
    with pytest.raises(ValueError, match="cannot be taken together in squares of side 3"):
        teachers.load(tmp_path, teachers.Teacher(reduction=3))


def test_a_run_is_measured(teachers, tmp_path):
    run_task(write_recipe(tmp_path / "recipe.yaml", {"num_hidden_layers": 3}, PROBES, {"max_steps": 1}))
    measured = teachers.measure(tmp_path / "out", num_images=10)
    assert set(measured) == {"all layers", *teachers.TEACHERS, "none, blocks"}
    assert {tuple(one) for one in measured.values()} == {("9", "2")}  # of 16 nodes down to 2
    assert measured["all layers"]["2"]["ari"] == 1
    assert measured["keys of the last layer"]["9"]["ari"] < 1
    assert 1 / 2 <= measured["single linkage"]["2"]["largest"] <= 15 / 16
    assert measured["none, blocks"]["2"]["largest"] == 1 / 2
    assert teachers.as_markdown([measured, measured]).count("\n") == len(measured) + 1
