"""Order, crops, broken files and odd formats, on pictures that tell their number and place."""

import io
import json
import math
import random
import shutil
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from tiny_recipes import ROOT, encode, picture, write_parquet, write_shards
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from modeling_ehm.training import decoding
from modeling_ehm.training.data import (
    DataArguments,
    ImageSource,
    IndexedSamples,
    Normalizer,
    NormalizingCollator,
    PretrainingImages,
    StreamedSamples,
    UnusableData,
    describe_source,
    load_labelled,
    open_samples,
    open_source,
    random_resized_crop,
    read_skipped,
)
from modeling_ehm.training.decoding import decode_image
from modeling_ehm.training.evaluation import ProbeEvaluator

pytestmark = pytest.mark.usefixtures("own_cache")

SHARDS = (9, 7, 5)  # pictures in each file
COUNT = sum(SHARDS)
KINDS = [f"{kind}{how}" for kind in ("parquet", "imagefolder", "webdataset") for how in ("", " streamed")]
TEXT = b"<html>404 not found</html>"
CUT = encode(PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")[:1500]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same 21 pictures in every kind of source, in three files where the kind has such files."""
    folder = tmp_path_factory.mktemp("sources")
    encoded = [encode(picture(number)) for number in range(COUNT)]
    starts = [sum(SHARDS[:shard]) for shard in range(len(SHARDS))]
    parquet = write_shards(folder, [encoded[s : s + n] for s, n in zip(starts, SHARDS, strict=True)])
    (folder / "pictures").mkdir()
    for number, content in enumerate(encoded):
        (folder / "pictures" / f"{number:02}.png").write_bytes(content)
    tars = [folder / f"shard-{shard}.tar" for shard in range(len(SHARDS))]
    for path, start, size in zip(tars, starts, SHARDS, strict=True):
        with tarfile.open(path, "w") as tar:
            for number in range(start, start + size):
                entry = tarfile.TarInfo(f"{number:02}.png")
                entry.size = len(encoded[number])
                tar.addfile(entry, io.BytesIO(encoded[number]))
    made = {
        "parquet": {"path": "parquet", "data_files": parquet},
        "imagefolder": {"path": "imagefolder", "data_dir": str(folder / "pictures")},
        "webdataset": {"path": "webdataset", "data_files": [str(path) for path in tars]},
    }
    return {k: ImageSource(**made[k.split()[0]], streaming=k.endswith("streamed")) for k in KINDS}


def indexed(encoded):
    return Dataset.from_dict(
        {"image": [{"bytes": content, "path": None} for content in encoded]},
        features=Features({"image": Image(decode=False)}),
    )


def images_of(source, seed=0, window=4, passes=3, count=COUNT, record=None, **arguments):
    samples = open_samples(source, seed, window, (16, 16)) if isinstance(source, ImageSource) else source
    arguments = {"train": ImageSource("synthetic"), "max_skipped_share": 0.9} | arguments
    data = DataArguments(**arguments)
    return PretrainingImages(samples, data, seed, (16, 16), num_positions=passes * count, record=record)


def as_key(example):
    """An example as something to compare: its pixels and the seed of its mask."""
    return example["pixel_values"].numpy().tobytes(), example["mask_seed"]


def number_of(example):
    """Which picture an example shows."""
    return int(example["pixel_values"][0, 0, 0])


def plain(examples):
    return examples


# Order


@pytest.mark.parametrize("kind", KINDS)
def test_each_pass_visits_each_image_once_in_an_order_of_its_own(sources, kind):
    """Three passes hold every picture once each; their orders, and that of another seed, differ."""
    images = images_of(sources[kind])
    seen = [number_of(images[position]) for position in range(3 * COUNT)]
    passes = [seen[start : start + COUNT] for start in range(0, 3 * COUNT, COUNT)]
    assert [sorted(numbers) for numbers in passes] == [list(range(COUNT))] * 3
    other = images_of(sources[kind], seed=1)
    orders = [*passes, [number_of(other[position]) for position in range(COUNT)], list(range(COUNT))]
    assert all(orders[a] != orders[b] for a in range(5) for b in range(a))


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_is_a_function_of_its_position(sources, kind):
    """In this process, in 1 or 2 workers, after a jump, or backwards: a position holds the same pixels and seed."""
    images = images_of(sources[kind])
    expected = [as_key(images[position]) for position in range(3 * COUNT)]
    assert len({seed for _, seed in expected}) == 3 * COUNT  # no two visits share a mask
    for workers in (0, 1, 2):
        loader = DataLoader(images_of(sources[kind]), batch_size=5, num_workers=workers, collate_fn=plain)
        assert [as_key(example) for batch in loader for example in batch] == expected, f"{workers} workers"
    fresh = images_of(sources[kind])
    assert [as_key(fresh[position]) for position in (50, 51, 62, 3)] == [expected[p] for p in (50, 51, 62, 3)]


@pytest.mark.parametrize("kind", ["parquet", "parquet streamed"])
def test_two_processes_share_out_what_one_would_see(sources, kind):
    """Step by step, two processes' batches of 4 together are one process's batch of 8, no image twice or missing."""
    one = DataLoader(images_of(sources[kind], passes=2), batch_size=8, collate_fn=plain)
    whole = [sorted(as_key(example) for example in batch) for batch in one][:5]  # 40 of 42 positions: whole batches
    halves = []
    for process in range(2):
        images = images_of(sources[kind], passes=2)
        batches = BatchSamplerShard(BatchSampler(SequentialSampler(images), 4, False), 2, process)
        halves.append(
            [[as_key(e) for e in batch] for batch in DataLoader(images, batch_sampler=batches, collate_fn=plain)]
        )
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)][:5] == whole


