"""Align small language models with several towers under the same data, and write one table.

    python benchmarks/nlvr_texts.py data/nlvr-mini/train.parquet outputs/nlvr_texts.parquet
    python benchmarks/alignment.py docs/results/alignment EHM=outputs/tin64_ehm MAE=outputs/tin64_random

For each task a small language model is made of its texts alone (`tiny_language_model.py`), once, and aligned with each
tower; columns are added for random weights of the first tower's architecture ("untrained"), and for the same model
that sees grey instead of every image ("blind"). Writes OUT_STEM.json and the tables into OUT_STEM.md, between two
marks. What is finished in the work folder is not run again.
"""

import argparse
import datetime
import hashlib
import json
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

from downstream import (
    ROOT,
    as_markdown,
    complete,
    machine,
    make_untrained,
    parse_checkpoints,
    run_all,
    run_one,
    times_table,
    write_tables,
)

from modeling_ehm import EHMConfig
from modeling_ehm.training.tasks import load_recipe

TASKS = {  # recipes, one after the other, each from the directory that the one before left
    "easy_vqa": ("align/easy_vqa_projector", "align/easy_vqa_instructions"),
    "nlvr": ("align/nlvr_texts", "align/nlvr"),
    "tin40_captions": ("align/tin40_captions",),
}


def recipes_by_texts(task: str) -> list[Path]:
    """Recipes of a task, without those that have the same texts as one before."""
    paths = [ROOT / "configs" / f"{recipe}.yaml" for recipe in TASKS[task]]
    texts = [load_recipe(path).data for path in paths]
    return [path for n, path in enumerate(paths) if texts[n] not in texts[:n]]


def make_language_model(task: str, work: Path, steps: int, seed: int) -> Path:
    """The task's language model, made if the work folder has none of these recipes, files, script, seed and length."""
    recipes = recipes_by_texts(task)
    script = ROOT / "benchmarks" / "tiny_language_model.py"
    files = [Path(load_recipe(path).data.train.data_files) for path in recipes]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in [*recipes, *files, script])).hexdigest()[:8]
    folder = work / f"{task}_lm-{key}-seed-{seed}-steps-{steps}"
    if not (folder / "tokenizer.json").exists():  # which is written last
        command = [sys.executable, script, folder, *recipes, "--steps", steps, "--seed", seed]
        subprocess.run([str(part) for part in command], check=True)
    return folder


def run_task(task: str, column: str, tower: Path, language_model: Path, seed: int, work: Path, settings: list) -> dict:
    """Figures of the last recipe of a task; `wall_seconds` are those of all its recipes."""
    overrides = [*settings, *(["data.blind=true"] if column == "blind" else [])]
    start, seconds, results = tower, 0.0, {}
    for number, recipe in enumerate(TASKS[task]):
        folder = work / column / recipe.replace("/", "-") / f"seed-{seed}"
        more = [f"head.language_model={language_model}"] if number == 0 else []
        results = run_one(recipe, start, seed, folder, [*overrides, *more])
        start, seconds = folder, seconds + results["wall_seconds"]
    return results | {"wall_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_stem", type=Path)
    parser.add_argument("towers", nargs="+", metavar="NAME=CHECKPOINT_DIR")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="columns at a time; set OMP_NUM_THREADS accordingly")
    parser.add_argument("--language-model-steps", type=int, default=400)
    parser.add_argument("--work", type=Path, default=Path("outputs/alignment"), help="folder of the runs")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="section.key=value",
        help="overrides of every recipe; the language model is made of the files that the recipes name",
    )
    options = parser.parse_args()
    towers = parse_checkpoints(parser, options.towers, added=["untrained", "blind"])
    first = next(iter(towers.values()))
    towers["untrained"] = make_untrained(EHMConfig.from_pretrained(first), options.work, seed=0)
    towers["blind"] = first
    jobs = {}
    for task, seed in product(options.tasks, options.seeds):
        language_model = make_language_model(task, options.work, options.language_model_steps, seed)
        for column, tower in towers.items():
            jobs[TASKS[task][-1], column, seed] = partial(
                run_task, task, column, tower, language_model, seed, options.work, options.set
            )
    runs, failures = run_all(jobs, options.jobs)
    results = complete(runs, [TASKS[task][-1] for task in options.tasks], list(towers), options.seeds)
    options.out_stem.parent.mkdir(parents=True, exist_ok=True)
    options.out_stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    columns = list(towers)
    text = f"""{datetime.date.today()}; {machine()}; {options.jobs} run(s) at a time; seeds {options.seeds}.

{as_markdown(results, columns, headline=True)}

Steps of the last stage, and time of all stages:

{times_table(results, columns)}

All other figures:

{as_markdown(results, columns, headline=False)}
"""
    write_tables(options.out_stem.with_suffix(".md"), text)
    print(f"wrote {options.out_stem}.md and .json")
    if failures:
        sys.exit(f"{len(failures)} runs failed")


if __name__ == "__main__":
    main()
