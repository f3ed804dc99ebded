"""Hold mask policies against each other: the same model, data, schedule and seeds, at equal steps and at equal time.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/masking_ledger.py docs/results/ledger --jobs 2

The settings stand in a YAML file (masking_ledger.yaml). First the cost of a step is measured for all of them, in turns
in one process. Then each is pre-trained for the recipe's steps and, with a schedule of its own, for as many steps as
fit into the time that the reference takes for them; last come the downstream recipes. What is finished in the work
folder is not run again, and what was stopped goes on from its last checkpoint, so that the whole can be done in slices
of `--minutes`; empty it after a change of the code that alters results. Writes OUT_STEM.json and the tables into
OUT_STEM.md, between two marks, of what is finished.
"""

import argparse
import copy
import dataclasses
import datetime
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import yaml
from downstream import ROOT, cell, machine, run_all, run_one, write_tables
from step import Setting, time_steps

from modeling_ehm.training.arguments import EHMTrainingArguments
from modeling_ehm.training.recipes import Recipe
from modeling_ehm.training.tasks import load_recipe, pretrain

UNMEASURED = ("data.probe_train=null", "data.probe_test=null", "data.segments=null", 'training.eval_strategy="no"')
STEPS, TIME = "equal steps", "equal time"
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
        common: Overrides of all settings.
        downstream: Overrides of each downstream recipe.
        settings: Overrides of each setting.
    """

    recipe: str
    reference: str
    common: list[str]
    downstream: dict[str, list[str]]
    settings: dict[str, list[str]]

    def recipe_of(self, setting: str, *more: str) -> Recipe:
        return load_recipe(ROOT / "configs" / f"{self.recipe}.yaml", [*self.common, *self.settings[setting], *more])


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file.

    Raises:
        ValueError: other keys than a plan has, an unknown reference, or steps on different numbers of masks.
    """
    content = yaml.safe_load(path.read_text())
    content["common"] = content.pop("set", [])
    plan = Plan(**content)
    if plan.reference not in plan.settings:
        raise ValueError(f"{path}: reference={plan.reference!r} is not one of the settings {list(plan.settings)}")
    masks = {name: masks_a_step(plan.recipe_of(name)) for name in plan.settings}
    if len(set(masks.values())) > 1:
        raise ValueError(f"{path}: every step must train on as many masks, images times masks_per_image, not {masks}")
    return plan


def masks_a_step(recipe: Recipe) -> int:
    return recipe.training["global_batch_size"] * recipe.model.get("masks_per_image", 1)


def measure_costs(plan: Plan, rounds: int) -> dict[str, float]:
    """Seconds of a step of each setting, data included: the median of ratios to the reference, times its median."""
    recipes = {name: plan.recipe_of(name) for name in plan.settings}
    args = EHMTrainingArguments(**recipes[plan.reference].training)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = torch.bfloat16 if args.bf16 else torch.float32
    setting = Setting(device, precision, args.attn_implementation, compiled=False)
    models = {name: pretrain.build_model(recipe, setting.attention).to(device) for name, recipe in recipes.items()}
    for model in models.values():
        model.train()
        if model.config.teacher == "ema":
            model.attach_teacher(copy.deepcopy(model.ehm))
    shape = StepShape(masks_a_step(recipes[plan.reference]), models[plan.reference].config.image_size)
    seconds = time_steps(models, shape, rounds, setting)
    with tempfile.TemporaryDirectory() as folder:  # preparing a run clears its folder
        image_seconds = time_images(plan.recipe_of(plan.reference, f"training.output_dir={folder}", *UNMEASURED))
    reference = statistics.median(seconds[plan.reference])
    costs = {}
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds[plan.reference], strict=True))
        costs[name] = ratio * reference + image_seconds * recipes[name].training["global_batch_size"]
    return costs


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
        seen += len(batch["pixel_values"])
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
    fitting = round(steps * costs[plan.reference] / costs[setting])
    return steps if abs(fitting - steps) <= 0.01 * steps else fitting


def run_setting(plan: Plan, setting: str, steps: int, seed: int, folder: Path, deadline: float) -> dict:
    """Figures of a pre-training run of so many steps."""
    overrides = [*plan.common, *plan.settings[setting], f"training.max_steps={steps}", f"training.eval_steps={steps}"]
    results = run_one(plan.recipe, None, seed, folder, overrides, deadline)
    return {"figures": results["evaluations"][-1], "wall_seconds": results["wall_seconds"]}


