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
GONE = np.int64(-(2**63))  # sorts before every float's key


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
        scratch = np.empty((count, count), arrays[0].dtype)
        bits = scratch.view(np.int32 if scratch.dtype == np.float32 else np.int64)
        shares = [array[first::threads] for array in arrays]
        return _merge_images(scratch, bits, LINKAGE_CODES[linkage], *shares)

    # Plain threads: numba's own may not be entered by two threads at a time, nor after a fork.
    with ThreadPoolExecutor(threads) as pool:
        sound = all(pool.map(merge_share, range(threads)))
    return (parent, height, rank) if sound else None


@compiled(nogil=True)
def _merge_images(scratch, bits, linkage, affinity, parent, height, rank):
    """Merge one image after the other in the same memory; False at the first one that is not clean."""
    for image in range(len(affinity)):
        if not _copy_sound(affinity[image], scratch, scratch.dtype.type(-LOWEST)):
            return False
        merged_in = np.zeros(len(scratch), np.int64)
        _merge_image(scratch, bits, linkage, parent[image], height[image], merged_in)
        _rank(height[image], merged_in, rank[image])
    return True


@compiled()
def _copy_sound(affinity, similarity, largest):
    """Copy an affinity, with nobody on its diagonal; whether it is symmetric, finite and not too large."""
    similarity[:] = affinity
    for i in range(len(similarity)):
        similarity[i, i] = 0
    sound = True
    for i in range(len(similarity)):
        for j in range(i):
            value = similarity[i, j]
            sound &= (value == similarity[j, i]) & (np.abs(value) <= largest)  # false for NaN
        similarity[i, i] = NOBODY
    return sound


@compiled()
def _merge_image(similarity, bits, linkage, parent, height, merged_in):
    count = len(similarity)
    alive = np.arange(count)  # clusters that are left, ascending, each named by its smallest leaf
    gone = np.zeros(count, np.int32)  # 1 for those that were absorbed
    size = np.ones(count, similarity.dtype)
    floor = np.full(count, np.inf, similarity.dtype)  # height of the cluster's own last merge
    nearest, best = np.zeros(count, np.int64), np.zeros(count, similarity.dtype)
    partner = np.full(count, -1)  # of the clusters that merge in this round
    # The pairs of a round: who absorbs, who is absorbed, the first one's share of the members.
    absorbing, absorbed, share = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, similarity.dtype)
    between = np.zeros((count // 2 + 1, count // 2 + 1), similarity.dtype)
    for i in range(count):
        _look(similarity, bits, gone, i, nearest, best)
    left, step = count, 0
    while left > 1:
        step += 1
        pairs = 0
        for place in range(left):
            a = alive[place]
            b = nearest[a]
            if a < b and nearest[b] == a:
                partner[a], partner[b], gone[b] = b, a, 1
                height[b] = min(best[b], floor[b], floor[a])
                parent[b], merged_in[b] = a, step
                absorbing[pairs], absorbed[pairs], share[pairs] = a, b, size[a] / (size[a] + size[b])
                size[a] += size[b]
                floor[a] = height[b]
                pairs += 1
        _join_pairs(similarity, linkage, absorbing[:pairs], absorbed, share, between)
        for first in range(pairs):
            a = absorbing[first]
            _join_rows(similarity[a], similarity[absorbed[first]], share[first], linkage)
            similarity[a, a] = NOBODY
            for second in range(pairs):
                if first != second:
                    similarity[a, absorbing[second]] = between[first, second]
        kept = 0
        for place in range(left):
            x = alive[place]
            if gone[x]:
                continue
            alive[kept] = x
            kept += 1
            looks = partner[x] >= 0 or partner[nearest[x]] >= 0
            if partner[x] < 0:
                found, value = nearest[x], best[x]
                for pair in range(pairs):
                    a = absorbing[pair]
                    joined = _join(similarity[x, a], similarity[x, absorbed[pair]], share[pair], linkage)
                    similarity[x, a] = joined
                    # Seldom so; asked first, it keeps the compiler from computing both sides.
                    if joined >= value and (joined > value or a < found):
                        found, value = a, joined
                nearest[x], best[x] = found, value
            if looks:
                _look(similarity, bits, gone, x, nearest, best)
        left = kept
        for pair in range(pairs):
            partner[absorbing[pair]] = partner[absorbed[pair]] = -1


@compiled()
def _look(similarity, bits, gone, i, nearest, best):
    """Find the most alike of the clusters that are left; the first of equals."""
    count, top = bits.shape[1], GONE
    for j in range(count):
        key = _key(bits[i, j]) if gone[j] == 0 else GONE
        top = key if key > top else top
    found = np.int64(count)
    for j in range(count):
        place = np.int64(j) if gone[j] == 0 and _key(bits[i, j]) == top else np.int64(count)
        found = place if place < found else found
    nearest[i], best[i] = found, similarity[i, found]


@compiled(inline="always")
def _key(bits):
    """A float's bits as an integer of the same order, of which the compiler takes maxima by vectors."""
    return np.int64(bits) if bits >= 0 else np.int64(np.iinfo(bits).min) - np.int64(bits)


@compiled(inline="always")
def _join(kept, other, share, linkage):
    """Similarity to a merged cluster, of the similarities to its parts."""
    if linkage == AVERAGE:
        return other + share * (kept - other)
    return max(kept, other) if linkage == SINGLE else min(kept, other)


@compiled()
def _join_rows(kept, other, share, linkage):
    if linkage == AVERAGE:
        for x in range(len(kept)):
            kept[x] = _join(kept[x], other[x], share, AVERAGE)
    else:
        for x in range(len(kept)):
            kept[x] = _join(kept[x], other[x], share, linkage)


@compiled()
def _join_pairs(similarity, linkage, absorbing, absorbed, share, between):
    """Similarities of merged clusters to each other: the mean of both orders of joining, unlike in the last bits."""
    for p in range(len(absorbing)):
        a, b = absorbing[p], absorbed[p]
        for q in range(p + 1, len(absorbing)):
            c, d = absorbing[q], absorbed[q]
            ac, ad, bc, bd = similarity[a, c], similarity[a, d], similarity[b, c], similarity[b, d]
            one = _join(_join(ac, bc, share[p], linkage), _join(ad, bd, share[p], linkage), share[q], linkage)
            two = _join(_join(ac, ad, share[q], linkage), _join(bc, bd, share[q], linkage), share[p], linkage)
            between[p, q] = between[q, p] = (one + two) / 2


@compiled()
def _rank(height, merged_in, rank):
    """Places of the absorptions: by falling height, then by round, then by leaf; leaf 0 comes last."""
    count = len(height)
    leaves = np.argsort(merged_in[1:] * count + np.arange(count - 1)) + 1  # by round, then by leaf
    order = leaves[np.argsort(-height[leaves], kind="mergesort")]
    for place in range(count - 1):
        rank[order[place]] = place
    rank[0] = count - 1
