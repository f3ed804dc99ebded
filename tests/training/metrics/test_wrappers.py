"""The same figures through `evaluate.Metric` and through `Trainer`."""

import numpy as np
import pytest
import torch

from modeling_ehm.hierarchy_ehm import build_hierarchy
from modeling_ehm.training.metrics import (
    as_evaluate_metric,
    coco_average_precision,
    confusion_matrix,
    hierarchy_accuracy,
    knn_accuracy,
    retrieval_scores,
    segmentation_scores,
    top_k_accuracy,
)


@pytest.fixture
def metric_of(tmp_path):
    return lambda name, **kwargs: as_evaluate_metric(name, cache_dir=str(tmp_path), **kwargs)


@pytest.fixture
def classified() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 8


@pytest.fixture
def maps() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Predicted and true maps of different sizes; 11 is unknown."""
    generator = np.random.default_rng(0)
    sizes = [(4, 6), (4, 6), (7, 3)]
    predictions, references = (
        [generator.integers(5, size=s) for s in sizes],
        [generator.integers(5, size=s) for s in sizes],
    )
    references[0][0] = 11
    return predictions, references


def test_knn_accuracy(metric_of):
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(60, 6, generator=generator), torch.randn(40, 6, generator=generator)
    train_labels, labels = (train[:, 0] > 0).long(), (test[:, 0] > 0).long()
    metric = metric_of("knn_accuracy")
    for start in range(0, 40, 16):
        metric.add_batch(predictions=test[start : start + 16], references=labels[start : start + 16])
    result = metric.compute(train_features=train, train_labels=train_labels, k=5)
    assert result == {"knn_accuracy": knn_accuracy(train, train_labels, test, labels, k=5)}
    assert 0.5 < result["knn_accuracy"] < 1


def test_hierarchy_accuracy(metric_of):
    trees = build_hierarchy(torch.corrcoef(torch.randn(16, 50, generator=torch.Generator().manual_seed(0)))[None])
    segments = torch.tensor([[0, 1, 1, 2] * 4])
    metric = metric_of("hierarchy_accuracy")
    for _ in range(2):
        metric.add_batch(parent=trees.parent, rank=trees.rank, references=segments)
    assert metric.compute() == hierarchy_accuracy(trees, segments)


def test_top_k_accuracy(metric_of, classified):
    logits, labels = classified
    metric = metric_of("top_k_accuracy")
    metric.add(prediction=logits[0], reference=labels[0])
    metric.add(prediction=logits[1].tolist(), reference=int(labels[1]))
    metric.add_batch(predictions=logits[2:30], references=labels[2:30])
    metric.add_batch(predictions=logits[30:].numpy(), references=labels[30:].numpy())
    assert metric.compute(k=(1, 3)) == top_k_accuracy(logits, labels, k=(1, 3))
    assert metric.compute(predictions=logits, references=labels) == top_k_accuracy(logits, labels)  # starts anew
    # Float32 would make a tie of these, and the smaller class win.
    close = np.array([[1.0, 1.0 + 1e-12]])
    assert metric.compute(predictions=close, references=[1], k=(1,)) == {"top1": 1.0}
    assert metric.compute(predictions=logits.bfloat16(), references=labels) == top_k_accuracy(logits.bfloat16(), labels)


def test_mean_iou_of_maps_of_different_sizes(metric_of, maps):
    expected = segmentation_scores(sum(confusion_matrix(p, r, 5, 11) for p, r in zip(*maps, strict=True)))
    metric = metric_of("mean_iou")
    metric.add(prediction=maps[0][0], reference=torch.tensor(maps[1][0]))
    metric.add_batch(predictions=maps[0][1:], references=[reference.tolist() for reference in maps[1][1:]])
    assert metric.compute(num_labels=5, ignore_index=11) == expected
    assert metric.compute(predictions=maps[0], references=maps[1], num_labels=5, ignore_index=11) == expected
    with pytest.raises(ValueError, match=r"image 1: predictions has shape \(4, 6\), references has \(7, 3\)"):
        metric.compute(predictions=maps[0][:2], references=maps[1][::2], num_labels=5, ignore_index=11)


def test_coco_average_precision(metric_of):
    predictions = [
        {"boxes": torch.tensor([[0.0, 0, 8, 10], [3, 3, 9, 9]]), "scores": torch.tensor([0.3, 0.9]), "labels": [1, 0]},
        {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)},
        {"boxes": [[0, 0, 50, 50]], "scores": [0.5], "labels": [0]},
    ]
    references = [
        {"boxes": np.array([[0, 0, 10, 10]]), "labels": np.array([1])},
        {"boxes": [[1, 1, 5, 5], [2, 2, 9, 9]], "labels": [0, 1], "iscrowd": [0, 1]},
        {"boxes": [[0, 0, 50, 45]], "labels": [0], "area": [900.0], "image_id": 3},
    ]
    expected = coco_average_precision(predictions, references, 2)
    metric = metric_of("coco_average_precision")
    metric.add(prediction=predictions[0], reference=references[0])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    assert str(metric.compute(num_labels=2)) == str(expected)  # as text, since NaN differs from itself
    assert 0 < expected["ap"] < 1
    with pytest.raises(ValueError, match=r"predictions\[0\] lacks scores"):
        metric.compute(predictions=references, references=references, num_labels=2)


def test_retrieval_map(metric_of):
    similarity = torch.rand(6, 20, generator=torch.Generator().manual_seed(0))
    queries, database, tags = torch.arange(6) % 4, torch.arange(20) % 4, ["crop", "turn"] * 3
    metric = metric_of("retrieval_map")
    for row in range(0, 6, 4):
        metric.add_batch(predictions=similarity[row : row + 4], references=queries[row : row + 4])
    result = metric.compute(database_groups=database, tags=tags)
    assert result == retrieval_scores(similarity, queries, database, tags)


def test_metrics_of_different_experiments_do_not_mix(metric_of, classified):
    logits, labels = classified
    first, second = (metric_of("top_k_accuracy", experiment_id=name) for name in ("first", "second"))
    for start in range(0, 40, 10):
        first.add_batch(predictions=logits[start : start + 10], references=labels[start : start + 10])
        second.add_batch(predictions=-logits[start : start + 10], references=labels[start : start + 10])
    assert second.compute() == top_k_accuracy(-logits, labels)
    assert first.compute() == top_k_accuracy(logits, labels) != top_k_accuracy(-logits, labels)


def test_metric_can_stay_in_memory(metric_of, classified, tmp_path):
    metric = metric_of("top_k_accuracy", keep_in_memory=True)
    assert metric.compute(predictions=classified[0], references=classified[1]) == top_k_accuracy(*classified)
    assert not list(tmp_path.rglob("*.arrow"))


def test_unknown_name():
    with pytest.raises(ValueError, match="name='ari' is not one of knn_accuracy, .*, retrieval_map"):
        as_evaluate_metric("ari")


class Channels(torch.nn.Module):
    """A segmenter whose logits are the image at half its size."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixel_values, labels=None):
        logits = torch.nn.functional.avg_pool2d(pixel_values, 2) * self.scale
        return {"loss": logits.mean(), "logits": logits}