def run_downstream(plan: Plan, recipe: str, checkpoint: Path, seed: int, folder: Path, deadline: float) -> dict:
    results = run_one(recipe, checkpoint, seed, folder, plan.downstream[recipe], deadline)
    return {"figures": results["figures"], "wall_seconds": results["wall_seconds"]}


def table(rows: dict[str, dict], plan: Plan, costs: dict[str, float], budget: str, seeds: list[int]) -> str:
    """Mean ± standard deviation over the seeds that are finished, whose number is in brackets if some are missing."""
    header = ["masks", "cost of a step", "steps", *(heading for heading, _ in FIGURES.values())]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for setting in plan.settings:
        cells = [setting, f"{costs[setting] / costs[plan.reference]:.2f}", str(steps_of(plan, costs, setting, budget))]
        for name, (_, factor) in FIGURES.items():
            values = [factor * figures[name] for figures in rows.get(setting, {}).values() if name in figures]
            text = cell(values) if values else ""
            cells.append(text + (f" ({len(values)})" if 0 < len(values) < len(seeds) else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_stem", type=Path)
    parser.add_argument("--plan", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="run these settings alone; the tables hold all that is finished")
    parser.add_argument("--budgets", nargs="+", default=[STEPS, TIME], choices=[STEPS, TIME])
    parser.add_argument("--no-downstream", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; set OMP_NUM_THREADS accordingly")
    parser.add_argument("--rounds", type=int, default=9, help="of the measurement of costs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; start again to go on")
    parser.add_argument("--work", type=Path, default=Path("outputs/ledger"), help="folder of the runs")
    options = parser.parse_args()
    plan, deadline = read_plan(options.plan), time.monotonic() + 60 * options.minutes
    costs = kept_costs(plan, options.work, options.rounds)
    jobs, folders = {}, {}
    for seed in options.seeds:
        for budget in options.budgets:
            for setting in plan.settings:
                steps = steps_of(plan, costs, setting, budget)
                name = "".join(letter if letter.isalnum() else "_" for letter in setting)
                folder = options.work / f"{name}-{steps}" / f"seed-{seed}"
                folders[setting, budget, seed] = folder
                jobs["pretrain", str(folder), seed] = partial(
                    run_setting, plan, setting, steps, seed, folder / "pretrain", deadline
                )
    wanted = {str(folder) for (setting, _, _), folder in folders.items() if setting in (options.only or plan.settings)}
    results, failures = run_all({key: job for key, job in jobs.items() if key[1] in wanted}, options.jobs)
    if not options.no_downstream:
        later = {}
        for _, folder, seed in [key for key in results if key[0] == "pretrain"]:
            for recipe in plan.downstream:
                own = Path(folder) / recipe.replace("/", "-")
                later[recipe, folder, seed] = partial(
                    run_downstream, plan, recipe, Path(folder) / "pretrain", seed, own, deadline
                )
        more, failed = run_all(later, options.jobs)
        results, failures = results | more, failures + failed
    report(options, plan, costs, folders, results)
    if failures:
        sys.exit(f"{len(failures)} runs are not finished")


def kept_costs(plan: Plan, work: Path, rounds: int) -> dict[str, float]:
    """Costs measured before for the same plan, or measured now."""
    path, key = work / "costs.json", json.dumps([plan.recipe, plan.common, plan.settings])
    if path.exists() and (kept := json.loads(path.read_text()))["key"] == key:
        return kept["costs"]
    costs = measure_costs(plan, rounds)
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"key": key, "costs": costs}))
    return costs


def report(options: argparse.Namespace, plan: Plan, costs: dict, folders: dict, results: dict) -> None:
    by_folder: dict[str, dict] = {}
    for (_, folder, _), result in results.items():
        by_folder.setdefault(folder, {}).update(result["figures"])
    tables, record = {}, {"costs": costs}
    for budget in options.budgets:
        rows: dict[str, dict] = {}
        for (setting, own, seed), folder in folders.items():
            if own == budget and str(folder) in by_folder:
                rows.setdefault(setting, {})[seed] = by_folder[str(folder)]
        tables[budget] = table(rows, plan, costs, budget, options.seeds)
        record[budget] = rows
    options.out_stem.parent.mkdir(parents=True, exist_ok=True)
    options.out_stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    text = f"{datetime.date.today()}; {machine()}; {torch.get_num_threads()} thread(s) a run; seeds {options.seeds}.\n"
    for budget, one in tables.items():
        text += f"\n{budget.capitalize()}:\n\n{one}\n"
    write_tables(options.out_stem.with_suffix(".md"), text)
    print(f"wrote {options.out_stem}.md and .json")


if __name__ == "__main__":
    main()