@pytest.mark.parametrize("kind", KINDS)
def test_max_images_takes_the_first_ones(sources, kind):
    """Of 21 pictures in 3 files, the first 12 are the first file and three more; of a stream, the first 4 a file."""
    source = ImageSource(**(vars(sources[kind]) | {"max_images": 12}))
    images = images_of(source, passes=1)
    seen = sorted(number_of(images[position]) for position in range(12))
    sharded = kind in ("parquet streamed", "webdataset streamed")  # a file of imagefolder holds one picture
    assert seen == ([0, 1, 2, 3, 9, 10, 11, 12, 16, 17, 18, 19] if sharded else list(range(12)))


def test_a_window_shuffles_and_a_window_of_one_keeps_the_order_of_a_shard(sources):
    """With a window of 1, each shard's pictures come in file order, whatever the order of the shards."""
    images = images_of(sources["parquet streamed"], window=1, passes=1)
    seen = [number_of(images[position]) for position in range(COUNT)]
    starts = [sum(SHARDS[:shard]) for shard in range(3)]
    runs = sorted(seen.index(start) for start in starts)
    assert sorted(seen[a:b] for a, b in zip(runs, [*runs[1:], COUNT], strict=True)) == [
        list(range(start, start + size)) for start, size in zip(starts, SHARDS, strict=True)
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_one_image_is_enough(tmp_path, streaming):
    """A source of one picture is a pass of one position, cropped and masked anew in each pass."""
    path = write_parquet(tmp_path / "one.parquet", [encode(picture(7))])
    images = images_of(ImageSource("parquet", data_files=path, streaming=streaming), count=1, passes=8)
    examples = [images[position] for position in range(8)]
    assert {number_of(example) for example in examples} == {7}
    assert len({as_key(example) for example in examples}) == 8


def test_no_images_is_an_error_that_says_where_to_look(tmp_path):
    """Empty sources are refused when they are opened, not waited for endlessly."""
    with pytest.raises(ValueError, match="data.train yields no images: check path, data_files and split"):
        IndexedSamples(indexed([]), seed=0)
    path = write_parquet(tmp_path / "empty.parquet", [])
    with pytest.raises(ValueError, match="data.train yields no images: check path, data_files and split"):
        images_of(ImageSource("parquet", data_files=path, streaming=True))
    with pytest.raises(ValueError, match="no data"):
        images_of(ImageSource("parquet", data_files=path))


def test_positions_outside_the_run_are_refused(sources):
    """Without a bound, iterating over the data set would never end."""
    images = images_of(sources["parquet"], passes=1)
    for position in (-1, COUNT):
        with pytest.raises(IndexError, match=rf"position={position} is not in \[0, {COUNT}\)"):
            images[position]


@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_a_zip_are_read(tmp_path, streaming):
    """`imagefolder` reads archives, whose members have a path that only `datasets` can open."""
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", encode(picture(number)))
    source = ImageSource("imagefolder", data_files=str(tmp_path / "pictures.zip"), streaming=streaming)
    images = images_of(source, count=3, passes=1)
    assert sorted(number_of(images[position]) for position in range(3)) == [0, 1, 2]


def folder_of(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(root / name)
    return root


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "names, left_out",
    [
        (["scan_1.png", "scan_2.JPG", "train-station.png"], "2 of 3"),
        (["train/1.png", "more/1.png"], "1 of 2"),
        (["train/test/1.png", "train/2.png", "other/3.png"], "1 of 3"),  # the first is of both splits
        (["train/__a.png", "more/b.png"], "1 of 2"),
    ],
)
def test_files_that_datasets_would_leave_out_are_told(tmp_path, names, left_out, streaming):
    """It takes names that contain `train` for the split; what contains no such word is in no split then."""
    root = folder_of(tmp_path / "mine", *names)
    (root / ".hidden.png").write_bytes(b"")
    (tmp_path / "link").symlink_to(root)
    for place in ({"path": "imagefolder", "data_dir": str(root)}, {"path": str(root)}, {"path": f"{tmp_path}/link"}):
        told = rf"{left_out} files in .* belong to no split .* data_files='.*/\*\*' without data_dir"
        with pytest.raises(ValueError, match=told):
            open_source(ImageSource(**place, streaming=streaming), (32, 32))
    for folder in (root, tmp_path / "link"):
        everything = ImageSource("imagefolder", data_files=f"{folder}/**", streaming=streaming)
        assert len(list(open_source(everything, (32, 32)))) == len(names)


def test_folders_behind_links_are_told(tmp_path):
    """`datasets` does not follow them; one that leads to what is read anyhow, or upwards, does no harm."""
    root = folder_of(tmp_path / "mine", "cat/1.png")
    (root / "up").symlink_to(root)
    (root / "again").symlink_to(root / "cat")
    (root / "lost.png").symlink_to(root / "nowhere.png")
    assert len(open_source(ImageSource("imagefolder", data_dir=str(root)), (32, 32))) == 1
    (root / "dog").symlink_to(folder_of(tmp_path / "elsewhere", "2.png"))
    for place in ({"data_dir": str(root)}, {"data_files": f"{root}/**"}):
        with pytest.raises(ValueError, match="1 of 2 files .* as .*dog/2.png, belong .* links are not followed"):
            open_source(ImageSource("imagefolder", **place), (32, 32))


def test_archives_in_no_split_are_told(tmp_path):
    for name in ("train.zip", "more.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("1.png", encode(picture(1)))
    with pytest.raises(ValueError, match="1 of 2 files .*more.zip"):
        open_source(ImageSource("imagefolder", data_dir=str(tmp_path)), (32, 32))


def test_folders_of_splits_and_of_classes_are_read(tmp_path, monkeypatch):
    """And files of other kinds beside them do no harm, nor does a folder here that is named as one of a Hub set is."""
    split = folder_of(tmp_path / "split", "train/1.png", "train/2.png", "test/1.png")
    classes = folder_of(tmp_path / "classes", "cat/1.png", "dog/1.png", "plain.png")
    for root in (split, classes):
        (root / "notes.txt").write_text("none of the images")
    assert len(open_source(ImageSource("imagefolder", data_dir=str(split)), (32, 32))) == 2
    assert len(open_source(ImageSource("imagefolder", data_dir=str(split), split="test"), (32, 32))) == 1
    assert len(open_source(ImageSource("imagefolder", data_dir=str(classes)), (32, 32))) == 3
    card = "---\nconfigs:\n- config_name: few\n  data_files:\n  - split: train\n    path: train/1.png\n---\n"
    (split / "README.md").write_text(card)
    assert len(open_source(ImageSource(str(split), "few"), (32, 32))) == 1  # what its card leaves out is left out
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "imagefolder" / "classes", "train.png", "more.png")
    assert len(open_source(ImageSource("imagefolder", data_dir="classes"), (32, 32))) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_split_is_told_with_its_source(tmp_path, streaming):
    root = folder_of(tmp_path / "mine", "scan.png", "test_1.png")
    for split, files in (("test", "{'test': '.*/mine/..'}"), ("train", "'.*/mine/..'")):
        told = rf"data_dir='.*mine', split='{split}': .* sorts files into splits .* data_files={files} without"
        with pytest.raises(ValueError, match=told):
            open_source(ImageSource("imagefolder", data_dir=str(root), split=split, streaming=streaming), (32, 32))
    (root / "scan.png").unlink()
    with pytest.raises(ValueError, match=r"split='train': (Unknown|Bad) split.* sorts files into splits"):
        open_source(ImageSource("imagefolder", data_dir=str(root), streaming=streaming), (32, 32))
    with pytest.raises(ValueError, match="path='parquet', data_files='none.parquet', split='train': Unable to find"):
        open_source(ImageSource("parquet", data_files="none.parquet", streaming=streaming), (32, 32))


def test_a_kind_of_files_needs_files(tmp_path, monkeypatch):
    """Without them `datasets` reads whatever lies in the working directory."""
    monkeypatch.chdir(folder_of(tmp_path, "a.png"))
    with pytest.raises(ValueError, match="path='imagefolder', split='train': name the files by data_files"):
        open_source(ImageSource("imagefolder"), (32, 32))


def test_parquet_by_the_documentation_holds_the_bytes(tmp_path, monkeypatch):
    """The Python code of docs/data.md, run in a folder of images, writes files that need that folder no more."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "my_images", "a.png", "train-station.png", "sub/b.png")
    (tmp_path / "data/mine").mkdir(parents=True)
    text = (ROOT / "docs/data.md").read_text()
    exec(text.split("```python")[1].split("```")[0], {})
    written = [path.read_bytes() for path in sorted((tmp_path / "my_images").rglob("*.png"))]
    shutil.rmtree(tmp_path / "my_images")
    files = sorted(map(str, (tmp_path / "data/mine").glob("*.parquet")))
    stored = open_source(ImageSource("parquet", data_files=files), (32, 32)).cast_column("image", Image(decode=False))
    assert sorted(row["image"]["bytes"] for row in stored) == sorted(written)


# Columns and labels


def test_the_image_column_is_found_by_its_type(tmp_path):
    """Named anything, the only Image column is read; several or none ask for a name, and list what there is."""
    content = {"bytes": encode(picture(3)), "path": None}
    both = Dataset.from_dict({"photo": [content], "map": [content], "caption": ["three"]})
    both = both.cast(Features({"photo": Image(), "map": Image(), "caption": datasets.Value("string")}))
    for name, columns in {"one": ["photo", "caption"], "two": ["photo", "map"], "none": ["caption"]}.items():
        both.select_columns(columns).to_parquet(str(tmp_path / f"{name}.parquet"))
    for streaming in (False, True):

        def source(name, streaming=streaming, **more):
            return ImageSource("parquet", data_files=str(tmp_path / f"{name}.parquet"), streaming=streaming, **more)

        assert number_of(images_of(source("one"), count=1)[0]) == 3
        assert number_of(images_of(source("two", image_column="map"), count=1)[0]) == 3
        assert number_of(images_of(source("two", segments_column="map"), count=1)[0]) == 3
        with pytest.raises(
            ValueError, match=r"columns of type Image: \['photo', 'map'\]; name the one .* image_column"
        ):
            images_of(source("two"))
        with pytest.raises(ValueError, match=r"no column of type Image among \['caption'\]; name the one"):
            images_of(source("none"))
        with pytest.raises(ValueError, match=r"image_column='foto' is not among the columns \['photo', 'caption'\]"):
            images_of(source("one", image_column="foto"))


def test_labels_that_a_probe_cannot_use_are_named(tmp_path):
    """A missing column, a missing value, text instead of numbers, and no column named at all: each says which."""
    columns = {"label": [4, 2], "gap": [1, None], "word": ["cat", "dog"]}
    path = write_parquet(tmp_path / "labels.parquet", [encode(picture(0)), encode(picture(1))], **columns)

    def load(column):
        return load_labelled(ImageSource("parquet", data_files=path, label_column=column), (16, 16), 3)

    assert load("label")["labels"].tolist() == [4, 2]
    with pytest.raises(ValueError, match=r"no column 'lable'; its columns are \['image', 'label', 'gap', 'word'\]"):
        load("lable")
    with pytest.raises(ValueError, match="row 1 has no value in label_column='gap'"):
        load("gap")
    unlabelled = load(None)
    with pytest.raises(ValueError, match="data.probe_train needs label_column: a probe cannot learn without labels"):
        ProbeEvaluator(unlabelled, load("label"), Normalizer([0.5] * 3, [0.5] * 3), linear=False)
    with pytest.raises(ValueError, match="data.probe_test needs label_column"):
        ProbeEvaluator(load("label"), unlabelled, Normalizer([0.5] * 3, [0.5] * 3), linear=False)


def test_text_labels_are_refused_by_name(tmp_path):
    """Whoever points a probe at a column of words learns which column, not only that 'cat' is no integer."""
    path = write_parquet(tmp_path / "words.parquet", [encode(picture(0))], word=["cat"])
    with pytest.raises(ValueError, match="label_column='word'"):
        load_labelled(ImageSource("parquet", data_files=path, label_column="word"), (16, 16), 3)


def test_a_broken_image_of_a_probe_is_named(tmp_path):
    """Probes skip nothing, so the error tells the row of the file that stopped the run."""
    path = write_parquet(tmp_path / "broken.parquet", [encode(picture(0)), TEXT], label=[0, 1])
    with pytest.raises(ValueError, match="row 1"):
        load_labelled(ImageSource("parquet", data_files=path, label_column="label"), (16, 16), 3)


def test_labelled_images_are_whole_and_unaugmented(tmp_path):
    """A picture of the target size comes back pixel by pixel; its map too, resized to the nearest value."""
    image = picture(5, 16, 16)
    segments = {"bytes": encode(PILImage.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))), "path": None}
    content = {"bytes": encode(image), "path": None}
    dataset = Dataset.from_dict({"image": [content], "map": [segments]}).cast(
        Features({"image": Image(), "map": Image()})
    )
    dataset.to_parquet(str(tmp_path / "maps.parquet"))
    source = ImageSource("parquet", data_files=str(tmp_path / "maps.parquet"), segments_column="map")
    loaded = load_labelled(source, (16, 16), 3)
    assert np.array_equal(loaded["pixels"][0].permute(1, 2, 0).numpy(), np.asarray(image))
    expected = torch.arange(64).reshape(8, 8).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(loaded["segments"][0], expected)


# Crops


@pytest.mark.parametrize("size", [(24, 20), (500, 375), (40, 200), (3, 7)])
@pytest.mark.parametrize(
    "scale, ratio", [((0.2, 1.0), (3 / 4, 4 / 3)), ((0.5, 0.6), (0.9, 1.1)), ((1.0, 1.0), (1.0, 1.0))]
)
def test_boxes_lie_inside_and_keep_area_and_ratio(size, scale, ratio):
    """Up to half a pixel of rounding, each side, a box has an area and a ratio within the bounds."""
    generator = np.random.default_rng(0)
    for _ in range(500):
        left, top, right, bottom = random_resized_crop(size, scale, ratio, generator.random(22))
        w, h = right - left, bottom - top
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        assert (w - 0.5) / (h + 0.5) <= ratio[1] and (w + 0.5) / (h - 0.5) >= ratio[0]
        assert (w - 0.5) * (h - 0.5) <= scale[1] * size[0] * size[1]
        fits = min(size[0] / size[1], size[1] / size[0]) >= ratio[0]
        assert not fits or (w + 0.5) * (h + 0.5) >= scale[0] * size[0] * size[1]


def plain_crop(width, height, scale, ratio, generator):
    """RandomResizedCrop as its paper's users describe it, with a generator of its own."""
    for _ in range(10):
        area = generator.uniform(*scale) * width * height
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.randint(0, width - w), generator.randint(0, height - h)
            return left, top, left + w, top + h
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@pytest.mark.parametrize("size", [(100, 80), (60, 120)])
def test_crops_are_distributed_as_those_of_a_plain_implementation(size):
    """Kolmogorov-Smirnov: area, shape and place of 4,000 boxes each differ by less than chance allows (p = 0.001)."""
    scale, ratio, count = (0.2, 1.0), (3 / 4, 4 / 3), 4000
    generator, numbers = np.random.default_rng(1), random.Random(1)
    ours = np.array([random_resized_crop(size, scale, ratio, generator.random(22)) for _ in range(count)])
    theirs = np.array([plain_crop(*size, scale, ratio, numbers) for _ in range(count)])
    for figure in (
        lambda box: (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]),
        lambda box: (box[:, 2] - box[:, 0]) / (box[:, 3] - box[:, 1]),
        *(lambda box, side=side: box[:, side] for side in range(4)),
    ):
        a, b = np.sort(figure(ours)), np.sort(figure(theirs))
        values = np.union1d(a, b)
        distance = abs(np.searchsorted(a, values, "right") - np.searchsorted(b, values, "right")).max() / count
        assert distance < 1.95 * math.sqrt(2 / count)


