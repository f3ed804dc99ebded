"""What the tasks that train a head have in common: start, trainer, end."""

import dataclasses
import json
import logging
import math
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset
from transformers import set_seed

from modeling_ehm.modeling_ehm import EHMBackbone
from modeling_ehm.training.arguments import ImageTrainingArguments, TaskTrainingArguments
from modeling_ehm.training.checkpoints import find_checkpoint
from modeling_ehm.training.data import ImageSource, describe_source, identity_of
from modeling_ehm.training.hub import RunRecord, is_figure
from modeling_ehm.training.recipes import Recipe, RecipeError
from modeling_ehm.training.task_trainer import TaskTrainer, find_encoder

logger = logging.getLogger(__name__)

TRAINING_OPTIONS = (  # that tasks without training refuse
    "push_to_hub",
    "layer_decay",
    "weight_average_decay",
    "freeze_encoder",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "base_learning_rate",
    "global_batch_size",
)


def start(
    recipe: Recipe, arguments: type[ImageTrainingArguments] = TaskTrainingArguments
) -> tuple[ImageTrainingArguments, str | None]:
    """Arguments of a run and the checkpoint folder it goes on from; seeds torch for the initial weights of the head."""
    args = arguments(**recipe.training)
    resume_from = find_checkpoint(args)
    set_seed(args.seed)  # before the model: the Trainer seeds too late for the initial weights
    return args, resume_from


def describe_run(recipe: Recipe, args: TaskTrainingArguments, train: Dataset | None = None) -> RunRecord:
    """Record of a run, for `run.json` and the model card; `train` is what a run is trained on that can be resumed."""
    data = {field.name: getattr(recipe.data, field.name) for field in dataclasses.fields(recipe.data)}
    sources = {name: value for name, value in data.items() if isinstance(value, ImageSource)}
    model = recipe.model | ({"pretrained": recipe.pretrained} if recipe.pretrained else {})
    if recipe.head is not None:
        model["head"] = dataclasses.asdict(recipe.head)
    return RunRecord(
        recipe=recipe.source,
        data="; ".join(f"{name}: {describe_source(source)}" for name, source in sources.items()),
        model=model,
        augmentation={name: value for name, value in data.items() if name not in sources},
        training=recipe.training,
        folder=args.output_dir,
        task=recipe.task,
        source={} if train is None else identity_of(recipe.data.train, train.extent),
    )


def build_trainer(
    recipe: Recipe,
    args: TaskTrainingArguments,
    resume_from: str | None,
    model: nn.Module,
    train: Dataset,
    test: Dataset,
    trainer_class: type[TaskTrainer] = TaskTrainer,
    **kwargs,
) -> TaskTrainer:
    """Trainer of a model that holds an EHM encoder; `kwargs` as for `trainer_class`."""
    freeze_unused(model, args.freeze_encoder)
    run = describe_run(recipe, args, train)
    run.begin(resume_from, args.world_size)
    trainer = trainer_class(model=model, args=args, train_dataset=train, eval_dataset=test, run=run, **kwargs)
    trainer.resume_from = resume_from
    return trainer


def freeze_unused(model: nn.Module, freeze_encoder: bool) -> None:
    """Freeze the encoder if asked to, and what no gradient would reach: several processes would wait for it in vain."""
    _, encoder = find_encoder(model)
    if encoder.embeddings.mask_token is not None:
        encoder.embeddings.mask_token.requires_grad_(False)  # SimMIM's; here nothing is masked
    if isinstance(encoder, EHMBackbone):
        last = max(encoder.stage_names.index(stage) for stage in encoder.out_features)
        encoder.layers[last:].requires_grad_(False)  # above the last feature map
    if freeze_encoder:
        encoder.requires_grad_(False)
        for layer in encoder.layers:
            layer.drop_path_rate = 0.0  # a frozen encoder gives the same features at every step


def refuse_options(recipe: Recipe, names: tuple[str, ...]) -> None:
    """Raise a RecipeError if the recipe sets training options that this task would ignore."""
    for name in names:
        if recipe.training.get(name):
            raise RecipeError(
                f"training.{name}={recipe.training[name]!r}: task {recipe.task!r} does not know this; leave it out"
                + (", and upload the output folder with `hf upload`" if name == "push_to_hub" else "")
            )


def execute(trainer: TaskTrainer) -> dict[str, float]:
    """Train, evaluate, save, push; returns the figures of the last evaluation by name."""
    trainer.announce()
    trained = trainer.train(resume_from_checkpoint=trainer.resume_from)
    evaluated = trainer.evaluate()
    figures = {key[5:]: value for key, value in evaluated.items() if is_figure(key)}
    trainer.save_final_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        report(trainer.run, figures, {"steps": trainer.state.global_step, "seconds": trained.metrics["train_runtime"]})
    trainer.finish_pushes()
    return figures


def report(run: RunRecord, figures: dict[str, float], more: dict) -> None:
    """Write `results.json` into the output folder and print the figures."""
    folder = Path(run.folder)
    run.save()
    summary = {
        "task": run.task,
        "pretrained": run.model.get("pretrained"),
        "seed": run.training.get("seed", 42),
        **more,
        # Not a number: a figure without anything to measure, which JSON can only call null.
        "figures": {name: None if math.isnan(value) else value for name, value in figures.items()},
        "references": run.references,
    }
    (folder / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{run.task}, from {run.model.get('pretrained') or 'random weights'}")
    for name, value in figures.items():
        reference = f"   (reference {run.references[name]:.4f})" if name in run.references else ""
        print(f"{name:32}{value:>10.4f}{reference}")
    print(f"wrote results.json to {folder}")
