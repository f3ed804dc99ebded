"""Evolved Mask Generation: (tree, progress of training) -> which patches are hidden.

Source: Evolved Hierarchical Masking (Feng & Zhang 2024, arXiv:2504.09155) draws masks from the nodes of the tree,
small ones early and large ones late. The curve of the node count, the score and the keyed randomness are our
decisions; its forerunner's code (EPM, CVPR 2023) goes from 40 parts to 10, linearly, for 196 patches.

True = masked, everywhere. Letters: B images, N patches, K nodes.
"""

import math

import torch
from torch import Tensor

from .hierarchy_ehm import PatchHierarchy

# Streams of one sample's randomness: numbers of its nodes, of its patches, and the order in which a node is split.
NODE_STREAM, PATCH_STREAM, SPLIT_STREAM = 0, 1, 2

# SplitMix64 (Steele, Lea & Flood 2014), its constants as signed 64-bit integers; torch's int64 products wrap.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash_int64(x: Tensor) -> Tensor:
    """SplitMix64's output for a state: a fixed bijection of int64 whose values look independent."""
    x = x + _GOLDEN_GAMMA
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def keyed_uniform(mask_seed: Tensor, count: int, stream: int) -> Tensor:
    """Uniform numbers that are a pure function of (seed, stream, place): the same on any device and in any batch.

    Args:
        mask_seed: `(B,)` int64, one number a sample.
        count: Numbers a sample.
        stream: Small integer; different streams of one seed are independent.

    Returns:
        `(B, count)` float32 in [0, 1), multiples of 2⁻²⁴ (exact in float32).
    """
    if mask_seed.dtype != torch.int64 or mask_seed.ndim != 1:
        raise ValueError(
            f"mask_seed has dtype {mask_seed.dtype} and shape {tuple(mask_seed.shape)}; (B,) int64 is expected"
        )
    key = hash_int64(hash_int64(mask_seed) + stream)[:, None]
    place = torch.arange(count, device=mask_seed.device)
    return _shift_right(hash_int64(key + place * _GOLDEN_GAMMA), 40).to(torch.float32) * 2.0**-24


def draw_mask_seeds(batch_size: int, device: torch.device | str = "cpu") -> Tensor:
    """`(B,)` int64 from torch's CPU generator, for callers that have no keys of their own."""
    return torch.randint(-(2**63), 2**63 - 1, (batch_size,)).to(device)


def num_nodes_at(progress: float, start: int, end: int, curve: str = "linear") -> int:
    """Number of tree nodes that are masked or kept as wholes at this point of pre-training.

    Source: our reading of Evolved Mask Generation; EPM's code uses 40 -> 10, linear.

    Args:
        progress: Finished fraction of pre-training, 0 at the first step, 1 at the last. Not an epoch.
        start: Nodes at progress 0; the number of patches means MAE's random masking.
        end: Nodes at progress 1, at least 1, at most `start`.
        curve: "linear"; "log": the same factor per unit of progress; "cosine": slow at both ends.

    Returns:
        Count between `end` and `start`, never rising as `progress` grows.

    Raises:
        ValueError: `progress` outside [0, 1], `end` outside [1, start], or an unknown curve.
    """
    if not 1 <= end <= start:
        raise ValueError(f"num_nodes_end={end} must lie in [1, num_nodes_start={start}]")
    _check_progress(progress)
    if curve == "linear":
        return round(start + (end - start) * progress)
    if curve == "log":
        return round(start * (end / start) ** progress)
    if curve == "cosine":
        return round(end + (start - end) * (1 + math.cos(math.pi * progress)) / 2)
    raise ValueError(f"num_nodes_curve={curve!r} is not one of linear, log, cosine")


def evolution_at(progress: float, start: float) -> float:
    """Finished fraction of the masks' evolution, which begins at `start` and ends with pre-training.

    Args:
        progress: Finished fraction of pre-training.
        start: The same at which masks begin to change, at least 0 and less than 1.
    """
    _check_progress(progress)
    return max(0.0, (progress - start) / (1 - start))


def softness_at(progress: float, start: float, end: float) -> float:
    """Share of per-patch noise in the mask score, linear in progress; EPM blended by the root of its progress."""
    _check_progress(progress)
    return start + (end - start) * progress


def _check_progress(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress} is not in [0, 1]; pass step / max_steps, not an epoch")


def mask_scores(hierarchy: PatchHierarchy, num_nodes: int | Tensor, mask_seed: Tensor, softness: float = 0.0) -> Tensor:
    """Score of each patch by its node of a tree, see `node_scores`.

    Args:
        hierarchy: Trees of B images.
        num_nodes: Nodes to cut each tree into, one int or `(B,)`.
        mask_seed: `(B,)` int64, one number a sample.
        softness: In [0, 1]: 0 masks whole nodes, 1 is random masking.

    Returns:
        `(B, N)` float32.
    """
    return node_scores(hierarchy.cut(num_nodes), mask_seed, softness)


