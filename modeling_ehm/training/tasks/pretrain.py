"""Pre-training: recipe -> config, model, images, evaluators, trainer -> checkpoint, figures, pictures."""

import dataclasses
import importlib
import json
import logging
from pathlib import Path

import torch
from transformers import set_seed

from modeling_ehm.configuration_ehm import EHMConfig, to_pair
from modeling_ehm.mask_policies_ehm import mask_policy_named
from modeling_ehm.modeling_ehm import EHMForPreTraining
from modeling_ehm.training import pictures
from modeling_ehm.training.arguments import EHMTrainingArguments
from modeling_ehm.training.checkpoints import find_checkpoint
from modeling_ehm.training.data import (
    DataArguments,
    Normalizer,
    PretrainingImages,
    describe_source,
    identity_of,
    load_labelled,
    open_samples,
    stack_examples,
)
from modeling_ehm.training.evaluation import (
    GalleryEvaluator,
    HeldOutImages,
    HierarchyEvaluator,
    ProbeEvaluator,
)
from modeling_ehm.training.hub import RunRecord, is_figure
from modeling_ehm.training.labelled import check_channels, count_steps, image_processor
from modeling_ehm.training.pretrained import load_for_pretraining
from modeling_ehm.training.recipes import Recipe, RecipeError, Schema, write_recipe
from modeling_ehm.training.trainer import EHMTrainer

logger = logging.getLogger(__name__)

SCHEMA = Schema(DataArguments, EHMTrainingArguments)
RECIPE_FILE = "recipe.yaml"  # in the output folder, as it is after overrides
# Overrides that leave out all figures and pictures of evaluations.
UNMEASURED = (
    "data.probe_train=null",
    "data.probe_test=null",
    "data.segments=null",
    'training.eval_strategy="no"',
    "training.eval_on_start=false",
    "training.num_gallery_images=0",
)
MAX_HELD_OUT = 512  # images of the evaluation loss; it is a curve to look at, the probes are the measure


def prepare(recipe: Recipe, trainer_class: type[EHMTrainer] = EHMTrainer) -> EHMTrainer:
    """Build everything that the recipe names, up to the first step; what a user got wrong is found here."""
    args = EHMTrainingArguments(**recipe.training)
    if args.num_gallery_images > 0:
        pictures.require_matplotlib()
    resume_from = find_checkpoint(args)
    if resume_from is not None:
        args.eval_on_start = False  # the figures of the untrained weights are in the history already
    elif args.process_index == 0:
        forget_earlier_run(Path(args.output_dir))

    set_seed(args.seed)  # before the model: the Trainer seeds too late for the initial weights
    import_modules(args.import_modules)
    model = load_for_pretraining(recipe.pretrained, args.attn_implementation, **recipe.model)
    config = model.config
    mask_policy_named(config.mask_policy)  # here, not at the first step
    check_channels(config, recipe.data.image_mean)
    images = training_images(recipe.data, args, config)
    evaluators, held_out, references = build_evaluators(recipe.data, args, config, model, images)
    augmentation = dataclasses.asdict(recipe.data)
    record = RunRecord(
        recipe.source,
        describe_source(recipe.data.train, images.samples.dataset),
        recipe.model | ({"pretrained": recipe.pretrained} if recipe.pretrained else {}),
        {k: v for k, v in augmentation.items() if k not in ("train", "probe_train", "probe_test", "segments")},
        recipe.training,
        args.output_dir,
        references=references,
        source=identity_of(recipe.data.train, images.extent),
        resolved={"affinity_layers": list(config.resolved_affinity_layers)},
    )
    record.begin(resume_from, args.world_size, former={"affinity_layers": former_layers(config)})
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=images,
        eval_dataset=held_out,
        data_collator=stack_examples,
        normalize=Normalizer(recipe.data.image_mean, recipe.data.image_std),
        processing_class=image_processor(config, recipe.data.image_mean, recipe.data.image_std),
        evaluators=evaluators,
        run=record,
    )
    trainer.resume_from = resume_from
    if trainer.is_world_process_zero():
        write_recipe(recipe, Path(args.output_dir) / RECIPE_FILE)
    return trainer


def execute(trainer: EHMTrainer) -> dict[str, float]:
    """Train, evaluate, save, push; returns the last evaluation's figures."""
    trainer.announce()
    try:
        trainer.train(resume_from_checkpoint=trainer.resume_from)
    finally:
        trainer.train_dataset.close()
    figures = finish(trainer, trainer.run)
    trainer.finish_pushes()
    return figures


