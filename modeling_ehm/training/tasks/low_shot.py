"""Few labels: 1, 5, 10 images a class, several draws; logistic regression on frozen features, and fine-tuning.

Which images a draw takes is a function of (seed, draw, class), so that every checkpoint is judged on the same ones; a
draw of more shots contains the draw of fewer.
"""

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed
from transformers.trainer_utils import SaveStrategy

from modeling_ehm.configuration_ehm import to_pair
from modeling_ehm.modeling_ehm import EHMModel
from modeling_ehm.training.arguments import TaskTrainingArguments
from modeling_ehm.training.data import keyed_order
from modeling_ehm.training.features import frozen_features
from modeling_ehm.training.labelled import KeyedExamples, LabelledRows, image_processor
from modeling_ehm.training.metrics import top_k_accuracy
from modeling_ehm.training.pretrained import load_encoder
from modeling_ehm.training.recipes import Recipe, RecipeError, Schema
from modeling_ehm.training.task_trainer import TaskTrainer
from modeling_ehm.training.tasks import finetuning
from modeling_ehm.training.tasks.classify import (
    Augmentation,
    ClassificationData,
    MixedPairs,
    collate,
    evaluation_images,
    put_classifier,
)
from modeling_ehm.training.tasks.probe import labelled_rows

SHOT_PART = 2  # of `keyed_order`, plus the class; parts 0 and 1 are training order and held-out images


@dataclass
class LowShotHead:
    """The `head` section.

    Attributes:
        shots: Training images a class.
        draws: Sets of training images for each number of shots.
        fine_tune_draws: For how many of them the whole model is fine-tuned too; 0 leaves that out.
        regularization: C of scikit-learn's LogisticRegression, on features of unit length scaled by sqrt(D).
    """

    shots: list[int] = field(default_factory=lambda: [1, 5, 10])
    draws: int = 5
    fine_tune_draws: int = 0
    regularization: float = 1.0

    def __post_init__(self):
        if not self.shots or min(self.shots) < 1:
            raise ValueError(f"head.shots={self.shots} must hold at least one number, all at least 1")
        if not 0 <= self.fine_tune_draws <= self.draws or self.draws < 1:
            raise ValueError(
                f"head.draws={self.draws} must be at least 1, and head.fine_tune_draws={self.fine_tune_draws} in"
                f" [0, {self.draws}]"
            )
        if self.regularization <= 0:
            raise ValueError(f"head.regularization={self.regularization} must be positive")


SCHEMA = Schema(ClassificationData, TaskTrainingArguments, LowShotHead)


@dataclass
class LowShotTask:
    """What `prepare` hands to `execute`."""

    recipe: Recipe
    args: TaskTrainingArguments
    encoder: EHMModel
    rows: dict[str, LabelledRows]  # "train", "test"
    names: list[str]


def prepare(recipe: Recipe) -> LowShotTask:
    """Load encoder and data, and check that every class has images enough."""
    require_sklearn()
    finetuning.refuse_options(recipe, ("push_to_hub",))
    args, _ = finetuning.start(recipe)
    args.save_strategy = SaveStrategy.NO  # each fine-tuning takes seconds
    if recipe.head.fine_tune_draws and args.max_steps <= 0:
        raise RecipeError("training.max_steps must be set: the steps of each fine-tuning, the same for all shots")
    encoder = load_encoder(recipe.pretrained, args.attn_implementation, **recipe.model).to(args.device)
    rows, names = labelled_rows(recipe, encoder)
    counts = np.bincount(rows["train"].column("label"), minlength=len(names))
    if counts.min() < max(recipe.head.shots):
        raise RecipeError(
            f"head.shots={recipe.head.shots}: class {names[counts.argmin()]!r} has only {counts.min()} training images"
        )
    return LowShotTask(recipe, args, encoder, rows, names)


