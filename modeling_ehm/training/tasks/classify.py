"""Fine-tuned classification: labelled images -> augmented, mixed examples -> `EHMForImageClassification`."""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor
from transformers import AutoConfig
from transformers.image_processing_utils import BaseImageProcessor

from modeling_ehm.configuration_ehm import to_pair
from modeling_ehm.modeling_ehm import EHMForImageClassification, EHMModel
from modeling_ehm.training import augment
from modeling_ehm.training.arguments import TaskTrainingArguments
from modeling_ehm.training.data import check_crops, random_resized_crop
from modeling_ehm.training.decoding import to_uint8_tensor
from modeling_ehm.training.labelled import (
    DRAWS,
    EvaluationImages,
    KeyedExamples,
    LabelledData,
    LabelledRows,
    check_channels,
    check_labels,
    class_names,
    count_steps,
    image_processor,
    keyed_uniform,
    resized,
)
from modeling_ehm.training.metrics import as_evaluate_metric
from modeling_ehm.training.pretrained import load_encoder
from modeling_ehm.training.recipes import Recipe, RecipeError, Schema
from modeling_ehm.training.task_trainer import TaskTrainer
from modeling_ehm.training.tasks import finetuning

MIX_STREAM = 2  # of randomness under one seed; 0 and 1 are order and samples
CROP_DRAWS = 23  # box and flip


