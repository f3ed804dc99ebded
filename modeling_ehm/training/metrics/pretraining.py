"""Figures by which a pre-training run is judged: features (k-NN, ridge probe), hierarchies, masks.

Pure functions: numpy arrays or tensors in, floats out, no randomness that a call does not bring along, nothing to
download.

Letters: n images, D feature width, B images, H W pixels, N patches, K nodes of a cut, S true segments of an image.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_ehm.hierarchy_ehm import PatchHierarchy
from modeling_ehm.masking_ehm import keyed_uniform

Array = np.ndarray | Tensor

TEST_CHUNK = 512  # test images whose similarities to all training images are held at a time
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


# Features


def knn_accuracy(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of test images whose class a weighted vote of their nearest training images finds.

    Weighted cosine k-NN as in DINO (Caron et al. 2021): each of k neighbours votes with `exp(cosine / temperature)`.
    Of neighbours at equal distance the first in the training set count, of classes with equal votes the smallest number
    wins.

    Args:
        train_features: `(n, D)`, array or tensor.
        train_labels: `(n,)` integers, any values.
        test_features: `(m, D)`.
        test_labels: `(m,)`.
        k: Neighbours that vote; all n if there are fewer.
        temperature: Above 0; the smaller, the more the nearest one decides.

    Returns:
        In [0, 1].

    Raises:
        ValueError: shapes that do not fit, no images, NaN or infinite features, `k` or `temperature` out of range.
    """
    train, train_labels = _checked_features("train", train_features, train_labels)
    test, test_labels = _checked_features("test", test_features, test_labels, width=train.shape[1])
    if k < 1:
        raise ValueError(f"k={k} must be at least 1 neighbour")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0; DINO uses 0.07")
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    classes, class_of = train_labels.unique(return_inverse=True)
    k, correct = min(k, len(train)), 0
    for features, labels in zip(test.split(TEST_CHUNK), test_labels.split(TEST_CHUNK), strict=True):
        similarity, neighbour = _nearest(features @ train.T, k)  # (chunk, k) each
        votes = torch.zeros(len(features), len(classes), dtype=torch.float64)
        votes.scatter_add_(1, class_of[neighbour], (similarity.double() / temperature).exp())
        correct += int((classes[votes.argmax(1)] == labels).sum())
    return correct / len(test)


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and places of the k largest of each row, on the CPU; of equal ones the first (`topk` may take any)."""
    kth = similarity.topk(k, dim=1).values[:, -1:]
    above, equal = similarity > kth, similarity == kth
    chosen = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    place = chosen.nonzero()[:, 1].reshape(-1, k)
    return similarity.gather(1, place).cpu(), place.cpu()


def linear_probe_accuracy(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    ridges: Sequence[float] = RIDGES,
) -> float:
    """Share of test images whose class a linear map of the features finds.

    This is ridge regression onto one-hot classes, solved in closed form, not the linear probe of the literature (a
    softmax classifier trained by SGD or LARS for 90 epochs on augmented images). Compare its figures with each other
    only. It has no learning rate to tune and no randomness, and takes seconds for 20,000 features of width 384.

    Features are standardised by the training set. A fixed tenth of it picks the strength, the largest of equally good
    ones; the map is then fitted on all of it.

    Args:
        train_features: `(n, D)`, array or tensor, at least 2 images.
        train_labels: `(n,)` integers, any values.
        test_features: `(m, D)`.
        test_labels: `(m,)`.
        ridges: Strengths to try, above 0, in units of the mean squared singular value of the standardised features.

    Returns:
        In [0, 1].

    Raises:
        ValueError: shapes that do not fit, too few images, NaN or infinite features, a strength of 0 or less.
    """
    train, train_labels = _checked_features("train", train_features, train_labels)
    test, test_labels = _checked_features("test", test_features, test_labels, width=train.shape[1])
    if len(train) < 2:
        raise ValueError(f"train_features holds {len(train)} image; at least 2 are needed, to fit and to choose by")
    if not ridges or min(ridges) <= 0:
        raise ValueError(f"ridges={ridges} must hold at least one strength, all above 0; for instance {RIDGES}")
    train, test = train.cpu().double(), test.cpu().double()
    classes, class_of = train_labels.unique(return_inverse=True)
    one_hot = F.one_hot(class_of, len(classes)).double()

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))  # labels may come sorted or in turn
    held_out, fit = order[: max(1, len(train) // 10)], order[max(1, len(train) // 10) :]
    ridges = sorted(ridges, reverse=True)
    tried = _ridge_scores(train[fit], one_hot[fit], train[held_out], ridges)  # (ridges, held out, classes)
    accuracy = (tried.argmax(2) == class_of[held_out]).double().mean(1)
    best = ridges[int(accuracy.argmax())]
    predicted = classes[_ridge_scores(train, one_hot, test, [best])[0].argmax(1)]
    return float((predicted == test_labels).double().mean())


def _ridge_scores(train: Tensor, targets: Tensor, new: Tensor, ridges: Sequence[float]) -> Tensor:
    """Predictions `(ridges, m, classes)` of ridge regressions for `(m, D)`; one decomposition for all strengths."""
    mean, std = train.mean(0), train.std(0, correction=0)
    scale = torch.where(std > 1e-6 * std.max().clamp(min=1e-30), 1 / std, 0.0)  # constant features carry nothing
    train, new, offset = (train - mean) * scale, (new - mean) * scale, targets.mean(0)
    values, vectors = torch.linalg.eigh(train.T @ train)  # (D,), (D, D)
    projected = vectors.T @ (train.T @ (targets - offset))  # (D, classes)
    rotated = new @ vectors  # (m, D)
    # The squared singular values of n standardised rows of width D sum to n * D, so their mean is n.
    damped = [projected / (values.clamp(min=0) + ridge * len(train))[:, None] for ridge in ridges]
    return torch.stack([rotated @ weights for weights in damped]) + offset


def _checked_features(name: str, features: Array, labels: Array, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Features `(n, D)` float32 where they were, labels `(n,)` int64 on the CPU."""
    features, labels = torch.as_tensor(features), torch.as_tensor(labels)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name}_features has shape {tuple(features.shape)}; (images, width), neither 0, is expected")
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"{name}_labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; one integer for each of the"
            f" {len(features)} rows of {name}_features is expected"
        )
    if width is not None and features.shape[1] != width:
        raise ValueError(
            f"{name}_features has width {features.shape[1]}, train_features has {width}; use one model for both"
        )
    features = features.detach().float()
    if not bool(features.isfinite().all()):
        raise ValueError(f"{name}_features holds NaN or infinite values; look for an overflow or a diverged model")
    return features, labels.detach().cpu().long()