def require_sklearn() -> None:
    """Raise an ImportError that says what to install."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError('logistic regression needs scikit-learn: pip install "modeling_ehm[tasks]"') from error


def draw_rows(labels: np.ndarray, shots: int, seed: int, draw: int) -> np.ndarray:
    """Rows of `shots` images of each class, `(classes * shots,)`, a function of (seed, draw, class)."""
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen.append(rows[keyed_order(seed, draw, SHOT_PART + int(label), len(rows))[:shots]])
    return np.concatenate(chosen)


def scaled(features: np.ndarray) -> np.ndarray:
    """Features at length sqrt(D), `(n, D)` float64, so that one regularisation fits encoders of any scale."""
    features = np.asarray(features, dtype=np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12) * features.shape[1] ** 0.5


def execute(task: LowShotTask) -> dict[str, float]:
    """All draws; figures are means and standard deviations over draws, in percent.

    `results.json` has the figures of single draws too: other checkpoints are judged on the same ones, so differences
    draw by draw are far less noisy than those of means.
    """
    from sklearn.linear_model import LogisticRegression

    recipe, args, head = task.recipe, task.args, task.recipe.head
    config, data = task.encoder.config, recipe.data
    processor = image_processor(config, data.image_mean, data.image_std, data.crop_pct)
    labels = {name: np.array(rows.column("label")) for name, rows in task.rows.items()}
    folder = Path(args.output_dir) / "features"
    with args.main_process_first(desc="features"):
        features = {
            name: scaled(
                frozen_features(
                    task.encoder,
                    rows,
                    processor,
                    folder,
                    (config.pooling,),
                    args.per_device_eval_batch_size,
                    args.dataloader_num_workers,
                    progress_bar=not args.disable_tqdm,
                )[config.pooling]
            )
            for name, rows in task.rows.items()
        }
    started, figures, draws = time.perf_counter(), {}, {}
    for shots in head.shots:
        accuracies: dict[str, list[float]] = {"frozen": [], "fine_tuned": []}
        for draw in range(head.draws):
            rows = draw_rows(labels["train"], shots, args.seed, draw)
            model = LogisticRegression(C=head.regularization, max_iter=1000)
            model.fit(features["train"][rows], labels["train"][rows])
            accuracies["frozen"].append(100 * model.score(features["test"], labels["test"]))
            if draw < head.fine_tune_draws:
                accuracies["fine_tuned"].append(100 * fine_tune(task, rows, draw, processor))
        for kind, values in accuracies.items():
            if values:
                draws[f"{kind}_{shots}_shot"] = values
                figures[f"{kind}_{shots}_shot"] = float(np.mean(values))
                figures[f"{kind}_{shots}_shot_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    run = finetuning.describe_run(recipe, args)
    run.begin(None, args.world_size)
    if args.process_index == 0:
        more = {"steps": args.max_steps, "seconds": time.perf_counter() - started, "draws": draws}
        finetuning.report(run, figures, more)
    return figures


def fine_tune(task: LowShotTask, rows: np.ndarray, draw: int, processor) -> float:
    """Top-1 accuracy on the test images of the whole model, fine-tuned on these rows."""
    args, data, size = task.args, task.recipe.data, to_pair(task.encoder.config.image_size)
    set_seed(args.seed + draw)
    model = put_classifier(copy.deepcopy(task.encoder), task.names, None)
    finetuning.freeze_unused(model, args.freeze_encoder)
    few = task.rows["train"].select(rows)
    examples = KeyedExamples(few, Augmentation(data, size), args.seed + draw, args.max_steps * args.images_per_step)
    trainer = TaskTrainer(
        model=model,
        args=args,
        train_dataset=MixedPairs(examples, data, len(task.names)),
        data_collator=collate,
        processing_class=processor,
    )
    trainer.train()
    with trainer.averaged_weights():
        predicted = trainer.predict(evaluation_images(task.rows["test"], processor))
    return top_k_accuracy(torch.from_numpy(predicted.predictions), predicted.label_ids)["top1"]
