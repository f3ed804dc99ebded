"""Labelled rows: what is wrong with them is said with its row, and examples are functions of their position."""

import numpy as np
import pytest
from datasets import ClassLabel
from PIL import Image as PILImage
from tiny_recipes import encode, picture, write_parquet

from modeling_ehm.training.data import ImageSource
from modeling_ehm.training.labelled import (
    DRAWS,
    EvaluationImages,
    KeyedExamples,
    LabelledRows,
    check_channels,
    check_labels,
    class_names,
    image_processor,
    keyed_uniform,
)

pytestmark = pytest.mark.usefixtures("own_cache")


def rows_of(tmp_path, labels, encoded=None, name="rows.parquet", **source):
    path = write_parquet(tmp_path / name, encoded or [encode(picture(n)) for n in range(len(labels))], label=labels)
    source = ImageSource("parquet", data_files=path, label_column="label", **source)
    return LabelledRows(source, {"label": source.label_column}, (32, 32))


def test_rows_come_decoded_with_their_labels(tmp_path):
    rows = rows_of(tmp_path, [0, 2, 1])
    assert len(rows) == 3 and rows.column("label") == [0, 2, 1]
    assert rows[1]["label"] == 2 and rows[1]["image"].getpixel((0, 0)) == (1, 0, 0)
    assert class_names(rows) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert [rows.select([2, 0])[n]["label"] for n in (0, 1)] == [1, 0] and len(rows) == 3
    examples = EvaluationImages(rows, lambda columns: columns["image"].getpixel((0, 0))[0])
    assert [examples[n] for n in range(len(examples))] == [0, 1, 2]


def test_class_labels_bring_their_names(tmp_path):
    rows = rows_of(tmp_path, [0, 1])
    rows.dataset = rows.dataset.cast_column("label", ClassLabel(names=["cat", "dog"]))
    rows.features = rows.dataset.features
    assert class_names(rows) == ["cat", "dog"]


def test_what_is_wrong_is_said_with_its_row(tmp_path):
    with pytest.raises(ValueError, match=r"row 1 has label 3, not a class in \[0, 2\]"):
        check_labels(rows_of(tmp_path, [0, 3]), 3)
    with pytest.raises(ValueError, match=r"row 2 has label -1, not a class in"):
        class_names(rows_of(tmp_path, [0, 1, -1], name="negative.parquet"))
    with pytest.raises(ValueError, match=r"row 0 has 0.5 in label_column='label', which should hold the numbers"):
        class_names(rows_of(tmp_path, [0.5, 1.0], name="float.parquet"))
    with pytest.raises(ValueError, match=r"row 1 has None"):
        class_names(rows_of(tmp_path, [0, None], name="missing.parquet"))
    broken = rows_of(tmp_path, [0, 1], [encode(picture(0)), b"text"], name="broken.parquet")
    assert broken[0]["label"] == 0
    with pytest.raises(ValueError, match=r"row 1 cannot be decoded \(UnidentifiedImageError"):
        broken[1]


def test_sources_that_cannot_serve_are_refused(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", [encode(picture(0))], label=[0])
    source = {"path": "parquet", "data_files": path}
    with pytest.raises(ValueError, match="name a column of it as label_column"):
        LabelledRows(ImageSource(**source), {"label": None}, (32, 32))
    with pytest.raises(ValueError, match=r"no column 'class' \(label_column\); its columns are \['image', 'label'\]"):
        LabelledRows(ImageSource(**source), {"label": "class"}, (32, 32))
    with pytest.raises(ValueError, match="streaming: false"):
        LabelledRows(ImageSource(**source, streaming=True), {"label": "label"}, (32, 32))


def test_examples_are_functions_of_their_position(tmp_path):
    """Each pass holds each row once, in its own order; asking again, in any order, gives the same numbers."""
    rows = rows_of(tmp_path, list(range(5)))

    def example(columns, uniform):
        assert uniform.shape == (DRAWS,) and uniform.min() >= 0 and uniform.max() < 1
        return columns["label"], float(uniform[0])

    examples = KeyedExamples(rows, example, seed=3, num_positions=12)
    drawn = [examples[position] for position in range(12)]
    first, second = drawn[:5], drawn[5:10]
    assert sorted(label for label, _ in first) == sorted(label for label, _ in second) == list(range(5))
    assert [label for label, _ in first] != [label for label, _ in second]
    assert {u for _, u in first}.isdisjoint({u for _, u in second})
    again = KeyedExamples(rows, example, seed=3, num_positions=12)
    assert [again[position] for position in reversed(range(12))] == drawn[::-1]
    assert [KeyedExamples(rows, example, seed=4, num_positions=12)[n] for n in range(12)] != drawn
    with pytest.raises(IndexError, match="position=12"):
        examples[12]


def test_numbers_are_uniform():
    numbers = np.concatenate([keyed_uniform(0, 1, 0, row) for row in range(200)])
    assert abs(numbers.mean() - 0.5) < 0.01 and abs(numbers.var() - 1 / 12) < 0.005


def test_the_processor_resizes_or_cuts_the_centre(config):
    """Native 32: 48 px images are squeezed whole, or, at crop_pct 0.5, resized to 64 and cut to the middle half."""
    image = PILImage.new("RGB", (48, 48), (255, 0, 0))
    image.paste((0, 0, 255), (12, 12, 36, 36))  # the middle half is blue
    whole, centre = (
        image_processor(config, [0.0] * 3, [1.0] * 3, crop_pct)(image, return_tensors="pt")["pixel_values"][0]
        for crop_pct in (1.0, 0.5)
    )
    assert whole.shape == centre.shape == (3, 32, 32)
    assert whole[0, 0, 0] == 1 and whole[2, 16, 16] == 1
    assert centre[0, 4:-4, 4:-4].abs().max() < 0.05 and centre[2, 4:-4, 4:-4].min() > 0.95


def test_the_centre_is_cut_out_for_squares_alone(make_config):
    """A square image resized to 73 px would fill 64 of 128 columns with black."""
    with pytest.raises(
        ValueError, match=r"data.crop_pct=0.875 with model.image_size=\[64, 128\]: .* set crop_pct to 1"
    ):
        image_processor(make_config(image_size=[64, 128]), [0.5] * 3, [0.5] * 3, 0.875)


def test_channels_that_do_not_fit_are_refused(make_config):
    with pytest.raises(ValueError, match="model.num_channels=5"):
        check_channels(make_config(num_channels=5), [0.5] * 5)
    with pytest.raises(ValueError, match=r"data.image_mean=\[0.5\] has 1 numbers"):
        check_channels(make_config(), [0.5])
