"""Object detection: labelled boxes -> `EHMBackbone` under transformers' RT-DETR.

RT-DETR picks its queries from a dense prediction at every cell, and so learns from few images sooner than detectors
whose queries must learn to look. Its maps come from `feature_scales`: one plain ViT gives the three strides it wants.
"""

import importlib.util
import io
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from datasets import ClassLabel
from PIL import Image as PILImage
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessorPil
from transformers.trainer_utils import EvalPrediction

from modeling_ehm.configuration_ehm import EHMConfig, to_pair
from modeling_ehm.modeling_ehm import evaluation_mode
from modeling_ehm.training import pictures
from modeling_ehm.training.arguments import TaskTrainingArguments
from modeling_ehm.training.data import check_crops, random_resized_crop
from modeling_ehm.training.decoding import FORMATS, to_uint8_tensor
from modeling_ehm.training.labelled import (
    EvaluationImages,
    KeyedExamples,
    LabelledData,
    LabelledRows,
    check_channels,
    check_same_classes,
    count_steps,
    resized,
)
from modeling_ehm.training.metrics import as_evaluate_metric
from modeling_ehm.training.pretrained import load_encoder
from modeling_ehm.training.recipes import Recipe, RecipeError, Schema
from modeling_ehm.training.task_trainer import TaskTrainer
from modeling_ehm.training.tasks import finetuning

DRAWN_SCORE = 0.3  # of the boxes in the picture; figures count all
SLOP = 1.0  # pixels by which a box may overlap the edge of its picture, as rounded annotations do; it is cut there
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass
class DetectionData(LabelledData):
    """The `data` section. `objects_column` of a source holds, for each image, `bbox` and `category` of its objects, as
    COCO's: boxes as x, y, width, height in pixels, categories as class numbers.

    Attributes:
        crop_scale: Share of the image's area that a training crop takes, smallest and largest; 1 takes all. Objects
            whose centre is outside are left out.
        crop_ratio: Width over height of a crop relative to the image's, smallest and largest.
        horizontal_flip: Whether half of the crops are mirrored.
    """

    crop_scale: list[float] = field(default_factory=lambda: [0.5, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [0.8, 1.25])
    horizontal_flip: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_crops(self.crop_scale, self.crop_ratio)


@dataclass
class DetectionHead:
    """The `head` section: sizes of RT-DETR (Zhao et al. 2024), whose own are those of the large model.

    Attributes:
        out_indices: Stages of the encoder that give the three maps, fine to coarse: 0 the patch embeddings, l the l-th
            layer; None takes the last three.
        feature_scales: Cells a patch side of each map; strides are patch / scale and must double: 8, 16, 32 for
            patch 8 and [1, 0.5, 0.25].
        hidden_size: Width of the detector.
        decoder_layers: Layers of its decoder.
        num_attention_heads: Heads in encoder and decoder.
        num_queries: Objects it can find in an image.
        num_denoising: Noised true boxes that it learns to repair beside; 0 for none.
    """

    out_indices: list[int] | None = None
    feature_scales: list[float] = field(default_factory=lambda: [1, 0.5, 0.25])
    hidden_size: int = 256
    decoder_layers: int = 6
    num_attention_heads: int = 8
    num_queries: int = 300
    num_denoising: int = 100

    def __post_init__(self):
        scales = self.feature_scales
        if len(scales) != 3 or scales != [scales[0], scales[0] / 2, scales[0] / 4] or scales[0] <= 0:
            raise ValueError(
                f"head.feature_scales={scales} must be three positive numbers, each half of the one before"
            )
        if self.out_indices is not None and len(self.out_indices) != 3:
            raise ValueError(f"head.out_indices={self.out_indices} must name three stages, one for each of the maps")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"head.hidden_size={self.hidden_size} is not a multiple of"
                f" head.num_attention_heads={self.num_attention_heads}"
            )


SCHEMA = Schema(DetectionData, TaskTrainingArguments, DetectionHead)


# Boxes


def size_of(encoded: dict) -> tuple[int, int]:
    """(width, height) of an encoded image as it is shown, from its header."""
    source = encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])
    with PILImage.open(source, formats=FORMATS) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(274) in TRANSPOSED else (width, height)


def category_names(rows: LabelledRows) -> list[str]:
    """Names of the classes of a column `objects`: those its type gives, else LABEL_0, ... up to the largest."""
    category = category_feature(rows)
    if isinstance(category, ClassLabel):
        return list(category.names)
    largest = max((int(c) for objects in rows.column("objects") for c in parts_of(objects)[1]), default=0)
    return [f"LABEL_{n}" for n in range(largest + 1)]


