"""Run every small downstream recipe from several checkpoints and write one table.

    python benchmarks/downstream.py docs/results/downstream EHM=outputs/tin64_ehm MAE=outputs/tin64_random

Adds a column "untrained": random weights of the first checkpoint's architecture. Writes OUT_STEM.json (all figures)
and the tables into OUT_STEM.md, between two marks: what stands before and after them there is kept. Runs that are
finished in the work folder are not run again, so the command can be stopped and started; a changed recipe or checkpoint
runs anew. The recipes name their data below `data/`.
"""

import argparse
import concurrent.futures
import datetime
import fnmatch
import functools
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
import transformers
import yaml
from transformers import set_seed

from modeling_ehm import EHMConfig, EHMForPreTraining
from modeling_ehm.training.hub import sha256_of

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- tables: written by the command above -->", "<!-- end of tables -->"
RECIPES = (  # the order of the table
    "classify/tin40",
    "probe/tin40",
    "probe/flowers5",
    "low_shot/flowers5",
    "low_shot/monkeys10",
    "classify/monkeys10_144px",
    "segment/camvid_upernet",
    "segment/camvid_linear",
    "detect/bccd",
    "detect/raccoon",
    "retrieve/copydup",
    "parts/camvid",
)
HEADLINES = {  # figures of the first table, by task; the others are in the second
    "classify": ("top1", "top5"),
    "probe": ("knn", "linear", "attentive"),
    "low_shot": ("frozen_*_shot", "fine_tuned_*_shot"),
    "segment": ("mean_iou", "pixel_accuracy"),
    "detect": ("ap", "ap50"),
    "retrieve": (
        "map",
        "recall_at_1",
        "map_crop[678]0",
        "map_rotate_fill",
        "map_noise_flip",
        "map_paste_partial",
        "map_paste_small",
    ),
    "parts": ("ari", "iou"),
    "align": ("exact_match", "true_false_accuracy", "named", "cider"),  # of alignment.py
}


def make_untrained(config: EHMConfig, work: Path, seed: int) -> Path:
    """A checkpoint with random weights, in a folder named after the architecture."""
    fields = config.to_json_string(use_diff=False)
    folder = work / f"untrained-checkpoint-{hashlib.sha256(fields.encode()).hexdigest()[:8]}"
    if not (folder / "model.safetensors").exists():
        set_seed(seed)
        EHMForPreTraining(config).save_pretrained(folder)
    return folder


def parse_checkpoints(parser: argparse.ArgumentParser, given: list[str], added: list[str]) -> dict[str, Path]:
    """NAME=CHECKPOINT_DIR -> folders by names; `added` are the names of columns that are made beside them."""
    folders: dict[str, Path] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder:
            parser.error(f"{text!r} must be NAME=CHECKPOINT_DIR, the name being that of a column")
        if name in folders or name in added:
            why = "was given before" if name in folders else "is the name of a column that is added"
            parser.error(f"{text!r}: {name!r} {why}; give the checkpoint another")
        folders[name] = Path(folder)
    return folders


def finished_results(
    recipe: str, checkpoint: Path | None, seed: int, folder: Path, overrides: list[str]
) -> dict | None:
    """Results of a run of this recipe, checkpoint, seed and overrides in this folder; None if it is not finished."""
    done = folder / "done.json"
    if not done.exists():
        return None
    kept = json.loads(done.read_text())
    return kept["results"] if kept["key"] == key_of(recipe, checkpoint, seed, overrides) else None


@functools.cache
def content_of(recipe: str) -> dict:
    """What a recipe's file says, comments aside."""
    return yaml.safe_load((ROOT / "configs" / f"{recipe}.yaml").read_text())


def key_of(recipe: str, checkpoint: Path | None, seed: int, overrides: list[str]) -> str:
    """What tells a run from others: hash of all that its results depend on but the code."""
    key = hashlib.sha256(json.dumps(content_of(recipe)).encode())
    if checkpoint is not None:
        key.update(sha256_of(checkpoint / "model.safetensors").encode())
    key.update(json.dumps([seed, overrides]).encode())
    return key.hexdigest()