def node_scores(node: Tensor, mask_seed: Tensor, softness: float = 0.0) -> Tensor:
    """Score of each patch; the patches of highest score are masked.

    Every node draws one number, every patch another; `(1 - softness) * node + softness * patch` is sorted, ties
    (all patches of one node, at softness 0) in random order. The place in that order is the score.

    Args:
        node: `(B, N)` int64, the node of each patch, in [0, N).
        mask_seed: `(B,)` int64, one number a sample.
        softness: In [0, 1]: 0 masks whole nodes, 1 is random masking.

    Returns:
        `(B, N)` float32: a permutation of 0, 1/N, ... (N-1)/N in each row. Usable as `noise=` of transformers'
        `ViTMAEForPreTraining`, which keeps the smallest.
    """
    if not 0 <= softness <= 1:
        raise ValueError(f"softness={softness} is not in [0, 1]")
    count, mask_seed = node.shape[1], mask_seed.to(node.device)
    drawn = keyed_uniform(mask_seed, count, NODE_STREAM).gather(1, node)  # (B, N)
    score = (1 - softness) * drawn + softness * keyed_uniform(mask_seed, count, PATCH_STREAM)
    return rank_scores(score, keyed_uniform(mask_seed, count, SPLIT_STREAM))


def random_scores(mask_seed: Tensor, num_patches: int) -> Tensor:
    """`(B, N)` scores of MAE's random masking, a permutation of 0, 1/N, ... in each row."""
    noise = keyed_uniform(mask_seed, num_patches, PATCH_STREAM)
    return rank_scores(noise, keyed_uniform(mask_seed, num_patches, SPLIT_STREAM))


def rank_scores(score: Tensor, tie_breaker: Tensor) -> Tensor:
    """Place of each patch by score, then by tie breaker, divided by N; `(B, N)` float32."""
    by_tie = tie_breaker.argsort(dim=1, stable=True)
    order = by_tie.gather(1, score.gather(1, by_tie).argsort(dim=1, stable=True))
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place).to(torch.float32) / score.shape[1]


def mask_from_scores(scores: Tensor, num_hidden: int, num_masks: int = 1) -> Tensor:
    """Mask the `num_hidden` patches of highest score, or draw several masks from one order of the patches.

    The r-th mask shows the patches from place `r * N // num_masks` of that order on, beyond its end those at its
    beginning: visible sets share no patch if `num_masks * (N - num_hidden) <= N`, else as few as can be. Half of the
    patches hidden and two masks, or three quarters and four: if N divides so, every patch is visible in just one.

    Args:
        scores: `(B, N)`.
        num_hidden: Patches to hide, at least 1 and not all.
        num_masks: R, masks an image, at least 1.

    Returns:
        `(B * R, N)` bool, the masks of one image in sequence, exactly `num_hidden` True in each row.
    """
    batch, count = scores.shape
    if not 0 < num_hidden < count:
        raise ValueError(
            f"num_hidden={num_hidden} must lie in [1, {count - 1}]: hide at least one of {count} patches, not all"
        )
    if num_masks < 1:
        raise ValueError(f"num_masks={num_masks} must be at least 1")
    order = scores.argsort(dim=1, stable=True)  # (B, N): patch at each place
    place = torch.arange(count, device=scores.device)
    start = torch.arange(num_masks, device=scores.device)[:, None] * count // num_masks
    hidden = (place - start) % count >= count - num_hidden  # (R, N), by place
    hidden = hidden.expand(batch, num_masks, count)
    by_patch = torch.empty_like(hidden).scatter_(2, order[:, None].expand_as(hidden), hidden)
    return by_patch.flatten(0, 1)


def hierarchical_mask(
    hierarchy: PatchHierarchy,
    num_nodes: int | Tensor,
    mask_seed: Tensor,
    mask_ratio: float = 0.75,
    softness: float = 0.0,
) -> Tensor:
    """Hide whole nodes of the tree, at most one of them in part.

    Args:
        hierarchy: Trees of B images.
        num_nodes: Nodes to cut each tree into; N of them is MAE's random masking.
        mask_seed: `(B,)` int64, one number a sample; the mask is a pure function of it and the tree.
        mask_ratio: Share of patches to hide.
        softness: Share of per-patch noise in the score.

    Returns:
        `(B, N)` bool, True = masked, exactly `round(mask_ratio * N)` True in each row.
    """
    num_hidden = round(mask_ratio * hierarchy.num_patches)
    return mask_from_scores(mask_scores(hierarchy, num_nodes, mask_seed, softness), num_hidden)


__all__ = [
    "draw_mask_seeds",
    "evolution_at",
    "hierarchical_mask",
    "keyed_uniform",
    "mask_from_scores",
    "mask_scores",
    "node_scores",
    "num_nodes_at",
    "random_scores",
    "rank_scores",
    "softness_at",
]
