"""Measurements between training steps: k-NN and linear probe, hierarchy accuracy, gallery.

An evaluator is called with the bare model, the step and the progress, and returns a dict of figures. It runs on the
main process only, never inside a training step; its seconds are logged as `eval_runtime`.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_ehm.configuration_ehm import to_pair
from modeling_ehm.hierarchy_ehm import PatchHierarchy
from modeling_ehm.modeling_ehm import EHMForPreTraining, EHMModel, evaluation_mode
from modeling_ehm.training import metrics, pictures
from modeling_ehm.training.data import Normalizer

logger = logging.getLogger(__name__)

Evaluator = Callable[[EHMForPreTraining, int, float], dict[str, float]]


class HeldOutImages(torch.utils.data.Dataset):
    """Images for the evaluation loss: without augmentation, and always with the same masks.

    Each example: `pixel_values` `(C, H, W)` uint8, `mask_seed` = its index.
    """

    def __init__(self, pixels: Tensor):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixels[index], "mask_seed": index}


def to_model(pixels: Tensor, normalize: Normalizer, model: torch.nn.Module) -> Tensor:
    """Normalised pixels on the model's device and in its type."""
    return normalize(pixels).to(model.device, model.dtype)


@torch.no_grad()
def encode(encoder: EHMModel, pixels: Tensor, normalize: Normalizer, batch_size: int = 256) -> Tensor:
    """`pooler_output` of images `(n, C, H, W)` uint8 as `(n, D)` float32 on the CPU, in evaluation mode."""
    with evaluation_mode(encoder):
        batches = pixels.split(batch_size)
        return torch.cat([encoder(to_model(b, normalize, encoder)).pooler_output.float().cpu() for b in batches])


def probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], linear: bool) -> dict[str, float]:
    """k-NN accuracy, and the linear probe's, of (features, labels) pairs, in percent."""
    figures = {"knn": 100 * metrics.knn_accuracy(*train, *test)}
    if linear:
        figures["linear"] = 100 * metrics.linear_probe_accuracy(*train, *test)
    return figures


def pixel_features(pixels: Tensor) -> Tensor:
    """Raw pixels as features, the reference that a backbone must beat: 12x12 averages, `(n, C*144)` float32."""
    return F.adaptive_avg_pool2d(pixels.float() / 255, 12).flatten(1)


class ProbeEvaluator:
    """k-NN and linear probe on mean-pooled features; `reference()` gives the same figures for raw pixels."""

    def __init__(self, train: dict[str, Tensor], test: dict[str, Tensor], normalize: Normalizer, linear: bool):
        for name, loaded in (("probe_train", train), ("probe_test", test)):
            if "labels" not in loaded:
                raise ValueError(f"data.{name} needs label_column: a probe cannot learn without labels")
        self.train, self.test, self.normalize, self.linear = train, test, normalize, linear

    def __call__(self, model: EHMForPreTraining, step: int, progress: float) -> dict[str, float]:
        features = [encode(model.ehm, part["pixels"], self.normalize) for part in (self.train, self.test)]
        return probe((features[0], self.train["labels"]), (features[1], self.test["labels"]), self.linear)

    def reference(self) -> dict[str, float]:
        parts = [(pixel_features(part["pixels"]), part["labels"]) for part in (self.train, self.test)]
        return probe(*parts, self.linear)


class HierarchyEvaluator:
    """How well each image's tree, cut at its number of true segments, agrees with them."""

    def __init__(self, loaded: dict[str, Tensor], normalize: Normalizer, ignore_index: int | None):
        if "segments" not in loaded:
            raise ValueError("data.segments needs segments_column, the column of the segment maps")
        self.pixels, self.segments = loaded["pixels"], loaded["segments"]
        self.normalize, self.ignore_index = normalize, ignore_index

    @torch.no_grad()
    def __call__(self, model: EHMForPreTraining, step: int, progress: float, batch_size: int = 64) -> dict[str, float]:
        patch = to_pair(model.config.patch_size)
        grid = self.pixels.shape[2] // patch[0], self.pixels.shape[3] // patch[1]
        segments = metrics.patch_segments(self.segments, grid, self.ignore_index)
        with evaluation_mode(model):
            batches = self.pixels.split(batch_size)
            parsed = [model.parse_hierarchy(to_model(b, self.normalize, model)).to("cpu") for b in batches]
        hierarchy = PatchHierarchy(
            *(torch.cat([getattr(p, name) for p in parsed]) for name in ("parent", "height", "rank"))
        )
        return {f"hierarchy_{name}": value for name, value in metrics.hierarchy_accuracy(hierarchy, segments).items()}

    def reference(self, model: EHMForPreTraining) -> dict:
        """Agreement of partitions that do not look at the picture."""
        patch = to_pair(model.config.patch_size)
        grid = self.pixels.shape[2] // patch[0], self.pixels.shape[3] // patch[1]
        return metrics.reference_partition_accuracy(
            metrics.patch_segments(self.segments, grid, self.ignore_index), grid
        )


class GalleryEvaluator:
    """Hierarchy, mask and reconstruction of a few fixed images; one PNG over all evaluations so far."""

    def __init__(self, pixels: Tensor, normalize: Normalizer, folder: Path):
        self.pixels, self.normalize, self.folder = pixels, normalize, folder

    def __call__(self, model: EHMForPreTraining, step: int, progress: float) -> dict[str, float]:
        if len(self.pixels) == 0:
            return {}
        seeds = torch.arange(len(self.pixels))
        mean, std = (x.flatten().tolist() for x in (self.normalize.mean, self.normalize.std))
        taken = pictures.snapshot(model, to_model(self.pixels, self.normalize, model), progress, seeds, mean, std)
        self.folder.mkdir(parents=True, exist_ok=True)
        pictures.save_snapshot(self.folder / f"step-{step:08d}-progress-{progress:.6f}.npz", taken)
        found = self.snapshots(step)
        same = [one for one in found if np.array_equal(one[2]["image"], taken["image"])]
        if len(same) < len(found):  # a run may go on with other images to look at
            logger.warning("gallery: %d earlier snapshots show other images, and are left out", len(found) - len(same))
        pictures.render_gallery(same, self.folder.parent / "gallery.png")
        return {}

    def snapshots(self, last_step: int) -> list[tuple[int, float, dict]]:
        """Snapshots on disk up to a step: those of a run that was interrupted and resumed are among them."""
        found = []
        for path in sorted(self.folder.glob("step-*-progress-*.npz")):
            _, step, _, progress = path.stem.split("-")
            if int(step) <= last_step:
                found.append((int(step), float(progress), pictures.load_snapshot(path)))
        return found