def run_one(
    recipe: str,
    checkpoint: Path | None,
    seed: int,
    folder: Path,
    overrides: list[str],
    deadline: float = float("inf"),
) -> dict:
    """Results of one recipe from one checkpoint or from random weights, from disk if the same was run before.

    At the `deadline`, seconds of `time.monotonic`, a run is stopped; called again it goes on.

    Raises:
        RuntimeError: the run failed, or was stopped.
    """
    if (kept := finished_results(recipe, checkpoint, seed, folder, overrides)) is not None:
        return kept
    left = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
    if left == 0:
        raise RuntimeError(f"{recipe} in {folder} was not begun: the time is over")
    key, begun = key_of(recipe, checkpoint, seed, overrides), folder / "key.txt"
    if folder.exists() and not (begun.exists() and begun.read_text() == key):
        shutil.rmtree(folder)  # else the new run would go on from the old one's checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(key)
    command = [sys.executable, ROOT / "train_ehm.py", ROOT / "configs" / f"{recipe}.yaml"]
    command += [] if checkpoint is None else [f"model.pretrained={checkpoint}"]
    command += [f"training.output_dir={folder}", f"training.seed={seed}", "training.disable_tqdm=true", *overrides]
    started = time.perf_counter()
    with open(folder / "log.txt", "w") as log:
        settings = {"stdout": log, "stderr": subprocess.STDOUT, "env": os.environ, "timeout": left}
        try:
            ended = subprocess.run([str(part) for part in command], **settings)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{recipe} in {folder} was stopped: the time is over") from None
    if ended.returncode != 0:
        raise RuntimeError(f"{recipe} from {checkpoint} failed; see {folder / 'log.txt'}")
    results = json.loads((folder / "results.json").read_text())
    results.pop("pretrained", None)  # a path of this machine; the column says which checkpoint it is
    results["wall_seconds"] = time.perf_counter() - started
    (folder / "done.json").write_text(json.dumps({"key": key, "results": results}))
    return results


def run_all(jobs: dict[tuple, Callable[[], dict]], at_a_time: int) -> tuple[dict[tuple, dict], list[str]]:
    """Results of jobs by (recipe or task, column, seed), and what is to be said of those that failed."""
    results, failures = {}, []
    with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
        running = {pool.submit(job): key for key, job in jobs.items()}
        for finished in concurrent.futures.as_completed(running):
            name, column, seed = key = running[finished]
            if (error := finished.exception()) is not None:
                failures.append(str(error))
                print(f"FAILED {name}, {column}, seed {seed}: {error}", flush=True)
            else:
                results[key] = finished.result()
                print(f"{name}, {column}, seed {seed}: {results[key]['wall_seconds'] / 60:.1f} minutes", flush=True)
    return results, failures


def complete(results: dict[tuple, dict], names: list[str], columns: list[str], seeds: list[int]) -> dict:
    """Results by recipe or task and column, lists over seeds; of those names alone where no run is missing."""
    return {
        name: {column: [results[name, column, seed] for seed in seeds] for column in columns}
        for name in names
        if all((name, column, seed) in results for column in columns for seed in seeds)
    }


def is_headline(task: str, name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in HEADLINES[task]) and not name.endswith("_sd")


def cell(values: list[float]) -> str:
    """Mean, and standard deviation of several."""
    text = f"{statistics.mean(values):.2f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.2f}"


def figure_rows(results: dict, recipe: str, columns: list[str], headline: bool) -> list[str]:
    """Table rows of one recipe; `results[column]` is a list over seeds."""
    task, first = recipe.split("/")[0], results[columns[0]][0]
    rows = []
    for name in first["figures"]:
        if is_headline(task, name) != headline:
            continue
        values = {
            c: [float("nan") if (v := one["figures"].get(name)) is None else v for one in results[c]] for c in columns
        }
        reference = first["references"].get(name)
        cells = ["" if reference is None else f"{reference:.2f}", *(cell(values[c]) for c in reversed(columns))]
        if len(columns) >= 2:
            cells.append(f"{statistics.mean(values[columns[0]]) - statistics.mean(values[columns[1]]):+.2f}")
        rows.append(f"| {recipe} | {name} | " + " | ".join(cells) + " |")
    return rows


def as_markdown(all_results: dict, columns: list[str], headline: bool) -> str:
    """Table of the headline figures, or of all the others."""
    header = ["recipe", "figure", "reference", *reversed(columns)]
    header += [f"{columns[0]} less {columns[1]}"] if len(columns) >= 2 else []
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for recipe, results in all_results.items():
        lines += figure_rows(results, recipe, columns, headline)
    return "\n".join(lines)


