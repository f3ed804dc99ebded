import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from modeling_ehm.training import synthetic
from modeling_ehm.training.synthetic import (
    CLASS_NAMES,
    OBJECTS,
    SyntheticImages,
    SyntheticImageStream,
    as_hf_dataset,
    as_hf_iterable,
    synthetic_example,
)

SIZES = {32: (32, 32), (48, 80): (48, 80), (80, 48): (80, 48), 224: (224, 224)}


@pytest.fixture(scope="module")
def examples():
    return [synthetic_example(index) for index in range(300)]


def digest(example):
    parts = (example["image"], example["segments"], np.array(example["label"]))
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def pixels(example):
    return np.asarray(example["image"]).tobytes()


def variance_explained(image, segments):
    """Share of the colour variance that lies between segments, not within them."""
    colours, segments = image.reshape(-1, 3).astype(float), segments.ravel()
    within = sum(colours[segments == s].var(0).sum() * (segments == s).sum() for s in np.unique(segments))
    return 1 - within / (colours.var(0).sum() * len(segments))


@pytest.mark.parametrize("image_size", SIZES)
def test_shapes_types_and_ranges(image_size):
    example = synthetic_example(5, image_size)
    assert example["image"].shape == (*SIZES[image_size], 3) and example["image"].dtype == np.uint8
    assert type(example["label"]) is int and 0 <= example["label"] < len(CLASS_NAMES)
    for name in ("segments", "object"):
        assert example[name].shape == SIZES[image_size] and example[name].dtype == np.int64
    assert set(np.unique(example["segments"])) <= set(range(len(OBJECTS[CLASS_NAMES[example["label"]]]) + 1))
    assert np.array_equal(example["object"], example["segments"] > 0)


def test_an_index_is_one_picture_whatever_was_made_before():
    first = digest(synthetic_example(7))
    np.random.seed(0)
    synthetic_example(8)
    assert digest(synthetic_example(7)) == first
    assert digest(synthetic_example(np.int64(7))) == first


