"""Images for pre-training: any source that `datasets` reads -> keyed order -> decoded crops -> batches.

One rule makes order, crops and masks independent of processes, workers and interruptions: a training example is a
function of its *position* in one endless sequence of samples. Position p belongs to global batch p // batch size.
Which sample stands there, how it is cropped and the seed of its mask follow from (seed, pass over the data, sample),
through counter-based randomness (Philox), never from a generator that remembers what was drawn before.

So the training set is an ordinary map-style dataset over positions, read in order: the Trainer's own sampler splits
batches over processes and workers, and skips to any step on resume without decoding what it skips.
"""

import dataclasses
import functools
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetBuilder, Image, IterableDataset, load_dataset_builder
from datasets.data_files import FILES_TO_IGNORE
from PIL import Image as PILImage
from torch import Tensor

from modeling_ehm.training import decoding
from modeling_ehm.training.decoding import (
    DECODERS,
    Pixels,
    check_decoder,
    decode_image,
    is_of_network,
    resized_crop,
    size_of,
    to_uint8_tensor,
)

logger = logging.getLogger(__name__)

# Streams of randomness under one seed.
ORDER_STREAM, SAMPLE_STREAM = 0, 1
BYTES_AT = re.compile(r"<_io\.BytesIO object at 0x[0-9a-f]+>")  # Pillow names what it could not identify
NO_IMAGES = "data.train yields no images: check path, data_files and split"
# user:password@host, or a query that signs an address for whoever has it.
SECRET_IN_ADDRESS = re.compile(
    r"^\w+://([^/?#]*@|[^?#]*\?(.*&)?([\w-]*(signature|token|secret|password|credential)|sig|\w*access_?key\w*|\w*key)=)",
    re.IGNORECASE,
)
READ_AHEAD = 64  # encoded rows fetched at a time from a stream
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass
class ImageSource:
    """Where images come from: what `datasets.load_dataset` takes, and which columns to read.

    Attributes:
        path: Hub id, or a builder: "parquet", "imagefolder", "webdataset", ...; "synthetic" is the embedded image set.
        name: Configuration of the dataset.
        data_dir: Folder of the files.
        data_files: File, list of files or mapping from split to files; globs and URLs are allowed.
        split: Split to read; slices such as "train[:5000]" work when not streaming. For "synthetic", any other
            split than "train" holds other images.
        revision: Commit of a Hub dataset; written to the model card.
        streaming: Read from where the files lie instead of preparing a local copy first.
        image_column: Column of the images; None takes the only column whose type is Image.
        label_column: Column of class labels, for probes.
        segments_column: Column of segment maps, for the hierarchy's accuracy.
        ignore_index: Value of the segment maps that belongs to no segment.
        objects_column: Column of boxes and their classes, for detection.
        conversations_column: Column of conversations, for alignment with a language model: lists of messages as in
            LLaVA's data (`from`, `value`) or in chat templates (`role`, `content`).
        question_column: Column of one question or a list of them.
        answer_column: Column of their answers: as many as questions; of a single question also several people's.
        text_column: Column of captions, or of class names to put into `data.templates`.
        group_column: Column of numbers that true matches share, for retrieval.
        tag_columns: Columns whose joined values name the kinds by which retrieval figures are split.
        max_images: Read only so many images: the first ones, or, of a stream with several shards, the first ones of
            each; the size of the set for "synthetic".
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list | dict | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    image_column: str | None = None
    label_column: str | None = None
    segments_column: str | None = None
    ignore_index: int | None = None
    objects_column: str | None = None
    conversations_column: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    text_column: str | None = None
    group_column: str | None = None
    tag_columns: list[str] | None = None
    max_images: int | None = None

    def __post_init__(self):
        if self.path == "synthetic" and (self.data_files or self.data_dir or self.name):
            raise ValueError("path=synthetic is the embedded image set, which has no files: name a path for data_files")
        for name in ("path", "data_dir", "data_files"):
            for address in strings_in(getattr(self, name)):
                if SECRET_IN_ADDRESS.search(address):
                    raise ValueError(
                        f"{name}={urlsplit(address).hostname} ... holds a password or a signature, which would be"
                        " written to the run's files: log in with `hf auth login`, HF_TOKEN or the storage's own"
                        " settings, or fetch the files first"
                    )


def strings_in(value: str | list | dict | None) -> Iterator[str]:
    """All strings of a setting, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from strings_in(one)


