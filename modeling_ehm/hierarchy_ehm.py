"""Adaptive Hierarchy Establishment: affinities between patches -> one binary tree over the patches of each image.

Source: Evolved Hierarchical Masking (Feng & Zhang 2024, arXiv:2504.09155) merges the two nodes of highest affinity
until one is left; average linkage, the symmetrisation and the form in which the tree is kept are our decisions.

Letters: B images, N patches, K nodes of a cut, M clusters that are still being merged.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Stands for "not a candidate". Finite, so that weighting it by 0 gives 0; affinities must stay far above it.
NOBODY, LOWEST = -1e30, -1e15

# Faster ways to do what `merge_in_rounds` does, by type of device. They find the same trees, leave the affinity as it
# is, and return None for one that is not clean. `fast_merging` adds one for CPUs where numba is installed, and one for
# GPUs where Triton is.
MERGING: dict[str, Callable[[Tensor, str], tuple[Tensor, Tensor, Tensor] | None]] = {}


@dataclass(frozen=True)
class PatchHierarchy:
    """One binary tree over the N patches of each of B images, in absorption form.

    Every leaf but leaf 0 is absorbed exactly once, into the cluster whose smallest leaf is `parent[j] < j`. So a
    cluster is named by its smallest leaf, and N - 1 pointers with their order are the whole dendrogram.

    Attributes:
        parent: `(B, N)` int64; `parent[:, 0] = 0`.
        height: `(B, N)` float; affinity at which leaf j's cluster is absorbed, never rises with `rank`; leaf 0: `+inf`.
        rank: `(B, N)` int64; place of j's absorption among the merges, 0 the first, N - 2 the last; leaf 0 has N - 1.
        grid_size: Patches along height and width, if known; patch `n` lies in row `n // width`.
    """

    parent: Tensor
    height: Tensor
    rank: Tensor
    grid_size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.parent.shape[0]

    @property
    def num_patches(self) -> int:
        return self.parent.shape[1]

    def to(self, device: torch.device | str) -> "PatchHierarchy":
        """The same trees on another device."""
        return PatchHierarchy(self.parent.to(device), self.height.to(device), self.rank.to(device), self.grid_size)

    def cut(self, num_nodes: int | Tensor) -> Tensor:
        """Cut every tree into nodes: undo its last `num_nodes - 1` merges.

        Args:
            num_nodes: K, one number for all images or `(B,)` int64, each in [1, N].

        Returns:
            `(B, N)` int64, node of each patch, 0 ... K - 1, numbered in the order of the nodes' smallest patches.

        Raises:
            ValueError: a K outside [1, N], or a tensor of another shape.
        """
        count = self._checked_num_nodes(num_nodes)
        merged = self.rank < self.num_patches - count  # (B, N): absorptions that this cut keeps
        own = torch.arange(self.num_patches, device=self.parent.device).expand_as(self.parent)
        root = torch.where(merged, self.parent, own)
        for _ in range(max(1, (self.num_patches - 1).bit_length())):  # pointer jumping halves the longest path
            root = root.gather(1, root)
        node = (root == own).cumsum(1) - 1  # running number of the roots
        return node.gather(1, root)

    def _checked_num_nodes(self, num_nodes: int | Tensor) -> Tensor | int:
        if isinstance(num_nodes, Tensor):
            if num_nodes.shape != (len(self),):
                raise ValueError(
                    f"num_nodes has shape {tuple(num_nodes.shape)}; give one int or a tensor ({len(self)},)"
                )
            low, high = int(num_nodes.min()), int(num_nodes.max())
        else:
            low = high = num_nodes
        if low < 1 or high > self.num_patches:
            raise ValueError(
                f"num_nodes={low if low < 1 else high} is not in [1, {self.num_patches}], the number of patches"
            )
        return num_nodes.to(self.rank.device)[:, None] if isinstance(num_nodes, Tensor) else num_nodes

    def to_linkage(self, index: int) -> Tensor:
        """Tree of one image as a scipy linkage matrix, for `scipy.cluster.hierarchy` (dendrogram, fcluster, ...).

        Args:
            index: Image in the batch.

        Returns:
            `(N - 1, 4)` float64 on the CPU: two merged clusters, distance, size. Distance is `1 - affinity`, or
            `largest affinity - affinity` where an affinity exceeds 1, since scipy wants distances of at least 0.
        """
        parent, height, rank = (x[index].cpu() for x in (self.parent, self.height, self.rank))
        order = rank.argsort()[:-1].tolist()  # leaves in the order of absorption, without leaf 0
        top = max(1.0, float(height[order[0]])) if order else 1.0
        cluster, size, rows = list(range(self.num_patches)), [1] * self.num_patches, []
        for step, leaf in enumerate(order):
            into = int(parent[leaf])
            size[into] += size[leaf]
            first, second = sorted((cluster[into], cluster[leaf]))
            rows.append([first, second, top - float(height[leaf]), size[into]])
            cluster[into] = self.num_patches + step
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


class NonFiniteAffinityError(ValueError):
    """An affinity holds NaN or infinite values: the weights of the teacher have diverged, or pixels were not finite."""


def symmetrize(affinity: Tensor) -> Tensor:
    """`(A + Aᵀ) / 2` of `(B, N, N)`; bitwise symmetric, since addition commutes."""
    return (affinity + affinity.transpose(1, 2)) / 2


def build_hierarchy(
    affinity: Tensor, linkage: str = "average", grid_size: tuple[int, int] | None = None
) -> PatchHierarchy:
    """Merge the two most alike clusters of each image again and again, until one is left.

    All images advance together in rounds; a round merges every pair of clusters that are each other's nearest. For
    these linkages that yields the tree of one-at-a-time merging (Bruynooghe 1977; Müllner 2011, arXiv:1109.2378).
    Ties go to the smallest patch indices, so the result is deterministic.

    Args:
        affinity: `(B, N, N)` float, larger = more alike, symmetric, finite; the diagonal is not read.
        linkage: Affinity of two clusters: "average", "single" (largest) or "complete" (smallest) of their members'.
        grid_size: Patches along height and width, kept in the result.

    Returns:
        The trees. On tie-free affinities every cut equals scipy's `linkage(1 - A, linkage)`.

    Raises:
        NonFiniteAffinityError: NaN or infinite values.
        ValueError: wrong shape, not symmetric, or an unknown linkage.
    """
    _check_arguments(affinity, linkage, grid_size)
    affinity = affinity.detach().to(torch.promote_types(affinity.dtype, torch.float32))
    merge = MERGING.get(affinity.device.type)
    merged = None if merge is None else merge(affinity, linkage)
    if merged is None:
        affinity = _clean_affinity(affinity)
        merged = merge_in_rounds(affinity.clone(), linkage) if merge is None else merge(affinity, linkage)
    return PatchHierarchy(*merged, grid_size)


def merge_in_rounds(similarity: Tensor, linkage: str) -> tuple[Tensor, Tensor, Tensor]:
    """Merge until one cluster is left.

    Args:
        similarity: `(B, N, N)` float32 or float64, bitwise symmetric, finite but for the diagonal; overwritten.
        linkage: As for `build_hierarchy`.

    Returns:
        `parent`, `height` and `rank` of `PatchHierarchy`, each `(B, N)`.
    """
    batch, count = similarity.shape[:2]
    device = similarity.device
    parent = torch.zeros(batch, count, dtype=torch.long, device=device)
    height = torch.full((batch, count), float("inf"), dtype=similarity.dtype, device=device)
    merged_in = torch.zeros(batch, count, dtype=torch.long, device=device)  # round of the absorption

    leaf = torch.arange(count, device=device).expand(batch, -1)  # (B, M): smallest leaf of each cluster
    size = torch.ones(batch, count, dtype=similarity.dtype, device=device)  # (B, M)
    floor = torch.full_like(size, float("inf"))  # (B, M): height of the cluster's own last merge
    active = torch.ones(batch, count, dtype=torch.bool, device=device)
    similarity = _exclude(similarity, active)
    for step in range(1, count):
        best, nearest, absorbs, absorbed = _reciprocal_pairs(similarity)
        # Rounding can put a mean a hair above its parts; a tree's heights never rise.
        level = best.minimum(floor).minimum(floor.gather(1, nearest))
        where = torch.where(absorbed, leaf, count)  # clusters that stay write to a spare last column
        parent = _scatter(parent, where, leaf.gather(1, nearest))
        height = _scatter(height, where, level)
        merged_in = _scatter(merged_in, where, torch.full_like(leaf, step))

        active = active & ~absorbed
        left = int(active.sum(1).max())
        if left == 1:
            break
        # Absorbed clusters are left behind, so later rounds work on ever smaller matrices; images that are further
        # than others are padded with clusters that no longer exist.
        keep = active.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :left]  # (B, M'), ascending
        joined_size = size + size.gather(1, nearest)
        share = torch.where(absorbs, size / joined_size, 1.0).gather(1, keep)
        partner = torch.where(absorbs, nearest, torch.arange(nearest.shape[1], device=device)).gather(1, keep)
        similarity = _merge(similarity, keep, partner, share, linkage)
        size = torch.where(absorbs, joined_size, size).gather(1, keep)
        floor = torch.where(absorbs, level, floor).gather(1, keep)
        leaf, active = leaf.gather(1, keep), active.gather(1, keep)
        similarity = _exclude(similarity, active)
    return parent, height, merge_order(height, merged_in)


def _check_arguments(affinity: Tensor, linkage: str, grid_size: tuple[int, int] | None) -> None:
    if linkage not in ("average", "single", "complete"):
        raise ValueError(f"linkage={linkage!r} is not one of average, single, complete")
    if affinity.ndim != 3 or affinity.shape[1] != affinity.shape[2] or 0 in affinity.shape:
        raise ValueError(f"affinity has shape {tuple(affinity.shape)}; (images, patches, patches) is expected")
    if grid_size is not None and grid_size[0] * grid_size[1] != affinity.shape[1]:
        raise ValueError(f"grid_size={grid_size} does not hold {affinity.shape[1]} patches")
    if not affinity.is_floating_point():
        raise ValueError(f"affinity has dtype {affinity.dtype}; a floating point type is expected")


def _clean_affinity(affinity: Tensor) -> Tensor:
    """The affinity, made symmetric to the last bit if it nearly is; errors on any other one that cannot be merged."""
    off_diagonal = affinity.masked_fill(torch.eye(affinity.shape[1], dtype=torch.bool, device=affinity.device), 0)
    if not bool(off_diagonal.isfinite().all()):
        raise NonFiniteAffinityError(
            "affinity holds NaN or infinite values; look for an overflow in the teacher's attention"
        )
    if bool((off_diagonal.abs() >= -LOWEST).any()):
        raise ValueError(f"affinity holds values of {-LOWEST:.0e} or beyond; scale it")
    if not bool((off_diagonal == off_diagonal.transpose(1, 2)).all()):
        # Mirrored pairs may differ in the last bits (two orders of one sum); anything more is a caller's mistake.
        if not torch.allclose(off_diagonal, off_diagonal.transpose(1, 2), rtol=1e-5, atol=1e-7):
            raise ValueError("affinity is not symmetric; pass symmetrize(affinity)")
        return symmetrize(affinity)
    return affinity


def _exclude(similarity: Tensor, active: Tensor) -> Tensor:
    """Make the diagonal and the columns of clusters that no longer exist nobody's nearest; in place.

    Their rows may stay as they are: a pair must be mutual.
    """
    similarity.masked_fill_(~active[:, None], NOBODY)
    similarity.diagonal(dim1=1, dim2=2).fill_(NOBODY)
    return similarity


def _reciprocal_pairs(similarity: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Similarity to the nearest cluster, its place, and which clusters absorb or are absorbed by theirs this round.

    All `(B, M)`.
    `argmax` takes the first of equal values: among the most alike pairs of an image the one with the smallest first
    member is always reciprocal, so every round merges at least one pair.
    """
    best, nearest = similarity.max(dim=2)
    own = torch.arange(nearest.shape[1], device=nearest.device)
    mutual = (nearest.gather(1, nearest) == own) & (best > LOWEST)
    return best, nearest, mutual & (own < nearest), mutual & (own > nearest)


