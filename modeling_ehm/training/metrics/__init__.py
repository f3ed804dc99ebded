"""Figures by which models are judged: pure functions, nothing to download."""

from modeling_ehm.training.metrics.pretraining import (
    as_evaluate_metric,
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

__all__ = [
    "as_evaluate_metric",
    "block_labels",
    "hierarchy_accuracy",
    "knn_accuracy",
    "linear_probe_accuracy",
    "mask_statistics",
    "partition_scores",
    "patch_segments",
    "reference_partition_accuracy",
    "segment_counts",
]