@dataclass
class ClassificationData(LabelledData):
    """The `data` section; defaults are MAE's fine-tuning (He et al. 2022, Table 9, and their code).

    Attributes:
        crop_scale: Share of the image's area that a crop takes, smallest and largest.
        crop_ratio: Width over height of a crop, smallest and largest.
        horizontal_flip: Whether half of the crops are mirrored.
        rand_augment_ops: Operations of RandAugment on each image; 0 switches it off.
        rand_augment_magnitude: Their strength, 0 to 10.
        random_erasing: Share of images in which a rectangle becomes noise.
        mixup_alpha: Mixup's weights follow Beta(alpha, alpha); 0 switches it off.
        cutmix_alpha: The same of CutMix.
        cutmix_share: Share of CutMix where both are on.
        label_smoothing: Share of each target that is spread over all classes.
        crop_pct: In tests the image fills the model's input (1), or its shorter side is resized to input / crop_pct
            and the centre is cut out (MAE: 0.875).
    """

    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    horizontal_flip: bool = True
    rand_augment_ops: int = 2
    rand_augment_magnitude: float = 9.0
    random_erasing: float = 0.25
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    cutmix_share: float = 0.5
    label_smoothing: float = 0.1
    crop_pct: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_crops(self.crop_scale, self.crop_ratio)
        ranges = {
            "rand_augment_ops": (0, (DRAWS - CROP_DRAWS - augment.ERASING_DRAWS - 1) // augment.RAND_AUGMENT_DRAWS),
            "rand_augment_magnitude": (0, augment.MAX_MAGNITUDE),
            "random_erasing": (0, 1),
            "mixup_alpha": (0, 1e6),
            "cutmix_alpha": (0, 1e6),
            "cutmix_share": (0, 1),
            "label_smoothing": (0, 1),
            "crop_pct": (1e-3, 1),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"data.{name}={getattr(self, name)} must lie in [{low}, {high}]")


SCHEMA = Schema(ClassificationData, TaskTrainingArguments)


class Augmentation:
    """Row and numbers in [0, 1) -> `pixel_values` `(C, H, W)` float32 normalised, `label` int."""

    def __init__(self, data: ClassificationData, image_size: tuple[int, int]):
        self.data, self.image_size = data, image_size
        self.mean = torch.tensor(data.image_mean)[:, None, None]
        self.std = torch.tensor(data.image_std)[:, None, None]
        self.fill = [round(255 * mean) for mean in data.image_mean]

    def __call__(self, columns: dict, uniform: np.ndarray) -> dict:
        data, image = self.data, columns["image"]
        counts = CROP_DRAWS, augment.RAND_AUGMENT_DRAWS * data.rand_augment_ops, augment.ERASING_DRAWS
        for_crop, for_operations, for_erasing, rest = np.split(uniform, np.cumsum(counts))
        box = random_resized_crop(image.size, data.crop_scale, data.crop_ratio, for_crop[:-1])
        image = resized(image.crop(box), self.image_size)
        if data.horizontal_flip and for_crop[-1] < 0.5:
            image = image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
        if data.rand_augment_ops:
            image = augment.rand_augment(
                image, for_operations, self.fill, data.rand_augment_ops, data.rand_augment_magnitude
            )
        pixels = (to_uint8_tensor(image).float() / 255 - self.mean) / self.std
        pixels = augment.random_erasing(pixels, for_erasing, int(rest[0] * 2**53), data.random_erasing)
        return {"pixel_values": pixels, "label": columns["label"]}


class MixedPairs(torch.utils.data.Dataset):
    """Examples 2n and 2n + 1 of a sequence mixed with each other, as in timm's `mode="pair"`.

    MAE mixes a batch with its own reverse, which ties an example to the batch it is in; pairs of neighbours in the
    keyed sequence do not.

    Each example: `pixel_values` `(C, H, W)`, `labels` `(num_labels,)` float32, a distribution.
    """

    def __init__(self, examples: KeyedExamples, data: ClassificationData, num_labels: int):
        self.examples, self.data, self.num_labels = examples, data, num_labels
        self._cached: dict[int, dict] = {}  # the partner is asked for next, in most loaders by the same worker

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def extent(self) -> dict[str, int]:
        """As `data.IndexedSamples.extent`."""
        return self.examples.extent

    def __getitem__(self, position: int) -> dict:
        data = self.data
        mixes = data.mixup_alpha > 0 or data.cutmix_alpha > 0
        first, lam = self._example(position), 1.0
        pixels, other = first["pixel_values"], first
        partner = min(position ^ 1, len(self) - 1)  # the last of an odd number mixes with itself
        if mixes:
            other = self._example(partner)
            uniform = keyed_uniform(self.examples.seed, MIX_STREAM, position // 2, count=augment.MIX_DRAWS)
            pixels, lam = augment.mix_pair(
                pixels, other["pixel_values"], uniform, data.mixup_alpha, data.cutmix_alpha, data.cutmix_share
            )
        target = augment.mixed_target(first["label"], other["label"], lam, self.num_labels, data.label_smoothing)
        return {"pixel_values": pixels, "labels": target}

    def _example(self, position: int) -> dict:
        if position not in self._cached:
            kept = {key: value for key, value in self._cached.items() if key // 2 == position // 2}
            self._cached = kept | {position: self.examples[position]}
        return self._cached[position]


def collate(examples: list[dict]) -> dict[str, Tensor]:
    """Stack `pixel_values` and `labels`."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.stack([torch.as_tensor(example["labels"]) for example in examples]),
    }


def evaluation_images(rows: LabelledRows, processor: BaseImageProcessor) -> EvaluationImages:
    """Rows as the saved image processor prepares them: `pixel_values` `(C, H, W)`, `labels` int."""

    def example(columns: dict) -> dict:
        pixels = processor(columns["image"], return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": columns["label"]}

    return EvaluationImages(rows, example)


def put_classifier(encoder: EHMModel, names: list[str], pretrained: str | None) -> EHMForImageClassification:
    """A classifier on an encoder, with a new head; where `pretrained` is a classification checkpoint, with its head.

    Raises:
        ValueError: the checkpoint's head is for another number of classes.
    """
    config = encoder.config
    config.id2label, config.label2id = dict(enumerate(names)), {name: n for n, name in enumerate(names)}
    model = EHMForImageClassification._from_config(config, attn_implementation=config._attn_implementation)
    model.ehm.load_state_dict(encoder.state_dict())
    saved = None if pretrained is None else AutoConfig.from_pretrained(pretrained)
    if saved is not None and EHMForImageClassification.__name__ in (saved.architectures or []):
        if saved.num_labels != len(names):
            raise RecipeError(
                f"model.pretrained={pretrained!r} has a head for {saved.num_labels} classes, but the training data have"
                f" {len(names)}; start from the pre-trained checkpoint instead, or give data with those classes"
            )
        saved_names = [saved.id2label[number] for number in range(len(names))]
        if saved_names != list(names):
            raise RecipeError(
                f"model.pretrained={pretrained!r} has a head for other classes, {saved_names[:3]}..., than the training"
                f" data, {list(names)[:3]}...; start from the pre-trained checkpoint instead"
            )
        whole = EHMForImageClassification.from_pretrained(pretrained)
        model.classifier.load_state_dict(whole.classifier.state_dict())
    return model


def prepare(recipe: Recipe) -> TaskTrainer:
    """Build everything that the recipe names, up to the first step."""
    args, resume_from = finetuning.start(recipe)
    data = recipe.data
    encoder = load_encoder(recipe.pretrained, args.attn_implementation, **recipe.model)
    config = encoder.config
    check_channels(config, data.image_mean)
    size, channels = to_pair(config.image_size), config.num_channels
    rows, test_rows = (
        LabelledRows(source, {"label": source.label_column}, size, channels, data.max_pixels)
        for source in (data.train, data.test)
    )
    names = class_names(rows)
    check_labels(test_rows, len(names), names)
    model = put_classifier(encoder, names, recipe.pretrained)
    processor = image_processor(config, data.image_mean, data.image_std, data.crop_pct)
    count_steps(args, len(rows))
    num_positions = args.max_steps * args.images_per_step
    examples = KeyedExamples(rows, Augmentation(data, size), args.seed, num_positions)

    metric = as_evaluate_metric("top_k_accuracy")

    def figures(prediction) -> dict[str, float]:
        scores = metric.compute(predictions=prediction.predictions, references=prediction.label_ids)
        return {name: 100 * value for name, value in scores.items()}

    return finetuning.build_trainer(
        recipe,
        args,
        resume_from,
        model,
        MixedPairs(examples, data, len(names)),
        evaluation_images(test_rows, processor),
        data_collator=collate,
        compute_metrics=figures,
        processing_class=processor,
        usage=USAGE,
    )


USAGE = """
import modeling_ehm  # registers the classes; without the package, pass trust_remote_code=True and a pinned revision
from transformers import pipeline

classify = pipeline("image-classification", model=repo)
classify(image)  # [{"label": ..., "score": ...}, ...]
"""

execute = finetuning.execute