def _scatter(values: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """`values` with `source` written at `index`; an index of N is dropped."""
    spare = torch.cat([values, values[:, :1]], dim=1)
    return spare.scatter(1, index, source)[:, :-1]


def _merge(similarity: Tensor, keep: Tensor, partner: Tensor, share: Tensor, linkage: str) -> Tensor:
    """Similarities `(B, M', M')` of the clusters that stay, each joined with its partner (itself, if it has none).

    Rows first, then columns, which after a transposition are rows again.
    """
    for _ in range(2):
        kept, other = _take_rows(similarity, keep), _take_rows(similarity, partner)
        if linkage == "average":
            joined = other + share[..., None] * (kept - other)  # exact where both are equal, as those without a partner
        else:
            joined = torch.maximum(kept, other) if linkage == "single" else torch.minimum(kept, other)
        similarity = joined.transpose(1, 2)
    # The two orders of summing differ in the last bits; without bitwise symmetry a round could find no pair.
    return symmetrize(similarity)


def _take_rows(matrices: Tensor, index: Tensor) -> Tensor:
    """`(B, M, W)` and `(B, M')` -> `(B, M', W)`. On CPUs copying whole rows is far faster than `gather`."""
    offset = torch.arange(len(index), device=index.device)[:, None] * matrices.shape[1]
    rows = matrices.reshape(-1, matrices.shape[2]).index_select(0, (index + offset).flatten())
    return rows.view(*index.shape, matrices.shape[2])


def merge_order(height: Tensor, merged_in: Tensor) -> Tensor:
    """Rank of each leaf's absorption: by falling height, then by round, then by leaf; leaf 0 comes last.

    A node is merged in a later round than its parts and at a height no larger, so parts always precede it.
    """
    height = height.clone()
    height[:, 0] = float("-inf")
    by_round = merged_in.argsort(dim=1, stable=True)
    by_height = height.gather(1, by_round).argsort(dim=1, descending=True, stable=True)
    order = by_round.gather(1, by_height)
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )


__all__ = ["PatchHierarchy", "NonFiniteAffinityError", "build_hierarchy", "symmetrize"]
