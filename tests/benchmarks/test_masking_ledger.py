"""The ledger of mask policies: equal masks a step, equal time, and only what is finished in the table."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import yaml
from tiny_recipes import ROOT

from modeling_ehm.mask_policies_ehm import MASK_POLICIES

SETTINGS = {"random": ["model.mask_policy=random"], "ehm": [], "four": ["model.masks_per_image=4"]}


@pytest.fixture
def ledger(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("masking_ledger")


def plan_of(ledger, tmp_path: Path, **changes):
    content = {
        "recipe": "pretrain/tin64_vit_tiny",
        "reference": "random",
        "seeds": [0, 1],
        "set": ["training.max_steps=1000"],
        "downstream": {"retrieve/copydup": ["head.rerank=0"]},
        "settings": {"random": ["model.mask_policy=random"], "ehm": []},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return ledger.read_plan(path)


@pytest.mark.parametrize(
    "name, policies, masks",
    [
        ("masking_ledger", {"random", "block", "grid", "color_noise", "epm", "ehm"}, {1, 2, 4}),
        ("masking_ledger_gpu", {"random", "ehm"}, {1, 4}),
        ("masking_ledger_long", {"random", "ehm"}, {1}),
        ("masking_ledger_deep", {"random", "ehm"}, {1}),
    ],
)
def test_the_plans_that_are_shipped(ledger, name, policies, masks):
    """Every recipe they name exists, every setting is a configuration, and every step trains on as many masks."""
    plan = ledger.read_plan(ROOT / "benchmarks" / f"{name}.yaml")
    recipes = {name: plan.recipe_of(name) for name in plan.settings}
    assert {ledger.masks_a_step(recipe) for recipe in recipes.values()} == {256}
    assert {recipe.model.get("masks_per_image", 1) for recipe in recipes.values()} == masks
    assert {recipe.model.get("mask_policy", "ehm") for recipe in recipes.values()} == policies
    for name, overrides in plan.downstream.items():
        ledger.load_recipe(ROOT / "configs" / f"{name}.yaml", overrides)


@pytest.mark.parametrize("name", ["ledger", "ledger_gpu", "ledger_long", "ledger_deep"])
def test_what_was_measured_is_of_the_plans_that_are_shipped(ledger, name, tmp_path):
    """No key of a record is an earlier plan's, which would run all of it again, and no cost is missing."""
    plan = ledger.read_plan(ROOT / "benchmarks" / f"masking_{name}.yaml")
    record = ledger.Record.read(ROOT / "docs/results" / f"{name}.json")
    costs = ledger.costs_of(plan, record)
    known = {key for run in ledger.runs_of(plan, costs, tmp_path).values() for key in run.keys(plan).values()}
    assert record.results and record.results.keys() <= known


def test_unequal_steps_are_refused(ledger, tmp_path):
    with pytest.raises(ValueError, match=r"every step must train on as many masks.*'four': 1024"):
        plan_of(ledger, tmp_path, settings=SETTINGS)
    fewer = SETTINGS | {"four": ["model.masks_per_image=4", "training.global_batch_size=64"]}
    with pytest.raises(ValueError, match=r"the same learning rate .*'random': 0.0015, .*'four': 0.000375"):
        plan_of(ledger, tmp_path, settings=fewer)
    fewer["four"].append("training.base_learning_rate=6.0e-3")
    assert list(plan_of(ledger, tmp_path, settings=fewer).settings) == ["random", "ehm", "four"]
    with pytest.raises(ValueError, match="steps missing or unknown; a plan has set, common, "):
        plan_of(ledger, tmp_path, steps=5)
    with pytest.raises(ValueError, match="reference='mae' is not one of the settings"):
        plan_of(ledger, tmp_path, reference="mae")


def test_who_is_slower_takes_fewer_steps_in_the_same_time(ledger, tmp_path):
    plan = plan_of(ledger, tmp_path)
    assert ledger.steps_of(plan, {"ehm": 1.25}, "ehm", ledger.STEPS) == 1000
    assert ledger.steps_of(plan, {"ehm": 1.25}, "ehm", ledger.TIME) == 800
    assert ledger.steps_of(plan, {"ehm": 1.015}, "ehm", ledger.TIME) == 1000  # as good as equal
    assert ledger.steps_of(plan, {"ehm": 1.03}, "ehm", ledger.TIME) == 971


