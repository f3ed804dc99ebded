"""Figures of classification: how often the true class is among the k highest logits.

Letters: n images, K classes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor


def top_k_accuracy(logits: Array, labels: Array, k: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Share of images whose true class is among the k highest logits.

    Of equal logits the class of the smaller number comes first. So a model that says the same of every class is right
    for the first k classes only, not for every image.

    Args:
        logits: `(n, K)`, array or tensor; any scores that rise with confidence.
        labels: `(n,)` integers in `[0, K)`.
        k: Lengths of the list of guesses; one above K counts as K, which finds every class.

    Returns:
        `{"top1": share, "top5": share}` in [0, 1], one entry for each number in `k`.

    Raises:
        ValueError: shapes that do not fit, no images, NaN logits, a label out of range, a `k` below 1.
    """
    logits, labels = torch.as_tensor(logits).detach(), torch.as_tensor(labels).detach()
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; (images, classes) is expected, at least 1 of each")
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; one integer for each of the"
            f" {len(logits)} rows of logits is expected"
        )
    if bool(logits.isnan().any()):
        raise ValueError(f"logits holds NaN in row {int(logits.isnan().any(1).nonzero()[0])}; has the model diverged?")
    labels = labels.to(logits.device, torch.long)
    outside = (labels < 0) | (labels >= logits.shape[1])
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(f"labels[{row}]={int(labels[row])} is not in [0, {logits.shape[1]}), the columns of logits")
    if min(k) < 1:
        raise ValueError(f"k={tuple(k)} must hold numbers of guesses, all at least 1")
    true = logits.gather(1, labels[:, None])  # (n, 1)
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    rank = ((logits > true) | ((logits == true) & before)).sum(1)  # (n,): classes that come before the true one
    return {f"top{guesses}": float((rank < guesses).double().mean()) for guesses in k}


__all__ = ["top_k_accuracy"]