@pytest.mark.parametrize(
    "size, box", [((1, 1), (0, 0, 1, 1)), ((300, 2), (148, 0, 151, 2)), ((2, 300), (0, 148, 2, 151))]
)
def test_images_that_no_crop_fits_give_their_centre(size, box):
    """2 pixels high at ratio 4/3 is 3 wide: columns 148 to 150 of 300; one pixel is one pixel."""
    for seed in range(20):
        assert random_resized_crop(size, (0.2, 1.0), (3 / 4, 4 / 3), np.random.default_rng(seed).random(22)) == box


@pytest.mark.parametrize("size", [(1, 1), (300, 2), (5, 3)])
def test_small_and_thin_images_are_enlarged(size):
    """Images below the crop's size are neither refused nor padded: red stays the picture's number everywhere."""
    images = images_of(IndexedSamples(indexed([encode(picture(90, *size))]), seed=0), count=1)
    example = images[0]["pixel_values"]
    assert example.shape == (3, 16, 16) and (example[0] == 90).all()


def test_the_crop_is_the_part_of_the_image_that_its_box_says():
    """Without crop and flip freedom the example is the picture itself."""
    image = picture(9, 16, 16)
    same = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "horizontal_flip": False}
    example = images_of(IndexedSamples(indexed([encode(image)]), seed=0), count=1, **same)[0]
    assert np.array_equal(example["pixel_values"].permute(1, 2, 0).numpy(), np.asarray(image))


