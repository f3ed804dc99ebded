"""Tasks of `train_ehm.py`, by the name that a recipe gives as `task`.

A task is a module with `prepare(recipe) -> EHMTrainer`, where mistakes of the user surface, and `execute(trainer)`.
"""

from modeling_ehm.training.tasks import pretrain

TASKS = {"pretrain": pretrain}
