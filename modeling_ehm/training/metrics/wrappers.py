"""The figures for code that is written against `evaluate`, or against `Trainer` with `batch_eval_metrics`.

The classes in `METRICS` are our halves of `evaluate.Metric` classes: `as_evaluate_metric` joins the other half when it
is called, because importing `evaluate` takes seconds. Nothing is downloaded; `evaluate.load` would want a script.

Letters: K classes, B images, H W pixels, L labels, D feature width, N patches, M database images.
"""

import io
import math
from collections.abc import Iterator, Mapping

import datasets
import numpy as np
import torch
from torch import Tensor

from modeling_ehm.hierarchy_ehm import PatchHierarchy
from modeling_ehm.training.metrics.classification import top_k_accuracy
from modeling_ehm.training.metrics.detection import coco_average_precision
from modeling_ehm.training.metrics.language import (
    bleu,
    cider,
    exact_match,
    named_share,
    true_false_accuracy,
    vqa_accuracy,
)
from modeling_ehm.training.metrics.pretraining import hierarchy_accuracy, knn_accuracy
from modeling_ehm.training.metrics.retrieval import retrieval_scores
from modeling_ehm.training.metrics.segmentation import confusion_matrix, segmentation_scores


def as_evaluate_metric(name: str, **kwargs):
    """A figure of this package as an `evaluate.Metric`, made here, so that nothing is downloaded.

    `add(prediction=, reference=)`, `add_batch(predictions=, references=)` and `compute` are those of `evaluate`; the
    result is the one of the function.

    | name | predictions and references, of each image | arguments of `compute` |
    | --- | --- | --- |
    | knn_accuracy | features `(D,)`; label | `train_features`, `train_labels`, `k=20`, `temperature=0.07` |
    | hierarchy_accuracy | `parent=`, `rank=` of the tree; references are segments `(N,)` | |
    | top_k_accuracy | logits `(K,)`; label | `k=(1, 5)` |
    | mean_iou | predicted and true map `(H, W)`, sizes may differ between images | `num_labels`, `ignore_index=None` |
    | coco_average_precision | the dicts of `coco_average_precision` | `num_labels` |
    | answer_scores | an answer; list of accepted answers, or of several people's | |
    | caption_scores | a caption; list of captions | `names=None`, of what each caption should name |
    | retrieval_map | similarities `(M,)` of a query; its group | `database_groups`, `tags=None` |

    Args:
        name: One of the table's.
        kwargs: Passed on to `evaluate.Metric`, for instance `experiment_id`, `cache_dir`, `num_process`, `process_id`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in METRICS:
        raise ValueError(f"name={name!r} is not one of {', '.join(METRICS)}")
    import evaluate  # here: it takes seconds, and only this function needs it

    ours = METRICS[name]
    return type(ours.__name__, (ours, evaluate.Metric), {})(**kwargs)


def _pack(row) -> bytes:
    """An array, tensor, number, list or dict of these as bytes in numpy's format, integers as small as they fit."""
    packed = io.BytesIO()
    if isinstance(row, Mapping):
        np.savez(packed, **{key: _small_array(value) for key, value in row.items()})
    else:
        np.save(packed, _small_array(row), allow_pickle=False)
    return packed.getvalue()


def _small_array(values) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # numpy has no bfloat16
    array = np.asarray(values)
    if array.dtype.kind in "iu" and array.size:
        array = array.astype(np.result_type(np.min_scalar_type(array.min()), np.min_scalar_type(array.max())))
    return array


def _unpack(packed: bytes) -> np.ndarray | dict[str, np.ndarray]:
    row = np.load(io.BytesIO(packed), allow_pickle=False)
    return {key: _widen(row[key]) for key in row} if isinstance(row, Mapping) else _widen(row)


def _widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int64) if array.dtype.kind in "iu" else array


