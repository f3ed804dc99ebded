"""The merging of `hierarchy_ehm` as one GPU kernel, by Triton: the same trees bit for bit, in less time.

In torch each round of `merge_in_rounds` is some fifty small kernels and a wait for the device. Here one program merges
one image from its first pair to its last, round by round and sum by sum as there; clusters stay at their place in the
matrix instead of being moved together.

Letters: B images, N patches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .hierarchy_ehm import LOWEST, NOBODY, merge_order

AVERAGE, SINGLE, COMPLETE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LINKAGE_CODES = {"average": AVERAGE.value, "single": SINGLE.value, "complete": COMPLETE.value}
NOT_A_CANDIDATE, TOO_LARGE = tl.constexpr(NOBODY), tl.constexpr(-LOWEST)
UNFUSED = {"enable_fp_fusion": False}  # a product and a sum rounded once would be another tree's
STUCK, UNSOUND, MERGED = tl.constexpr(-1), tl.constexpr(0), tl.constexpr(1)
# Warps of a program and values of a matrix that it holds at a time: of seven pairs on an H200 the fastest for few
# patches, and one within a tenth of the fastest for many.
FEW_PATCHES, MANY_PATCHES, MOST_OF_FEW = (4, 2048), (16, 4096), 256


def merge_on_gpu(affinity: Tensor, linkage: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `hierarchy_ehm.merge_in_rounds`, on a GPU.

    Args:
        affinity: `(B, N, N)` float32 or float64; not written to.
        linkage: As for `build_hierarchy`.

    Returns:
        `parent`, `height` and `rank` of `PatchHierarchy`, each `(B, N)`; None if a value off the diagonal is not
        finite, is too large, or is not bit for bit that on the other side: `build_hierarchy` says what is wrong.
    """
    batch, count = affinity.shape[:2]
    affinity = affinity.contiguous()
    parent = affinity.new_zeros(batch, count, dtype=torch.long)
    height = affinity.new_full((batch, count), float("inf"))
    merged_in = affinity.new_zeros(batch, count, dtype=torch.long)
    if count == 1:  # nothing to merge, and Triton would compile a kernel of its own for the number 1
        return parent, height, merged_in
    outcome = affinity.new_empty(batch, dtype=torch.int32)
    matrices = affinity.new_empty(batch, 2, count, count)  # of the last round, and of this one
    cluster_values = affinity.new_empty(batch, 4, count)  # best, floor, size, share: see _merge
    cluster_indices = affinity.new_empty(batch, 3, count, dtype=torch.int32)  # nearest, partner, those that are left
    columns = triton.next_power_of_2(count)
    num_warps, tile = FEW_PATCHES if columns <= MOST_OF_FEW else MANY_PATCHES
    with torch.cuda.device_of(affinity):  # Triton starts kernels on the current device
        _merge[(batch,)](
            affinity,
            matrices,
            cluster_values,
            cluster_indices,
            parent,
            height,
            merged_in,
            outcome,
            count,
            LINKAGE=LINKAGE_CODES[linkage],
            COLUMNS=columns,
            ROWS=max(1, tile // columns),
            IN_DOUBLE=affinity.dtype == torch.float64,
            num_warps=num_warps,
            **UNFUSED,
        )
    worst = int(outcome.min())  # the one wait for the device
    if worst == STUCK.value:
        raise RuntimeError(f"the kernel found no pair to merge in {count} rounds over {count} patches; report this")
    return None if worst == UNSOUND.value else (parent, height, merge_order(height, merged_in))


@triton.jit
def _merge(
    affinity,
    matrices,
    cluster_values,
    cluster_indices,
    parent,
    height,
    merged_in,
    outcome,
    count,
    LINKAGE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    IN_DOUBLE: tl.constexpr,
):
    """Merge one image. Its threads read from memory what others of them wrote: hence the barriers."""
    image = tl.program_id(0).to(tl.int64)
    affinity += image * count * count
    before, after = matrices + image * 2 * count * count, matrices + (image * 2 + 1) * count * count
    # Of each cluster: similarity to the nearest, height of its own last merge, members, their share of the merged one;
    # its nearest cluster, and the one it merges with, or itself. Then the clusters that are left, ascending.
    best, floor = cluster_values + image * 4 * count, cluster_values + (image * 4 + 1) * count
    size, share = cluster_values + (image * 4 + 2) * count, cluster_values + (image * 4 + 3) * count
    nearest, partner, listed = (
        cluster_indices + image * 3 * count,
        cluster_indices + (image * 3 + 1) * count,
        cluster_indices + (image * 3 + 2) * count,
    )
    parent, height, merged_in = parent + image * count, height + image * count, merged_in + image * count

    own = tl.arange(0, COLUMNS)
    alive = own < count
    sound = 1
    for first in range(0, count, ROWS):
        rows = first + tl.arange(0, ROWS)
        cells = (rows < count)[:, None] & alive[None, :]
        value = tl.load(affinity + rows[:, None] * count + own[None, :], mask=cells, other=0.0)
        mirrored = tl.load(affinity + own[None, :] * count + rows[:, None], mask=cells, other=0.0)
        off_diagonal = cells & (rows[:, None] != own[None, :])
        fits = (value == mirrored) & (tl.abs(value) < TOO_LARGE)  # false for NaN
        sound = tl.minimum(sound, tl.min(tl.min((fits | (off_diagonal == 0)).to(tl.int32), axis=1), axis=0))
        value = tl.where(off_diagonal, value, NOT_A_CANDIDATE)
        tl.store(before + rows[:, None] * count + own[None, :], value, mask=cells)
        top, found = tl.max(value, axis=1, return_indices=True)  # the first of equals
        tl.store(best + rows, top, mask=rows < count)
        tl.store(nearest + rows, found, mask=rows < count)
    ones = tl.full((COLUMNS,), 1.0, tl.float64 if IN_DOUBLE else tl.float32)
    tl.store(size + own, ones, mask=alive)
    tl.store(floor + own, ones * float("inf"), mask=alive)

    left = tl.where(sound == 1, count, 1)
    step = 0
    # Every round merges a pair; were that wrong, a kernel without an end would take the device along.
    while (left > 1) & (step < count):
        step += 1
        tl.debug_barrier()
        top = tl.load(best + own, mask=alive, other=NOT_A_CANDIDATE)
        near = tl.load(nearest + own, mask=alive, other=0)
        mutual = alive & (tl.load(nearest + near, mask=alive, other=-1) == own) & (top > -TOO_LARGE)
        absorbs, absorbed = mutual & (own < near), mutual & (own > near)
        # Rounding can put a mean a hair above its parts; a tree's heights never rise.
        level = tl.minimum(top, tl.load(floor + own, mask=alive, other=0.0))
        level = tl.minimum(level, tl.load(floor + near, mask=alive, other=0.0))
        members = tl.load(size + own, mask=alive, other=1.0)
        joined = members + tl.load(size + near, mask=alive, other=1.0)
        tl.store(parent + own, near.to(tl.int64), mask=absorbed)
        tl.store(height + own, level, mask=absorbed)
        tl.store(merged_in + own, (own * 0 + step).to(tl.int64), mask=absorbed)
        tl.debug_barrier()
        part = members / joined if IN_DOUBLE else tl.div_rn(members, joined)
        tl.store(floor + own, level, mask=absorbs)
        tl.store(size + own, joined, mask=absorbs)
        part, other = tl.where(absorbs, part, ones), tl.where(absorbs, near, own)
        tl.store(share + own, part, mask=alive)
        tl.store(partner + own, other, mask=alive)
        alive = alive & (absorbed == 0)
        left = tl.sum(alive.to(tl.int32), axis=0)
        tl.store(listed + tl.cumsum(alive.to(tl.int32), axis=0) - 1, own, mask=alive)
        tl.debug_barrier()
        for first in range(0, left, ROWS):
            there = first + tl.arange(0, ROWS) < left
            rows = tl.load(listed + first + tl.arange(0, ROWS), mask=there, other=0)
            row_partners = tl.load(partner + rows, mask=there, other=0)[:, None] * count
            row_share = tl.load(share + rows, mask=there, other=1.0)[:, None]
            cells = there[:, None] & alive[None, :]
            # a and b are the parts of a row's cluster, c and d those of a column's.
            ac = tl.load(before + rows[:, None] * count + own[None, :], mask=cells, other=0.0)
            ad = tl.load(before + rows[:, None] * count + other[None, :], mask=cells, other=0.0)
            bc = tl.load(before + row_partners + own[None, :], mask=cells, other=0.0)
            bd = tl.load(before + row_partners + other[None, :], mask=cells, other=0.0)
            # The two orders of joining differ in the last bits; their mean is the same on both sides.
            rows_first = _join(
                _join(ac, bc, row_share, LINKAGE), _join(ad, bd, row_share, LINKAGE), part[None, :], LINKAGE
            )
            columns_first = _join(
                _join(ac, ad, part[None, :], LINKAGE), _join(bc, bd, part[None, :], LINKAGE), row_share, LINKAGE
            )
            value = tl.where(
                cells & (rows[:, None] != own[None, :]), (rows_first + columns_first) * 0.5, NOT_A_CANDIDATE
            )
            tl.store(after + rows[:, None] * count + own[None, :], value, mask=cells)
            row_best, row_nearest = tl.max(value, axis=1, return_indices=True)
            tl.store(best + rows, row_best, mask=there)
            tl.store(nearest + rows, row_nearest, mask=there)
        before, after = after, before
    tl.store(outcome + image, tl.where(left > 1, STUCK, tl.where(sound == 1, MERGED, UNSOUND)))


@triton.jit
def _join(kept, other, share, LINKAGE: tl.constexpr):
    """Similarity to a merged cluster, of the similarities to its parts."""
    if LINKAGE == AVERAGE:
        return other + share * (kept - other)
    if LINKAGE == SINGLE:
        return tl.maximum(kept, other)
    return tl.minimum(kept, other)


__all__ = ["merge_on_gpu"]
