"""Kill runs at random moments, start them again, and hold what they end with against runs that nothing disturbed.

    OMP_NUM_THREADS=1 python benchmarks/survival.py docs/results/survival --kills 20

Every row of the table is one recipe: stored or streamed images, workers, processes. A run is killed (SIGKILL, all its
processes at once) at moments drawn anew: while it starts, in its first quarter of a second of training and later, or
while a checkpoint is being written; some kills meet a run that has hardly started again. Then it is let go on to its
end. Weights, moving average of the teacher, optimiser, log of masks and losses must be those of the undisturbed run,
bit for bit. Writes OUT_STEM.json and the table into OUT_STEM.md, between two marks.
"""

import argparse
import datetime
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import Dataset, Features, Image
from downstream import ROOT, machine, write_tables
from PIL import Image as PILImage

from modeling_ehm.training.checkpoints import STAGING, checkpoints_in, fault_of

STEPS, SAVE_STEPS = 60, 5
MODEL = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
    "teacher": "ema",
    "hidden_dropout_prob": 0.1,
    "softness_end": 0.3,
}
MOMENTS = ("starting", "training", "saving", "at once")
ENDS = ("model.safetensors", "ema_teacher.safetensors", "masks-*.jsonl", f"checkpoint-{STEPS}/model.safetensors")


@dataclass(frozen=True)
class Setup:
    """How a run reads its data, and with how many processes."""

    streaming: bool
    workers: int
    processes: int

    def __str__(self) -> str:
        source = "streamed" if self.streaming else "stored"
        return f"{source}, {self.workers} workers, {self.processes} process(es)"


SETUPS = [Setup(*values) for values in itertools.product((False, True), (0, 2), (1, 2))]


