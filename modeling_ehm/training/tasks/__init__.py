"""Tasks of `train_ehm.py`, by the name that a recipe gives as `task`.

A task is a module with a `SCHEMA` of its recipes, `prepare(recipe)`, where mistakes of the user surface, and
`execute(prepared)`, which does the work.
"""

from collections.abc import Sequence
from pathlib import Path

from modeling_ehm.training.recipes import Recipe, read_recipe
from modeling_ehm.training.tasks import align, classify, detect, low_shot, parts, pretrain, probe, retrieve, segment

TASKS = {
    "pretrain": pretrain,
    "classify": classify,
    "probe": probe,
    "low_shot": low_shot,
    "segment": segment,
    "detect": detect,
    "retrieve": retrieve,
    "parts": parts,
    "align": align,
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe of any task, as `recipes.read_recipe` does."""
    return read_recipe(path, overrides, {name: task.SCHEMA for name, task in TASKS.items()})
