"""Unsupervised parts: each image's tree, cut at its number of true segments, held against them. Nothing is trained.

Which affinity and linkage build the trees, the `model` section says: `affinity`, `affinity_layers`, `linkage`.
"""

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modeling_ehm.configuration_ehm import to_pair
from modeling_ehm.modeling_ehm import EHMModel, evaluation_mode
from modeling_ehm.training import metrics, pictures
from modeling_ehm.training.arguments import TaskTrainingArguments
from modeling_ehm.training.data import (
    ImageSource,
    Normalizer,
    load_labelled,
)
from modeling_ehm.training.evaluation import HierarchyEvaluator, to_model
from modeling_ehm.training.labelled import ImageData, check_channels
from modeling_ehm.training.pretrained import load_encoder
from modeling_ehm.training.recipes import Recipe, Schema
from modeling_ehm.training.tasks import finetuning

SHOWN = 4  # images of the picture


@dataclass(kw_only=True)
class PartsData(ImageData):
    """The `data` section; other fields: see `ImageData`.

    Attributes:
        images: Images with segment maps: `segments_column`, and `ignore_index` if some pixels belong to no segment.
    """

    images: ImageSource


SCHEMA = Schema(PartsData, TaskTrainingArguments)


@dataclass
class PartsTask:
    """What `prepare` hands to `execute`."""

    recipe: Recipe
    args: TaskTrainingArguments
    encoder: EHMModel
    evaluator: HierarchyEvaluator


def prepare(recipe: Recipe) -> PartsTask:
    """Load encoder and images."""
    finetuning.refuse_options(recipe, finetuning.TRAINING_OPTIONS)
    args, _ = finetuning.start(recipe)
    data = recipe.data
    encoder = load_encoder(recipe.pretrained, args.attn_implementation, **recipe.model).to(args.device)
    check_channels(encoder.config, data.image_mean)
    size, channels = to_pair(encoder.config.image_size), encoder.config.num_channels
    loaded = load_labelled(data.images, size, channels, data.max_pixels)
    normalize = Normalizer(data.image_mean, data.image_std)
    return PartsTask(recipe, args, encoder, HierarchyEvaluator(loaded, normalize, data.images.ignore_index))


def execute(task: PartsTask) -> dict[str, float]:
    """Figures in percent: "ari", "purity" and "iou" of `metrics.hierarchy_accuracy`; writes `parts.png`."""
    started = time.perf_counter()
    measured = task.evaluator(task.encoder, step=0, progress=1.0)
    figures = {name.removeprefix("hierarchy_"): 100 * value for name, value in measured.items()}
    run = finetuning.describe_run(task.recipe, task.args)
    run.references = {name: 100 * value for name, value in task.evaluator.reference(task.encoder)["blocks"].items()}
    run.begin(None, task.args.world_size)
    if task.args.process_index == 0:
        finetuning.report(run, figures, {"steps": 0, "seconds": time.perf_counter() - started})
        if importlib.util.find_spec("matplotlib") is not None:
            draw_parts(task, Path(task.args.output_dir) / "parts.png")
    return figures


@torch.no_grad()
def draw_parts(task: PartsTask, path: Path) -> None:
    """Draw a few images with their true segments and the cut of their trees at the number of these."""
    encoder, evaluator = task.encoder, task.evaluator
    chosen = torch.linspace(0, len(evaluator.pixels) - 1, min(SHOWN, len(evaluator.pixels))).round().long()
    pixels, segments = evaluator.pixels[chosen], evaluator.segments[chosen]
    with evaluation_mode(encoder):
        hierarchy = encoder.parse_hierarchy(to_model(pixels, evaluator.normalize, encoder)).to("cpu")
    on_patches = metrics.patch_segments(segments, hierarchy.grid_size, evaluator.ignore_index)
    labels = hierarchy.cut(metrics.segment_counts(on_patches).clamp(min=1))  # (n, N)
    ignored = segments < 0 if evaluator.ignore_index is None else segments == evaluator.ignore_index
    true = segments.masked_fill(ignored, -1)
    images = pixels[:, :1].expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels[:, :3]
    shown = [
        (image.permute(1, 2, 0).numpy(), truth.numpy(), as_pixels(label, hierarchy.grid_size, truth.shape))
        for image, truth, label in zip(images, true, labels, strict=True)
    ]
    pictures.render_segmentation(shown, None, path, ignore_index=-1, titles=("image", "true segments", "parts"))


def as_pixels(labels: Tensor, grid_size: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """`(N,)` labels of patches -> `(H, W)`, numbered 0, 1, ... in the order of their values."""
    _, dense = labels.unique(return_inverse=True)
    patch = size[0] // grid_size[0], size[1] // grid_size[1]
    return np.kron(dense.reshape(grid_size).numpy(), np.ones(patch, dtype=np.int64))
