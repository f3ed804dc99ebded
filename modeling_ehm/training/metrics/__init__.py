"""Figures by which models are judged: pure functions, nothing to download."""

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
from modeling_ehm.training.metrics.pretraining import (
    block_labels,
    hierarchy_accuracy,
    knn_accuracy,
    linear_probe_accuracy,
    mask_statistics,
    partition_scores,
    patch_segments,
    reference_partition_accuracy,
    segment_counts,
)
from modeling_ehm.training.metrics.retrieval import average_precision, retrieval_scores
from modeling_ehm.training.metrics.segmentation import confusion_matrix, segmentation_scores
from modeling_ehm.training.metrics.wrappers import as_evaluate_metric

__all__ = [
    "as_evaluate_metric",
    "average_precision",
    "bleu",
    "block_labels",
    "cider",
    "coco_average_precision",
    "confusion_matrix",
    "exact_match",
    "hierarchy_accuracy",
    "knn_accuracy",
    "linear_probe_accuracy",
    "mask_statistics",
    "named_share",
    "partition_scores",
    "patch_segments",
    "reference_partition_accuracy",
    "retrieval_scores",
    "segment_counts",
    "segmentation_scores",
    "top_k_accuracy",
    "true_false_accuracy",
    "vqa_accuracy",
]