def test_half_of_the_crops_are_mirrored_if_any():
    """Green falls from left to right in a mirrored picture: half of 2,000 within 4 deviations; none if switched off."""
    samples = IndexedSamples(indexed([encode(picture(0, 20, 20))]), seed=0)

    def mirrored(**data):
        images = images_of(samples, count=1, passes=2000, **data)
        greens = (images[position]["pixel_values"][1, 8].int() for position in range(2000))
        return sum(bool(green[0] > green[-1]) for green in greens) / 2000

    assert abs(mirrored() - 0.5) < 4 * math.sqrt(0.25 / 2000)
    assert mirrored(horizontal_flip=False) == 0


# Broken images


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_replaced_by_the_next_good_one(tmp_path, streaming, workers):
    """A truncated JPEG, text and nothing give way to the next in order, of the window if streamed; no mask changes."""
    good = [encode(picture(number)) for number in range(12)]
    broken = dict(zip((2, 5, 9), (CUT, TEXT, b""), strict=True))
    rows = [broken.get(number, content) for number, content in enumerate(good)]

    def run(encoded, name, workers):
        path = write_parquet(tmp_path / name, encoded)
        images = images_of(ImageSource("parquet", data_files=path, streaming=streaming), count=12, passes=2)
        loader = DataLoader(images, batch_size=4, num_workers=workers, collate_fn=plain)
        return [example for batch in loader for example in batch]

    clean, found = run(good, "good.parquet", 0), run(rows, "rows.parquet", workers)
    for position, example in enumerate(found):
        size = 4 if streaming else 12  # candidates: the window, or the pass
        start = position - position % size
        ring = [number_of(clean[start + (position - start + step) % size]) for step in range(size)]
        assert number_of(example) == next(number for number in ring if number not in broken)
        assert example["mask_seed"] == clean[position]["mask_seed"]  # that of the image it stands for
        if ring[0] not in broken:
            assert as_key(example) == as_key(clean[position])


