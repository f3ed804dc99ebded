"""Hold mask policies against each other: the same model, data, schedule and seeds, at equal steps and at equal time.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/masking_ledger.py docs/results/ledger --jobs 2

The settings stand in a YAML file (masking_ledger.yaml). First the cost of a step is measured for all of them, in turns
in one process. Then each is pre-trained for the recipe's steps and, with a schedule of its own, for as many steps as
fit into the time that the reference takes for them; last come the downstream recipes. OUT_STEM.json gathers costs and
figures with the machine that each was measured on, so that the whole can be done in slices of `--minutes` and on
several machines: what stands there is not run again, and what was stopped goes on from its last checkpoint in the work
folder. Remove both after a change of the code, or of a default, that alters results. The tables of all that is there
go into OUT_STEM.md, between two marks.
"""

import argparse
import collections
import copy
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from downstream import ROOT, cell, content_of, finished_results, machine, run_all, run_one, write_tables
from step import Setting, time_steps

from modeling_ehm import EHMConfig
from modeling_ehm.training.arguments import EHMTrainingArguments
from modeling_ehm.training.pretrained import load_for_pretraining
from modeling_ehm.training.recipes import Recipe
from modeling_ehm.training.tasks import load_recipe, pretrain

BUDGETS = STEPS, TIME = "equal steps", "equal time"
AS_GOOD_AS_EQUAL = 0.02  # relative difference of steps: costs are measured no better
FIGURES = {  # of an evaluation in pre-training, and of the downstream recipes: heading, name, factor
    "eval_loss": ("loss", 1),
    "eval_knn": ("k-NN", 1),
    "eval_linear": ("linear", 1),
    "eval_hierarchy_ari": ("hierarchy", 100),
    "top1": ("fine-tuning", 1),
    "mean_iou": ("segmentation", 1),
    "map": ("copies", 1),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A file of settings.

    Attributes:
        recipe: Of pre-training, as task/name.
        reference: Setting whose time is the measure.
        seeds: Of the runs of every setting.
        common: Overrides of all settings.
        downstream: Overrides of each downstream recipe.
        settings: Overrides of each setting.
    """

    recipe: str
    reference: str
    seeds: list[int]
    common: list[str]
    downstream: dict[str, list[str]]
    settings: dict[str, list[str]]

    def recipe_of(self, setting: str, *more: str) -> Recipe:
        return load_recipe(ROOT / "configs" / f"{self.recipe}.yaml", [*self.common, *self.settings[setting], *more])


@dataclasses.dataclass(frozen=True)
class Run:
    """One pre-training run, and the downstream runs from its checkpoint.

    Attributes:
        setting: Name in the plan.
        steps: Optimiser steps.
        seed: Of weights, order, crops and masks.
        folder: Of this run; those that follow it are beside it.
    """

    setting: str
    steps: int
    seed: int
    folder: Path

    def arguments(self, plan: Plan) -> tuple:
        """Those of `run_one` and `finished_results`."""
        length = [f"training.max_steps={self.steps}", f"training.eval_steps={self.steps}"]
        overrides = [*plan.common, *plan.settings[self.setting], *length]
        return plan.recipe, None, self.seed, self.folder / "pretrain", overrides

    def downstream_arguments(self, plan: Plan, recipe: str) -> tuple:
        folder = self.folder / recipe.replace("/", "-")
        return recipe, self.folder / "pretrain", self.seed, folder, plan.downstream[recipe]

    def finished_figures(self, plan: Plan, recipe: str) -> dict[str, float] | None:
        """Of a recipe, from the work folder."""
        if recipe == plan.recipe:
            results = finished_results(*self.arguments(plan))
            return None if results is None else results["evaluations"][-1]
        if not (self.folder / "pretrain" / "model.safetensors").exists():
            return None
        results = finished_results(*self.downstream_arguments(plan, recipe))
        return None if results is None else results["figures"]

    def keys(self, plan: Plan) -> dict[str, str]:
        """What tells the results of each recipe, that of pre-training first, from others."""
        _, _, seed, _, overrides = self.arguments(plan)
        pretrained = key_of(plan.recipe, seed, overrides)
        return {plan.recipe: pretrained} | {
            recipe: key_of(recipe, pretrained, own) for recipe, own in plan.downstream.items()
        }


@dataclasses.dataclass
class Record:
    """What was measured so far, on whatever machine.

    Attributes:
        costs: By key: setting, its cost as a ratio to that of the reference, machine.
        results: By key: recipe, setting, steps, seed, figures, machine.
    """

    costs: dict[str, dict] = dataclasses.field(default_factory=dict)
    results: dict[str, dict] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Record":
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def gather(self, plan: Plan, runs: list[Run]) -> None:
        """Take over what is finished in this machine's work folder."""
        for run in runs:
            for recipe, key in run.keys(plan).items():
                if (figures := run.finished_figures(plan, recipe)) is None:
                    continue
                if figures != self.results.get(key, {}).get("figures"):
                    told = {"recipe": recipe, "setting": run.setting, "steps": run.steps, "seed": run.seed}
                    self.results[key] = told | {"figures": figures, "machine": machine()}

    def figures_of(self, plan: Plan, run: Run) -> dict[str, float]:
        """Of a run and of those that follow it, as far as they are there."""
        figures = {}
        for key in run.keys(plan).values():
            figures |= self.results.get(key, {}).get("figures", {})
        return figures


def key_of(recipe: str, *told) -> str:
    """Hash of what a recipe says, comments aside, and of what else results depend on."""
    return hashlib.sha256(json.dumps([content_of(recipe), *told]).encode()).hexdigest()[:16]


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file.

    Raises:
        ValueError: other keys than a plan has, an unknown reference, or settings whose steps have other numbers of
            masks or other learning rates.
    """
    content = yaml.safe_load(path.read_text())
    content["common"] = content.pop("set", [])
    known = {field.name for field in dataclasses.fields(Plan)}
    if content.keys() != known:
        names = sorted(content.keys() ^ known)
        raise ValueError(f"{path}: {', '.join(names)} missing or unknown; a plan has set, {', '.join(sorted(known))}")
    plan = Plan(**content)
    if plan.reference not in plan.settings:
        raise ValueError(f"{path}: reference={plan.reference!r} is not one of the settings {list(plan.settings)}")
    recipes = {name: plan.recipe_of(name) for name in plan.settings}
    masks = {name: masks_a_step(recipe) for name, recipe in recipes.items()}
    if len(set(masks.values())) > 1:
        raise ValueError(f"{path}: every step must train on as many masks, images times masks_per_image, not {masks}")
    rates = {name: EHMTrainingArguments(**recipe.training).learning_rate for name, recipe in recipes.items()}
    if len(set(rates.values())) > 1:
        raise ValueError(
            f"{path}: every step must have the same learning rate (the base rate counts images), not {rates}"
        )
    return plan


def masks_a_step(recipe: Recipe) -> int:
    return recipe.training["global_batch_size"] * recipe.model.get("masks_per_image", 1)


def measure_costs(plan: Plan, names: list[str], rounds: int) -> dict[str, float]:
    """Cost of a step of these settings, data included, as a ratio to that of the reference.

    Of the model's part, the median of ratios in the same round.
    """
    recipes = {name: plan.recipe_of(name) for name in {plan.reference: None} | dict.fromkeys(names)}
    args = EHMTrainingArguments(**recipes[plan.reference].training)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = torch.bfloat16 if args.bf16 else torch.float32
    setting = Setting(device, precision, args.attn_implementation, compiled=False)
    for recipe in recipes.values():
        pretrain.import_modules(recipe.training.get("import_modules", []))
    models = {
        name: load_for_pretraining(recipe.pretrained, setting.attention, **recipe.model).to(device)
        for name, recipe in recipes.items()
    }
    for model in models.values():
        model.train()
        if model.config.teacher == "ema":
            model.attach_teacher(copy.deepcopy(model.ehm))
    shape = StepShape(masks_a_step(recipes[plan.reference]), models[plan.reference].config.image_size)
    seconds = time_steps(models, shape, rounds, setting)
    with tempfile.TemporaryDirectory() as folder:  # preparing a run clears its folder
        image_seconds = time_images(
            plan.recipe_of(plan.reference, f"training.output_dir={folder}", *pretrain.UNMEASURED)
        )
    reference, costs = statistics.median(seconds[plan.reference]), {}
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds[plan.reference], strict=True))
        costs[name] = ratio * reference + image_seconds * recipes[name].training["global_batch_size"]
    return {name: costs[name] / costs[plan.reference] for name in names}


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What `step.time_steps` needs to know."""

    batch_size: int
    image_size: int


def time_images(recipe: Recipe, count: int = 512) -> float:
    """Seconds in which one process reads, crops and normalises an image."""
    trainer = pretrain.prepare(recipe)
    started, seen = None, 0
    for batch in trainer.get_train_dataloader():
        if started is None:  # the first batch has to start everything
            started = time.process_time()
            continue
        seen += len(trainer._prepare_inputs(batch)["pixel_values"])
        if seen >= count:
            break
    seconds = (time.process_time() - started) / seen
    trainer.train_dataset.close()
    return seconds


def steps_of(plan: Plan, costs: dict[str, float], setting: str, budget: str) -> int:
    """Steps that a setting may take."""
    steps = plan.recipe_of(setting).training["max_steps"]
    if budget == STEPS:
        return steps
    fitting = round(steps / costs[setting])
    return steps if abs(fitting - steps) <= AS_GOOD_AS_EQUAL * steps else fitting


def runs_of(plan: Plan, costs: dict[str, float], work: Path) -> dict[tuple[str, str, int], Run]:
    """All runs of a plan by (setting, budget, seed); where both budgets are the same number of steps, the same run."""
    runs = {}
    for seed, budget, setting in itertools.product(plan.seeds, BUDGETS, plan.settings):
        steps = steps_of(plan, costs, setting, budget)
        name = "".join(letter if letter.isalnum() else "_" for letter in setting)
        runs[setting, budget, seed] = Run(setting, steps, seed, work / f"{name}-{steps}" / f"seed-{seed}")
    return runs


def table(rows: dict[str, dict], plan: Plan, costs: dict[str, float], budget: str) -> str:
    """Mean ± standard deviation over the seeds that are finished, whose number is in brackets if some are missing."""
    header = ["masks", "cost of a step", "steps", *(heading for heading, _ in FIGURES.values())]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for setting in plan.settings:
        cells = [setting, f"{costs[setting]:.2f}", str(steps_of(plan, costs, setting, budget))]
        for name, (_, factor) in FIGURES.items():
            values = [factor * figures[name] for figures in rows.get(setting, {}).values() if name in figures]
            text = cell(values) if values else ""
            cells.append(text + (f" ({len(values)})" if 0 < len(values) < len(plan.seeds) else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_stem", type=Path)
    parser.add_argument("--plan", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--seeds", nargs="+", type=int, help="run these alone; the tables hold all that is finished")
    parser.add_argument("--only", nargs="+", metavar="SETTING", help="run these settings alone")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, choices=BUDGETS, help="run these alone")
    parser.add_argument("--no-downstream", action="store_true", help="run pre-training alone")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; set OMP_NUM_THREADS accordingly")
    parser.add_argument("--rounds", type=int, default=9, help="of the measurement of costs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; start again to go on")
    parser.add_argument("--work", type=Path, default=Path("outputs/ledger"), help="folder of the runs")
    options = parser.parse_args()
    plan, deadline = read_plan(options.plan), time.monotonic() + 60 * options.minutes
    if unknown := [name for name in options.only or [] if name not in plan.settings]:
        parser.error(f"--only {unknown} is not in {options.plan}, whose settings are {list(plan.settings)}")
    path = options.out_stem.with_suffix(".json")
    record = Record.read(path)
    measure_missing(plan, record, options.rounds)
    costs = costs_of(plan, record)
    record.write(path)
    runs = runs_of(plan, costs, options.work)
    record.gather(plan, list(runs.values()))
    wanted = {
        run
        for (setting, budget, seed), run in runs.items()
        if setting in (options.only or plan.settings)
        and budget in options.budgets
        and seed in (options.seeds or plan.seeds)
    }
    recipes = [plan.recipe, *([] if options.no_downstream else plan.downstream)]
    missing = {
        run: [recipe for recipe in recipes if run.keys(plan)[recipe] not in record.results]
        for run in dict.fromkeys(runs.values())
        if run in wanted
    }
    jobs = {  # a run whose figures alone are left has to be run again for those that follow it
        ("pretrain", str(run.folder), run.seed): functools.partial(run_one, *run.arguments(plan), deadline)
        for run, some in missing.items()
        if some
    }
    _, failures = run_all(jobs, options.jobs)
    jobs = {
        (recipe, str(run.folder), run.seed): functools.partial(
            run_one, *run.downstream_arguments(plan, recipe), deadline
        )
        for run, some in missing.items()
        for recipe in some
        if recipe != plan.recipe and run.finished_figures(plan, plan.recipe) is not None
    }
    failures += run_all(jobs, options.jobs)[1]
    record.gather(plan, list(runs.values()))
    record.write(path)
    report(options.out_stem, plan, costs, runs, record)
    if failures:
        sys.exit(f"{len(failures)} runs are not finished")


def cost_keys(plan: Plan) -> dict[tuple[str, ...], str]:
    """What tells the costs of all phases of all settings from others, by their overrides."""
    common = [plan.common, plan.settings[plan.reference]]
    phases = dict.fromkeys(own for name in plan.settings for own in phases_of(plan, name))
    return {own: key_of(plan.recipe, *common, list(own)) for own in phases}


def measure_missing(plan: Plan, record: Record, rounds: int) -> None:
    """Measure the costs that are not on record, and note them there."""
    keys = cost_keys(plan)
    if missing := [own for own, key in keys.items() if key not in record.costs]:
        names = {tuple(overrides): name for name, overrides in plan.settings.items()}
        named = {names.get(own, " ".join(own)): own for own in missing}
        measured = dataclasses.replace(plan, settings=plan.settings | {name: list(own) for name, own in named.items()})
        for name, ratio in measure_costs(measured, list(named), rounds).items():
            record.costs[keys[named[name]]] = {"setting": name, "ratio": ratio, "machine": machine()}


def costs_of(plan: Plan, record: Record) -> dict[str, float]:
    """Costs of all settings, as ratios to the reference's.

    Raises:
        ValueError: some are not on record.
    """
    keys, phases = cost_keys(plan), {name: phases_of(plan, name) for name in plan.settings}
    if missing := [name for name, some in phases.items() if any(keys[own] not in record.costs for own in some)]:
        raise ValueError(f"the costs of {missing} are not on record")
    ratios = {own: record.costs[key]["ratio"] for own, key in keys.items()}
    return {name: sum(share * ratios[own] for own, share in some.items()) for name, some in phases.items()}


def phases_of(plan: Plan, setting: str) -> dict[tuple[str, ...], float]:
    """Overrides of the phases of a run between which steps cost another time, with their shares of the steps.

    Until masks change no teacher runs, if it is not needed: a step costs what it does under a policy that has none.

    Raises:
        ValueError: `evolution_start` does not stand in the setting itself.
    """
    overrides, start = tuple(plan.settings[setting]), "model.evolution_start="
    config = EHMConfig(**plan.recipe_of(setting).model)
    each_alone = config.num_nodes_range(config.num_patches)[0] == config.num_patches
    before = {"ehm": "random" if each_alone else None, "epm": "grid"}.get(config.mask_policy)
    if not config.evolution_start or before is None:
        return {overrides: 1.0}
    if not any(override.startswith(start) for override in overrides):
        raise ValueError(f"{setting}: write {start}{config.evolution_start} into the settings that shall have it")
    later = tuple(override for override in overrides if not override.startswith(start))
    unread = ("model.mask_policy=", "model.affinity_layers=")  # there: no teacher runs
    others = (override for override in later if not override.startswith(unread))
    first = (f"model.mask_policy={before}", *others)
    return {first: config.evolution_start, later: 1 - config.evolution_start}


def report(
    out_stem: Path, plan: Plan, costs: dict[str, float], runs: dict[tuple[str, str, int], Run], record: Record
) -> None:
    """Write the tables of all that is on record, whatever was run just now."""
    text = f"{datetime.date.today()}; seeds {plan.seeds}; costs and runs, downstream ones included, by machine:\n\n"
    machines = collections.Counter(one["machine"] for one in record.results.values())
    measured = collections.Counter(one["machine"] for one in record.costs.values())
    text += "".join(f"- {name}: {measured[name]} costs, {machines[name]} runs\n" for name in measured | machines)
    for budget in BUDGETS:
        rows: dict[str, dict] = {}
        for (setting, own, seed), run in runs.items():
            if own == budget:
                rows.setdefault(setting, {})[seed] = record.figures_of(plan, run)
        text += f"\n{budget.capitalize()}:\n\n{table(rows, plan, costs, budget)}\n"
    text += "\nLoss: under the setting's own last masks, and so not to be compared from row to row.\n"
    write_tables(out_stem.with_suffix(".md"), text)
    print(f"wrote {out_stem}.md and .json")


if __name__ == "__main__":
    main()
