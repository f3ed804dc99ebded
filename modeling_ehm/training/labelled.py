"""Labelled images for downstream tasks: rows with random access -> keyed order -> augmented examples.

As in pre-training, a training example is a function of its position in one endless sequence, so that processes,
workers and interruptions change nothing; see `data.py`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image
from PIL import Image as PILImage
from transformers import ViTImageProcessorPil

from modeling_ehm.configuration_ehm import EHMConfig, to_pair
from modeling_ehm.training.arguments import ImageTrainingArguments
from modeling_ehm.training.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SAMPLE_STREAM,
    ImageSource,
    UnusableRow,
    check_normalization,
    find_image_column,
    keyed_bits,
    keyed_order,
    open_source,
)
from modeling_ehm.training.decoding import MODES, decode_image
from modeling_ehm.training.recipes import RecipeError

DRAWS = 128  # numbers in [0, 1) that each training example is made with


@dataclass(kw_only=True)
class ImageData:
    """What the `data` sections of all downstream tasks share.

    Attributes:
        image_mean: Mean of each channel on the scale 0 to 1, one number a channel; that of the pre-training.
        image_std: Standard deviation of each channel.
        max_pixels: Larger images are refused (decompression bombs).
    """

    image_mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    image_std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))
    max_pixels: int = 178_956_970

    def __post_init__(self):
        check_normalization(self.image_mean, self.image_std)


@dataclass(kw_only=True)
class LabelledData(ImageData):
    """The `data` section of tasks that learn from labels; other fields: see `ImageData`.

    Attributes:
        train: Labelled images to learn from.
        test: Labelled images to judge by.
    """

    train: ImageSource
    test: ImageSource


class LabelledRows:
    """Rows of a labelled source by number: the image undecoded, the other columns as `datasets` gives them.

    Args:
        source: Where from; it must have random access, so it is not streamed.
        columns: Canonical names of the columns wanted beside the image, with the column of the source of each, for
            example `{"label": source.label_column}`.
        image_size: (height, width) of the embedded synthetic images.
        num_channels: Channels to decode to.
        max_pixels: As in `ImageData`.

    Attributes:
        features: `datasets` feature of each column, by canonical name.

    Raises:
        ValueError: a streamed source, a column that is missing or not named, no rows.
    """

    def __init__(
        self,
        source: ImageSource,
        columns: dict[str, str | None],
        image_size: tuple[int, int],
        num_channels: int = 3,
        max_pixels: int = 178_956_970,
    ):
        if source.streaming:
            raise ValueError(f"{source.path}: labelled images are read with random access; set streaming: false")
        dataset = open_source(source, image_size)
        for name, column in columns.items():
            if column is None:
                raise ValueError(f"{source.path}: name a column of it as {name}_column, which this task needs")
            if column not in dataset.column_names:
                raise ValueError(
                    f"{source.path} has no column {column!r} ({name}_column); its columns are {dataset.column_names}"
                )
        if len(dataset) == 0:
            raise ValueError(f"{source.path}, split {source.split!r}, holds no images")
        image_column = find_image_column(dataset, source)
        if len(set(columns.values())) < len(columns):
            raise ValueError(f"{source.path}: a column is named for two purposes, {columns}; each needs its own")
        for name, column in columns.items():
            if column == image_column:
                raise ValueError(f"{source.path}: {name}_column={column!r} is the column of the images; name another")
        dataset = dataset.select_columns([image_column, *columns.values()])
        dataset = dataset.cast_column(image_column, Image(decode=False))
        names = {image_column: "image", **{column: name for name, column in columns.items()}}
        self.dataset: Dataset = dataset.rename_columns({old: new for old, new in names.items() if old != new})
        self.features = self.dataset.features
        self.source, self.num_channels, self.max_pixels = source, num_channels, max_pixels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        """Columns of a row, `image` decoded to an upright PIL image, and its number as `row`.

        Raises:
            UnusableRow: the image cannot be decoded; the row is named.
        """
        columns = self.dataset[row] | {"row": row}
        try:
            columns["image"] = decode_image(columns["image"], self.num_channels, self.max_pixels)
        except Exception as error:  # Pillow raises nearly every type on broken files
            reason = f"{type(error).__name__}: {error}"
            raise UnusableRow(
                f"{self.source.path}: row {row} cannot be decoded ({reason}); mend it or leave it out of the data"
            ) from None
        return columns

    def select(self, rows: np.ndarray) -> "LabelledRows":
        """The same source with only these rows, in this order."""
        chosen = copy.copy(self)
        chosen.dataset = self.dataset.select(rows)
        return chosen

    def column(self, name: str) -> list:
        """All values of a column, without decoding images."""
        return self.dataset.select_columns([name])[name][:]


class EvaluationImages(torch.utils.data.Dataset):
    """`make_example(columns)` of each row, in the order of the rows."""

    def __init__(self, rows: LabelledRows, make_example: Callable[[dict], dict]):
        self.rows, self.make_example = rows, make_example

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        return self.make_example(self.rows[row])


class KeyedExamples(torch.utils.data.Dataset):
    """Training examples by position: pass p over the rows has the order of (seed, p), each example its own numbers.

    Args:
        rows: The labelled rows.
        make_example: `(columns, uniform)` -> example; `uniform` `(DRAWS,)` in [0, 1) is a function of (seed, pass,
            row), and all the randomness that an example may use.
        seed: Key of order and numbers.
        num_positions: Length of the sequence that is offered: steps times images a step.
    """

    def __init__(
        self, rows: LabelledRows, make_example: Callable[[dict, np.ndarray], dict], seed: int, num_positions: int
    ):
        self.rows, self.make_example = rows, make_example
        self.seed, self.num_positions = seed, num_positions
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.num_positions

    @property
    def extent(self) -> dict[str, int]:
        """As `data.IndexedSamples.extent`."""
        return {"rows": len(self.rows)}

    def __getitem__(self, position: int) -> dict:
        if not 0 <= position < self.num_positions:
            raise IndexError(f"position={position} is not in [0, {self.num_positions})")
        pass_index, offset = divmod(position, len(self.rows))
        if self._order[0] != pass_index:
            self._order = (pass_index, keyed_order(self.seed, pass_index, 0, len(self.rows)))
        row = int(self._order[1][offset])
        return self.make_example(self.rows[row], keyed_uniform(self.seed, SAMPLE_STREAM, pass_index, row))


def keyed_uniform(seed: int, stream: int, *key: int, count: int = DRAWS) -> np.ndarray:
    """`(count,)` float64 in [0, 1), a pure function of (seed, stream, key)."""
    return (keyed_bits(seed, stream, *key, count=count) >> np.uint64(11)) * 2.0**-53


def class_names(rows: LabelledRows) -> list[str]:
    """Names of the classes in the column `label`: those its type gives, else LABEL_0, LABEL_1, ... up to the largest.

    Raises:
        ValueError: labels that are not whole numbers, or lie outside the classes; the first such row is named.
    """
    feature, labels = rows.features["label"], rows.column("label")
    for row, label in enumerate(labels):
        if not isinstance(label, int):
            raise ValueError(
                f"{rows.source.path}: row {row} has {label!r} in label_column={rows.source.label_column!r}, which"
                " should hold the numbers of classes"
            )
    names = feature.names if isinstance(feature, ClassLabel) else [f"LABEL_{n}" for n in range(max(labels) + 1)]
    check_labels(rows, len(names))
    return list(names)


def check_labels(rows: LabelledRows, num_labels: int, names: list[str] | None = None) -> None:
    """Raise a ValueError that names the first row whose `label` is not in [0, num_labels), or other class names."""
    if names is not None and isinstance(rows.features["label"], ClassLabel):
        check_same_classes(names, rows.features["label"].names, rows.source)
    for row, label in enumerate(rows.column("label")):
        if not isinstance(label, int) or not 0 <= label < num_labels:
            raise ValueError(
                f"{rows.source.path}: row {row} has label {label!r}, not a class in [0, {num_labels - 1}]; correct the"
                " data, or give training and test sets the same classes"
            )


def check_same_classes(train: list[str], test: list[str], source: ImageSource) -> None:
    """Raise a ValueError if training and test set name their classes differently; numbers would mean other things."""
    for number, (one, other) in enumerate(zip_longest(train, test)):
        if one != other:
            raise ValueError(
                f"{source.path}: class {number} of the test set is {other!r}, that of the training set {one!r}; give"
                " both the same classes in the same order"
            )


def check_channels(config: EHMConfig, image_mean: list[float]) -> None:
    """Raise a RecipeError if image files cannot have these channels, or the normalisation is for other ones."""
    if config.num_channels not in MODES:
        raise RecipeError(
            f"model.num_channels={config.num_channels}: image files have 1, 3 or 4 channels; for others give a"
            " torch data set of your own to the Trainer"
        )
    if len(image_mean) != config.num_channels:
        raise RecipeError(
            f"data.image_mean={image_mean} has {len(image_mean)} numbers, but model.num_channels="
            f"{config.num_channels}; give one mean and one standard deviation a channel"
        )


def count_steps(args: ImageTrainingArguments, num_rows: int | None) -> None:
    """Set `args.max_steps` from `num_train_epochs`, if the recipe does not give it.

    Raises:
        RecipeError: it does not, and the number of rows is not known.
    """
    if args.max_steps <= 0:
        if num_rows is None:
            raise RecipeError(
                "training.max_steps or training.num_samples must be set: a stream has no length from which epochs could"
                " be counted"
            )
        args.max_steps = max(1, int(args.num_train_epochs * num_rows) // args.images_per_step)


def resized(image: PILImage.Image, size: tuple[int, int]) -> PILImage.Image:
    """Bicubic resize to (height, width), as the saved image processor does."""
    return image.resize(size[::-1], PILImage.Resampling.BICUBIC)


def image_processor(
    config: EHMConfig, image_mean: list[float], image_std: list[float], crop_pct: float = 1.0
) -> ViTImageProcessorPil:
    """transformers' own processor, saved beside the weights: resize to the native size, scale, normalise.

    It converts to RGB for 3 channels; for 1 or 4, convert with PIL (`L`, `RGBA`) before calling it.

    Args:
        config: Says size and channels.
        image_mean: As in `ImageData`.
        image_std: As in `ImageData`.
        crop_pct: 1 resizes the image to the native size; below, its shorter side becomes native / crop_pct, and the
            centre is cut out.

    Raises:
        RecipeError: `crop_pct` below 1 for a native size that is not square, which images of other proportions do not
            fill: the processor would fill up with black.
    """
    height, width = to_pair(config.image_size)
    sizes = {"size": {"height": height, "width": width}}
    if crop_pct < 1:
        if height != width:
            raise RecipeError(
                f"data.crop_pct={crop_pct} with model.image_size={config.image_size}: the centre can be cut out for"
                " square sizes only; set crop_pct to 1"
            )
        sizes = {"size": {"shortest_edge": round(min(height, width) / crop_pct)}, "do_center_crop": True}
        sizes["crop_size"] = {"height": height, "width": width}
    return ViTImageProcessorPil(
        **sizes,
        resample=3,  # bicubic, as in training
        image_mean=image_mean,
        image_std=image_std,
        do_convert_rgb=True if config.num_channels == 3 else None,
    )