def import_modules(names: list[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
            raise RecipeError(
                f"training.import_modules names {name!r}, which is not found; put its folder on PYTHONPATH"
            ) from error


def former_layers(config: EHMConfig) -> list[int]:
    """Layers that teachers read by default before runs noted them: all for attention, the last for keys."""
    last = config.num_hidden_layers - 1
    return [last] if config.affinity == "keys" else list(range(last + 1))


def forget_earlier_run(folder: Path) -> None:
    """Remove what a run that starts afresh would otherwise mix with an earlier one's in the same folder."""
    for snapshot in (folder / "gallery").glob("step-*-progress-*.npz"):
        snapshot.unlink()
    for record in (folder / "skipped_images.jsonl", *folder.glob("nonfinite-step-*")):
        record.unlink(missing_ok=True)


def training_images(data: DataArguments, args: EHMTrainingArguments, config: EHMConfig) -> PretrainingImages:
    """The training set: as many positions as the run has steps times images a step."""
    image_size = to_pair(config.image_size)
    samples = open_samples(data.train, args.seed, data.shuffle_window, image_size)
    count_steps(args, samples.samples_per_pass)
    return PretrainingImages(
        samples,
        data,
        args.seed,
        image_size,
        config.num_channels,
        num_positions=args.max_steps * args.images_per_step,
        record=Path(args.output_dir) / "skipped_images.jsonl",
    )


def build_evaluators(
    data: DataArguments,
    args: EHMTrainingArguments,
    config: EHMConfig,
    model: EHMForPreTraining,
    images: PretrainingImages,
):
    """Evaluators, images for the evaluation loss, and figures that need no training, as far as the data allow.

    Where no other images are given, the gallery shows some of those that are trained on; a loss is not measured then.
    """
    image_size, channels = to_pair(config.image_size), config.num_channels
    normalize = Normalizer(data.image_mean, data.image_std)
    evaluators, references, pixels = [], {}, None
    if data.probe_train is not None:
        train, test = (
            load_labelled(s, image_size, channels, data.max_pixels) for s in (data.probe_train, data.probe_test)
        )
        evaluators.append(ProbeEvaluator(train, test, normalize, args.linear_probe))
        references |= {f"eval_{name}": value for name, value in evaluators[-1].reference().items()}
        pixels = test["pixels"]
    if data.segments is not None:
        loaded = load_labelled(data.segments, image_size, channels, data.max_pixels)
        evaluators.append(HierarchyEvaluator(loaded, normalize, data.segments.ignore_index))
        blocks = evaluators[-1].reference(model)["blocks"]
        references |= {f"eval_hierarchy_{name}": value for name, value in blocks.items()}
        pixels = loaded["pixels"] if pixels is None else pixels
    if args.num_gallery_images > 0:
        if pixels is not None:
            shown = pixels[torch.linspace(0, len(pixels) - 1, min(args.num_gallery_images, len(pixels))).long()]
        elif args.process_index == 0:
            shown = images.some_whole(args.num_gallery_images)
        else:  # pictures are drawn by the main process, but all have to know that there is something to evaluate
            shown = torch.empty(0)
        evaluators.append(GalleryEvaluator(shown, normalize, Path(args.output_dir) / "gallery"))
    measures = "data.probe_train and data.probe_test, or data.segments"
    if not evaluators and args.eval_strategy != "no":
        raise RecipeError(
            f"training.eval_strategy={args.eval_strategy.value!r}, but there is nothing to evaluate: give {measures},"
            ' or training.num_gallery_images above 0, or set eval_strategy: "no"'
        )
    if pixels is None and args.metric_for_best_model is not None and args.eval_strategy != "no":
        raise RecipeError(
            f"training.metric_for_best_model={args.metric_for_best_model!r} (which lr_scheduler_type="
            f"{args.lr_scheduler_type.value!r} may have set), but nothing is measured: give {measures}"
        )
    held_out = torch.empty(0) if pixels is None else pixels[:MAX_HELD_OUT]
    return evaluators, HeldOutImages(held_out), references


def finish(trainer: EHMTrainer, record: RunRecord) -> dict[str, float]:
    """Evaluate if the last step was not, save the model, write figures and curves, print the table."""
    state = trainer.state
    evaluated = [row for row in state.log_history if "eval_runtime" in row]
    if trainer.evaluators and (not evaluated or evaluated[-1]["step"] != state.global_step):
        trainer.evaluate()
        evaluated = [row for row in state.log_history if "eval_runtime" in row]
    trainer.save_final_model()  # no push yet: figures and card come first
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return evaluated[-1] if evaluated else {}
    folder = Path(trainer.args.output_dir)
    summary = {"steps": state.global_step, "references": record.references, "evaluations": evaluated}
    (folder / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    curved = any("loss" in row or any(map(is_figure, row)) for row in state.log_history)  # not in a run of few steps
    if trainer.args.num_gallery_images > 0 and curved:
        pictures.render_curves({folder.name: state.log_history}, folder / "curves.png", references=record.references)
    print_table(record.references, evaluated, folder)
    return evaluated[-1] if evaluated else {}


def print_table(references: dict, evaluated: list[dict], folder: Path) -> None:
    """Figures of raw pixels or plain blocks, of the first and of the last evaluation, side by side."""
    if figures := [key for key in (evaluated[-1] if evaluated else {}) if is_figure(key)]:
        first, last = evaluated[0], evaluated[-1]
        print(f"\n{'':24}{'reference':>12}{'step ' + str(first['step']):>12}{'step ' + str(last['step']):>12}")
        for key in figures:
            reference = f"{references[key]:.3f}" if key in references else "-"
            print(f"{key[5:]:24}{reference:>12}{first.get(key, float('nan')):>12.3f}{last[key]:>12.3f}")
        print("reference: 12x12 raw pixels for knn and linear, plain square blocks for the hierarchy")
    names = [n for n in ("model.safetensors", "gallery.png", "curves.png", "results.json") if (folder / n).exists()]
    print(f"wrote {', '.join(names)} to {folder}")