@pytest.mark.parametrize("content", [TEXT, b"", encode(picture(0))[:40]], ids=["text", "nothing", "cut PNG"])
def test_what_is_no_image_is_recorded_as_such(tmp_path, content):
    """Pillow's own words reach the record, whichever formats it tried."""
    images = images_of(IndexedSamples(indexed([content]), seed=0), count=1, record=tmp_path / "record.jsonl")
    with pytest.raises(RuntimeError, match="of data.train could be decoded; the last: .*record.jsonl"):
        images[0]
    (line,) = read_skipped(tmp_path / "record.jsonl")
    assert line["error"].startswith(("UnidentifiedImageError: cannot identify image file", "OSError: ")), line["error"]


def test_the_record_tells_shard_and_row_of_a_stream(tmp_path):
    """The second picture of the third file is broken."""
    shards = [[encode(picture(10 * shard + row)) for row in range(3)] for shard in range(3)]
    shards[2][1] = TEXT
    source = ImageSource("parquet", data_files=write_shards(tmp_path, shards), streaming=True)
    images = images_of(source, count=9, passes=1, record=tmp_path / "record.jsonl")
    for position in range(9):
        images[position]
    assert {(line["shard"], line["row"]) for line in read_skipped(tmp_path / "record.jsonl")} == {(2, 1)}


