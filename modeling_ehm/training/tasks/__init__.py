"""Tasks of `train_ehm.py`, by the name that a recipe gives as `task`."""

from modeling_ehm.training.tasks import pretrain

TASKS = {"pretrain": pretrain.run}
