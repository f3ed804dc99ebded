"""Figures of semantic segmentation, all of them read from one confusion matrix over pixels.

Letters: L labels. Matrices of batches, images or processes add up, so that the figures of a whole set need no more
memory than `(L, L)`.
"""

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor


def confusion_matrix(predictions: Array, references: Array, num_labels: int, ignore_index: int | None = None) -> Tensor:
    """How many pixels of each true class got each predicted class.

    Args:
        predictions: Integers of any shape, for instance `(B, H, W)`, in `[0, L)` wherever the truth is known.
        references: Integers of the same shape, in `[0, L)` or `ignore_index`.
        num_labels: L.
        ignore_index: True class of the pixels that do not count, often 255; None if all pixels count.

    Returns:
        `(L, L)` int64 on the CPU; the row is the true class, the column the predicted one.

    Raises:
        ValueError: shapes that differ, values that are no integers, classes out of range.
    """
    predictions, references = torch.as_tensor(predictions).detach(), torch.as_tensor(references).detach()
    if predictions.shape != references.shape:
        raise ValueError(
            f"predictions has shape {tuple(predictions.shape)}, references has {tuple(references.shape)}; resize the"
            " logits to the size of the true map before the argmax"
        )
    for name, values in (("predictions", predictions), ("references", references)):
        if values.is_floating_point():
            raise ValueError(f"{name} has dtype {values.dtype}; class numbers are expected, so take the argmax")
    predictions, references = predictions.long().flatten(), references.to(predictions.device, torch.long).flatten()
    if ignore_index is not None:
        known = references != ignore_index
        predictions, references = predictions[known], references[known]
    _check_range("references", references, num_labels, f"nor is it ignore_index={ignore_index}")
    _check_range("predictions", predictions, num_labels, "has the head other channels?")
    pairs = torch.bincount(references * num_labels + predictions, minlength=num_labels**2)
    return pairs.reshape(num_labels, num_labels).cpu()


def _check_range(name: str, values: Tensor, num_labels: int, hint: str) -> None:
    outside = values[(values < 0) | (values >= num_labels)]
    if len(outside):
        raise ValueError(f"{name} holds class {int(outside[0])}, not in [0, num_labels={num_labels}); {hint}")


def segmentation_scores(confusion: Array) -> dict[str, float | list[float]]:
    """Mean intersection over union, and how many pixels are right.

    A class that occurs neither in the truth nor in the predictions has no IoU and is left out of the mean; one that is
    predicted but never true has an IoU of 0 and counts. `mean_accuracy` is the mean over the classes that are true
    somewhere.

    Args:
        confusion: `(L, L)` counts, rows true, as `confusion_matrix` returns them; sums of several are fine.

    Returns:
        `mean_iou`, `pixel_accuracy`, `mean_accuracy` in [0, 1], and `iou_per_class`, a list of L floats, NaN where the
        class does not occur.

    Raises:
        ValueError: not square, or without a single pixel.
    """
    confusion = torch.as_tensor(confusion).double()
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"confusion has shape {tuple(confusion.shape)}; (num_labels, num_labels) is expected")
    if not float(confusion.sum()):
        raise ValueError("confusion counts no pixel: the set is empty, or the truth is ignore_index everywhere")
    right, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)  # (L,) each
    iou = right / (true + predicted - right)  # 0 / 0 is NaN: the class does not occur
    return {
        "mean_iou": float(iou.nanmean()),
        "pixel_accuracy": float(right.sum() / confusion.sum()),
        "mean_accuracy": float((right / true).nanmean()),
        "iou_per_class": iou.tolist(),
    }


__all__ = ["confusion_matrix", "segmentation_scores"]
