"""Box average precision of COCO, the same figures as pycocotools' COCOeval, in numpy.

Letters: n boxes of a prediction, G true boxes of an image, T thresholds of overlap, A ranges of area, R points of
recall, L labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_POINTS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 100  # of one class in one image
AREA_RANGES = np.array([[0, 1e5**2], [0, 32**2], [32**2, 96**2], [96**2, 1e5**2]])  # all, small, medium, large


@dataclass
class Boxes:
    """Boxes of one image; those of a prediction have scores, true ones have `iscrowd`.

    `xywh` is `(n, 4)`, all others are `(n,)`. COCO computes with width and height, which differ from the corners'
    differences in the last digit, enough to fall on the other side of a threshold.
    """

    xywh: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    scores: np.ndarray | None = None
    iscrowd: np.ndarray | None = None


def coco_average_precision(
    predictions: Sequence[Mapping], references: Sequence[Mapping], num_labels: int
) -> dict[str, float | list[float]]:
    """Average precision of boxes as COCO defines it, over a whole set of images.

    For each class and each IoU threshold of .5, .55, ..., .95 the boxes of all images are matched with the true ones,
    the highest score first; precision is read at 101 recalls, and AP is the mean over recalls, thresholds and classes.
    At most 100 boxes of a class in an image count. Of equal scores, the earlier box in the earlier image comes first.
    Boxes that lie on a crowd, or are of another size than `small`, `medium` or `large` asks for, count neither way.

    Args:
        predictions: For each image a dict of `boxes` `(n, 4)` as x1, y1, x2, y2 in pixels, `scores` `(n,)`, `labels`
            `(n,)` in `[0, L)`: what `post_process_object_detection` of transformers returns. Empty where nothing was
            found.
        references: For each image a dict of `boxes` `(G, 4)` and `labels` `(G,)`, and where they are known `area`
            `(G,)` in square pixels (of the box if missing; COCO's own annotations give the object's) and `iscrowd`
            `(G,)` (0 if missing). Empty where the image holds no object.
        num_labels: L.

    Returns:
        `ap`, `ap50`, `ap75`, `ap_small` (area up to 32 x 32 pixels), `ap_medium`, `ap_large` (from 96 x 96), `ar100`
        (mean of the highest recall) in [0, 1], and `ap_per_class`, a list of L floats. NaN where the set holds no
        such object (COCO writes -1); classes without objects are left out of the means.

    Raises:
        ValueError: other numbers of predictions and references, a missing key, shapes that do not fit, a label out of
            range, boxes that are inverted or not finite; the message names image and box.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"there are {len(predictions)} predictions and {len(references)} references; each image needs both"
        )
    found = [_checked_boxes(f"predictions[{i}]", image, num_labels, True) for i, image in enumerate(predictions)]
    true = [_checked_boxes(f"references[{i}]", image, num_labels, False) for i, image in enumerate(references)]
    curves = [_class_curves(found, true, label) for label in range(num_labels)]
    precision = np.stack([precision for precision, _ in curves])  # (L, A, T, R)
    recall = np.stack([recall for _, recall in curves])  # (L, A, T)
    return {
        "ap": _known_mean(precision[:, 0]),
        "ap50": _known_mean(precision[:, 0, 0]),
        "ap75": _known_mean(precision[:, 0, 5]),
        "ap_small": _known_mean(precision[:, 1]),
        "ap_medium": _known_mean(precision[:, 2]),
        "ap_large": _known_mean(precision[:, 3]),
        "ar100": _known_mean(recall[:, 0]),
        "ap_per_class": [_known_mean(of_class) for of_class in precision[:, 0]],
    }


def _known_mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _class_curves(found: list[Boxes], true: list[Boxes], label: int) -> tuple[np.ndarray, np.ndarray]:
    """`(A, T, R)` precision and `(A, T)` highest recall of one class; NaN in the ranges without an object."""
    shape = (len(AREA_RANGES), len(IOU_THRESHOLDS))
    scores, matched, ignored = [np.zeros(0)], [np.zeros((*shape, 0), bool)], [np.zeros((*shape, 0), bool)]
    num_objects = np.zeros(len(AREA_RANGES), int)
    for of_image, truth in zip(found, true, strict=True):
        chosen = np.flatnonzero(of_image.labels == label)
        chosen = chosen[np.argsort(-of_image.scores[chosen], kind="stable")][:MAX_DETECTIONS]
        objects = np.flatnonzero(truth.labels == label)
        if not len(chosen) and not len(objects):
            continue
        uncounted = truth.iscrowd[objects] | _outside(truth.area[objects])  # (A, G)
        iou = _box_iou(of_image.xywh[chosen], truth.xywh[objects], truth.iscrowd[objects])
        image_matched, image_ignored = _match(iou, uncounted, truth.iscrowd[objects])
        image_ignored |= ~image_matched & _outside(of_image.area[chosen])[:, None]
        scores.append(of_image.scores[chosen])
        matched.append(image_matched)
        ignored.append(image_ignored)
        num_objects += (~uncounted).sum(1)  # (A,)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    matched, ignored = np.concatenate(matched, 2)[..., order], np.concatenate(ignored, 2)[..., order]  # (A, T, n)

    hits = (matched & ~ignored).cumsum(2).astype(float)
    misses = (~matched & ~ignored).cumsum(2)
    precision, recall = np.full((*shape, len(RECALL_POINTS)), np.nan), np.full(shape, np.nan)
    for area in np.flatnonzero(num_objects):
        reached = hits[area] / num_objects[area]  # (T, n), rising
        # Precision at a recall is the highest one at this or any higher recall; 0 beyond the last.
        exact = hits[area] / (hits[area] + misses[area] + np.spacing(1))
        best = np.maximum.accumulate(exact[:, ::-1], axis=1)[:, ::-1]
        best = np.pad(best, ((0, 0), (0, 1)))
        for threshold in range(len(IOU_THRESHOLDS)):
            place = np.searchsorted(reached[threshold], RECALL_POINTS)
            precision[area, threshold] = best[threshold, place]
        recall[area] = reached[:, -1] if reached.shape[1] else 0
    return precision, recall