def test_a_resumed_run_does_not_count_its_broken_images_twice(tmp_path):
    """The same positions asked for again, as after an interruption, leave the list of skipped images as it was."""
    samples = IndexedSamples(indexed([TEXT, encode(picture(1))]), seed=0)
    images = images_of(samples, count=2, passes=1, record=tmp_path / "record.jsonl")
    assert read_skipped(tmp_path / "record.jsonl") == []
    images[0], images[1]
    once = read_skipped(tmp_path / "record.jsonl")
    images[0], images[1]
    assert len((tmp_path / "record.jsonl").read_text().splitlines()) == 2
    again = read_skipped(tmp_path / "record.jsonl")
    assert [line["sample_id"] for line in once] == [line["sample_id"] for line in again] == [0]


def test_a_row_without_an_image_is_a_broken_image(tmp_path):
    """A null in the column is skipped and recorded as a file that cannot be decoded is."""
    rows = Dataset.from_dict(
        {"image": [None, {"bytes": encode(picture(1)), "path": None}]},
        features=Features({"image": Image(decode=False)}),
    )
    images = images_of(IndexedSamples(rows, seed=0), count=2, passes=1, record=tmp_path / "record.jsonl")
    assert {number_of(images[position]) for position in range(2)} == {1}
    assert [line["sample_id"] for line in read_skipped(tmp_path / "record.jsonl")] == [0]


@pytest.mark.parametrize("row", range(5))
def test_one_broken_image_never_stops_a_streamed_run(tmp_path, row):
    """5 pictures in windows of 4 leave one alone in the last window; broken, it is replaced like any other."""
    rows = [TEXT if number == row else encode(picture(number)) for number in range(5)]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    images = images_of(ImageSource("parquet", data_files=path, streaming=True), count=5, passes=4)
    assert {number_of(images[position]) for position in range(20)} == set(range(5)) - {row}


# Streams that break off


class Breaking:
    """Stands for a stream's shard: raises such errors at such rows, each once or for ever."""

    def __init__(self, count, faults):
        self.count, self.faults, self.given = count, faults, 0

    num_shards = 1

    def shard(self, *_):
        return self

    def skip(self, count):
        left = Breaking(self.count, self.faults)
        left.given = count
        return left

    def iter(self, batch_size):
        for row in range(self.given, self.count):
            if self.faults.get(row, [None])[0] is not None:
                raise self.faults[row].pop(0)
            yield {"image": [{"bytes": encode(picture(row)), "path": None}]}


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(decoding, "READ_PAUSES", (0, 0, 0))


def test_a_stream_that_breaks_off_is_read_on(no_pauses, caplog):
    """Twice at one row and once at another: the rows are those of a stream that did not break, and it is told."""
    faults = {3: [OSError("reset"), TimeoutError("slow"), None], 6: [ConnectionError("503"), None]}
    with caplog.at_level("WARNING"):
        broken = images_of(StreamedSamples(Breaking(9, faults), seed=0, window=4), count=9)
        whole = images_of(StreamedSamples(Breaking(9, {}), seed=0, window=4), count=9)
        assert [as_key(broken[n]) for n in range(27)] == [as_key(whole[n]) for n in range(27)]
    assert "shard 0 broke off after row 3 (OSError: reset); reading on in 0 s" in caplog.text


def test_a_stream_that_stays_away_ends_the_run(no_pauses):
    """An outage never shortens a shard, since other workers may see it whole."""
    samples = StreamedSamples(Breaking(9, {5: [OSError("gone")] * 9}), seed=0, window=4)
    with pytest.raises(
        UnusableData, match=r"shard 0 of data.train cannot be read on after row 5: OSError: gone\. Start"
    ):
        [images_of(samples, count=9)[n] for n in range(9)]


def test_a_file_behind_a_url_is_read_again(no_pauses, monkeypatch):
    """What the network breaks is tried four times; what is not there is not asked for again."""
    asked = []

    def open_broken(path, mode):
        asked.append(path)
        raise FileNotFoundError("404") if "gone" in path else OSError("503")

    monkeypatch.setattr(decoding.fsspec, "open", open_broken)
    for path, tries in (("http://a/b.png", 4), ("http://a/gone.png", 1), ("b.png", 1)):
        asked.clear()
        with pytest.raises(OSError):
            decoding.read_path(path)
        assert asked == [path] * tries


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:4] + b"\xff" * 20 + content[24:],
        lambda content: content[:-60] + b"\xff" * 40 + content[-20:],
    ],
    ids=["cut", "page header", "footer"],
)
def test_what_is_broken_of_a_shard_is_one_row_of_the_record(tmp_path, damage):
    """Of three files one cannot be read: all other pictures are seen in each pass."""
    shards = write_shards(tmp_path, [[encode(picture(10 * s + n)) for n in range(5)] for s in range(3)])
    content = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(damage(content))
    source = ImageSource("parquet", data_files=shards, streaming=True)
    images = images_of(source, count=11, record=tmp_path / "record.jsonl")
    for start in (0, 11):
        seen = sorted(number_of(images[start + n]) for n in range(11))
        assert set(seen) == {0, 1, 2, 3, 4, 20, 21, 22, 23, 24} and len(seen) == 11  # one stands for what is broken
    lines = read_skipped(tmp_path / "record.jsonl")
    assert [(line["pass"], line["shard"], line["row"]) for line in lines] == [(0, 1, 0), (1, 1, 0)]
    assert "the rest of the shard cannot be read: " in lines[0]["error"]


