"""Tasks of `train_ehm.py`, by the name that a recipe gives as `task`.

A task is a module with a `SCHEMA` of its recipes, `prepare(recipe)`, where mistakes of the user surface, and
`execute(prepared)`, which does the work.
"""

from modeling_ehm.training.tasks import classify, detect, low_shot, parts, pretrain, probe, retrieve, segment

TASKS = {
    "pretrain": pretrain,
    "classify": classify,
    "probe": probe,
    "low_shot": low_shot,
    "segment": segment,
    "detect": detect,
    "retrieve": retrieve,
    "parts": parts,
}
