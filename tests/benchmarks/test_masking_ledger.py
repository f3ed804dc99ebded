"""The ledger of mask policies: equal masks a step, equal time, and only what is finished in the table."""

import importlib
from pathlib import Path

import pytest
import yaml
from tiny_recipes import ROOT

SETTINGS = {"random": ["model.mask_policy=random"], "ehm": [], "four": ["model.masks_per_image=4"]}


@pytest.fixture
def ledger(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("masking_ledger")


def plan_of(ledger, tmp_path: Path, **changes):
    content = {
        "recipe": "pretrain/tin64_vit_tiny",
        "reference": "random",
        "set": ["training.max_steps=1000"],
        "downstream": {"retrieve/copydup": ["head.rerank=0"]},
        "settings": {"random": ["model.mask_policy=random"], "ehm": []},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return ledger.read_plan(path)


def test_the_plan_that_is_shipped(ledger):
    """Every recipe it names exists, every setting is a configuration, and every step trains on 256 masks."""
    plan = ledger.read_plan(ROOT / "benchmarks" / "masking_ledger.yaml")
    recipes = {name: plan.recipe_of(name) for name in plan.settings}
    assert {ledger.masks_a_step(recipe) for recipe in recipes.values()} == {256}
    policies = {recipe.model.get("mask_policy", "ehm") for recipe in recipes.values()}
    assert policies == {"random", "block", "grid", "color_noise", "epm", "ehm"}
    for name, overrides in plan.downstream.items():
        ledger.load_recipe(ROOT / "configs" / f"{name}.yaml", overrides)


def test_unequal_steps_are_refused(ledger, tmp_path):
    with pytest.raises(ValueError, match=r"every step must train on as many masks.*'four': 1024"):
        plan_of(ledger, tmp_path, settings=SETTINGS)
    fewer = SETTINGS | {"four": ["model.masks_per_image=4", "training.global_batch_size=64"]}
    assert list(plan_of(ledger, tmp_path, settings=fewer).settings) == ["random", "ehm", "four"]
    with pytest.raises(ValueError, match="reference='mae' is not one of the settings"):
        plan_of(ledger, tmp_path, reference="mae")


def test_who_is_slower_takes_fewer_steps_in_the_same_time(ledger, tmp_path):
    plan = plan_of(ledger, tmp_path)
    costs = {"random": 2.0, "ehm": 2.5}
    assert ledger.steps_of(plan, costs, "ehm", ledger.STEPS) == 1000
    assert ledger.steps_of(plan, costs, "ehm", ledger.TIME) == 800
    assert ledger.steps_of(plan, {"random": 2.0, "ehm": 2.01}, "ehm", ledger.TIME) == 1000  # as good as equal


def test_the_table_holds_what_is_finished(ledger, tmp_path):
    plan = plan_of(ledger, tmp_path)
    rows = {"random": {0: {"eval_knn": 20.0, "eval_hierarchy_ari": 0.25, "map": 80.0}, 1: {"eval_knn": 22.0}}}
    lines = ledger.table(rows, plan, {"random": 2.0, "ehm": 2.5}, ledger.TIME, [0, 1]).splitlines()
    assert lines[0].startswith("| masks | cost of a step | steps | loss | k-NN | linear | hierarchy |")
    assert lines[2] == "| random | 1.00 | 1000 |  | 21.00 ± 1.41 |  | 25.00 (1) |  |  | 80.00 (1) |"
    assert lines[3] == "| ehm | 1.25 | 800 |  |  |  |  |  |  |  |"


def test_a_run_that_is_stopped_is_not_taken_for_finished(ledger, tmp_path):
    """The time is over before it begins."""
    plan = plan_of(ledger, tmp_path)
    with pytest.raises(RuntimeError, match="was not begun: the time is over"):
        ledger.run_setting(plan, "ehm", 5, 0, tmp_path / "run", deadline=0.0)
    assert not (tmp_path / "run" / "done.json").exists()