def test_too_many_broken_images_stop_the_run(tmp_path):
    """6 of 60 are broken: a share of 0.01 stops with both numbers, one of 0.2 goes on."""
    rows = [TEXT if number % 10 == 0 else encode(picture(number)) for number in range(60)]
    samples = IndexedSamples(indexed(rows), seed=0)
    record = tmp_path / "skipped.jsonl"

    def run(share):
        images = images_of(samples, count=60, max_skipped_share=share, record=record)
        for position in range(180):
            images[position]

    run(0.2)
    message = r"\d+ of \d+ images could not be decoded, more than data.max_skipped_share=0.01; .*skipped.jsonl; raise"
    with pytest.raises(RuntimeError, match=message):
        run(0.01)


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_but_broken_images_is_an_error(tmp_path, monkeypatch, streaming, share):
    """There is nothing to replace the first one by, and no end of trying that a test could wait for."""
    passes, chunks = [], StreamedSamples._chunks
    monkeypatch.setattr(StreamedSamples, "_chunks", lambda self, n: passes.append(n) or chunks(self, n))
    path = write_parquet(tmp_path / "broken.parquet", [TEXT, CUT, b""])
    images = images_of(ImageSource("parquet", data_files=path, streaming=streaming), count=3, max_skipped_share=share)
    tell = PretrainingImages._skip

    def skip(self, *args):
        assert len(passes) < 500, "500 passes over a stream without one good image, and no end"
        tell(self, *args)

    monkeypatch.setattr(PretrainingImages, "_skip", skip)
    with pytest.raises(RuntimeError, match="could not be decoded|none of the images"):
        images[0]


# Decoding


def decoded(image, num_channels, format="PNG", **options):
    return np.asarray(decode_image({"bytes": encode(image, format, **options), "path": None}, num_channels, 10_000))


def test_sixteen_bits_are_scaled_not_clipped():
    """257 k of 65,535 is k of 255, in one channel or three."""
    image = PILImage.fromarray(np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16))
    assert decoded(image, 1).tolist() == [[0, 1, 128, 255]]
    assert decoded(image, 3).tolist() == [[[v] * 3 for v in (0, 1, 128, 255)]]


def test_cmyk_jpegs_become_rgb():
    """No cyan, all magenta and yellow, is red."""
    red = decoded(PILImage.new("CMYK", (8, 8), (0, 255, 255, 0)), 3, "JPEG", quality=95)
    assert red.shape == (8, 8, 3) and abs(red.astype(int) - [255, 0, 0]).max() <= 4


def test_palettes_and_their_transparency():
    """Colours are looked up; the transparent entry counts only where alpha is a channel."""
    image = PILImage.new("P", (2, 1))
    image.putpalette([250, 0, 0, 0, 250, 0])
    image.putdata([0, 1])
    assert decoded(image, 3, transparency=0).tolist() == [[[250, 0, 0], [0, 250, 0]]]
    assert decoded(image, 4, transparency=0).tolist() == [[[250, 0, 0, 0], [0, 250, 0, 255]]]


def test_photos_are_turned_upright():
    """EXIF orientation 6 is a quarter turn clockwise: the left pixel becomes the upper one."""
    image = PILImage.fromarray(np.array([[[200, 0, 0], [0, 0, 200]]], dtype=np.uint8))
    exif = PILImage.Exif()
    exif[0x0112] = 6
    assert decoded(image, 3, exif=exif).tolist() == [[[200, 0, 0]], [[0, 0, 200]]]


def test_an_animation_is_its_first_frame():
    """Red, then blue: red."""
    frames = [PILImage.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    first = decoded(frames[0], 3, "GIF", save_all=True, append_images=frames[1:])
    assert first.shape == (4, 4, 3) and (first == [255, 0, 0]).all()


def test_grey_and_colour_turn_into_each_other():
    """Grey is three equal channels; pure red is 0.299 bright (ITU-R 601), that is 76."""
    assert decoded(PILImage.new("L", (1, 1), 33), 3).tolist() == [[[33, 33, 33]]]
    assert decoded(PILImage.new("RGB", (1, 1), "red"), 1).tolist() == [[76]]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "MPO"])
def test_every_listed_format_is_read(format):
    """A grey square survives each format, lossy or not, within 3 levels."""
    square = decoded(PILImage.new("RGB", (16, 16), (100, 100, 100)), 3, format)
    assert square.shape == (16, 16, 3) and abs(square.astype(int) - 100).max() <= 3


def test_images_beyond_the_pixel_limit_are_not_decoded():
    """100 pixels pass a limit of 100 and fail one of 99, which the message names, without touching the pixels."""
    content = {"bytes": encode(picture(0, 10, 10)), "path": None}
    assert decode_image(content, 3, max_pixels=100).size == (10, 10)
    with pytest.raises(ValueError, match="10x10 pixels exceed data.max_pixels=99"):
        decode_image(content, 3, max_pixels=99)
    cut = {"bytes": encode(picture(0, 500, 500))[:200], "path": None}  # a header is enough
    with pytest.raises(ValueError, match="500x500 pixels exceed data.max_pixels=1000"):
        decode_image(cut, 3, max_pixels=1000)


