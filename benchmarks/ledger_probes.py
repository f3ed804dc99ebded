"""Probe the runs of the masking ledger again, with more labelled images than a pre-training run looks at.

    python benchmarks/ledger_probes.py docs/results/ledger_probes --images data/tinextra100-64/train.parquet

Of each run of the plan whose weights lie in the work folder of masking_ledger.py: k-NN and linear probe of the mean
patch token, as in pre-training. Half of the images teach and the other half is tested, then the other way round, so
that every image is tested once. Nothing is trained. OUT_STEM.json gathers the figures, and what stands there is not
measured again; the tables go into OUT_STEM.md, between two marks, with the differences to the plan's reference with
the same seed.
"""

import argparse
import datetime
import json
import statistics
from pathlib import Path

import torch
from downstream import ROOT, cell, finished_results, machine, write_tables
from masking_ledger import Plan, Record, Run, costs_of, read_plan, runs_of
from torch import Tensor

from modeling_ehm.configuration_ehm import EHMConfig, to_pair
from modeling_ehm.training.data import ImageSource, Normalizer, keyed_order, load_labelled
from modeling_ehm.training.evaluation import encode, pixel_features, probe
from modeling_ehm.training.pretrained import load_for_pretraining

FIGURES = {"knn": "k-NN", "linear": "linear"}


def probed_key(plan: Plan, run: Run, images: Path) -> str | None:
    """What tells the figures of a run from others; None where it is not finished, or its weights are gone."""
    there = (run.folder / "pretrain" / "model.safetensors").exists()
    if not there or finished_results(*run.arguments(plan)) is None:
        return None
    return f"{run.keys(plan)[plan.recipe]} {name_of(images)}"


def name_of(images: Path) -> str:
    return f"{images.parent.name}/{images.name}"


def both_ways(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Figures in percent of features `(n, D)` with labels `(n,)`, every image tested once by the other half."""
    order = torch.from_numpy(keyed_order(0, 0, 0, len(features)))  # labels may come sorted or in turn
    halves = [(features[part], labels[part]) for part in order.chunk(2)]
    ways = [probe(*halves, linear=True), probe(*reversed(halves), linear=True)]
    return {name: statistics.mean(way[name] for way in ways) for name in FIGURES}


def measure(run: Run, plan: Plan, loaded: dict[str, Tensor]) -> dict[str, float]:
    data = plan.recipe_of(run.setting).data
    encoder = load_for_pretraining(str(run.folder / "pretrain"), "sdpa").ehm
    return both_ways(encode(encoder, loaded["pixels"], Normalizer(data.image_mean, data.image_std)), loaded["labels"])


def difference_cells(own: dict[int, dict], reference: dict[int, dict]) -> list[str]:
    """Of each figure: differences with the same seed in percentage points, then their mean."""
    cells = []
    for name in FIGURES:
        less = [own[seed][name] - reference[seed][name] for seed in own if seed in reference]
        cells.append(", ".join(map(signed, less)) + f"; {signed(statistics.mean(less))}" if less else "")
    return cells


def signed(difference: float) -> str:
    """One decimal; without a sign where that is 0."""
    rounded = round(difference, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def table(plan: Plan, results: list[dict]) -> str:
    """A row for each setting and number of steps, in the plan's order."""
    rows: dict[tuple[str, int], dict[int, dict]] = {}
    for one in sorted(results, key=lambda one: (list(plan.settings).index(one["setting"]), -one["steps"], one["seed"])):
        rows.setdefault((one["setting"], one["steps"]), {})[one["seed"]] = one["figures"]
    whole = next((own for (setting, _), own in rows.items() if setting == plan.reference), {})
    headings = FIGURES.values()
    header = ["masks", "steps", "seeds", *headings, *(f"{heading} less {plan.reference}" for heading in headings)]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for (setting, steps), own in rows.items():
        cells = [setting, str(steps), ", ".join(map(str, own))]
        cells += [cell([one[name] for one in own.values()]) for name in FIGURES]
        cells += ["", ""] if setting == plan.reference else difference_cells(own, whole)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(out_stem: Path, plan: Plan, runs: list[Run], record: dict) -> None:
    """Write the tables of all that is on record of these runs."""
    known = {run.keys(plan)[plan.recipe] for run in runs}
    present = [one for key, one in record["results"].items() if key.split()[0] in known]
    machines = sorted({one["machine"] for one in present})
    text = f"{datetime.date.today()}; {'; '.join(machines)}.\n"
    for name, reference in record["references"].items():
        results = [one for one in present if one["images"] == name]
        pixels = ", ".join(f"{heading} {reference[figure]:.2f}" for figure, heading in FIGURES.items())
        text += f"\n{name}, {reference['count']} images; of raw pixels {pixels}:\n\n{table(plan, results)}\n"
    write_tables(out_stem.with_suffix(".md"), text)
    print(f"wrote {out_stem}.md and .json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_stem", type=Path)
    parser.add_argument("--images", type=Path, required=True, help="Parquet file of labelled images")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--plan", type=Path, default=Path(__file__).with_name("masking_ledger.yaml"))
    parser.add_argument("--ledger", type=Path, help="JSON that masking_ledger.py wrote for the plan; docs/results/...")
    parser.add_argument("--work", type=Path, default=Path("outputs/ledger"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", metavar="SETTING", help="measure these settings alone")
    options = parser.parse_args()
    plan, path = read_plan(options.plan), options.out_stem.with_suffix(".json")
    if unknown := [name for name in options.only or [] if name not in plan.settings]:
        parser.error(f"--only {unknown} is not in {options.plan}, whose settings are {list(plan.settings)}")
    ledger = options.ledger or ROOT / "docs/results" / f"{options.plan.stem.removeprefix('masking_')}.json"
    try:
        costs = costs_of(plan, Record.read(ledger))
    except ValueError as error:
        parser.error(f"--ledger={ledger}: {error}; give the JSON that masking_ledger.py wrote for {options.plan}")
    runs = list(dict.fromkeys(runs_of(plan, costs, options.work).values()))
    record = json.loads(path.read_text()) if path.exists() else {"references": {}, "results": {}}
    source = ImageSource(path="parquet", data_files=str(options.images), label_column=options.label_column)
    config, name = EHMConfig(**plan.recipe_of(plan.reference).model), name_of(options.images)
    loaded = load_labelled(source, to_pair(config.image_size), config.num_channels)
    if name not in record["references"]:
        reference = both_ways(pixel_features(loaded["pixels"]), loaded["labels"])
        record["references"][name] = {"count": len(loaded["labels"])} | reference
    for run in runs:
        key = probed_key(plan, run, options.images)
        if key is None or key in record["results"] or run.setting not in (options.only or plan.settings):
            continue
        told = {"setting": run.setting, "steps": run.steps, "seed": run.seed, "images": name}
        figures = measure(run, plan, loaded)
        record["results"][key] = told | {"figures": figures, "machine": machine()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{run.setting}, {run.steps} steps, seed {run.seed}: {figures}", flush=True)
    report(options.out_stem, plan, runs, record)


if __name__ == "__main__":
    main()
