"""The merging of `hierarchy_ehm` as machine code for CPUs, by numba: the same trees bit for bit, in less time.

It computes what `merge_in_rounds` computes, round by round and sum by sum, but keeps each cluster's nearest from round
to round: a merged cluster is never nearer to a third one than the nearer of its parts was (but for rounding, which is
looked after), so only clusters whose nearest has merged look again.

Letters: B images, N patches.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numba
import numpy as np
import torch
from torch import Tensor

from .hierarchy_ehm import LOWEST, NOBODY

AVERAGE, SINGLE, COMPLETE = range(3)
LINKAGE_CODES = {"average": AVERAGE, "single": SINGLE, "complete": COMPLETE}
WIDTH = 32  # values that loops take at a time, and more
PAGE = 4096  # bytes


def can_cache() -> bool:
    """Whether numba finds a folder in which to keep the machine code; without one it compiles in every process."""
    try:
        numba.njit(cache=True)(can_cache)
    except RuntimeError:
        return False
    return True


compiled = partial(numba.njit, cache=can_cache())


def merge_compiled(affinity: Tensor, linkage: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `hierarchy_ehm.merge_in_rounds`, on the CPU.

    Args:
        affinity: `(B, N, N)` float32 or float64; not written to.
        linkage: As for `build_hierarchy`.

    Returns:
        `parent`, `height` and `rank` of `PatchHierarchy`, each `(B, N)`; None if a value off the diagonal is not
        finite, is too large, or is not bit for bit that on the other side: `build_hierarchy` says what is wrong.
    """
    batch, count = affinity.shape[:2]
    parent = torch.zeros(batch, count, dtype=torch.long)
    height = torch.full((batch, count), float("inf"), dtype=affinity.dtype)
    rank = torch.zeros(batch, count, dtype=torch.long)
    arrays = affinity.contiguous().numpy(), parent.numpy(), height.numpy(), rank.numpy()
    threads = min(torch.get_num_threads(), batch)

    def merge_share(first: int) -> bool:
        scratch = np.full((count, padded(count, arrays[0].itemsize)), NOBODY, arrays[0].dtype)
        bits = scratch.view(np.int32 if scratch.dtype == np.float32 else np.int64)
        shares = [array[first::threads] for array in arrays]
        return _merge_images(scratch, bits, LINKAGE_CODES[linkage], *shares)

    # Plain threads: numba's own may not be entered by two threads at a time, nor after a fork.
    with ThreadPoolExecutor(threads) as pool:
        sound = all(pool.map(merge_share, range(threads)))
    return (parent, height, rank) if sound else None