def write_images(folder: Path, count: int = 150, shards: int = 5) -> list[str]:
    """Parquet files of random pictures, one of 50 broken."""
    rng, files = np.random.default_rng(0), []
    for shard in range(shards):
        rows = []
        for number in range(count // shards):
            file = io.BytesIO()
            coarse = PILImage.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            coarse.resize((48, 40), PILImage.Resampling.BICUBIC).save(file, "PNG")
            content = file.getvalue()
            rows.append({"bytes": content[:60] if (shard + number) % 50 == 7 else content, "path": None})
        files.append(str(folder / f"shard-{shard}.parquet"))
        Dataset.from_dict({"image": rows}, features=Features({"image": Image()})).to_parquet(files[-1])
    return files


def write_recipe(folder: Path, setup: Setup, files: list[str]) -> Path:
    recipe = {
        "task": "pretrain",
        "model": MODEL,
        "data": {
            "train": {"path": "parquet", "data_files": files, "streaming": setup.streaming},
            "shuffle_window": 32,
            "max_skipped_share": 0.1,
        },
        "training": {
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "max_steps": STEPS,
            "save_steps": SAVE_STEPS,
            "logging_steps": 1,
            "global_batch_size": 16,
            "base_learning_rate": 0.01,
            "dataloader_num_workers": setup.workers,
            "num_gallery_images": 0,
            "report_to": "none",
            "disable_tqdm": True,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def start(recipe: Path, setup: Setup) -> subprocess.Popen:
    """The run as a group of processes of its own; what it says is appended to log.txt beside the recipe."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(setup.processes)]
    command = [sys.executable, *(launch if setup.processes > 1 else []), str(ROOT / "train_ehm.py"), str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(recipe.with_name("log.txt"), "a") as log:
        return subprocess.Popen(
            command, cwd=recipe.parent, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to all processes of the run. Those of torchrun have sessions of their own, so look for children.

    They are stopped first: one that is being born meanwhile would be overlooked, and go on writing.
    """
    family: list[int] = []
    while (found := [process.pid, *descendants(process.pid)]) != family:
        family = found
        send(signal.SIGSTOP, family)
    send(signal.SIGKILL, family)
    process.wait()
    while any(is_running(pid) for pid in family):
        time.sleep(0.01)


def send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def descendants(pid: int) -> list[int]:
    """Processes that this one started, and those they started."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except (OSError, ValueError):
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_and_kill(recipe: Path, setup: Setup, moment: str, rng: random.Random) -> str | None:
    """Start a run and kill it at such a moment; returns the moment that was met, None if the run ended before."""
    out = recipe.parent / "out"
    left = unfinished(out)
    process = start(recipe, setup)
    if moment == "at once":
        time.sleep(rng.uniform(0, 0.5))
    elif moment == "starting":
        time.sleep(rng.uniform(0.5, 8))
    else:
        before = steps_logged(out)
        while process.poll() is None and steps_logged(out) == before:
            time.sleep(0.002)
        time.sleep(rng.choice([rng.uniform(0, 0.25), rng.uniform(0, 3)]))
        if moment == "saving":
            while process.poll() is None and not (out / STAGING).exists():
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.05))
    if process.poll() is not None:
        return None
    kill(process)
    if unfinished(out) - left:
        return "saving"
    return "training" if moment == "saving" else moment


def unfinished(out: Path) -> set[tuple[str, int]]:
    """Folders of checkpoints that are not whole, with the time of their last change."""
    folders = [*(out / STAGING).glob("*"), *(path for path in checkpoints_in(out) if fault_of(path))]
    return {(str(path), path.stat().st_mtime_ns) for path in folders}


def steps_logged(out: Path) -> int:
    path = out / "masks-0.jsonl"
    return path.stat().st_size if path.exists() else 0


def fingerprint(out: Path) -> dict[str, str]:
    """SHA-256 of the files that must be equal, and of what the optimiser and the losses are."""
    files = sorted(path for pattern in ENDS for path in out.glob(pattern))
    found = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    moments = torch.load(out / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)["state"]
    digest = hashlib.sha256()
    for state in moments.values():
        for name in sorted(state):
            digest.update(state[name].numpy().tobytes())
    found["optimiser"] = digest.hexdigest()
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [(row["step"], row["loss"], row["grad_norm"]) for row in history if "loss" in row]
    found["losses"] = hashlib.sha256(json.dumps(losses).encode()).hexdigest()
    return found


def survive(setup: Setup, files: list[str], folder: Path, kills: int, seed: int) -> dict:
    """Figures of one setup: kills by moment, and what differs from the run that nothing disturbed (nothing, we hope).

    Raises:
        RuntimeError: a run failed by itself.
    """
    rng, met = random.Random(seed), Counter()
    unbroken = write_recipe(folder / "unbroken", setup, files)
    if start(unbroken, setup).wait() != 0:
        raise RuntimeError(f"{setup}: the undisturbed run failed:\n{end_of_log(unbroken)}")
    recipe, starts = write_recipe(folder / "killed", setup, files), 0
    out = recipe.parent / "out"
    while met.total() < kills:
        starts += 1
        if (moment := wait_and_kill(recipe, setup, rng.choice(MOMENTS), rng)) is None:
            shutil.rmtree(out)  # it has ended too early: from the beginning, until it was killed often enough
        else:
            met[moment] += 1
    if start(recipe, setup).wait() != 0:
        raise RuntimeError(f"{setup}: the run failed after {kills} kills:\n{end_of_log(recipe)}")
    expected, found = fingerprint(unbroken.parent / "out"), fingerprint(out)
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    skipped = [
        {json.dumps(line) for line in map(json.loads, (path / "out" / "skipped_images.jsonl").read_text().splitlines())}
        for path in (unbroken.parent, recipe.parent)
    ]
    if skipped[0] != skipped[1]:
        differing.append("skipped_images.jsonl")
    return {
        "setup": str(setup),
        "starts": starts + 1,
        "kills": dict(met),
        "compared": len(expected),
        "differing": differing,
    }


def end_of_log(recipe: Path) -> str:
    return recipe.with_name("log.txt").read_text()[-6000:]


def as_markdown(rows: list[dict]) -> str:
    lines = ["| run | starts | " + " | ".join(f"killed {moment}" for moment in MOMENTS) + " | compared | differing |"]
    lines.append("| --- | --- |" + " --- |" * (len(MOMENTS) + 2))
    for row in rows:
        kills = [str(row["kills"].get(moment, 0)) for moment in MOMENTS]
        cells = [row["setup"], str(row["starts"]), *kills, str(row["compared"]), ", ".join(row["differing"]) or "none"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_stem", type=Path)
    parser.add_argument("--kills", type=int, default=20, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--setups", nargs="+", type=int, default=range(len(SETUPS)), help="numbers, counted from 0")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        files = write_images(Path(name))
        for number in options.setups:
            rows.append(survive(SETUPS[number], files, Path(name) / str(number), options.kills, options.seed + number))
            print(rows[-1], flush=True)
    options.out_stem.parent.mkdir(parents=True, exist_ok=True)
    options.out_stem.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    text = f"{datetime.date.today()}; {machine()}; {STEPS} steps, a checkpoint every {SAVE_STEPS}, seed {options.seed}."
    write_tables(options.out_stem.with_suffix(".md"), f"{text}\n\n{as_markdown(rows)}\n")
    if any(row["differing"] for row in rows):
        sys.exit("a run that was killed ended differently")


if __name__ == "__main__":
    main()