# Hierarchies


def patch_segments(segments: Array, grid_size: tuple[int, int], ignore_index: int | None = None) -> Tensor:
    """Segment of each patch: the one most of its pixels belong to, of equal ones the smallest number.

    Args:
        segments: `(B, H, W)` integers, 0 or more except for `ignore_index`; H and W multiples of the grid.
        grid_size: Patches along height and width.
        ignore_index: Number of pixels that belong to no known segment, often 255.

    Returns:
        `(B, N)` int64, row by row; -1 where more than half of the pixels are ignored.

    Raises:
        ValueError: shapes that do not fit, or negative numbers other than `ignore_index`.
    """
    segments = _checked_integers("segments", segments, ndim=3)
    (batch, height, width), (rows, columns) = segments.shape, grid_size
    if height % rows or width % columns or not height or not width:
        raise ValueError(
            f"segments is {height}x{width} pixels, not a multiple of grid_size={tuple(grid_size)}; resize it as the"
            " image, by nearest neighbour"
        )
    ignored = torch.zeros_like(segments, dtype=torch.bool) if ignore_index is None else segments == ignore_index
    if bool(((segments < 0) & ~ignored).any()):
        low = int(segments[~ignored].min())
        raise ValueError(f"segments holds {low}, neither 0 or more nor ignore_index={ignore_index}; pass ignore_index")
    segments = segments.masked_fill(ignored, -1).reshape(batch, rows, height // rows, columns, width // columns)
    pixels = segments.transpose(2, 3).reshape(batch, rows * columns, -1).sort(dim=2).values  # (B, N, pixels)
    # How often each pixel's value occurs in its patch; argmax takes the first, so the smallest, of equals.
    count = torch.searchsorted(pixels, pixels, right=True) - torch.searchsorted(pixels, pixels)
    most = pixels.gather(2, count.masked_fill(pixels < 0, 0).argmax(2, keepdim=True))[..., 0]
    return most.masked_fill((pixels < 0).sum(2) * 2 > pixels.shape[2], -1)


def segment_counts(segments: Array) -> Tensor:
    """Number of different segments of each image, `(B, N)` -> `(B,)` int64; negative numbers are ignored."""
    return _dense(_checked_integers("segments", segments, ndim=2)).amax(1) + 1


def hierarchy_accuracy(hierarchy: PatchHierarchy, segments: Array) -> dict[str, float]:
    """How well trees agree with true segments, each tree cut into as many nodes as its image has segments.

    Read the figures beside those of `reference_partition_accuracy`, which know nothing of the images.

    Args:
        hierarchy: Trees of B images.
        segments: `(B, N)` integers, from `patch_segments`; patches with a negative number are left out.

    Returns:
        Means over images with at least 2 segments of: "ari", the adjusted Rand index (1 the same partition, 0 what
        chance gives); "purity", the share of patches that lie in the main segment of their node; "iou", the best
        intersection over union that a node reaches, averaged over the segments of the image.

    Raises:
        ValueError: shapes that do not fit, or no image with at least 2 segments.
    """
    segments = _checked_integers("segments", segments, ndim=2)
    if segments.shape != hierarchy.parent.shape:
        raise ValueError(
            f"segments has shape {tuple(segments.shape)}, the trees are over {tuple(hierarchy.parent.shape)} (images,"
            " patches); make it by patch_segments(segments, hierarchy.grid_size)"
        )
    return _mean_scores(hierarchy.cut(segment_counts(segments).clamp(min=1)), segments)


def reference_partition_accuracy(segments: Array, grid_size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """`hierarchy_accuracy` of two partitions that know nothing of the images, with as many nodes as there are segments.

    A hierarchy that has learnt something beats both; "blocks" is the harder one, since segments are compact too.

    Args:
        segments: `(B, N)` integers, as in `hierarchy_accuracy`.
        grid_size: Patches along height and width.

    Returns:
        "random": nodes of equal size, their patches strewn at random (the same at each call). "blocks": the image cut
        in near-square blocks of about equal size. Each maps to a dict like that of `hierarchy_accuracy`.
    """
    segments = _checked_integers("segments", segments, ndim=2)
    batch, num_patches = segments.shape
    if grid_size[0] * grid_size[1] != num_patches:
        raise ValueError(f"grid_size={tuple(grid_size)} does not hold the {num_patches} patches of segments")
    counts = segment_counts(segments).clamp(min=1)
    place = keyed_uniform(torch.arange(batch), num_patches, stream=0).argsort(dim=1, stable=True)  # a permutation
    blocks = {count: block_labels(grid_size, count) for count in counts.unique().tolist()}
    return {
        "random": _mean_scores(place * counts[:, None] // num_patches, segments),
        "blocks": _mean_scores(torch.stack([blocks[count] for count in counts.tolist()]), segments),
    }


def block_labels(grid_size: tuple[int, int], count: int) -> Tensor:
    """Cut a grid into `count` near-square blocks of about equal size; `(N,)` int64, 0 ... count - 1."""
    rows, columns = grid_size
    if not 1 <= count <= rows * columns:
        raise ValueError(f"count={count} is not in [1, {rows * columns}], the patches of grid_size={tuple(grid_size)}")
    labels, number = torch.zeros(rows, columns, dtype=torch.long), 0
    todo = [(labels, count)]
    while todo:
        block, count = todo.pop()
        if count == 1:
            block.fill_(number)
            number += 1
            continue
        if block.shape[0] < block.shape[1]:
            block = block.T  # a view: halve the longer side
        (length, across), first = block.shape, count // 2
        cut = min(max(round(length * first / count), 1), length - 1)
        first = min(max(first, count - (length - cut) * across), cut * across)  # a patch a block, at least
        todo += [(block[cut:], count - first), (block[:cut], first)]
    return labels.flatten()


def partition_scores(labels: Array, segments: Array) -> dict[str, Tensor]:
    """Agreement of partitions with true segments, image by image.

    Args:
        labels: `(B, N)` integers of 0 or more, the node of each patch.
        segments: `(B, N)` integers; patches with a negative number are left out.

    Returns:
        "ari", "purity" and "iou" as in `hierarchy_accuracy`, each `(B,)` float64, NaN for images with fewer than 2
        segments.
    """
    labels, segments = _checked_integers("labels", labels, ndim=2), _checked_integers("segments", segments, ndim=2)
    if labels.shape != segments.shape or bool((labels < 0).any()):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and smallest value {int(labels.min())}, segments has shape"
            f" {tuple(segments.shape)}; equal shapes and labels of 0 or more are expected"
        )
    shared = _contingency(_dense(labels), _dense(segments))  # (B, K, S) patches in node k and segment s
    nodes, true, total = shared.sum(2), shared.sum(1), shared.sum((1, 2))
    union = nodes[:, :, None] + true[:, None] - shared
    best_iou = (shared / union.clamp(min=1)).amax(1)  # (B, S), 0 for segments that the image does not have
    scores = {
        "ari": _adjusted_rand_index(shared),
        "purity": shared.amax(2).sum(1) / total.clamp(min=1),
        "iou": best_iou.sum(1) / (true > 0).sum(1).clamp(min=1),
    }
    too_few = (true > 0).sum(1) < 2
    return {name: score.masked_fill(too_few, float("nan")) for name, score in scores.items()}


def _adjusted_rand_index(shared: Tensor) -> Tensor:
    """`(B, K, S)` counts -> `(B,)`: Hubert & Arabie 1985, in counts of ordered pairs, as scikit-learn has it."""
    total, squares = shared.sum((1, 2)), shared.square().sum((1, 2))
    together = squares - total  # pairs that both partitions put together
    only_true = shared.sum(1).square().sum(1) - squares
    only_nodes = shared.sum(2).square().sum(1) - squares
    apart = total.square() - only_true - only_nodes - squares
    chance = (together + only_true) * (only_true + apart) + (together + only_nodes) * (only_nodes + apart)
    index = 2 * (together * apart - only_true * only_nodes) / chance.clamp(min=1)
    return torch.where((only_true == 0) & (only_nodes == 0), 1.0, index)


def _contingency(labels: Tensor, segments: Tensor) -> Tensor:
    """`(B, K, S)` float64: patches that lie in node k and segment s; patches with a negative segment are left out."""
    batch, nodes, most = len(labels), int(labels.max()) + 1, max(1, int(segments.max()) + 1)
    cell = (torch.arange(batch)[:, None] * nodes + labels) * most + segments
    return cell[segments >= 0].bincount(minlength=batch * nodes * most).reshape(batch, nodes, most).double()


def _dense(labels: Tensor) -> Tensor:
    """Renumber each row `(B, N)` to 0, 1, ... in the order of its values; negative ones become -1."""
    values, order = labels.clamp(min=-1).sort(dim=1, stable=True)
    number = F.pad((values[:, 1:] != values[:, :-1]).long().cumsum(1), (1, 0)) - (values[:, :1] < 0).long()
    return torch.empty_like(labels).scatter_(1, order, number)


def _mean_scores(labels: Tensor, segments: Tensor) -> dict[str, float]:
    scores = partition_scores(labels, segments)
    if bool(scores["ari"].isnan().all()):
        raise ValueError(
            f"segments: none of {len(segments)} images has at least 2 different segments, so there is nothing to agree"
            " with; pass images that show more than one thing, or smaller patches"
        )
    return {name: float(score.nanmean()) for name, score in scores.items()}


def _checked_integers(name: str, values: Array, ndim: int) -> Tensor:
    values = torch.as_tensor(values)
    if values.ndim != ndim or values.is_floating_point() or 0 in values.shape:
        layout = {2: "(images, patches)", 3: "(images, height, width)"}[ndim]
        raise ValueError(f"{name} is {values.dtype} of shape {tuple(values.shape)}; integers {layout} are expected")
    return values.detach().cpu().long()


# Masks


def mask_statistics(bool_masked_pos: Array, grid_size: tuple[int, int]) -> dict[str, float]:
    """Shape of masks: how large and how compact the hidden regions are.

    A region is a set of hidden patches that hang together by their sides. For MAE's random masks of ratio r,
    compactness is about `r / (2 - r)`, 0.6 at 0.75. At such ratios nearly all hidden patches hang together, however
    they are drawn (site percolation sets in at 0.59), so look at compactness, or pass `~mask` for the visible regions.

    Args:
        bool_masked_pos: `(B, N)` bool, True = masked.
        grid_size: Patches along height and width.

    Returns:
        Means over images of: "region_size", the mean size of a region in patches; "largest_region_share", the share of
        the hidden patches that lie in the largest region; "compactness", the share of those pairs of side-by-side
        patches that are both hidden, among the pairs of which at least one is.

    Raises:
        ValueError: shapes that do not fit, another dtype than bool, or an image without a hidden patch.
    """
    mask = torch.as_tensor(bool_masked_pos).detach().cpu()
    rows, columns = grid_size
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != rows * columns or not len(mask):
        raise ValueError(
            f"bool_masked_pos has dtype {mask.dtype} and shape {tuple(mask.shape)}; bool and (images, {rows * columns})"
            f" for grid_size={tuple(grid_size)} are expected, True = masked"
        )
    hidden = mask.sum(1).double()
    if not bool(hidden.all()):
        raise ValueError(f"bool_masked_pos masks no patch of image {int(hidden.argmin())}; leave such images out")
    sizes = _region_sizes(mask.reshape(-1, rows, columns))  # (B, N), 0 where no region has its name
    grid = mask.reshape(-1, rows, columns)
    pairs = [(grid[:, 1:], grid[:, :-1]), (grid[:, :, 1:], grid[:, :, :-1])]
    both = sum((a & b).sum((1, 2)) for a, b in pairs)
    either = sum((a | b).sum((1, 2)) for a, b in pairs)
    statistics = {
        "region_size": hidden / (sizes > 0).sum(1),
        "largest_region_share": sizes.amax(1) / hidden,
        "compactness": both.double() / either.clamp(min=1),
    }
    return {name: float(value.mean()) for name, value in statistics.items()}


def _region_sizes(mask: Tensor) -> Tensor:
    """`(B, rows, columns)` bool -> `(B, N)` int64: size of each connected region, at the place of its last patch."""
    count = mask[0].numel()
    # Each hidden patch takes the largest number among itself and its neighbours until nothing changes; 0 is visible.
    number = torch.arange(1, count + 1, dtype=torch.float32).reshape(mask.shape[1:]) * mask
    while True:
        across = F.max_pool2d(number[:, None], (1, 3), stride=1, padding=(0, 1))
        along = F.max_pool2d(number[:, None], (3, 1), stride=1, padding=(1, 0))
        spread = torch.maximum(across, along)[:, 0] * mask
        if torch.equal(spread, number):
            break
        number = spread
    sizes = torch.zeros(len(mask), count + 1, dtype=torch.long)
    return sizes.scatter_add_(1, number.long().flatten(1), mask.flatten(1).long())[:, 1:]


__all__ = [
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