def test_a_bomb_in_the_training_set_is_skipped_and_recorded(tmp_path):
    """Of a small and a large picture the small one is shown twice, and the record tells the limit."""
    samples = IndexedSamples(indexed([encode(picture(1, 10, 10)), encode(picture(2, 11, 10))]), seed=0)
    images = images_of(samples, count=2, passes=1, max_pixels=100, record=tmp_path / "record.jsonl")
    assert [number_of(images[position]) for position in range(2)] == [1, 1]
    (line,) = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert line["sample_id"] == 1 and line["error"] == "ValueError: 11x10 pixels exceed data.max_pixels=100"


def test_five_channels_are_not_in_image_files():
    """The error names the number and the way out."""
    with pytest.raises(ValueError, match="num_channels=5: image files have 1, 3 or 4; .* torch dataset"):
        decode_image({"bytes": encode(picture(0)), "path": None}, 5, 10_000)


# Batches and settings


def test_batches_are_normalised_and_seeded():
    """(1 - 0.5) / 0.25 = 2 for white, (0 - 0.5) / 0.25 = -2 for black; seeds are signed 64-bit numbers."""
    examples = [
        {"pixel_values": torch.full((1, 2, 2), value, dtype=torch.uint8), "mask_seed": seed}
        for value, seed in ((255, -(2**63)), (0, 2**63 - 1))
    ]
    batch = NormalizingCollator([0.5], [0.25])(examples)
    assert batch["pixel_values"].tolist() == [[[[2.0, 2.0]] * 2], [[[-2.0, -2.0]] * 2]]
    assert batch["mask_seed"].tolist() == [-(2**63), 2**63 - 1]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"crop_scale": [0.0, 1.0]}, r"data.crop_scale=\[0.0, 1.0\] must be two rising numbers above 0, at most 1"),
        ({"crop_scale": [0.8, 0.2]}, r"data.crop_scale=\[0.8, 0.2\] must be two rising numbers"),
        ({"crop_ratio": [1.0]}, r"data.crop_ratio=\[1.0\] must be two rising numbers"),
        ({"image_std": [0.2, 0.2, 0.0]}, r"data.image_std=\[0.2, 0.2, 0.0\] must hold one number a channel.* positive"),
        ({"image_mean": [0.5]}, r"data.image_mean=\[0.5\] and data.image_std="),
        ({"shuffle_window": 0}, "data.shuffle_window=0 must be at least 1"),
        ({"max_skipped_share": 1.5}, r"data.max_skipped_share=1.5 must lie in \[0, 1\]"),
        ({"probe_train": ImageSource("synthetic")}, "data.probe_train and data.probe_test go together"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    """Field, value and rule are in the message."""
    with pytest.raises(ValueError, match=message):
        DataArguments(train=ImageSource("synthetic"), **wrong)


def test_a_source_is_described_without_the_folders_of_this_machine():
    """What goes into a public card says file, split, revision and streaming, not who trained where."""
    source = ImageSource("parquet", data_files="/home/someone/data/tiny/train.parquet", streaming=True)
    assert describe_source(source) == "parquet, tiny/train.parquet, split train, streamed"
    assert describe_source(ImageSource("/home/someone/sets/pictures")) == "sets/pictures, split train"
    folder = ImageSource("imagefolder", data_dir="/home/someone/sets/pictures")
    assert describe_source(folder) == "imagefolder, sets/pictures, split train"
    assert describe_source(ImageSource("org/set", "small", split="all", revision="v1")) == (
        "org/set, small, split all, revision v1"
    )


def test_the_embedded_images_have_no_files():
    """A path that was forgotten does not train on synthetic images in place of one's own."""
    with pytest.raises(ValueError, match="path=synthetic is the embedded image set, which has no files"):
        ImageSource("synthetic", data_files="mine.parquet")


def test_streamed_samples_know_their_pass_only_after_it(sources):
    """The length of a stream is learnt by reading it: nothing before, 21 afterwards."""
    samples = open_samples(sources["parquet streamed"], 0, 4, (16, 16))
    assert isinstance(samples, StreamedSamples) and samples.samples_per_pass is None
    next(samples.candidates(COUNT))
    assert samples.samples_per_pass == COUNT


@pytest.mark.parametrize(
    "address",
    [
        "https://alice:sesame@example.org/train.parquet",
        "s3://AKIA0:sesame@bucket/train.parquet",
        "https://bucket.example.org/train.parquet?X-Amz-Date=1&X-Amz-Signature=sesame",
        "https://account.example.org/train.parquet?sv=2024&sig=sesame",
        "https://example.org/train.parquet?download=true&access_token=sesame",
    ],
)
def test_addresses_that_hold_secrets_are_refused(address):
    """They would be in the run's recipe, card and records."""
    for files in (address, [address], {"train": ["train.parquet", address]}):
        with pytest.raises(ValueError, match="data_files=.* holds a password or a signature") as refused:
            ImageSource("parquet", data_files=files)
        assert "sesame" not in str(refused.value)
    with pytest.raises(ValueError, match="path=.*HF_TOKEN"):
        ImageSource(address)


@pytest.mark.parametrize(
    "address",
    [
        "hf://datasets/alice/images@main/train.parquet",
        "https://example.org/a@b.parquet?download=true&design=2",
        "a?sig=1",
    ],
)
def test_plain_addresses_are_taken(address):
    assert ImageSource("parquet", data_files=[address]).data_files == [address]