@dataclass
class DataArguments:
    """The `data` section of a recipe.

    Attributes:
        train: Unlabelled images to learn from.
        probe_train: Labelled images that k-NN and linear probe learn from; None switches the probes off.
        probe_test: Labelled images they are tested on.
        segments: Images with segment maps, to score the hierarchy; None switches that off.
        crop_scale: Share of the image's area that a crop takes, smallest and largest.
        crop_ratio: Width over height of a crop, smallest and largest.
        horizontal_flip: Whether half of the crops are mirrored.
        image_mean: Mean of each channel on the scale 0 to 1, one number a channel.
        image_std: Standard deviation of each channel.
        shuffle_window: Samples of a stream that are shuffled among each other; shards are shuffled as wholes.
        max_skipped_share: Share of undecodable images above which the run stops.
        max_pixels: Larger images are not decoded but recorded as skipped (decompression bombs).
        decoder: "pil", or "simplejpeg": plain JPEGs by simplejpeg and crops by OpenCV, in two thirds of the time,
            with slightly other pixels (`decoding.py`); needs the extra `decode`.
    """

    train: ImageSource
    probe_train: ImageSource | None = None
    probe_test: ImageSource | None = None
    segments: ImageSource | None = None
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    horizontal_flip: bool = True
    image_mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    image_std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))
    shuffle_window: int = 2048
    max_skipped_share: float = 0.01
    max_pixels: int = 178_956_970
    decoder: str = "pil"

    def __post_init__(self):
        check_crops(self.crop_scale, self.crop_ratio)
        check_normalization(self.image_mean, self.image_std)
        check_decoder(self.decoder)
        if self.shuffle_window < 1:
            raise ValueError(
                f"data.shuffle_window={self.shuffle_window} must be at least 1 (1 keeps the stream's order)"
            )
        if not 0 <= self.max_skipped_share <= 1:
            raise ValueError(f"data.max_skipped_share={self.max_skipped_share} must lie in [0, 1]")
        if (self.probe_train is None) != (self.probe_test is None):
            raise ValueError("data.probe_train and data.probe_test go together: give both, or neither")


def check_crops(crop_scale: list[float], crop_ratio: list[float]) -> None:
    """Raise a ValueError unless both are a smallest and a largest number that crops can have."""
    for name, value, high in (("crop_scale", crop_scale, 1), ("crop_ratio", crop_ratio, float("inf"))):
        if len(value) != 2 or not 0 < value[0] <= value[1] <= high:
            raise ValueError(f"data.{name}={value} must be two rising numbers above 0, at most {high}")


def check_normalization(image_mean: list[float], image_std: list[float]) -> None:
    """Raise a ValueError unless there is one mean and one positive standard deviation a channel."""
    if len(image_mean) != len(image_std) or min(image_std, default=0) <= 0:
        raise ValueError(
            f"data.image_mean={image_mean} and data.image_std={image_std} must hold one number a channel, the latter"
            " positive"
        )


def keyed_bits(seed: int, stream: int, *key: int, count: int) -> np.ndarray:
    """`count` uint64 that are a pure function of (seed, stream, key); raw Philox output, the same in every numpy."""
    words = [int(k) % 2**64 for k in key]
    counter = np.array([0, *words, *[0] * (3 - len(words))], dtype=np.uint64)
    philox = np.random.Philox(key=np.array([seed % 2**64, stream], dtype=np.uint64), counter=counter)
    return philox.random_raw(count)


def keyed_order(seed: int, pass_index: int, part: int, count: int) -> np.ndarray:
    """Permutation of `count` items for one pass over the data, `(count,)` int64."""
    return keyed_bits(seed, ORDER_STREAM, pass_index, part, count=count).argsort(kind="stable")


@dataclass(frozen=True)
class Sample:
    """One row in the sequence: its pass over the data, its identity in the source, and its columns.

    `sample_id` is the row, and in streams `shard << 40 | row in the shard`. `columns["image"]` is an image still
    encoded, `{"bytes", "path"}`, or None. `error` is what ended the reading of a shard, of the row after its last.
    """

    pass_index: int
    sample_id: int
    columns: dict
    error: str | None = None

    @property
    def place(self) -> dict:
        """Where to find it, for the record of what was skipped."""
        path = (self.columns["image"] or {}).get("path")
        return {"shard": self.sample_id >> 40, "row": self.sample_id & (1 << 40) - 1, "path": path}


class IndexedSamples:
    """Endless keyed sequence over a dataset with random access; pass p visits every row once, in the order of p."""

    def __init__(self, dataset: Dataset, seed: int):
        if len(dataset) == 0:
            raise ValueError(NO_IMAGES)
        self.dataset, self.seed = dataset, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def samples_per_pass(self) -> int:
        return len(self.dataset)

    @property
    def extent(self) -> dict[str, int]:
        """How much there is, as far as that is known before it is read."""
        return {"rows": len(self.dataset)}

    def look(self) -> Iterator[dict]:
        """Rows in the order of the first pass, to look at."""
        yield from (self.dataset[int(row)] for row in keyed_order(self.seed, 0, 0, len(self.dataset)))

    def candidates(self, position: int) -> Iterator[Sample]:
        """The sample at this position, then those that replace it, in order, if it cannot be decoded."""
        count = len(self.dataset)
        pass_index, offset = divmod(position, count)
        if self._order[0] != pass_index:
            self._order = (pass_index, keyed_order(self.seed, pass_index, 0, count))
        for step in range(count):
            row = int(self._order[1][(offset + step) % count])
            yield Sample(pass_index, row, self.dataset[row])


