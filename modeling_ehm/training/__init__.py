"""Training side: recipes, data, Trainer, evaluation, Hub. Never copied to the Hub."""

from modeling_ehm.training.callbacks import EMATeacherCallback, ProgressCallback

__all__ = ["EMATeacherCallback", "ProgressCallback"]