def test_a_fresh_process_makes_the_same_bytes():
    code = (
        "import hashlib; from modeling_ehm.training.synthetic import synthetic_example as make\n"
        "for i in range(10): print(hashlib.sha256(make(i, (48, 80), seed=3)['image'].tobytes()).hexdigest())"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    here = [hashlib.sha256(synthetic_example(i, (48, 80), seed=3)["image"].tobytes()).hexdigest() for i in range(10)]
    assert fresh == here


def test_seeds_and_indices_all_differ():
    assert len({digest(synthetic_example(index, seed=seed)) for index in range(20) for seed in range(3)}) == 60
    labels = [[synthetic_example(index, 16, seed)["label"] for index in range(50)] for seed in range(2)]
    assert labels[0] != labels[1]


def test_classes_are_exactly_balanced():
    assert Counter(synthetic._label(0, index) for index in range(1000)) == dict.fromkeys(range(10), 100)
    assert [synthetic._label(0, index) for index in range(20)] != list(range(10)) * 2


def test_a_larger_size_shows_the_same_scene():
    for index in range(20):
        small, large = synthetic_example(index, 64), synthetic_example(index, 192)
        assert small["label"] == large["label"]
        assert (small["segments"] == large["segments"][1::3, 1::3]).mean() > 0.995  # 1::3: the same pixel centres


def test_every_class_is_parts_on_ground(examples):
    assert {example["label"] for example in examples} == set(range(10))
    for example in examples:
        numbers, counts = np.unique(example["segments"], return_counts=True)
        assert numbers[0] == 0 and len(numbers) >= 3
        assert 0.25 < counts[0] / counts.sum() < 0.97


def test_segments_are_where_the_colours_change(examples):
    explained = np.array([variance_explained(example["image"], example["segments"]) for example in examples])
    moved = [variance_explained(example["image"], np.roll(example["segments"], 6, (0, 1))) for example in examples]
    assert explained.mean() > 0.7 and explained.min() > 0.25
    assert (explained > moved).all()


def test_colour_and_brightness_do_not_tell_the_class(examples):
    mean = np.array([example["image"].mean((0, 1)) for example in examples])
    labels = np.array([example["label"] for example in examples])
    centres = np.array([mean[labels == label].mean(0) for label in range(10)])
    between = ((centres[labels] - mean.mean(0)) ** 2).sum() / ((mean - mean.mean(0)) ** 2).sum()
    assert between < 0.1  # 9 / 299 = 0.03 is expected of 10 random groups


def test_map_style_set_starts_at_first_index():
    images = SyntheticImages(5, 32, seed=2, first_index=100)
    assert len(images) == 5 and images.class_names == CLASS_NAMES and len(list(images)) == 5
    expected = synthetic_example(103, 32, seed=2)
    assert images[3]["image"].mode == "RGB" and pixels(images[3]) == expected["image"].tobytes()
    assert images[3]["label"] == expected["label"] and np.array_equal(images[3]["segments"], expected["segments"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_of_a_stream_make_each_image_once(num_workers):
    loader = DataLoader(SyntheticImageStream(11, 32), batch_size=2, num_workers=num_workers, collate_fn=list)
    found = Counter(pixels(example) for batch in loader for example in batch)
    assert found == Counter(pixels(example) for example in SyntheticImages(11, 32))


def test_a_stream_without_a_number_goes_on():
    stream = iter(SyntheticImageStream(image_size=16))
    assert [next(stream)["label"] for _ in range(30)] == [synthetic._label(0, index) for index in range(30)]


def test_hf_dataset_holds_the_same_pictures():
    rows = as_hf_dataset(6, (32, 48), seed=1, first_index=4)
    assert rows.features["label"].names == list(CLASS_NAMES)
    for row, example in zip(rows, SyntheticImages(6, (32, 48), seed=1, first_index=4), strict=True):
        assert row["image"].format == "PNG" and pixels(row) == pixels(example) and row["label"] == example["label"]
        assert row["segments"].mode == "L" and np.array_equal(np.asarray(row["segments"]), example["segments"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_hf_iterable_makes_each_image_once(num_workers):
    rows = as_hf_iterable(7, 32, num_shards=3)
    assert rows.num_shards == 3 and rows.features == as_hf_dataset(1, 32).features
    loader = DataLoader(rows, batch_size=None, num_workers=num_workers)
    expected = [pixels(example) for example in SyntheticImages(7, 32)]
    found = [pixels(row) for row in loader]
    assert Counter(found) == Counter(expected)
    assert num_workers or found == expected  # in order where nothing runs in parallel


@pytest.mark.parametrize("image_size", [15, 0, 64.0, "64", (64,), (64, 8), (64, 64, 3), None])
def test_impossible_image_sizes_are_named(image_size):
    with pytest.raises(ValueError, match=r"image_size=.* is not an int or a \(height, width\) pair"):
        synthetic_example(0, image_size)


@pytest.mark.parametrize("field", ["index", "seed"])
@pytest.mark.parametrize("value", [-1, 2**64, 1.5, None])
def test_impossible_numbers_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} is not an integer in"):
        synthetic_example(**{"index": 0, field: value})


@pytest.mark.parametrize("make", [SyntheticImages, SyntheticImageStream, as_hf_dataset, as_hf_iterable])
def test_sets_check_their_arguments_at_once(make):
    with pytest.raises(ValueError, match="num_images=0"):
        make(0)
    with pytest.raises(ValueError, match="image_size=8"):
        make(5, image_size=8)
    with pytest.raises(ValueError, match="first_index=-1"):
        make(5, first_index=-1)


@pytest.mark.parametrize("i", [-1, 5])
def test_items_outside_the_set_are_an_index_error(i):
    with pytest.raises(IndexError, match=rf"i={i} is not in \[0, num_images=5\)"):
        SyntheticImages(5, 16)[i]