class StreamedSamples:
    """Endless keyed sequence over a stream: shards in keyed order, and a keyed order within windows of samples.

    Positions must be asked for in rising order, as a sequential sampler does; going back re-reads from the start.
    Every worker of every process reads all encoded rows and decodes only its own: that needs no agreement between
    them, and costs reading (not decoding) in each. Prefer `streaming: false` where the data fit on the local disk.
    """

    def __init__(self, dataset: IterableDataset, seed: int, window: int):
        self.dataset, self.seed, self.window = dataset, seed, window
        self.samples_per_pass: int | None = None  # known after the first pass
        first = dataset.iter(batch_size=1)
        if next(first, None) is None:
            raise ValueError(NO_IMAGES)
        first.close()
        self._windows: Iterator[tuple[int, list[Sample]]] | None = None
        self._start, self._samples = 0, []

    @property
    def extent(self) -> dict[str, int]:
        """As `IndexedSamples.extent`."""
        return {"shards": self.dataset.num_shards}

    def look(self) -> Iterator[dict]:
        """Rows of the first pass's shards as they lie there, so that no window has to be read."""
        for shard in keyed_order(self.seed, 0, 0, self.dataset.num_shards):
            yield from (columns for columns, error in self._rows(int(shard)) if error is None)

    def candidates(self, position: int) -> Iterator[Sample]:
        """As `IndexedSamples.candidates`; replacements come from the same window, then from those after it."""
        if self._windows is None or position < self._start:
            self._seek(position)
        while position >= self._start + len(self._samples):
            length_was_known = self.samples_per_pass is not None
            self._start, self._samples = next(self._windows)
            if self.samples_per_pass is not None and not length_was_known:
                self._seek(position)  # a resumed run need not read the passes between
        offset = position - self._start
        for step in range(len(self._samples)):
            yield self._samples[(offset + step) % len(self._samples)]
        pass_index = self._samples[0].pass_index
        while self._samples[0].pass_index <= pass_index + 1:  # a whole window of broken images: try a full pass
            self._start, self._samples = next(self._windows)
            yield from self._samples

    def close(self) -> None:
        """Stop reading. A process that ends while a Parquet reader's threads are still at work is aborted by them."""
        if self._windows is not None:
            self._windows.close()
            self._windows, self._start, self._samples = None, 0, []

    def _seek(self, position: int) -> None:
        """Start reading at the pass that holds this position, or at the first one while their length is unknown."""
        self.close()
        self._windows = self._read(position // self.samples_per_pass if self.samples_per_pass else 0)
        self._start, self._samples = next(self._windows)

    def _read(self, pass_index: int) -> Iterator[tuple[int, list[Sample]]]:
        """Windows of shuffled samples with the position of their first, pass after pass."""
        start = pass_index * (self.samples_per_pass or 0)
        while True:
            pass_start, part = start, 0
            for samples in self._chunks(pass_index):
                order = keyed_order(self.seed, pass_index, 1 + part, len(samples))
                yield start, [samples[i] for i in order]
                start, part = start + len(samples), part + 1
            self.samples_per_pass = start - pass_start
            pass_index += 1

    def _chunks(self, pass_index: int) -> Iterator[list[Sample]]:
        """Runs of `window` samples in the order of this pass's shards."""
        chunk: list[Sample] = []
        for shard in keyed_order(self.seed, pass_index, 0, self.dataset.num_shards):
            for row, (columns, error) in enumerate(self._rows(int(shard))):
                chunk.append(Sample(pass_index, (int(shard) << 40) | row, columns, error))
                if len(chunk) == self.window:
                    yield chunk
                    chunk = []
        if chunk:
            yield chunk

    def _rows(self, shard: int) -> Iterator[tuple[dict, str | None]]:
        """Rows of one shard, each with None; if the file itself is broken, last an empty row with the error.

        What the network breaks off is read again from there: all workers must see the same rows, so that an outage may
        end the run but never shorten a shard.

        Raises:
            UnusableData: a shard cannot be read, however often it is tried.
        """
        given = tries = 0
        while True:
            try:
                for columns in self._rows_after(shard, given):
                    yield columns, None
                    given, tries = given + 1, 0
                return
            except Exception as error:
                if not is_of_network(error):
                    yield {"image": None}, f"the rest of the shard cannot be read: {type(error).__name__}: {error}"
                    return
                if tries == len(decoding.READ_PAUSES):
                    raise UnusableData(
                        f"shard {shard} of data.train cannot be read on after row {given}: {type(error).__name__}:"
                        f" {error}. Started again, the run goes on from its newest checkpoint"
                    ) from error
                logger.warning(
                    "shard %d broke off after row %d (%s: %s); reading on in %g s",
                    *(shard, given, type(error).__name__, error, decoding.READ_PAUSES[tries]),
                )
                time.sleep(decoding.READ_PAUSES[tries])
                tries += 1

    def _rows_after(self, shard: int, given: int) -> Iterator[dict]:
        """Rows of one shard but the first ones. `.iter`, since `__iter__` would drop rows in DataLoader workers."""
        dataset = self.dataset.shard(self.dataset.num_shards, shard)
        for batch in (dataset.skip(given) if given else dataset).iter(batch_size=READ_AHEAD):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))


