"""Confusion matrix and IoU: known by hand, and scikit-learn's."""

import numpy as np
import pytest
import sklearn.metrics
import torch

from modeling_ehm.training.metrics import confusion_matrix, segmentation_scores


def test_scores_known_by_hand():
    # Class 3 occurs nowhere, class 2 is predicted only; 255 is unknown.
    references = torch.tensor([[[0, 0, 0, 1], [1, 1, 255, 255]]])
    predictions = torch.tensor([[[0, 0, 1, 1], [1, 2, 0, 1]]])
    confusion = confusion_matrix(predictions, references, num_labels=4, ignore_index=255)
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    scores = segmentation_scores(confusion)
    assert scores["iou_per_class"] == [2 / 3, 2 / 4, 0.0, pytest.approx(float("nan"), nan_ok=True)]
    assert scores["mean_iou"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(4 / 6)
    assert scores["mean_accuracy"] == pytest.approx((2 / 3 + 2 / 3) / 2)  # over the two true classes


def test_scores_equal_sklearn():
    generator = np.random.default_rng(0)
    references = generator.integers(5, size=(4, 9, 13))
    predictions = np.where(generator.random(references.shape) < 0.6, references, generator.integers(5, size=(4, 9, 13)))
    references[generator.random(references.shape) < 0.2] = 11
    known = references != 11
    confusion = confusion_matrix(predictions, torch.tensor(references), num_labels=5, ignore_index=11)
    expected = sklearn.metrics.confusion_matrix(references[known], predictions[known], labels=range(5))
    assert confusion.tolist() == expected.tolist()
    iou = sklearn.metrics.jaccard_score(references[known], predictions[known], labels=range(5), average=None)
    scores = segmentation_scores(confusion)
    assert scores["iou_per_class"] == pytest.approx(iou.tolist(), abs=1e-12)
    assert scores["mean_iou"] == pytest.approx(iou.mean(), abs=1e-12)
    assert scores["pixel_accuracy"] == pytest.approx((references == predictions)[known].mean(), abs=1e-12)
    balanced = sklearn.metrics.balanced_accuracy_score(references[known], predictions[known])
    assert scores["mean_accuracy"] == pytest.approx(balanced, abs=1e-12)


def test_matrices_of_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    predictions, references = torch.randint(0, 3, (2, 6, 4, 4), generator=generator)
    parts = [confusion_matrix(predictions[i], references[i], num_labels=3) for i in range(6)]
    assert torch.equal(sum(parts), confusion_matrix(predictions, references, num_labels=3))


def test_perfect_prediction_scores_one_whatever_is_absent():
    references = torch.tensor([0, 4, 4])
    scores = segmentation_scores(confusion_matrix(references, references, num_labels=20))
    assert scores["mean_iou"] == scores["mean_accuracy"] == scores["pixel_accuracy"] == 1.0


def test_predictions_under_ignored_pixels_do_not_matter():
    references = torch.tensor([0, 255, 1])
    confusion = confusion_matrix(torch.tensor([0, 77, 1]), references, num_labels=2, ignore_index=255)
    assert confusion.tolist() == [[1, 0], [0, 1]]


def test_an_ignored_class_within_range_may_be_predicted():
    confusion = confusion_matrix(torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1]), num_labels=2, ignore_index=0)
    assert confusion.tolist() == [[0, 0], [1, 1]]


def test_errors_name_the_class():
    references = torch.zeros(2, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"predictions has shape \(2, 2, 2\), references has \(2, 4, 4\)"):
        confusion_matrix(references[:, :2, :2], references, num_labels=2)
    with pytest.raises(ValueError, match="predictions has dtype torch.float32"):
        confusion_matrix(references.float(), references, num_labels=2)
    with pytest.raises(ValueError, match=r"references holds class 255.*num_labels=2\); nor is it ignore_index=None"):
        confusion_matrix(references, references + 255, num_labels=2)
    with pytest.raises(ValueError, match="references holds class -1"):
        confusion_matrix(references, references - 1, num_labels=2, ignore_index=255)
    with pytest.raises(ValueError, match="predictions holds class 2"):
        confusion_matrix(references + 2, references, num_labels=2)
    with pytest.raises(ValueError, match="counts no pixel"):
        segmentation_scores(confusion_matrix(references, references + 255, num_labels=2, ignore_index=255))
    with pytest.raises(ValueError, match=r"confusion has shape \(2, 3\)"):
        segmentation_scores(torch.ones(2, 3))
