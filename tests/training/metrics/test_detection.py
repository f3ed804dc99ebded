"""Box average precision: known by hand, and pycocotools'."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from modeling_ehm.training.metrics import coco_average_precision

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
NAN = pytest.approx(float("nan"), nan_ok=True)


def pycocotools_scores(predictions: list[dict], references: list[dict], num_labels: int) -> dict:
    """The same figures by COCOeval, -1 as NaN."""

    def annotations(images: list[dict]) -> list[dict]:
        found = []
        for number, image in enumerate(images):
            for i, (x1, y1, x2, y2) in enumerate(np.reshape(image["boxes"], (-1, 4)).tolist()):
                box = {"image_id": number, "bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": int(image["labels"][i])}
                if "scores" in image:
                    box["score"] = float(image["scores"][i])
                else:
                    box["area"] = float(image["area"][i]) if "area" in image else (x2 - x1) * (y2 - y1)
                    box["iscrowd"] = int(image["iscrowd"][i]) if "iscrowd" in image else 0
                found.append(box | {"id": len(found) + 1})
        return found

    truth = COCO()
    truth.dataset = {
        "images": [{"id": number} for number in range(len(references))],
        "categories": [{"id": label} for label in range(num_labels)],
        "annotations": annotations(references),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(annotations(predictions)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    scores = dict(zip(NAMES, evaluation.stats[:6].tolist(), strict=True)) | {"ar100": float(evaluation.stats[8])}
    scores["ap_per_class"] = [
        of_class.mean() for of_class in evaluation.eval["precision"].transpose(2, 0, 1, 3, 4)[..., 0, 2]
    ]
    return {name: np.where(np.equal(score, -1), np.nan, score).tolist() for name, score in scores.items()}


def random_images(seed: int, num_images: int, num_labels: int, size: int, integers: bool) -> tuple[list, list]:
    """Objects of all sizes, some of them crowds; predictions that are near them, doubled, misplaced or absent."""
    generator = np.random.default_rng(seed)
    predictions, references = [], []
    for _ in range(num_images):
        count = int(generator.integers(0, 8))
        corner, extent = generator.random((count, 2)) * size * 0.7, generator.random((count, 2)) ** 2 * size * 0.6
        boxes = np.concatenate([corner, corner + extent + 1], 1)
        labels = generator.integers(num_labels, size=count)
        crowd = generator.random(count) < 0.15
        references.append({"boxes": boxes, "labels": labels, "iscrowd": crowd})
        if generator.random() < 0.5:
            references[-1]["area"] = extent.prod(1) * generator.uniform(0.5, 1, count)
        chosen = np.flatnonzero(generator.random(2 * count) < 0.8) % max(count, 1)
        near = boxes[chosen] + generator.normal(size=(len(chosen), 4)) * 0.08 * extent[chosen].repeat(2, 1)
        stray = generator.random((int(generator.integers(0, 4)), 4)) * size
        found = np.concatenate([near, stray])
        found = np.concatenate([np.minimum(found[:, :2], found[:, 2:]), np.maximum(found[:, :2], found[:, 2:])], 1)
        guess = np.concatenate([labels[chosen], generator.integers(num_labels, size=len(stray))])
        scores = generator.integers(0, 6, len(found)) / 5  # many ties
        predictions.append({"boxes": found, "labels": guess, "scores": scores})
    if integers:
        for image in predictions + references:
            image["boxes"] = image["boxes"].round()
    return predictions, references


@pytest.mark.parametrize(
    ("seed", "num_images", "num_labels", "size", "integers"),
    [(0, 12, 3, 200, False), (1, 12, 3, 60, True), (2, 25, 1, 400, False), (3, 8, 6, 30, True), (4, 40, 2, 12, True)],
)
def test_scores_equal_pycocotools(seed, num_images, num_labels, size, integers):
    predictions, references = random_images(seed, num_images, num_labels, size, integers)
    assert any(len(image["boxes"]) == 0 for image in references)
    assert any(image["iscrowd"].any() for image in references)
    expected = pycocotools_scores(predictions, references, num_labels)
    scores = coco_average_precision(predictions, references, num_labels)
    assert set(scores) == set(expected)
    for name in expected:
        assert scores[name] == pytest.approx(expected[name], abs=1e-9, nan_ok=True), name
    assert 0.1 < scores["ap"] < 0.9


def test_crowded_images_and_more_than_100_boxes_equal_pycocotools():
    # Boxes of a coarse raster: equal overlaps, equal scores, several objects for each prediction, 150 boxes an image.
    generator = np.random.default_rng(5)
    predictions, references = [], []
    for _ in range(3):
        for images, count in ((predictions, 150), (references, 30)):
            corner = generator.integers(0, 8, (count, 2)) * 10
            boxes = np.concatenate([corner, corner + generator.integers(1, 5, (count, 2)) * 10], 1)
            images.append({"boxes": boxes, "labels": np.zeros(count, int)})
        predictions[-1]["scores"] = generator.integers(0, 20, 150) / 20
        references[-1]["iscrowd"] = generator.random(30) < 0.1
    expected = pycocotools_scores(predictions, references, 1)
    scores = coco_average_precision(predictions, references, 1)
    assert scores == {name: pytest.approx(value, abs=1e-9, nan_ok=True) for name, value in expected.items()}
    fewer = [{name: values[:100] for name, values in image.items()} for image in predictions]
    assert coco_average_precision(fewer, references, 1)["ar100"] != scores["ar100"]  # the best 100, not the first


def box(*corners: float, score: float | None = None, label: int = 0) -> dict:
    image = {"boxes": [list(corners)], "labels": [label]}
    return image if score is None else image | {"scores": [score]}


def test_scores_known_by_hand():
    # Overlap 8 / 10 = .8: found at the seven thresholds .5 to .8, missed at .85, .9 and .95.
    scores = coco_average_precision([box(0, 0, 8, 10, score=0.3)], [box(0, 0, 10, 10)], num_labels=2)
    assert [scores[name] for name in ("ap", "ap_small", "ar100")] == pytest.approx([7 / 10] * 3)
    assert [scores[name] for name in ("ap50", "ap75")] == pytest.approx([1, 1])
    assert [scores[name] for name in ("ap_medium", "ap_large")] == [NAN, NAN]
    assert scores["ap_per_class"] == [pytest.approx(7 / 10), NAN]


def test_a_wrong_box_with_a_higher_score_halves_the_precision():
    found = {"boxes": [[50, 50, 60, 60], [0, 0, 10, 10]], "scores": [0.9, 0.1], "labels": [0, 0]}
    assert coco_average_precision([found], [box(0, 0, 10, 10)], num_labels=1)["ap"] == pytest.approx(1 / 2)
    found["scores"] = [0.1, 0.9]  # behind the last right answer it costs nothing
    assert coco_average_precision([found], [box(0, 0, 10, 10)], num_labels=1)["ap"] == pytest.approx(1)


def test_a_second_box_on_the_same_object_is_wrong_except_on_a_crowd():
    found = {"boxes": [[0, 0, 10, 10], [0, 0, 10, 10], [30, 0, 40, 10]], "scores": [0.9, 0.8, 0.7], "labels": [0, 0, 0]}
    truth = {"boxes": [[0, 0, 10, 10], [30, 0, 40, 10]], "labels": [0, 0]}
    # Recall .5 at precision 1 (51 points), then 2 of 3 right (50 points).
    expected = (51 + 50 * 2 / 3) / 101
    assert coco_average_precision([found], [truth], num_labels=1)["ap"] == pytest.approx(expected)
    crowd = truth | {"iscrowd": [1, 0]}
    assert coco_average_precision([found], [crowd], num_labels=1)["ap"] == pytest.approx(1)


def test_found_nothing_and_nothing_to_find():
    nothing = {"boxes": [], "scores": [], "labels": []}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    scores = coco_average_precision([nothing], [box(0, 0, 10, 10)], num_labels=1)
    assert (scores["ap"], scores["ar100"], scores["ap_large"]) == (0, 0, NAN)
    scores = coco_average_precision([box(0, 0, 10, 10, score=1.0), nothing], [empty, empty], num_labels=2)
    assert scores == {name: NAN for name in (*NAMES, "ar100")} | {"ap_per_class": [NAN, NAN]}


def test_tensors_and_half_precision_are_fine():
    found = {
        "boxes": torch.tensor([[0.0, 0, 8, 10]], dtype=torch.bfloat16, requires_grad=True),
        "scores": torch.tensor([0.5], dtype=torch.float16),
        "labels": torch.tensor([0]),
    }
    assert coco_average_precision([found], [box(0, 0, 10, 10)], num_labels=1)["ap"] == pytest.approx(7 / 10)


def test_errors_name_image_and_box():
    good, truth = box(0, 0, 10, 10, score=0.5), box(0, 0, 10, 10)
    two = {"boxes": [[0, 0, 10, 10], [5, 0, 4, 10]], "labels": [0, 0]}

    def message(prediction: dict, reference: dict) -> str:
        with pytest.raises(ValueError) as error:
            coco_average_precision([good, prediction], [truth, reference], num_labels=2)
        return str(error.value)

    assert "references[1]['boxes'][1]=[5.0, 0.0, 4.0, 10.0] is inverted" in message(good, two)
    assert "predictions[1]['boxes'][1]=[5.0, 0.0, 4.0, 10.0] is inverted" in message(two | {"scores": [1, 1]}, truth)
    assert "references[1]['labels'][0]=2 is not an integer in [0, num_labels=2)" in message(
        good, truth | {"labels": [2]}
    )
    assert "predictions[1]['labels'][0]=-1" in message(good | {"labels": [-1]}, truth)
    assert "predictions[1]['labels'][0]=0.5" in message(good | {"labels": [0.5]}, truth)
    assert "predictions[1]['scores'][0]=nan is not finite" in message(good | {"scores": [float("nan")]}, truth)
    assert "references[1]['boxes'][0]=[0.0, 0.0, inf, 10.0] is not finite" in message(good, box(0, 0, float("inf"), 10))
    assert "references[1]['boxes'] has shape (1, 5)" in message(good, truth | {"boxes": [[0, 0, 1, 1, 1]]})
    assert "references[1]['iscrowd'] has shape (2,), there are 1 boxes" in message(good, truth | {"iscrowd": [0, 0]})
    assert "predictions[1] lacks scores; it has boxes, labels" in message(truth, truth)
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        coco_average_precision([good, good], [truth], num_labels=2)