def open_source(source: ImageSource, image_size: tuple[int, int]) -> Dataset | IterableDataset:
    """Open a source as `datasets` does. `image_size` (height, width) is that of the embedded synthetic images.

    Raises:
        ValueError: there is no such source or split, or files of its folder belong to no split.
    """
    if source.path == "synthetic":
        from modeling_ehm.training.synthetic import as_hf_dataset, as_hf_iterable

        first = 0 if source.split == "train" else 10_000_000  # other splits hold other images
        make = as_hf_iterable if source.streaming else as_hf_dataset
        dataset = make(source.max_images or 10_000, image_size=image_size, first_index=first)
    else:
        dataset = _load(source)
    if source.max_images is not None and source.path != "synthetic":
        dataset = (
            dataset.take(source.max_images) if source.streaming else dataset.take(min(source.max_images, len(dataset)))
        )
    return dataset


def _load(source: ImageSource) -> Dataset | IterableDataset:
    """What `datasets.load_dataset` does, with a look at the files in between."""
    where = {"name": source.name, "data_dir": source.data_dir, "data_files": source.data_files}
    folder = None
    try:
        if Path(source.path, datasets.config.DATASET_STATE_JSON_FILENAME).exists():
            raise ValueError("a dataset saved by save_to_disk; write it with to_parquet, and read it with path=parquet")
        builder = load_dataset_builder(source.path, **where, revision=source.revision)
        folder = _folder_of(source, builder)
        if folder is not None:
            _refuse_files_left_out(source, folder, builder)
        if source.streaming:
            return builder.as_streaming_dataset(split=source.split)
        builder.download_and_prepare()
        return builder.as_dataset(split=source.split)
    except (ValueError, FileNotFoundError) as error:
        given = {"path": source.path} | {name: value for name, value in where.items() if value is not None}
        told = ", ".join(f"{name}={value!r}" for name, value in given.items())
        no_split = folder is not None and str(error).startswith(("Unknown split", "Bad split"))
        hint = f" {_how_splits_are_made(source, folder)}" if no_split else ""
        raise ValueError(f"{told}, split={source.split!r}: {error}{hint}") from error


def _folder_of(source: ImageSource, builder: DatasetBuilder) -> Path | None:
    """The local folder all of whose files a source is about, and which `datasets` sorts into splits by names.

    None if there is none, or if its card says which files belong where.

    Raises:
        ValueError: a kind of files is named, but no files, for which the working directory would be searched.
    """
    of_files = type(builder).__module__.startswith(f"datasets.packaged_modules.{source.path}.")  # as imagefolder
    if of_files and not (source.data_dir or source.data_files):
        raise ValueError("name the files by data_files, or their folder by data_dir")
    if isinstance(source.data_files, str) and source.data_files.endswith("/**"):
        folder = Path(source.data_dir or "", source.data_files.removesuffix("/**"))
    elif source.data_files:
        return None
    elif of_files:
        folder = Path(source.data_dir)
    else:
        folder = Path(source.path, source.data_dir or "")
        cards = [Path(source.path, name) for name in ("README.md", ".huggingface.yaml")]
        texts = [card.read_text(encoding="utf-8", errors="replace") for card in cards if card.is_file()]
        if any(line.startswith("configs:") for text in texts for line in text.splitlines()):
            return None
    folder = folder.expanduser()
    return folder if folder.is_dir() else None