def draws_table(all_results: dict, columns: list[str]) -> str:
    """Differences draw by draw to the last column, "untrained": mean, its standard error, and how often ahead."""
    last, others = columns[-1], columns[-2::-1]
    lines = ["| recipe | figure | " + " | ".join(f"{c} less {last}" for c in others) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(others))
    for recipe, results in all_results.items():
        for name in results[last][0].get("draws", {}):
            pooled = {c: [value for one in results[c] for value in one["draws"][name]] for c in columns}
            cells = []
            for column in others:
                gains = [a - b for a, b in zip(pooled[column], pooled[last], strict=True)]
                error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
                ahead = sum(gain > 0 for gain in gains)
                cells.append(f"{statistics.mean(gains):+.2f} ± {error:.2f} ({ahead} of {len(gains)})")
            lines.append(f"| {recipe} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def times_table(all_results: dict, columns: list[str]) -> str:
    """Steps and minutes of each run."""
    lines = ["| recipe | steps | " + " | ".join(f"minutes, {c}" for c in reversed(columns)) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(columns))
    for recipe, results in all_results.items():
        minutes = [f"{statistics.mean(one['wall_seconds'] for one in results[c]) / 60:.1f}" for c in reversed(columns)]
        lines.append(f"| {recipe} | {results[columns[0]][0]['steps']} | " + " | ".join(minutes) + " |")
    return "\n".join(lines)


def machine() -> str:
    """Hardware and versions, one line."""
    models = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{os.cpu_count()} cores of {models[0] if models else platform.processor() or platform.machine()}, {gpu},"
        f" torch {torch.__version__}, transformers {transformers.__version__}"
    )


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write_json(path: Path, results: dict | list, options: argparse.Namespace) -> None:
    """Results with date, machine, threads and the options of the command."""
    settings = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    told = {"date": str(datetime.date.today()), "machine": machine(), "threads": torch.get_num_threads()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told | {"options": settings, "results": results}, indent=1) + "\n")


def write_tables(path: Path, text: str) -> None:
    """Put the tables between the marks of a Markdown file; where there are none they come at its end."""
    text_before = path.read_text() if path.exists() else ""
    if BEGIN not in text_before:
        text_before += f"{BEGIN}\n{END}\n"
    before, after = text_before.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_stem", type=Path)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT_DIR")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="some of the recipes, as task/name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; set OMP_NUM_THREADS accordingly")
    parser.add_argument("--work", type=Path, default=Path("outputs/downstream"), help="folder of the runs")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="overrides of every recipe")
    options = parser.parse_args()
    checkpoints = parse_checkpoints(parser, options.checkpoints, added=["untrained"])
    config = EHMConfig.from_pretrained(next(iter(checkpoints.values())))
    checkpoints["untrained"] = make_untrained(config, options.work, seed=0)
    jobs = {}
    for recipe, column, seed in product(options.recipes, checkpoints, options.seeds):
        folder = options.work / column / recipe.replace("/", "-") / f"seed-{seed}"
        jobs[recipe, column, seed] = partial(run_one, recipe, checkpoints[column], seed, folder, options.set)
    all_results, failures = run_all(jobs, options.jobs)
    columns = list(checkpoints)
    tables = complete(all_results, options.recipes, columns, options.seeds)
    options.out_stem.parent.mkdir(parents=True, exist_ok=True)
    options.out_stem.with_suffix(".json").write_text(json.dumps(tables, indent=1) + "\n")
    text = f"""{datetime.date.today()}; {machine()}; {options.jobs} run(s) at a time; seeds {options.seeds}.

{as_markdown(tables, columns, headline=True)}

Draws of few labels, the same ones for all checkpoints: mean difference ± its standard error, and draws ahead:

{draws_table(tables, columns)}

Steps and time:

{times_table(tables, columns)}

All other figures:

{as_markdown(tables, columns, headline=False)}
"""
    write_tables(options.out_stem.with_suffix(".md"), text)
    print(f"wrote {options.out_stem}.md and .json")
    if failures:
        sys.exit(f"{len(failures)} runs failed")


if __name__ == "__main__":
    main()