def test_a_policy_of_ones_own_is_measured(ledger, tmp_path, monkeypatch):
    """Its module is imported before the models are made."""
    (tmp_path / "my_masks.py").write_text(
        "from modeling_ehm.mask_policies_ehm import register_mask_policy\n"
        "from modeling_ehm.masking_ehm import keyed_uniform\n"
        "@register_mask_policy('mine')\n"
        "def mine(request):\n"
        "    return keyed_uniform(request.mask_seed, request.num_patches, 16)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ledger, "time_images", lambda recipe: 0.0)
    mine = ["model.mask_policy=mine", 'training.import_modules=["my_masks"]']
    small = ["model.hidden_size=32", "model.num_hidden_layers=1", "training.global_batch_size=4"]
    plan = plan_of(ledger, tmp_path, set=small, settings={"random": ["model.mask_policy=random"], "mine": mine})
    try:
        costs = ledger.measure_costs(plan, ["mine"], rounds=1)
    finally:
        MASK_POLICIES.pop("mine", None)
    assert costs.keys() == {"mine"} and costs["mine"] > 0


def test_steps_before_the_evolution_cost_what_those_of_random_masks_do(ledger, tmp_path, monkeypatch):
    four = ["training.global_batch_size=64", "training.base_learning_rate=6.0e-3", "model.masks_per_image=4"]
    settings = {
        "random": ["model.mask_policy=random"],
        "ehm": [],
        "late": ["model.evolution_start=0.75"],
        "late, four": ["model.evolution_start=0.75", *four],
        "late, coarse": ["model.evolution_start=0.75", "model.num_nodes_start=32"],
        "late, random": ["model.mask_policy=random", "model.evolution_start=0.75"],
        "late, all": ["model.affinity_layers=all", "model.evolution_start=0.75"],
        "late, named": ["model.mask_policy=ehm", "model.evolution_start=0.75", "model.num_nodes_start=64"],
        "late, parts": ["model.mask_policy=epm", "model.evolution_start=0.75"],
    }
    plan, asked = plan_of(ledger, tmp_path, settings=settings), {}

    def measure_costs(plan, names, rounds):
        asked.update({name: plan.recipe_of(name).model for name in names})
        return {name: {"random": 1.0, "grid": 2.0}.get(asked[name].get("mask_policy"), 3.0) for name in names}

    monkeypatch.setattr(ledger, "measure_costs", measure_costs)
    record = ledger.Record()
    with pytest.raises(ValueError, match=r"the costs of \['random', 'ehm', 'late', .* are not on record"):
        ledger.costs_of(plan, record)
    ledger.measure_missing(plan, record, rounds=1)
    costs = ledger.costs_of(plan, record)
    assert costs["late"] == costs["late, four"] == costs["late, named"] == 0.75 * 1 + 0.25 * 3
    assert costs["late, parts"] == 0.75 * 2 + 0.25 * 3
    assert costs["random"] == costs["late, random"] == 1 and costs["ehm"] == costs["late, coarse"] == 3
    # random, ehm, two settings of one phase, all layers' teacher; four masks, named and parts with and without one
    assert len(asked) == len(record.costs) == 11
    assert costs["late, all"] == costs["late"]  # before the evolution they do the same
    four = [model for model in asked.values() if model.get("masks_per_image") == 4]
    assert [model.get("evolution_start", 0) for model in four] == [0, 0]
    asked.clear()
    ledger.measure_missing(plan, record, rounds=1)
    assert ledger.costs_of(plan, record) == costs and not asked


def test_an_evolution_that_all_settings_share_is_refused(ledger, tmp_path):
    plan = dataclasses.replace(plan_of(ledger, tmp_path), common=["model.evolution_start=0.5"])
    with pytest.raises(ValueError, match=r"ehm: write model.evolution_start=0.5 into the settings that shall have it"):
        ledger.phases_of(plan, "ehm")


@pytest.fixture
def finished_work(ledger, tmp_path, monkeypatch):
    """A plan and a folder in which the runs of `random` are finished, with one downstream run; what runs is noted."""
    plan, work, ran = plan_of(ledger, tmp_path), tmp_path / "work", []
    costs = {"random": 1.0, "ehm": 1.25}
    runs = ledger.runs_of(plan, costs, work)
    monkeypatch.setattr(ledger, "measure_costs", lambda plan, names, rounds: {name: costs[name] for name in names})

    def finish(recipe, checkpoint, seed, folder, overrides, deadline=None, root=work):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        results = {"evaluations": [{"eval_knn": 20.0 + seed}], "figures": {"map": 80.0}, "wall_seconds": 1.0}
        key = downstream.key_of(recipe, checkpoint, seed, overrides)
        (folder / "done.json").write_text(json.dumps({"key": key, "results": results}))
        ran.append((recipe, str(folder.relative_to(root))))
        return results

    downstream = importlib.import_module("downstream")
    for seed in (0, 1):
        finish(*runs["random", ledger.STEPS, seed].arguments(plan))
    finish(*runs["random", ledger.STEPS, 0].downstream_arguments(plan, "retrieve/copydup"))
    monkeypatch.setattr(ledger, "run_one", finish)
    ran.clear()
    return tmp_path / "plan.yaml", work, ran


def run_ledger(ledger, monkeypatch, plan: Path, work: Path, out: Path, *arguments: str) -> list[str]:
    """Rows of both tables after a call with these arguments."""
    given = ["masking_ledger.py", str(out), "--plan", str(plan), "--work", str(work), *arguments]
    monkeypatch.setattr("sys.argv", given)
    ledger.main()
    return [line for line in out.with_suffix(".md").read_text().splitlines() if line.startswith(("| random", "| ehm"))]


def test_the_tables_hold_what_is_finished_whatever_was_run(ledger, finished_work, tmp_path, monkeypatch):
    plan, work, ran = finished_work
    some = ["--only", "ehm", "--seeds", "1", "--budgets", ledger.TIME, "--no-downstream"]
    rows = run_ledger(ledger, monkeypatch, plan, work, tmp_path / "out", *some)
    assert ran == [("pretrain/tin64_vit_tiny", "ehm-800/seed-1/pretrain")]
    assert rows == [
        "| random | 1.00 | 1000 |  | 20.50 ± 0.71 |  |  |  |  | 80.00 (1) |",
        "| ehm | 1.25 | 1000 |  |  |  |  |  |  |  |",
        "| random | 1.00 | 1000 |  | 20.50 ± 0.71 |  |  |  |  | 80.00 (1) |",
        "| ehm | 1.25 | 800 |  | 21.00 (1) |  |  |  |  |  |",
    ]
    rows = run_ledger(ledger, monkeypatch, plan, work, tmp_path / "out")  # all the rest
    assert rows[1] == "| ehm | 1.25 | 1000 |  | 20.50 ± 0.71 |  |  |  |  | 80.00 ± 0.00 |"


def test_what_is_on_record_outlives_the_work_folder(ledger, finished_work, tmp_path, monkeypatch):
    """On another machine costs and runs of the record stand; what is missing is run, and pre-trained again for."""
    plan, work, ran = finished_work
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    run_ledger(ledger, monkeypatch, plan, work, out, "--only", "random", "--no-downstream")
    (tmp_path / "plan.yaml").write_text(
        plan.read_text().replace("ehm: []", "ehm: []\n  grid: [model.mask_policy=grid]")
    )
    measured = []
    monkeypatch.setattr(ledger, "measure_costs", lambda plan, names, rounds: measured.extend(names) or {"grid": 2.0})
    monkeypatch.setattr(ledger, "machine", lambda: "another machine")
    ran.clear()
    finish = ledger.run_one
    monkeypatch.setattr(ledger, "run_one", lambda *a: finish(*a, root=elsewhere))
    rows = run_ledger(ledger, monkeypatch, plan, elsewhere, out, "--only", "random", "--budgets", ledger.STEPS)
    assert measured == ["grid"]
    assert ran == [
        ("pretrain/tin64_vit_tiny", "random-1000/seed-1/pretrain"),
        ("retrieve/copydup", "random-1000/seed-1/retrieve-copydup"),
    ]
    assert rows[0] == "| random | 1.00 | 1000 |  | 20.50 ± 0.71 |  |  |  |  | 80.00 ± 0.00 |"
    text = out.with_suffix(".md").read_text()
    assert "- another machine: 1 costs, 1 runs\n" in text
    ran.clear()
    run_ledger(ledger, monkeypatch, plan, tmp_path / "third", out, "--only", "random", "--budgets", ledger.STEPS)
    assert ran == []


def test_unknown_settings_are_refused(ledger, finished_work, tmp_path, monkeypatch, capsys):
    plan, work, ran = finished_work
    with pytest.raises(SystemExit):
        run_ledger(ledger, monkeypatch, plan, work, tmp_path / "out", "--only", "emh")
    assert "--only ['emh'] is not in" in capsys.readouterr().err and ran == []


def test_a_run_that_is_stopped_is_not_taken_for_finished(ledger, tmp_path):
    """The time is over before it begins."""
    plan = plan_of(ledger, tmp_path)
    run, record = ledger.Run("ehm", 5, 0, tmp_path / "run"), ledger.Record()
    with pytest.raises(RuntimeError, match="was not begun: the time is over"):
        ledger.run_one(*run.arguments(plan), 0.0)
    record.gather(plan, [run])
    assert record.figures_of(plan, run) == {}