def _refuse_files_left_out(source: ImageSource, folder: Path, builder: DatasetBuilder) -> None:
    """`datasets` reads the files that it could put into a split, and says nothing of the others.

    Raises:
        ValueError: there are others of the kinds that the source reads.
    """
    real = functools.cache(os.path.realpath)  # of folders, which are fewer than files

    def place(file: str) -> str:
        return os.path.join(real(os.path.dirname(file)), os.path.basename(file))

    taken = {place(file) for files in (builder.config.data_files or {}).values() for file in files}
    kinds = {Path(file).suffix.lower() for file in taken}
    if images := getattr(builder, "EXTENSIONS", None):  # beside them there may be tables that describe them
        kinds = {*images, *(kinds & {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"})}
    found = [file for file in _files_below(folder) if Path(file).suffix.lower() in kinds]
    left_out = [file for file in found if place(file) not in taken]
    if left_out:
        linked = any(not Path(place(file)).is_relative_to(real(folder)) for file in left_out)
        links = " Folders that are links are not followed: give those that they lead to." if linked else ""
        raise ValueError(
            f"{len(left_out)} of {len(found)} files in {folder}, as {left_out[0]}, belong to no split and would not be"
            f" read. {_how_splits_are_made(source, folder)}{links}"
        )


def _files_below(folder: Path) -> Iterator[str]:
    """Absolute paths of the files that a user may expect `datasets` to read, also those behind links."""
    seen = set()
    for root, folders, files in os.walk(os.path.abspath(folder), followlinks=True):
        if (here := os.path.realpath(root)) in seen:  # a link that leads upwards
            folders.clear()
            continue
        seen.add(here)
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]  # what `datasets` never reads
        names = (name for name in files if not name.startswith(".") and name not in FILES_TO_IGNORE)
        yield from (path for name in names if os.path.isfile(path := os.path.join(root, name)))


def _how_splits_are_made(source: ImageSource, folder: Path) -> str:
    files = f"{folder}/**" if source.split == "train" else {source.split: f"{folder}/**"}
    return (
        "datasets sorts files into splits by words such as train, test or val in their names and folders. Give"
        f" data_files={files!r} without data_dir for all of them as split {source.split}, or a pattern for some."
    )


def find_image_column(dataset: Dataset | IterableDataset, source: ImageSource) -> str:
    """The column named in the source, or the only one whose feature type is Image.

    Raises:
        ValueError: no such column, none of type Image, or several of them.
    """
    features = dataset.features if dataset.features is not None else dataset._resolve_features().features
    if source.image_column is not None:
        if source.image_column not in features:
            raise ValueError(f"image_column={source.image_column!r} is not among the columns {list(features)}")
        return source.image_column
    columns = [name for name, feature in features.items() if isinstance(feature, Image)]
    columns = [name for name in columns if name != source.segments_column]
    if len(columns) != 1:
        found = f"columns of type Image: {columns}" if columns else f"no column of type Image among {list(features)}"
        raise ValueError(f"{source.path}: {found}; name the one to read as image_column")
    return columns[0]


def open_samples(
    source: ImageSource, seed: int, window: int, image_size: tuple[int, int], columns: dict[str, str] | None = None
):
    """Open a source as an endless keyed sequence of rows with an encoded image.

    Args:
        source: Where from.
        seed: Key of the order.
        window: Rows of a stream that are shuffled among each other.
        image_size: (height, width) of the embedded synthetic images.
        columns: Names that further columns get, with their names in the source.

    Raises:
        ValueError: a column is missing, or named for two purposes.
    """
    dataset = open_source(source, image_size)
    names = {"image": find_image_column(dataset, source)} | (columns or {})
    available = list(dataset.features if dataset.features is not None else dataset._resolve_features().features)
    for name, column in names.items():
        if column not in available:
            raise ValueError(f"{source.path} has no column {column!r} ({name}_column); its columns are {available}")
    if len(set(names.values())) < len(names):
        raise ValueError(f"{source.path}: a column is named for two purposes, {names}; each needs its own")
    dataset = dataset.select_columns(list(names.values())).cast_column(names["image"], Image(decode=False))
    dataset = dataset.rename_columns({column: name for name, column in names.items() if column != name})
    if isinstance(dataset, Dataset):
        return IndexedSamples(dataset, seed)
    return StreamedSamples(dataset, seed, window)


def random_resized_crop(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], uniform: np.ndarray
) -> tuple[int, int, int, int]:
    """Box of a crop: torchvision's RandomResizedCrop with its numbers given from outside.

    Args:
        size: (width, height) of the image in pixels.
        scale: Smallest and largest share of the area.
        ratio: Smallest and largest width over height, drawn on a log scale.
        uniform: 22 numbers in [0, 1): ten tries of area and ratio, then the place.

    Returns:
        (left, top, right, bottom) in pixels.
    """
    width, height = size
    log_low, log_high = np.log(ratio[0]), np.log(ratio[1])
    for u_area, u_ratio in uniform[:20].reshape(10, 2):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = np.exp(log_low + (log_high - log_low) * u_ratio)
        w, h = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(uniform[20] * (width - w + 1)), int(uniform[21] * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height  # no try fitted: the largest central crop within the bounds of the ratio
    if width / height < ratio[0]:
        h = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = min(width, max(1, round(height * ratio[1])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class UnusableData(RuntimeError):
    """Too few of the rows can be used to go on."""


class UnusableRow(UnusableData, ValueError):
    """A row of a labelled set cannot be used; such sets are small, and nothing of them is left out in silence."""


class UnreadableShard(RuntimeError):
    """The file of a shard is broken; stands in the record for the rows that it may have held."""


class SampledExamples(torch.utils.data.Dataset):
    """Training examples by position, from rows some of which may be unusable: those are recorded and replaced.

    Args:
        samples: Endless keyed sequence of rows.
        num_positions: Length of the sequence that is offered: steps times global batch.
        record: File to which skipped rows are appended, one JSON line each; None keeps no record.
        max_skipped_share: Share of unusable rows above which the run stops.

    Raises (from `__getitem__`):
        RuntimeError: more than `max_skipped_share` of the rows asked for here could not be read, or every candidate
            failed.
    """

    kind, done = "rows", "used"  # what messages call them, and what was to be done with them

    def __init__(
        self,
        samples: IndexedSamples | StreamedSamples,
        num_positions: int = 1,
        record: Path | None = None,
        max_skipped_share: float = 0.01,
    ):
        self.samples, self.num_positions, self.record = samples, num_positions, record
        self.max_skipped_share = max_skipped_share
        self.tried = self.skipped = 0  # rows, in this worker

    @property
    def extent(self) -> dict[str, int]:
        """As `IndexedSamples.extent`."""
        return self.samples.extent

    def read(self, sample: Sample, key: Sample):
        """Content of a row; whatever this raises makes the row a skipped one. `key` as for `make_example`."""
        raise NotImplementedError

    def make_example(self, content, key: Sample) -> dict:
        """Example of a row's content; randomness by the seed and `key`'s pass and identity, nothing else."""
        return content

    def close(self) -> None:
        """Let go of an open stream; asking for an example opens it again."""
        if isinstance(self.samples, StreamedSamples):
            self.samples.close()

    def __len__(self) -> int:
        return self.num_positions

    def __getitem__(self, position: int) -> dict:
        if not 0 <= position < self.num_positions:
            raise IndexError(f"position={position} is not in [0, {self.num_positions})")
        assigned = last = None
        for sample in self.samples.candidates(position):
            # A replacement is varied by the key of the row it stands for, so it is nobody's duplicate.
            assigned = assigned or sample
            self.tried += 1
            try:
                if sample.error is not None:
                    raise UnreadableShard(sample.error)
                content = self.read(sample, assigned)
            except Exception as error:  # Pillow raises nearly every type on broken files
                self._skip(position, sample, error)
                last = error
                continue
            return self.make_example(content, assigned)
        raise UnusableData(
            f"none of the {self.kind} of data.train could be {self.done}; the last: {type(last).__name__}: {last}. See"
            f" {self.record}"
        )

    def _skip(self, position: int, sample: Sample, error: Exception) -> None:
        self.skipped += 1
        if self.record is not None:
            line = {
                "position": position,
                "pass": sample.pass_index,
                "sample_id": sample.sample_id,
                **sample.place,
                "error": f"{type(error).__name__}: {BYTES_AT.sub('the bytes', str(error))}",
            }
            self.record.parent.mkdir(parents=True, exist_ok=True)
            with open(self.record, "ab", buffering=0) as file:  # one write a line: workers may append side by side
                file.write((json.dumps(line) + "\n").encode())
        expected = self.max_skipped_share * self.tried
        # Three standard deviations of grace: a share just below the limit must not end a run by chance.
        if self.tried >= 100 and self.skipped > expected + 3 * expected**0.5:
            raise UnusableData(
                f"{self.skipped} of {self.tried} {self.kind} could not be {self.done}, more than"
                f" data.max_skipped_share={self.max_skipped_share}; the last: {type(error).__name__}: {error}."
                f" See {self.record}; raise the share if that many broken {self.kind} are expected"
            )


@dataclass(frozen=True)
class CropDraw:
    """What chance decides of a training example.

    Attributes:
        box: Left, upper, right, lower edge in pixels.
        mirrored: Whether left and right are exchanged.
        mask_seed: int64, key of the mask.
    """

    box: tuple[int, int, int, int]
    mirrored: bool
    mask_seed: int


class PretrainingImages(SampledExamples):
    """Training examples of pre-training: decoded, cropped, mirrored, with the seed of their mask.

    Args:
        samples: Endless keyed sequence of encoded images.
        data: Crops, flips, limits.
        seed: Key of crops and masks.
        image_size: (height, width) of the crops in pixels.
        num_channels: 1, 3 or 4.
        num_positions: Length of the sequence that is offered: steps times global batch.
        record: File to which skipped images are appended, one JSON line each; None keeps no record.

    Each example: `pixel_values` `(C, H, W)` uint8, `mask_seed` int, `sample_id` as in `Sample`.
    """

    kind, done = "images", "decoded"

    def __init__(
        self,
        samples: IndexedSamples | StreamedSamples,
        data: DataArguments,
        seed: int,
        image_size: tuple[int, int],
        num_channels: int = 3,
        num_positions: int = 1,
        record: Path | None = None,
    ):
        super().__init__(samples, num_positions, record, data.max_skipped_share)
        self.data, self.seed = data, seed
        self.image_size, self.num_channels = image_size, num_channels

    def read(self, sample: Sample, key: Sample) -> Pixels:
        return DECODERS[self.data.decoder](sample.columns["image"], self.num_channels, self.data.max_pixels)

    def make_example(self, image: Pixels, key: Sample) -> dict:
        draw = self.draw_crop(size_of(image), key)
        crop = resized_crop(image, draw.box, self.image_size, draw.mirrored)
        return {"pixel_values": crop, "mask_seed": draw.mask_seed, "sample_id": key.sample_id}

    def some_whole(self, count: int, tries: int = 8) -> Tensor:
        """Some of the images, resized as wholes, `(n, C, H, W)` uint8.

        Fewer than `count` where there are not as many, or of `tries * count` rows not as many can be decoded, which is
        left to training to record.
        """
        found, rows = [], self.samples.look()
        for columns in itertools.islice(rows, tries * count):
            try:
                image = decode_image(columns["image"], self.num_channels, self.data.max_pixels)
            except Exception:  # Pillow raises nearly every type on broken files
                continue
            found.append(to_uint8_tensor(image.resize(self.image_size[::-1], PILImage.Resampling.BICUBIC)))
            if len(found) == count:
                break
        rows.close()
        return torch.stack(found) if found else torch.empty(0, dtype=torch.uint8)

    def draw_crop(self, size: tuple[int, int], key: Sample) -> CropDraw:
        """Box, mirroring and seed of the mask of an image of this size (width, height), by (seed, pass, sample)."""
        bits = keyed_bits(self.seed, SAMPLE_STREAM, key.pass_index, key.sample_id, count=24)
        uniform = (bits[1:] >> np.uint64(11)) * 2.0**-53
        box = random_resized_crop(size, self.data.crop_scale, self.data.crop_ratio, uniform[:22])
        mirrored = bool(self.data.horizontal_flip and uniform[22] < 0.5)
        return CropDraw(box, mirrored, mask_seed=int(bits[:1].view(np.int64)[0]))


def read_skipped(record: Path) -> list[dict]:
    """Lines of the record of skipped images, each position's and sample's once, although a resumed run writes anew."""
    if not record.exists():
        return []
    lines = [json.loads(line) for line in record.read_text().splitlines() if line]
    return list({(line["position"], line["sample_id"]): line for line in lines}.values())


class Normalizer:
    """`(B, C, H, W)` uint8 -> float32, less the mean and divided by the standard deviation of each channel."""

    def __init__(self, image_mean: list[float], image_std: list[float]):
        self.mean = torch.tensor(image_mean).view(1, -1, 1, 1)
        self.std = torch.tensor(image_std).view(1, -1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        if pixels.dtype != torch.uint8:
            raise ValueError(
                f"pixel_values has dtype {pixels.dtype}; uint8 is expected, what is normalised already fits"
            )
        self.mean, self.std = self.mean.to(pixels.device), self.std.to(pixels.device)
        return (pixels.float() / 255 - self.mean) / self.std


def stack_examples(examples: list[dict]) -> dict[str, Tensor]:
    """`pixel_values` `(B, C, H, W)` uint8, a quarter of the bytes of floats; the numbers of examples `(B,)` int64."""
    numbers = [name for name in examples[0] if name != "pixel_values"]
    batch = {name: torch.tensor([example[name] for example in examples], dtype=torch.int64) for name in numbers}
    return batch | {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}


class NormalizingCollator:
    """What the model takes, normalised to float32: for a plain Trainer; `EHMTrainer` normalises on its device."""

    def __init__(self, image_mean: list[float], image_std: list[float]):
        self.normalize = Normalizer(image_mean, image_std)

    def __call__(self, examples: list[dict]) -> dict[str, Tensor]:
        batch = stack_examples(examples)
        return {"pixel_values": self.normalize(batch["pixel_values"]), "mask_seed": batch["mask_seed"]}


def load_labelled(
    source: ImageSource, image_size: tuple[int, int], num_channels: int, max_pixels: int = 178_956_970
) -> dict[str, Tensor]:
    """Decode a labelled or segmented source into memory, each image resized to `image_size`, without augmentation.

    Returns:
        `pixels` `(n, C, H, W)` uint8; `labels` `(n,)` int64 if the source names a label column; `segments` `(n, H, W)`
        int64 if it names a segments column (resized to the nearest value).

    Raises:
        ValueError: a named column is missing, a label or an image is missing, or there are no images.
    """
    dataset = open_source(source, image_size)
    column = find_image_column(dataset, source)
    wanted = [c for c in (source.label_column, source.segments_column) if c is not None]
    missing = [c for c in wanted if c not in dataset.column_names]
    if missing:
        raise ValueError(f"{source.path} has no column {missing[0]!r}; its columns are {dataset.column_names}")
    dataset = dataset.select_columns([column, *wanted]).cast_column(column, Image(decode=False))
    size, pixels, labels, segments = image_size[::-1], [], [], []
    for number, row in enumerate(dataset):
        try:
            image = decode_image(row[column], num_channels, max_pixels)
        except Exception as error:  # Pillow raises nearly every type on broken files
            reason = f"{type(error).__name__}: {BYTES_AT.sub('the bytes', str(error))}"
            if path := (row[column] or {}).get("path"):
                reason += f"; {path}"
            raise ValueError(f"{source.path}: row {number} cannot be decoded ({reason})") from None
        pixels.append(to_uint8_tensor(image.resize(size, PILImage.Resampling.BICUBIC)))
        if source.label_column is not None:
            labels.append(_label(row[source.label_column], number, source))
        if source.segments_column is not None:
            segment_map = row[source.segments_column]
            if not isinstance(segment_map, PILImage.Image):
                raise ValueError(
                    f"{source.path}: row {number} has no image in segments_column={source.segments_column!r}"
                )
            segments.append(np.array(segment_map.resize(size, PILImage.Resampling.NEAREST)))
    if not pixels:
        raise ValueError(f"{source.path}, split {source.split!r}, holds no images")
    loaded = {"pixels": torch.stack(pixels)}
    if labels:
        loaded["labels"] = torch.tensor(labels)
    if segments:
        loaded["segments"] = torch.from_numpy(np.stack(segments).astype(np.int64))
    return loaded


def _label(value, row: int, source: ImageSource) -> int:
    if value is None:
        raise ValueError(f"{source.path}: row {row} has no value in label_column={source.label_column!r}")
    if not isinstance(value, int):
        raise ValueError(
            f"{source.path}: row {row} has {value!r} in label_column={source.label_column!r}, which should hold the"
            " numbers of classes"
        )
    return int(value)


def identity_of(source: ImageSource, extent: dict[str, int]) -> dict:
    """What decides which training images there are and in which order, by field, as `data.train.max_images`.

    Of local files and folders only the end of their path: a run goes on where its data have been moved.
    """
    fields = dataclasses.asdict(source)
    for name in ("data_dir", "data_files", *(["path"] if os.path.isdir(source.path) else [])):
        fields[name] = _moved(fields[name])
    return {f"data.train.{name}": value for name, value in (fields | extent).items() if value is not None}


def _moved(paths):
    """Paths of a field without the folders that differ from machine to machine; addresses stay as they are.

    Of a path its last two parts, of a pattern from two parts before the first wildcard on.
    """
    if isinstance(paths, dict):
        return {name: _moved(path) for name, path in paths.items()}
    if isinstance(paths, list | tuple):
        return [_moved(path) for path in paths]
    if paths is None or "://" in paths:
        return paths
    parts = Path(os.path.abspath(paths)).parts
    fixed = next((n for n, part in enumerate(parts) if set(part) & set("*?[{")), len(parts))
    return os.path.join(*parts[max(fixed - 2, 1) :])


def describe_source(source: ImageSource, dataset: Dataset | IterableDataset | None = None) -> str:
    """One line for logs and model cards; of local files and folders only the last two parts of their path.

    `dataset` is the opened source: a Hub dataset that was prepared locally says which commit it came from.
    """
    files = source.data_files if isinstance(source.data_files, str) else None
    named = [text for text in (source.path, source.name, source.data_dir, files) if text]
    parts = [os.path.join(*Path(text).parts[-2:]) for text in named]
    parts.append(f"split {source.split}")
    checksums = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    resolved = next((found[1] for url in checksums if (found := re.search(r"@([0-9a-f]{40})/", str(url)))), None)
    parts += [f"revision {revision}"] if (revision := resolved or source.revision) else []
    parts += ["streamed"] if source.streaming else []
    return ", ".join(parts)