def category_feature(rows: LabelledRows):
    """Type of the categories in a column `objects`.

    Raises:
        ValueError: the column does not hold boxes and categories.
    """
    feature = rows.features["objects"]
    feature = getattr(feature, "feature", feature)  # a list of objects, or lists of their parts
    if not isinstance(feature, dict) or not {"bbox", "category"} <= set(feature):
        raise ValueError(
            f"{rows.source.path}: objects_column={rows.source.objects_column!r} must hold `bbox` and `category`; it is"
            f" {rows.features['objects']}"
        )
    return getattr(feature["category"], "feature", feature["category"])


def parts_of(objects: dict | list[dict]) -> tuple[list, list]:
    """Boxes and categories of an image, whether given as lists of parts or as a list of objects."""
    if isinstance(objects, list):
        return [o["bbox"] for o in objects], [o["category"] for o in objects]
    return list(objects["bbox"]), list(objects["category"])


def true_objects(rows: LabelledRows, row: int, num_labels: int) -> dict[str, np.ndarray]:
    """Objects of an image: `boxes` `(n, 4)` float64, left, top, right, bottom in its pixels; `labels` `(n,)` int64.

    Raises:
        ValueError: an empty or inverted box, one outside the picture, or an unknown category; row and object are named.
    """
    columns = rows.dataset[row]
    bboxes, categories = parts_of(columns["objects"])
    try:
        width, height = size_of(columns["image"])
    except Exception as error:  # Pillow raises nearly every type on broken files
        raise ValueError(f"{rows.source.path}: row {row} cannot be opened ({type(error).__name__}: {error})") from None
    boxes = np.zeros((len(bboxes), 4))
    for number, (bbox, category) in enumerate(zip(bboxes, categories, strict=True)):
        where = f"{rows.source.path}: row {row}, object {number}, bbox {list(bbox)}"
        if len(bbox) != 4 or not np.isfinite(bbox).all():
            raise ValueError(f"{where}: four finite numbers x, y, width, height are expected")
        x, y, w, h = bbox
        if w <= 0 or h <= 0:
            raise ValueError(f"{where}: width and height must be positive; remove empty boxes, or swap inverted ones")
        if x < -SLOP or y < -SLOP or x + w > width + SLOP or y + h > height + SLOP:
            raise ValueError(
                f"{where} reaches out of its picture of {width}x{height} pixels; boxes are x, y, width, height in"
                " pixels of the image, its EXIF orientation applied"
            )
        if not isinstance(category, int) or not 0 <= category < num_labels:
            raise ValueError(f"{where}: category {category!r} is not a class in [0, {num_labels - 1}]")
        boxes[number] = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    return {"boxes": boxes, "labels": np.array(categories, dtype=np.int64)}