class PackedMetric:
    """Half of a metric whose rows are kept as bytes: any shape and key, without the slow way through nested lists."""

    inputs = ("predictions", "references")

    def _info(self):
        import evaluate

        features = datasets.Features({name: datasets.Value("large_binary") for name in self.inputs})
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation="", inputs_description="", features=features
        )

    def add(self, **row):
        """Add one prediction and its reference."""
        super().add(**{name: _pack(value) for name, value in row.items()})

    def add_batch(self, **rows):
        """Add predictions and their references."""
        super().add_batch(**{name: [_pack(value) for value in values] for name, values in rows.items()})

    def _compute(self, **arguments):
        rows = {name: map(_unpack, arguments.pop(name)) for name in self.inputs}
        return self.score(**rows, **arguments)


class KNNAccuracy(PackedMetric):
    """Share of test images whose class a weighted vote of their nearest training images finds."""

    def score(self, predictions: Iterator, references: Iterator, train_features, train_labels, **options):
        test = np.stack([*predictions]), np.stack([*references])
        return {"knn_accuracy": knn_accuracy(train_features, train_labels, *test, **options)}


class HierarchyAccuracy(PackedMetric):
    """Agreement of the hierarchies' cuts with true segments."""

    inputs = ("parent", "rank", "references")

    def score(self, parent: Iterator, rank: Iterator, references: Iterator):
        parent, rank = torch.as_tensor(np.stack([*parent])), torch.as_tensor(np.stack([*rank]))
        trees = PatchHierarchy(parent, -rank.double(), rank)  # cuts read no heights
        return hierarchy_accuracy(trees, np.stack([*references]))


class TopKAccuracy(PackedMetric):
    """Share of images whose true class is among the k highest logits."""

    def score(self, predictions: Iterator, references: Iterator, **options):
        return top_k_accuracy(np.stack([*predictions]), np.stack([*references]), **options)


class MeanIoU(PackedMetric):
    """Mean intersection over union, and how many pixels are right."""

    def score(self, predictions: Iterator, references: Iterator, num_labels: int, ignore_index: int | None = None):
        confusion = torch.zeros(num_labels, num_labels, dtype=torch.long)
        for image, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
            try:
                confusion += confusion_matrix(predicted, true, num_labels, ignore_index)
            except ValueError as error:
                raise ValueError(f"image {image}: {error}") from error
        return segmentation_scores(confusion)


class CocoAveragePrecision(PackedMetric):
    """Box average precision as COCO defines it."""

    def score(self, predictions: Iterator, references: Iterator, num_labels: int):
        return coco_average_precision([*predictions], [*references], num_labels)


class RetrievalMap(PackedMetric):
    """Mean average precision of ranked databases, and how often the first answer is right."""

    def score(self, predictions: Iterator, references: Iterator, database_groups, tags=None):
        return retrieval_scores(np.stack([*predictions]), np.stack([*references]), database_groups, tags)


class TextMetric:
    """Half of a metric of texts: predictions are texts, references lists of texts."""

    def _info(self):
        import evaluate

        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation="", inputs_description="", features=features
        )

    def _compute(self, predictions, references, **arguments):
        return self.score(predictions, references, **arguments)


class AnswerScores(TextMetric):
    """Exact match, VQA accuracy where several people answered, and accuracy of what is true or false."""

    def score(self, predictions: list[str], references: list[list[str]]):
        scores = {"exact_match": exact_match(predictions, references)}
        if any(len(people) > 1 for people in references):
            scores["vqa_accuracy"] = vqa_accuracy(predictions, references)
        truth = true_false_accuracy(predictions, references)
        return scores if math.isnan(truth) else scores | {"true_false_accuracy": truth}


class CaptionScores(TextMetric):
    """CIDEr-D, BLEU-4, and, where names are given, in how many captions the right one stands."""

    def score(self, predictions: list[str], references: list[list[str]], names: list[str] | None = None):
        scores = {"cider": cider(predictions, references), "bleu4": bleu(predictions, references)}
        return scores if names is None else scores | {"named": named_share(predictions, names)}


METRICS = {
    "knn_accuracy": KNNAccuracy,
    "hierarchy_accuracy": HierarchyAccuracy,
    "top_k_accuracy": TopKAccuracy,
    "mean_iou": MeanIoU,
    "coco_average_precision": CocoAveragePrecision,
    "retrieval_map": RetrievalMap,
    "answer_scores": AnswerScores,
    "caption_scores": CaptionScores,
}


__all__ = ["as_evaluate_metric"]
