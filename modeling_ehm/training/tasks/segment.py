"""Semantic segmentation: images with maps -> the same crops of both -> a dense head on the encoder.

The head is transformers' `UperNetForSemanticSegmentation` on `EHMBackbone`, or the linear one of
`EHMForSemanticSegmentation`. Test images are resized to the model's size; what it predicts is resized to the true map
and judged there, as `pipeline("image-segmentation")` does it.

Letters: B images, H W pixels, L labels.
"""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from PIL import ImageEnhance
from torch import Tensor
from transformers import (
    AutoConfig,
    EvalPrediction,
    PreTrainedModel,
    SegformerImageProcessorPil,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from modeling_ehm.configuration_ehm import EHMConfig, to_pair
from modeling_ehm.modeling_ehm import EHMForSemanticSegmentation, EHMModel, evaluation_mode
from modeling_ehm.training import pictures
from modeling_ehm.training.arguments import TaskTrainingArguments
from modeling_ehm.training.data import ImageSource, check_crops, random_resized_crop
from modeling_ehm.training.decoding import to_uint8_tensor
from modeling_ehm.training.labelled import (
    EvaluationImages,
    KeyedExamples,
    LabelledData,
    LabelledRows,
    check_channels,
    count_steps,
    resized,
)
from modeling_ehm.training.metrics import confusion_matrix, segmentation_scores
from modeling_ehm.training.pretrained import load_encoder
from modeling_ehm.training.recipes import Recipe, RecipeError, Schema
from modeling_ehm.training.task_trainer import TaskTrainer
from modeling_ehm.training.tasks import finetuning

HEADS = ("upernet", "linear")
AUXILIARY_MAP = 2  # the feature map that UperNet's auxiliary head reads, counted from 0
UNUSED_IGNORE_INDEX = 255  # where the data name none; the default of both heads


@dataclass
class SegmentationHead:
    """The `head` section; all fields but `kind` concern UperNet, with the sizes of BEiT's and MAE's ViT-B as defaults.

    Attributes:
        kind: "upernet", or "linear": batch norm and one linear layer on each patch token.
        out_indices: Layers whose feature maps UperNet reads, counted from 1, ascending; None takes four at even
            distances, the last layer among them.
        feature_scales: By how much each of these maps is enlarged or reduced, which makes the pyramid.
        hidden_size: Channels of UperNet.
        auxiliary_loss_weight: Weight of the loss of a second head on the third map; 0 leaves that head out.
        auxiliary_channels: Channels of the second head.
    """

    kind: str = "upernet"
    out_indices: list[int] | None = None
    feature_scales: list[float] = field(default_factory=lambda: [4, 2, 1, 0.5])
    hidden_size: int = 512
    auxiliary_loss_weight: float = 0.4
    auxiliary_channels: int = 256

    def __post_init__(self):
        if self.kind not in HEADS:
            raise ValueError(f"head.kind={self.kind!r} is not one of {', '.join(HEADS)}")
        for name in ("hidden_size", "auxiliary_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"head.{name}={getattr(self, name)} must be at least 1")
        if self.auxiliary_loss_weight < 0:
            raise ValueError(f"head.auxiliary_loss_weight={self.auxiliary_loss_weight} must be 0 (no head) or more")
        if self.auxiliary_loss_weight and len(self.feature_scales) <= AUXILIARY_MAP:
            raise ValueError(
                f"head.feature_scales={self.feature_scales} makes {len(self.feature_scales)} maps, but the auxiliary"
                " head reads the third; give three or more, or set head.auxiliary_loss_weight=0"
            )

    def layers(self, num_hidden_layers: int) -> list[int]:
        """Layers whose feature maps are read, counted from 1.

        Raises:
            ValueError: not as many as `feature_scales`, not ascending, or layers that the encoder lacks.
        """
        count = len(self.feature_scales)
        chosen = self.out_indices
        if chosen is None:
            chosen = [round(num_hidden_layers * number / count) for number in range(1, count + 1)]
        if len(chosen) != count:
            raise RecipeError(
                f"head.out_indices={chosen} and head.feature_scales={self.feature_scales} must be of one length"
            )
        if chosen != sorted(set(chosen)) or not 1 <= chosen[0] <= chosen[-1] <= num_hidden_layers:
            raise RecipeError(
                f"head.out_indices={chosen} must be ascending numbers in [1, {num_hidden_layers}], the layers of the"
                " encoder; give other ones, or fewer of them and of head.feature_scales"
            )
        return chosen


@dataclass
class SegmentationData(LabelledData):
    """The `data` section; `segments_column` of the sources names the maps, `ignore_index` the value without a class.

    Attributes:
        class_names: Names of the classes 0, 1, ..., which maps do not carry; None names them LABEL_0, LABEL_1, ... up
            to the largest value in the training maps.
        reduce_labels: Whether 0 in the maps has no class and value n stands for class n - 1, as in ADE20K.
        crop_scale: Share of the image's area that a crop takes, smallest and largest.
        crop_ratio: Width over height of a crop, smallest and largest.
        horizontal_flip: Whether half of the crops are mirrored.
        color_jitter: Brightness, contrast and saturation are multiplied by factors in [1 - this, 1 + this].
    """

    class_names: list[str] | None = None
    reduce_labels: bool = False
    crop_scale: list[float] = field(default_factory=lambda: [0.25, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    horizontal_flip: bool = True
    color_jitter: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_crops(self.crop_scale, self.crop_ratio)
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"data.color_jitter={self.color_jitter} must lie in [0, 1]")
        if self.class_names is not None and len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"data.class_names={self.class_names} names a class twice")

    @property
    def ignore_index(self) -> int:
        """What stands for pixels without a class in examples, losses and figures, whatever a source calls them."""
        named = (self.train.ignore_index, self.test.ignore_index)
        return next((value for value in named if value is not None), UNUSED_IGNORE_INDEX)


SCHEMA = Schema(SegmentationData, TaskTrainingArguments, SegmentationHead)


class SegmentationRows(LabelledRows):
    """Rows of images and `labels` `(H, W)` int64: classes, and `data.ignore_index` where there is none.

    Args:
        source: Where from; it must name `segments_column`.
        data: How maps are read.
        config: Of the encoder: size and channels.
        num_labels: L; None if any value of 0 or more is a class.

    Raises:
        ValueError: as `LabelledRows`.
    """

    def __init__(self, source: ImageSource, data: SegmentationData, config: EHMConfig, num_labels: int | None = None):
        if source.segments_column is None:
            raise ValueError(f"{source.path}: name the column of the segment maps as segments_column")
        columns = {"segments": source.segments_column}
        super().__init__(source, columns, to_pair(config.image_size), config.num_channels, data.max_pixels)
        self.data, self.num_labels = data, num_labels

    def __getitem__(self, row: int) -> dict:
        """`image`, upright, and `labels` of a row.

        Raises:
            ValueError: image or map cannot be decoded, the map is missing, of another size than the image, or holds a
                value that is neither a class nor to be ignored; the row is named.
        """
        try:
            columns = super().__getitem__(row)
        except (OSError, SyntaxError) as error:  # of the map, which `datasets` decodes
            raise ValueError(f"{self.source.path}: row {row} has a map that cannot be decoded ({error})") from None
        return {"image": columns["image"], "labels": self._labels(row, columns["segments"], columns["image"].size)}

    def _labels(self, row: int, segments, image_size: tuple[int, int]) -> np.ndarray:
        where = f"{self.source.path}: row {row}"
        if segments is None:
            raise ValueError(f"{where} has no map in segments_column={self.source.segments_column!r}")
        segments = np.asarray(segments)
        if segments.ndim != 2 or segments.dtype.kind not in "uib":
            raise ValueError(
                f"{where} has a map of shape {segments.shape} and type {segments.dtype}; one whole number a pixel is"
                " expected, so convert colours to numbers of classes"
            )
        if segments.shape != image_size[::-1]:
            (height, width), (image_width, image_height) = segments.shape, image_size
            raise ValueError(
                f"{where}: the map has {width}x{height} pixels, its image {image_width}x{image_height}; resize the map"
                " to its image (nearest value)"
            )
        ignored = np.zeros(segments.shape, bool)
        if self.source.ignore_index is not None:
            ignored |= segments == self.source.ignore_index
        labels = segments.astype(np.int64)
        if self.data.reduce_labels:
            ignored |= segments == 0
            labels -= 1
        wrong = ~ignored & ((labels < 0) | (labels >= (self.num_labels or np.inf)))
        if wrong.any():
            last = self.num_labels - 1 + self.data.reduce_labels if self.num_labels else "..."
            raise ValueError(
                f"{where} holds the value {segments[wrong][0]}, which is no class, [{int(self.data.reduce_labels)},"
                f" {last}], nor ignore_index={self.source.ignore_index}; correct the map, or name the value as"
                " ignore_index"
            )
        labels[ignored] = self.data.ignore_index
        return labels

    def read_all(self) -> int:
        """Read every row once, so that a bad one is found before training; returns the largest class.

        Raises:
            ValueError: as for single rows, or no pixel of the source has a class.
        """
        largest = -1
        for row in range(len(self)):
            labels = self[row]["labels"]
            largest = max(largest, int(labels.max(where=labels != self.data.ignore_index, initial=-1)))
        if largest < 0:
            raise ValueError(f"{self.source.path}: every pixel is ignore_index={self.source.ignore_index}")
        return largest


def resized_labels(labels: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> Tensor:
    """`(H, W)` -> int64 of (height, width), each the nearest value within the box (left, top, right, bottom)."""
    labels = PILImage.fromarray(labels.astype(np.int32))
    labels = labels.resize(size[::-1], PILImage.Resampling.NEAREST, box=box)
    return torch.from_numpy(np.array(labels, dtype=np.int64))


def jittered(image: PILImage.Image, strength: float, uniform: np.ndarray) -> PILImage.Image:
    """Brightness, contrast and saturation times factors in [1 - strength, 1 + strength]; `uniform` `(3,)` in [0, 1)."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind, number in zip(kinds, uniform, strict=True):
        image = kind(image).enhance(1 + strength * (2 * number - 1))
    return image


class Augmentation:
    """Row and numbers in [0, 1) -> `pixel_values` `(C, H, W)` float32 normalised, `labels` `(H, W)` int64."""

    def __init__(self, data: SegmentationData, image_size: tuple[int, int]):
        self.data, self.image_size = data, image_size
        self.mean = torch.tensor(data.image_mean)[:, None, None]
        self.std = torch.tensor(data.image_std)[:, None, None]

    def __call__(self, columns: dict, uniform: np.ndarray) -> dict:
        data, image = self.data, columns["image"]
        for_box, for_flip, for_colours = uniform[:22], uniform[22], uniform[23:26]
        box = random_resized_crop(image.size, data.crop_scale, data.crop_ratio, for_box)
        image = resized(image.crop(box), self.image_size)
        labels = resized_labels(columns["labels"], self.image_size, box)
        if data.color_jitter:
            image = jittered(image, data.color_jitter, for_colours)
        pixels = (to_uint8_tensor(image).float() / 255 - self.mean) / self.std
        if data.horizontal_flip and for_flip < 0.5:
            pixels, labels = pixels.flip(-1), labels.flip(-1)
        return {"pixel_values": pixels, "labels": labels}


def collate(examples: list[dict]) -> dict[str, Tensor | list[Tensor]]:
    """Stack `pixel_values` and `labels`; `true_maps`, of any sizes, stay a list."""
    batch = {key: torch.stack([example[key] for example in examples]) for key in ("pixel_values", "labels")}
    if "true_map" in examples[0]:
        batch["true_maps"] = [example["true_map"] for example in examples]
    return batch


def put_head(
    encoder: EHMModel, head: SegmentationHead, names: list[str], ignore_index: int, pretrained: str | None
) -> PreTrainedModel:
    """A segmentation model on an encoder, with a new head; a linear one from `pretrained`, if that has one.

    Raises:
        ValueError: the encoder lacks layers the head reads, or the checkpoint's head is for another number of classes.
    """
    build = put_linear if head.kind == "linear" else put_upernet
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    model = build(encoder, head, labels, ignore_index)
    model.accepts_loss_kwargs = False  # both losses are means over their batch; UperNet's signature says otherwise
    saved = None if pretrained is None else AutoConfig.from_pretrained(pretrained)
    if head.kind == "linear" and EHMForSemanticSegmentation.__name__ in (getattr(saved, "architectures", None) or []):
        if saved.num_labels != len(names):
            raise RecipeError(
                f"model.pretrained={pretrained!r} has a head for {saved.num_labels} classes, but the data have"
                f" {len(names)}; start from the pre-trained checkpoint instead, or give data with those classes"
            )
        whole = EHMForSemanticSegmentation.from_pretrained(pretrained)
        model.norm.load_state_dict(whole.norm.state_dict())
        model.classifier.load_state_dict(whole.classifier.state_dict())
    return model


def put_linear(encoder: EHMModel, head: SegmentationHead, labels: dict, ignore_index: int) -> PreTrainedModel:
    config = encoder.config
    config.id2label, config.label2id = labels["id2label"], labels["label2id"]
    config.semantic_loss_ignore_index = ignore_index
    model = EHMForSemanticSegmentation._from_config(config, attn_implementation=config._attn_implementation)
    model.ehm.load_state_dict(encoder.state_dict())
    return model


def put_upernet(encoder: EHMModel, head: SegmentationHead, labels: dict, ignore_index: int) -> PreTrainedModel:
    maps = {
        "out_features": None,  # they follow from the indices
        "out_indices": head.layers(encoder.config.num_hidden_layers),
        "feature_scales": head.feature_scales,
    }
    config = UperNetConfig(
        backbone_config=EHMConfig(**(encoder.config.to_dict() | maps)),
        hidden_size=head.hidden_size,
        use_auxiliary_head=head.auxiliary_loss_weight > 0,
        auxiliary_loss_weight=float(head.auxiliary_loss_weight),  # YAML's 0 is no float to transformers
        auxiliary_channels=head.auxiliary_channels,
        loss_ignore_index=ignore_index,
        **labels,
    )
    # UperNet declares no attention kernels and would refuse all but these, although it has no attention of its own.
    model = UperNetForSemanticSegmentation._from_config(config, attn_implementation="eager")
    model.backbone.set_attn_implementation(encoder.config._attn_implementation)
    model.backbone.load_state_dict(encoder.state_dict())
    return model


def predicted_map(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """`(L, h, w)` -> `(H, W)` int64: bilinear resize, then the largest; as transformers' post-processing does."""
    return F.interpolate(logits[None].float(), size=size, mode="bilinear", align_corners=False)[0].argmax(0)


class SegmentationTrainer(TaskTrainer):
    """Its evaluations keep `(L, L)` counts of each image at the size of its true map, and no logits.

    Counts are made where the image is, and gathered: true maps may differ in size, and several processes count each
    image once.
    """

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """As the Trainer does; 0 for a batch without a labelled pixel, where a mean over none would be no number."""
        is_empty = not (inputs["labels"] != self.ignore_index).any()
        if is_empty:  # some labels, for a loss that reaches all weights, and of which nothing is left
            inputs = inputs | {"labels": torch.zeros_like(inputs["labels"])}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = 0 * loss if is_empty else loss
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, counts `(B, L, L)` and the number of pixels that count `(B,)`."""
        true_maps = inputs["true_maps"]
        inputs = {key: value for key, value in inputs.items() if key != "true_maps"}
        loss, logits, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        counts = torch.stack(
            [
                confusion_matrix(predicted_map(scores, true.shape), true, scores.shape[0], self.ignore_index)
                for scores, true in zip(logits, true_maps, strict=True)
            ]
        ).to(logits.device)
        return loss, counts, counts.sum((1, 2))

    @property
    def ignore_index(self) -> int:
        return self.eval_dataset.rows.data.ignore_index


class SegmentationFigures:
    """`compute_metrics` with `batch_eval_metrics`: sums `(B, L, L)` counts; figures in percent at the last batch.

    Figures: `mean_iou`, `pixel_accuracy`, `mean_accuracy`, and `iou_<class>` of each class that occurs.
    """

    def __init__(self, names: list[str]):
        self.names = names
        self._confusion: Tensor | int = 0

    def __call__(self, evaluation: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self._confusion = self._confusion + evaluation.predictions.sum(0).cpu()
        if not compute_result:
            return {}
        scores, self._confusion = segmentation_scores(self._confusion), 0
        per_class = dict(zip(self.names, scores.pop("iou_per_class"), strict=True))
        scores |= {f"iou_{name}": iou for name, iou in per_class.items() if not np.isnan(iou)}
        return {name: 100 * value for name, value in scores.items()}


def image_processor(config: EHMConfig, data: SegmentationData) -> SegformerImageProcessorPil:
    """transformers' own processor, saved beside the weights: as `labelled.image_processor`, and it makes maps."""
    height, width = to_pair(config.image_size)
    return SegformerImageProcessorPil(
        size={"height": height, "width": width},
        resample=3,  # bicubic, as in training
        image_mean=data.image_mean,
        image_std=data.image_std,
        do_reduce_labels=data.reduce_labels,
        do_convert_rgb=True if config.num_channels == 3 else None,
    )


def check_batch(args: TaskTrainingArguments, head: SegmentationHead) -> None:
    """Raise a RecipeError if UperNet would see single images: it pools each into one pixel before a batch norm."""
    if head.kind == "upernet" and args.train_batch_size < 2:
        raise RecipeError(
            f"training.per_device_train_batch_size={args.train_batch_size}: the batch norm of head.kind=upernet needs 2"
            " images a process; take larger batches, or head.kind=linear"
        )


def prepare(recipe: Recipe) -> SegmentationTrainer:
    """Build everything that the recipe names, up to the first step."""
    args, resume_from = finetuning.start(recipe)
    args.batch_eval_metrics = True  # counts are summed batch by batch
    data, head = recipe.data, recipe.head
    check_batch(args, head)
    encoder = load_encoder(recipe.pretrained, args.attn_implementation, **recipe.model)
    config = encoder.config
    check_channels(config, data.image_mean)
    rows = SegmentationRows(data.train, data, config, data.class_names and len(data.class_names))
    largest = rows.read_all()
    names = data.class_names or [f"LABEL_{n}" for n in range(largest + 1)]
    if len(names) < 2:
        raise RecipeError(f"the training maps hold one class, {names}; segmentation needs two or more")
    if 0 <= data.ignore_index < len(names):
        raise RecipeError(
            f"ignore_index={data.ignore_index} would stand for the class {names[data.ignore_index]!r} too; name another"
            " value of the maps as ignore_index"
        )
    test_rows = SegmentationRows(data.test, data, config, len(names))
    test_rows.read_all()
    model = put_head(encoder, head, names, data.ignore_index, recipe.pretrained)
    processor, size = image_processor(config, data), to_pair(config.image_size)
    count_steps(args, len(rows))
    num_positions = args.max_steps * args.images_per_step
    examples = KeyedExamples(rows, Augmentation(data, size), args.seed, num_positions)

    def evaluated(columns: dict) -> dict:
        pixels = processor(columns["image"], return_tensors="pt")["pixel_values"][0]
        labels = columns["labels"]
        return {
            "pixel_values": pixels,
            "labels": resized_labels(labels, size),
            "true_map": torch.from_numpy(labels),
        }

    return finetuning.build_trainer(
        recipe,
        args,
        resume_from,
        model,
        examples,
        EvaluationImages(test_rows, evaluated),
        trainer_class=SegmentationTrainer,
        data_collator=collate,
        compute_metrics=SegmentationFigures(names),
        processing_class=processor,
        usage=USAGE,
    )


USAGE = """
import modeling_ehm  # registers the classes
from transformers import pipeline

segment = pipeline("image-segmentation", model=repo)
segment(image)  # [{"label": ..., "mask": a PIL image of the image's size, 255 where the class is}, ...]
"""


def execute(trainer: SegmentationTrainer) -> dict[str, float]:
    """Train, evaluate, save, push, and draw `predictions.png` if matplotlib is installed; returns the figures."""
    figures = finetuning.execute(trainer)
    if trainer.is_world_process_zero() and importlib.util.find_spec("matplotlib") is not None:
        draw_predictions(trainer, Path(trainer.args.output_dir) / "predictions.png")
    return figures


@torch.no_grad()
def draw_predictions(trainer: SegmentationTrainer, path: Path) -> None:
    """Draw up to four test images, at even distances in the set, with true and predicted maps."""
    test, model = trainer.eval_dataset, trainer.bare_model
    chosen = np.linspace(0, len(test) - 1, min(len(test), pictures.MAX_IMAGES)).round().astype(int).tolist()
    shown = []
    with trainer.averaged_weights(), evaluation_mode(model):
        for row in chosen:
            columns = test.rows[row]
            pixels = test.make_example(columns)["pixel_values"][None].to(model.device)
            predicted = predicted_map(model(pixel_values=pixels).logits[0], columns["labels"].shape)
            image = np.asarray(columns["image"].convert("RGB"))
            shown.append((image, columns["labels"], predicted.cpu().numpy()))
    names = [model.config.id2label[n] for n in range(model.config.num_labels)]
    pictures.render_segmentation(shown, names, path, trainer.ignore_index)
