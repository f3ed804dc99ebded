"""What tests of training share: pictures that tell their number and place, parquet files, a recipe of seconds."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from modeling_ehm.training.tasks import TASKS, load_recipe

ROOT = Path(__file__).parents[1]

MODEL = {  # 32 px images in 8 px patches: N = 16
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
TRAINING = {
    "use_cpu": True,
    "max_steps": 4,
    "global_batch_size": 8,
    "base_learning_rate": 0.032,  # 1.0e-3 for 8 images
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "num_gallery_images": 0,
    "report_to": "none",
    "disable_tqdm": True,
}
SYNTHETIC = {"path": "synthetic", "image_column": "image"}
PROBES = {
    "probe_train": SYNTHETIC | {"max_images": 30, "label_column": "label"},
    "probe_test": SYNTHETIC | {"split": "test", "max_images": 10, "label_column": "label"},
}
SEGMENTS = {"segments": SYNTHETIC | {"split": "test", "max_images": 6, "segments_column": "segments"}}


def picture(number: int, width: int = 24, height: int = 20) -> PILImage.Image:
    """Red is the picture's number, green grows with x and blue with y: a crop tells what it was cut from, and where."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return PILImage.fromarray(np.stack([np.full_like(x, number), x % 26 * 10, y % 26 * 10], axis=2).astype(np.uint8))


def encode(image: PILImage.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write_parquet(path: Path, encoded: list[bytes | None], **columns) -> str:
    """One parquet file, that is one shard, with a column `image` of encoded images; returns its path."""
    rows = [None if content is None else {"bytes": content, "path": None} for content in encoded]
    dataset = Dataset.from_dict({"image": rows}, features=Features({"image": Image()}))
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    dataset.to_parquet(str(path), batch_size=None if encoded else 1)  # datasets before 5.2 divide by the rows
    return str(path)


def write_shards(folder: Path, shards: list[list[bytes]]) -> list[str]:
    """One parquet file a shard."""
    return [write_parquet(folder / f"shard-{number}.parquet", encoded) for number, encoded in enumerate(shards)]


def write_recipe(path: Path, model: dict | None = None, data: dict | None = None, training: dict | None = None) -> Path:
    """A recipe of a tiny model on 40 synthetic images, with changes section by section; outputs go beside it."""
    sections = {
        "task": "pretrain",
        "model": MODEL | (model or {}),
        "data": {"train": SYNTHETIC | {"max_images": 40}} | (data or {}),
        "training": TRAINING | {"output_dir": str(path.parent / "out")} | (training or {}),
    }
    path.write_text(yaml.safe_dump(sections))
    return path


def log_of(folder: Path) -> list[dict]:
    """Rows that a run logged, from the state it left."""
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


def losses_of(folder: Path) -> dict[int, float]:
    """Training loss of each logged step."""
    return {row["step"]: row["loss"] for row in log_of(folder) if "loss" in row}


def child_environment(home: Path) -> dict[str, str]:
    """For a process that needs no Hub: nothing of the user's own settings, caches or tokens takes part."""
    dropped = ("PYTHON", "HF_", "HUGGING", "TRANSFORMERS_", "ACCELERATE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    offline["PYTHONDONTWRITEBYTECODE"] = "1"  # one whose files the system cuts short would leave half a module
    return kept | offline | {"PYTHONPATH": str(ROOT)}


def run_script(recipe: Path, *overrides: str, launch: Sequence[str] = (), **options) -> subprocess.CompletedProcess:
    """train_ehm.py in a fresh process, or several; `launch` are arguments of python, `options` those of subprocess."""
    return subprocess.run(
        [sys.executable, *launch, str(ROOT / "train_ehm.py"), str(recipe), *overrides],
        env=child_environment(recipe.parent / "home"),
        cwd=recipe.parent,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def write_task_recipe(path: Path, task: str, pretrained: Path | None, data: dict, training=None, **sections) -> Path:
    """A recipe of a downstream task on a checkpoint of the tiny model, of 2 steps; outputs go beside it."""
    model = sections.pop("model", {})
    recipe = {
        "task": task,
        "model": (MODEL | model) if pretrained is None else {"pretrained": str(pretrained)} | model,
        "data": data,
        "training": {
            "output_dir": str(path.parent / "out"),
            "use_cpu": True,
            "max_steps": 2,
            "global_batch_size": 4,
            "learning_rate": 1.0e-3,
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        | (training or {}),
        **sections,
    }
    if task in ("retrieve", "parts"):  # nothing is trained
        for name in ("max_steps", "global_batch_size", "learning_rate"):
            if name not in (training or {}):
                del recipe["training"][name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_task(path: Path, *overrides: str) -> dict:
    """Run a recipe of any task in this process; returns the figures that `execute` gives."""
    recipe = load_recipe(path, overrides)
    task = TASKS[recipe.task]
    return task.execute(task.prepare(recipe))