def crop_boxes(
    boxes: np.ndarray, crop: tuple[int, int, int, int], flip: bool, min_side: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes as a crop shows them.

    Args:
        boxes: `(n, 4)` left, top, right, bottom in pixels of the image.
        crop: (left, top, right, bottom) in pixels.
        flip: Whether the crop is mirrored.
        min_side: Boxes of which less than so many pixels are left in width or height are dropped.

    Returns:
        `(m, 4)` centre x, centre y, width, height as shares of the crop; `(n,)` bool, which boxes are kept: those whose
        centre is inside, cut at the crop's edges.
    """
    left, top, right, bottom = crop
    origin, size = np.array([left, top, left, top]), np.array([right - left, bottom - top] * 2, dtype=np.float64)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 - origin[:2]
    moved = (boxes - origin).clip(0, size)
    kept = ((centre >= 0) & (centre < size[:2])).all(1) & (moved[:, 2:] - moved[:, :2] >= min_side).all(1)
    moved = moved[kept] / size
    if flip:
        moved = np.stack([1 - moved[:, 2], moved[:, 1], 1 - moved[:, 0], moved[:, 3]], axis=1)
    low, high = moved[:, :2], moved[:, 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=1), kept


# Examples


class DetectionAugmentation:
    """Row and numbers -> `pixel_values` `(C, H, W)` float32 normalised, `labels` with `class_labels` and `boxes`."""

    def __init__(self, data: DetectionData, objects: list[dict], image_size: tuple[int, int]):
        self.data, self.objects, self.image_size = data, objects, image_size
        self.mean = torch.tensor(data.image_mean)[:, None, None]
        self.std = torch.tensor(data.image_std)[:, None, None]

    def __call__(self, columns: dict, uniform: np.ndarray) -> dict:
        data, image, objects = self.data, columns["image"], self.objects[columns["row"]]
        native = image.width / image.height
        ratio = data.crop_ratio[0] * native, data.crop_ratio[1] * native
        crop = random_resized_crop(image.size, data.crop_scale, ratio, uniform[:22])
        flip = data.horizontal_flip and uniform[22] < 0.5
        boxes, kept = crop_boxes(objects["boxes"], crop, flip)
        image = resized(image.crop(crop), self.image_size)
        if flip:
            image = image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
        labels = {
            "class_labels": torch.from_numpy(objects["labels"][kept]),
            "boxes": torch.from_numpy(boxes).float(),
        }
        return {"pixel_values": (to_uint8_tensor(image).float() / 255 - self.mean) / self.std, "labels": labels}


def collate(examples: list[dict]) -> dict:
    """Stack `pixel_values`; `labels` stay a list of dicts in training, `rows` become a tensor in evaluation."""
    batch = {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
    if "labels" in examples[0]:
        return batch | {"labels": [example["labels"] for example in examples]}
    return batch | {"rows": torch.tensor([example["row"] for example in examples])}


class DetectionTrainer(TaskTrainer):
    """Evaluates on predictions of one shape, and leaves true boxes, of which images have any number, to the metric."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(pixel_values=inputs["pixel_values"])
        return None, (outputs.logits.float(), outputs.pred_boxes.float()), inputs["rows"]


class DetectionFigures:
    """`compute_metrics`: COCO's figures and the AP of each class, in percent, in pixels of the original images.

    Args:
        rows: The test rows.
        objects: True objects of each row, from `true_objects`.
        names: Of the classes.
        processor: Turns the detector's outputs into boxes.
    """

    def __init__(self, rows: LabelledRows, objects: list[dict], names: list[str], processor: RTDetrImageProcessorPil):
        self.objects, self.names, self.processor = objects, names, processor
        self.sizes = [size_of(rows.dataset[row]["image"]) for row in range(len(rows))]
        self.metric = as_evaluate_metric("coco_average_precision")

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, boxes = (torch.from_numpy(array) for array in prediction.predictions)
        chosen = [int(row) for row in prediction.label_ids]
        found = self.processor.post_process_object_detection(
            SimpleNamespace(logits=logits, pred_boxes=boxes),
            threshold=0.0,
            target_sizes=[self.sizes[row][::-1] for row in chosen],
        )
        found = [{name: part.numpy() for name, part in image.items()} for image in found]
        self.metric.add_batch(predictions=found, references=[self.objects[row] for row in chosen])
        scores = self.metric.compute(num_labels=len(self.names))
        per_class = scores.pop("ap_per_class")
        scores |= {f"ap_{name}": value for name, value in zip(self.names, per_class, strict=True)}
        return {name: 100 * value for name, value in scores.items()}


def build_detector(head: DetectionHead, encoder_config: EHMConfig, names: list[str]) -> RTDetrForObjectDetection:
    """RT-DETR with random weights on an `EHMBackbone`.

    Raises:
        RecipeError: the native size does not halve twice.
    """
    patch, across = to_pair(encoder_config.patch_size)
    if patch != across:
        raise RecipeError(f"patch_size={encoder_config.patch_size} is not square, and RT-DETR knows one stride a map")
    strides = [patch / scale for scale in head.feature_scales]
    sides = to_pair(encoder_config.image_size)
    if any(stride != int(stride) for stride in strides) or any(side % strides[-1] for side in sides):
        raise RecipeError(
            f"model.image_size={encoder_config.image_size} is not a multiple of {strides[-1]:g} pixels, the stride of"
            f" the coarsest map (patch_size {patch} / head.feature_scales {head.feature_scales[-1]}): maps must halve"
            " exactly"
        )
    cells = sum(int(sides[0] // stride) * int(sides[1] // stride) for stride in strides)
    if head.num_queries > cells:
        raise RecipeError(
            f"head.num_queries={head.num_queries} exceeds the {cells} cells of the feature maps at"
            f" model.image_size={encoder_config.image_size}; queries are chosen among them"
        )
    last = encoder_config.num_hidden_layers
    fields = encoder_config.to_diff_dict() | {
        "out_indices": head.out_indices or [last - 2, last - 1, last],
        "out_features": None,
        "feature_scales": list(head.feature_scales),
    }
    config = RTDetrConfig(
        backbone_config=EHMConfig(**{k: v for k, v in fields.items() if k not in UNWANTED}),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        encoder_in_channels=[encoder_config.hidden_size] * 3,
        feat_strides=[int(stride) for stride in strides],
        encoder_hidden_dim=head.hidden_size,
        encoder_ffn_dim=4 * head.hidden_size,
        encoder_attention_heads=head.num_attention_heads,
        d_model=head.hidden_size,
        decoder_in_channels=[head.hidden_size] * 3,
        decoder_ffn_dim=4 * head.hidden_size,
        decoder_layers=head.decoder_layers,
        decoder_attention_heads=head.num_attention_heads,
        num_queries=head.num_queries,
        num_denoising=head.num_denoising,
    )
    return RTDetrForObjectDetection(config)


def check_batch(args: TaskTrainingArguments, head: DetectionHead, config: EHMConfig) -> None:
    """Raise a RecipeError if RT-DETR's batch norms would see one value a channel on the coarsest map."""
    stride = to_pair(config.patch_size)[0] / head.feature_scales[-1]
    cells = [int(side // stride) for side in to_pair(config.image_size)]
    if args.train_batch_size * cells[0] * cells[1] < 2:
        raise RecipeError(
            f"training.per_device_train_batch_size={args.train_batch_size}: the coarsest map at"
            f" model.image_size={config.image_size} has a single cell, and its batch norm needs two values; take larger"
            " batches or larger images"
        )


UNWANTED = ("architectures", "auto_map", "id2label", "label2id", "transformers_version", "dtype", "model_type")


def prepare(recipe: Recipe) -> TaskTrainer:
    """Build everything that the recipe names, up to the first step; all boxes are checked."""
    require_scipy()
    args, resume_from = finetuning.start(recipe)
    args.ddp_find_unused_parameters = True  # a batch without an object leaves the denoising weights unused
    data = recipe.data
    encoder = load_encoder(recipe.pretrained, args.attn_implementation, **recipe.model)
    config = encoder.config
    check_channels(config, data.image_mean)
    size = to_pair(config.image_size)
    rows, test_rows = (
        LabelledRows(source, {"objects": source.objects_column}, size, config.num_channels, data.max_pixels)
        for source in (data.train, data.test)
    )
    names = category_names(rows)
    if isinstance(category_feature(test_rows), ClassLabel):
        check_same_classes(names, category_names(test_rows), data.test)
    objects, test_objects = ([true_objects(r, n, len(names)) for n in range(len(r))] for r in (rows, test_rows))
    model = build_detector(recipe.head, config, names)
    check_batch(args, recipe.head, config)
    backbone = model.model.backbone.model
    backbone.load_state_dict(encoder.state_dict())
    backbone.set_attn_implementation(args.attn_implementation)
    height, width = size
    processor = RTDetrImageProcessorPil(
        size={"height": height, "width": width},
        resample=3,  # bicubic, as in training
        do_normalize=True,
        image_mean=data.image_mean,
        image_std=data.image_std,
    )

    def evaluated(columns: dict) -> dict:
        pixels = processor(columns["image"], return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "row": columns["row"]}

    count_steps(args, len(rows))
    augmentation = DetectionAugmentation(data, objects, size)
    return finetuning.build_trainer(
        recipe,
        args,
        resume_from,
        model,
        KeyedExamples(rows, augmentation, args.seed, args.max_steps * args.images_per_step),
        EvaluationImages(test_rows, evaluated),
        trainer_class=DetectionTrainer,
        data_collator=collate,
        compute_metrics=DetectionFigures(test_rows, test_objects, names, processor),
        processing_class=processor,
        usage=USAGE,
    )


def require_scipy() -> None:
    """Raise an ImportError that says what to install."""
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError('matching boxes needs scipy: pip install "modeling_ehm[tasks]"') from error


USAGE = """
import modeling_ehm  # registers the backbone's class; the directory does not load without it
from transformers import pipeline

detect = pipeline("object-detection", model=repo)
detect(image)  # [{"score": ..., "label": ..., "box": {"xmin": ..., ...}}, ...]
"""


def execute(trainer: DetectionTrainer) -> dict[str, float]:
    """Train, evaluate, save, push, and draw `predictions.png` if matplotlib is installed; returns the figures."""
    figures = finetuning.execute(trainer)
    if trainer.is_world_process_zero() and importlib.util.find_spec("matplotlib") is not None:
        draw_predictions(trainer, Path(trainer.args.output_dir) / "predictions.png")
    return figures


@torch.no_grad()
def draw_predictions(trainer: DetectionTrainer, path: Path) -> None:
    """Draw up to four test images, at even distances in the set, with true boxes and those found."""
    rows, model, processor = trainer.eval_dataset.rows, trainer.bare_model, trainer.processing_class
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), pictures.MAX_IMAGES)).round().astype(int).tolist()
    shown = []
    with trainer.averaged_weights(), evaluation_mode(model):
        for row in chosen:
            image = rows[row]["image"]
            pixels = processor(image, return_tensors="pt")["pixel_values"].to(model.device)
            outputs = model(pixel_values=pixels)
            (found,) = processor.post_process_object_detection(
                outputs, threshold=DRAWN_SCORE, target_sizes=[image.size[::-1]]
            )
            found = {name: part.cpu().numpy() for name, part in found.items()}
            shown.append((np.asarray(image.convert("RGB")), true_objects(rows, row, model.config.num_labels), found))
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    pictures.render_detection(shown, names, path)