def padded(count: int, itemsize: int) -> int:
    """Columns of a row in memory: loops have no rest then, and columns do not lie a page apart, in few cache lines."""
    columns = -(-count // WIDTH) * WIDTH
    return columns + WIDTH if columns * itemsize % PAGE == 0 else columns


@compiled(nogil=True)
def _merge_images(scratch, bits, linkage, affinity, parent, height, rank):
    """Merge one image after the other in the same memory; False at the first one that is not clean."""
    order = np.zeros(len(scratch) - 1, np.int64)
    for image in range(len(affinity)):
        if not _copy_sound(affinity, image, scratch, scratch.dtype.type(-LOWEST)):
            return False
        _merge_image(scratch, bits, linkage, parent[image], height[image], order)
        _rank(height[image], order, rank[image])
    return True


@compiled()
def _copy_sound(affinity, image, similarity, too_large):
    """Copy an affinity, with nobody on its diagonal; whether it is symmetric, finite and not too large."""
    count, sound = len(similarity), True
    for i in range(count):
        for j in range(count):
            similarity[i, j] = affinity[image, i, j]
        similarity[i, i] = 0
    for i in range(count):
        for j in range(i):
            value = similarity[i, j]
            sound &= (value == similarity[j, i]) & (np.abs(value) < too_large)  # false for NaN
        similarity[i, i] = NOBODY
    return sound


@compiled()
def _merge_image(similarity, bits, linkage, parent, height, order):
    """Merge until one cluster is left; `order` takes the absorbed leaves by round, and within it ascending."""
    count, columns = similarity.shape
    alive = np.arange(count)  # clusters that are left, ascending, each named by its smallest leaf
    gone = np.ones(columns, np.int32)  # 1 for those that were absorbed, and beyond the last
    gone[:count] = 0
    size = np.ones(count, similarity.dtype)
    floor = np.full(count, np.inf, similarity.dtype)  # height of the cluster's own last merge
    nearest, best = np.zeros(columns, np.int32), np.zeros(columns, similarity.dtype)
    keys = np.zeros(columns, bits.dtype)  # what `_look` compares
    merges, looks = np.zeros(count, np.bool_), np.zeros(count, np.bool_)  # in this round: merges; looks again
    # The pairs of a round: who absorbs, who is absorbed, the first one's share of the members.
    absorbing, absorbed, share = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, similarity.dtype)
    between = np.zeros((count // 2 + 1, count // 2 + 1), similarity.dtype)
    for i in range(count):
        _look(similarity, bits, keys, gone, i, nearest, best)
    left, merged = count, 0
    while left > 1:
        pairs = 0
        for place in range(left):
            a = alive[place]
            b = nearest[a]
            if a < b and nearest[b] == a:
                merges[a] = merges[b] = True
                gone[b] = 1
                height[b] = min(best[b], floor[b], floor[a])
                parent[b] = a
                absorbing[pairs], absorbed[pairs], share[pairs] = a, b, size[a] / (size[a] + size[b])
                size[a] += size[b]
                floor[a] = height[b]
                pairs += 1
        if pairs == 0:
            raise AssertionError("no two clusters are each other's nearest, which cannot be")  # else for ever
        for place in range(left):
            x = alive[place]
            looks[x] = merges[x] or merges[nearest[x]]
        _join_pairs(similarity, linkage, pairs, absorbing, absorbed, share, between)
        for pair in range(pairs):
            _compare(similarity, absorbing[pair], nearest, best)
        kept = 0
        for place in range(left):
            x = alive[place]
            if gone[x]:
                order[merged] = x
                merged += 1
                continue
            alive[kept] = x
            kept += 1
            if not merges[x]:
                for pair in range(pairs):
                    similarity[x, absorbing[pair]] = similarity[absorbing[pair], x]
            if looks[x]:
                _look(similarity, bits, keys, gone, x, nearest, best)
        left = kept
        for pair in range(pairs):
            merges[absorbing[pair]] = merges[absorbed[pair]] = False


@compiled()
def _look(similarity, bits, keys, gone, i, nearest, best):
    """Find the most alike of the clusters that are left; the first of equals.

    Compares the floats' bits as integers of the same order, of which the compiler takes maxima by vectors.
    """
    integer = bits.dtype.type
    lowest = integer(np.iinfo(bits.dtype).min)  # sorts before every float
    count, top = len(gone), lowest
    for j in range(count):
        value = bits[i, j]
        key = value if value >= 0 else integer(lowest - value)
        keys[j] = key if gone[j] == 0 else lowest
        top = keys[j] if keys[j] > top else top
    found = np.int32(count)
    for j in range(count):
        place = np.int32(j) if keys[j] == top else np.int32(count)
        found = place if place < found else found
    nearest[i], best[i] = found, similarity[i, found]


@compiled()
def _compare(similarity, a, nearest, best):
    """Note cluster `a`, which absorbed another one, as nearest of those to which it is nearer than theirs."""
    name = np.int32(a)
    for x in range(len(nearest)):
        value = similarity[a, x]
        nearer = (value > best[x]) | ((value == best[x]) & (name < nearest[x]))
        best[x] = value if nearer else best[x]
        nearest[x] = name if nearer else nearest[x]


@compiled()
def _join_pairs(similarity, linkage, pairs, absorbing, absorbed, share, between):
    """Write similarities to merged clusters into the rows of those that absorb.

    To each other: the mean of both orders of joining, unlike in the last bits.
    """
    for pair in range(pairs):
        _join_rows(similarity, absorbing[pair], absorbed[pair], share[pair], linkage)
    for p in range(pairs):
        a = absorbing[p]
        for q in range(pairs):
            between[p, q] = _join(similarity[a, absorbing[q]], similarity[a, absorbed[q]], share[q], linkage)
    for p in range(pairs):
        a = absorbing[p]
        for q in range(pairs):
            similarity[a, absorbing[q]] = (between[p, q] + between[q, p]) / 2
        similarity[a, a] = NOBODY


@compiled()
def _join_rows(similarity, a, b, share, linkage):
    if linkage == AVERAGE:  # said here, so that the loop need not ask
        for x in range(similarity.shape[1]):
            similarity[a, x] = _join(similarity[a, x], similarity[b, x], share, AVERAGE)
    else:
        for x in range(similarity.shape[1]):
            similarity[a, x] = _join(similarity[a, x], similarity[b, x], share, linkage)


@compiled(inline="always")
def _join(kept, other, share, linkage):
    """Similarity to a merged cluster, of the similarities to its parts."""
    if linkage == AVERAGE:
        return other + share * (kept - other)
    return max(kept, other) if linkage == SINGLE else min(kept, other)


@compiled()
def _rank(height, leaves, rank):
    """Places of the absorptions: by falling height, then by round, then by leaf; leaf 0 comes last."""
    order = np.argsort(-height[leaves], kind="mergesort")
    for place in range(len(leaves)):
        rank[leaves[order[place]]] = place
    rank[0] = len(leaves)