def _outside(area: np.ndarray) -> np.ndarray:
    """`(n,)` -> `(A, n)` bool: not in the range."""
    return (area < AREA_RANGES[:, :1]) | (area > AREA_RANGES[:, 1:])


def _box_iou(found: np.ndarray, true: np.ndarray, iscrowd: np.ndarray) -> np.ndarray:
    """`(n, G)`: intersection over union; over the found box's own area where the true box is a crowd."""
    left_top = np.maximum(found[:, None, :2], true[None, :, :2])
    right_bottom = np.minimum((found[:, :2] + found[:, 2:])[:, None], (true[:, :2] + true[:, 2:])[None])
    width_height = (right_bottom - left_top).clip(min=0)
    intersection = width_height[..., 0] * width_height[..., 1]
    found_area, true_area = found[:, 2:3] * found[:, 3:], true[:, 2] * true[:, 3]
    union = np.where(iscrowd, found_area, found_area + true_area - intersection)
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=intersection > 0)


def _match(iou: np.ndarray, uncounted: np.ndarray, iscrowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the found boxes, best score first, each the true box it overlaps most among those that are left.

    Args:
        iou: `(n, G)`.
        uncounted: `(A, G)`, true boxes that count neither way; taken only where no other one is near enough.
        iscrowd: `(G,)`, true boxes that any number of found ones may take.

    Returns:
        `(A, T, n)` bool twice: whether a true box was taken, whether it was an uncounted one.
    """
    num_found, num_true = iou.shape
    shape = (len(uncounted), len(IOU_THRESHOLDS))
    matched, ignored = np.zeros((*shape, num_found), bool), np.zeros((*shape, num_found), bool)
    if not num_true:
        return matched, ignored
    near = iou[:, None] >= np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]  # (n, T, G)
    free = np.ones((*shape, num_true), bool)
    areas, thresholds = np.ogrid[: shape[0], : shape[1]]
    for box in range(num_found):
        if not near[box].any():
            continue
        candidates = near[box] & (free | iscrowd)  # (A, T, G)
        counted = candidates & ~uncounted[:, None]
        pool = np.where(counted.any(2, keepdims=True), counted, candidates)
        # Of equal overlaps COCO takes the last true box.
        best = num_true - 1 - np.where(pool, iou[box], -1)[..., ::-1].argmax(2)  # (A, T)
        matched[..., box] = pool.any(2)
        ignored[..., box] = matched[..., box] & uncounted[areas, best]
        free[areas, thresholds, best] &= ~matched[..., box]
    return matched, ignored


def _checked_boxes(name: str, image: Mapping, num_labels: int, with_scores: bool) -> Boxes:
    missing = {"boxes", "labels"} | ({"scores"} if with_scores else set())
    if missing := sorted(missing - set(image)):
        raise ValueError(f"{name} lacks {', '.join(missing)}; it has {', '.join(sorted(image)) or 'nothing'}")
    boxes = torch.as_tensor(image["boxes"]).detach().cpu().double().numpy()
    boxes = boxes.reshape(0, 4) if boxes.shape == (0,) else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}['boxes'] has shape {boxes.shape}; (boxes, 4) is expected")
    columns = {}
    for key in ("labels", "scores", "area", "iscrowd"):
        if key in image:
            columns[key] = torch.as_tensor(image[key]).detach().cpu().double().numpy()
            if columns[key].shape != boxes.shape[:1]:
                raise ValueError(f"{name}['{key}'] has shape {columns[key].shape}, there are {len(boxes)} boxes")
    for key, values in {"boxes": boxes, **columns}.items():
        if not np.isfinite(values).all():
            box = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise ValueError(f"{name}['{key}'][{box}]={values[box].tolist()} is not finite")
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    for box in np.flatnonzero((xywh[:, 2:] < 0).any(1)):
        raise ValueError(f"{name}['boxes'][{box}]={boxes[box].tolist()} is inverted; x1 <= x2 and y1 <= y2 is expected")
    labels = columns["labels"]
    for box in np.flatnonzero((labels < 0) | (labels >= num_labels) | (labels % 1 != 0)):
        raise ValueError(f"{name}['labels'][{box}]={labels[box]:g} is not an integer in [0, num_labels={num_labels})")
    return Boxes(
        xywh=xywh,
        labels=labels,
        area=xywh[:, 2] * xywh[:, 3] if with_scores or "area" not in columns else columns["area"],
        scores=columns.get("scores"),
        iscrowd=columns.get("iscrowd", np.zeros(len(boxes))) != 0,
    )


__all__ = ["coco_average_precision"]
