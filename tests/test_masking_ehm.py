"""Masks are pure functions of seed and tree, exact in number, and of the promised distribution."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import ViTConfig, ViTForMaskedImageModeling, ViTMAEConfig, ViTMAEForPreTraining

from modeling_ehm import build_hierarchy, hierarchical_mask, mask_scores, num_nodes_at
from modeling_ehm.hierarchy_ehm import symmetrize
from modeling_ehm.masking_ehm import (
    NODE_STREAM,
    PATCH_STREAM,
    SPLIT_STREAM,
    draw_mask_seeds,
    evolution_at,
    hash_int64,
    keyed_uniform,
    mask_from_scores,
    node_scores,
    random_scores,
    softness_at,
)

WORD = (1 << 64) - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """Steele, Lea & Flood 2014, in Python's unbounded integers."""
    state = (state + GOLDEN_GAMMA) & WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return state ^ (state >> 31)


def signed(word: int) -> int:
    word &= WORD
    return word - (1 << 64) if word >> 63 else word


def random_trees(batch: int, count: int, seed: int = 0):
    return build_hierarchy(symmetrize(torch.rand(batch, count, count, generator=torch.Generator().manual_seed(seed))))


def two_halves(batch: int, count: int = 16):
    """Trees whose cut into 2 nodes is the first half of the patches and the second half."""
    half = torch.arange(count) < count // 2
    affinity = (half[:, None] == half).float() + 0.1 * symmetrize(torch.rand(1, count, count))[0]
    return build_hierarchy(affinity.expand(batch, -1, -1))


def test_hash_is_splitmix64():
    states = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF, -987654321, *range(2, 40)]
    expected = [signed(splitmix64(state & WORD)) for state in states]
    assert hash_int64(torch.tensor(states)).tolist() == expected


def test_hash_gives_the_published_stream_of_seed_zero():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
    states = torch.tensor([signed(place * GOLDEN_GAMMA) for place in range(5)])
    assert [word & WORD for word in hash_int64(states).tolist()] == published


def test_keyed_uniform_is_the_documented_function():
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    for stream in (NODE_STREAM, PATCH_STREAM, SPLIT_STREAM):
        values = keyed_uniform(torch.tensor(seeds), 20, stream)
        assert values.dtype == torch.float32
        for seed, row in zip(seeds, values.tolist(), strict=True):
            key = splitmix64(splitmix64(seed & WORD) + stream & WORD)
            assert row == [(splitmix64(key + place * GOLDEN_GAMMA & WORD) >> 40) * 2.0**-24 for place in range(20)]


def test_keyed_uniform_is_uniform():
    values = keyed_uniform(torch.arange(1000), 200, NODE_STREAM).double().numpy()
    assert values.min() >= 0 and values.max() < 1
    assert stats.kstest(values.ravel(), "uniform").pvalue > 0.01
    assert stats.kstest(values[:, 0], "uniform").pvalue > 0.01  # one place, consecutive seeds
    assert stats.kstest(values[7], "uniform").pvalue > 0.01  # one seed, consecutive places


def test_neighbouring_seeds_places_and_streams_are_independent():
    first = keyed_uniform(torch.arange(1000), 200, NODE_STREAM).double()
    second = keyed_uniform(torch.arange(1000), 200, PATCH_STREAM).double()
    pairs = {
        "streams": (first, second),
        "seeds": (first[1:], first[:-1]),
        "places": (first[:, 1:], first[:, :-1]),
        "seed + 1, stream - 1": (first[1:], second[:-1]),
    }
    for name, (one, other) in pairs.items():
        assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.01, name  # 4 sigma is 0.009


def test_keyed_uniform_does_not_depend_on_the_batch():
    seeds = torch.tensor([5, -3, 12, 5])
    together = keyed_uniform(seeds, 30, NODE_STREAM)
    assert torch.equal(together[0], together[3])
    assert torch.equal(together[1:2], keyed_uniform(seeds[1:2], 30, NODE_STREAM))
    assert torch.equal(together[:, :7], keyed_uniform(seeds, 7, NODE_STREAM))


@pytest.mark.parametrize("seeds", [torch.tensor([1], dtype=torch.int32), torch.tensor([1.0]), torch.tensor(1)])
def test_seeds_of_another_kind_are_refused(seeds):
    with pytest.raises(ValueError, match=r"mask_seed has dtype .* and shape .*; \(B,\) int64 is expected"):
        keyed_uniform(seeds, 4, NODE_STREAM)


def test_drawn_seeds_follow_torchs_generator():
    torch.manual_seed(3)
    first, second = draw_mask_seeds(100), draw_mask_seeds(100)
    torch.manual_seed(3)
    assert torch.equal(draw_mask_seeds(100), first)
    assert len(torch.cat([first, second]).unique()) == 200
    assert first.dtype == torch.int64 and (first < 0).any() and (first > 0).any()


@pytest.mark.parametrize("count", [4, 16, 49, 100, 196])
def test_exactly_the_rounded_share_is_masked(count):
    trees = random_trees(3, count)
    for ratio in (0.1, 0.25, 0.33, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95):
        expected = round(ratio * count)
        if not 0 < expected < count:
            continue
        for num_nodes, softness in ((1, 0.0), (2, 0.0), (count, 0.0), (3, 0.5), (3, 1.0)):
            mask = hierarchical_mask(trees, num_nodes, torch.arange(3), ratio, softness)
            assert mask.dtype == torch.bool
            assert mask.sum(1).tolist() == [expected] * 3


def test_scores_are_a_permutation():
    for scores in (mask_scores(random_trees(5, 49), 6, torch.arange(5)), random_scores(torch.arange(5), 49)):
        assert torch.equal(scores.sort(1).values, (torch.arange(49) / 49).expand(5, -1))


def subset_counts(mask: torch.Tensor) -> np.ndarray:
    """How often each subset of the patches is the masked one, over all that have the same size."""
    count, hidden = mask.shape[1], int(mask[0].sum())
    codes = (mask.long() << torch.arange(count)).sum(1)
    subsets = [sum(1 << n for n in members) for members in itertools.combinations(range(count), hidden)]
    counts = np.array([int((codes == code).sum()) for code in subsets])
    assert counts.sum() == len(mask)
    return counts


@pytest.mark.parametrize("seeds", [torch.arange(20_000), torch.arange(20_000) * 2**40 - 7])
def test_every_patch_its_own_node_is_random_masking(seeds):
    """All 20 ways to hide 3 of 6 patches are equally likely, as with MAE's argsort of noise."""
    trees = random_trees(1, 6)
    trees = type(trees)(*(x.expand(len(seeds), -1) for x in (trees.parent, trees.height, trees.rank)))
    mask = hierarchical_mask(trees, 6, seeds, mask_ratio=0.5)
    assert stats.chisquare(subset_counts(mask)).pvalue > 0.01
    assert stats.chisquare(subset_counts(mask_from_scores(random_scores(seeds, 6), 3))).pvalue > 0.01


def test_marginals_and_pairs_of_random_masking():
    count, hidden, samples = 16, 12, 20_000
    trees = random_trees(1, count)
    trees = type(trees)(*(x.expand(samples, -1) for x in (trees.parent, trees.height, trees.rank)))
    masked = hierarchical_mask(trees, count, torch.arange(samples), 0.75).double()

    share = hidden / count
    deviation = masked.sum(0) - samples * share
    chi_square = (deviation**2).sum() / (samples * share * (1 - share)) * (count - 1) / count  # the sum is fixed
    assert stats.chi2.sf(float(chi_square), count - 1) > 0.01

    pairs = (masked.T @ masked)[tuple(torch.triu_indices(count, count, 1))]  # (120,)
    share = hidden * (hidden - 1) / (count * (count - 1))
    sigma = (pairs - samples * share) / (samples * share * (1 - share)) ** 0.5
    assert sigma.abs().max() < 4
    assert 0.7 < sigma.square().mean() < 1.3


def test_chi_square_would_notice_whole_nodes():
    """The claim above is not empty: with 3 nodes of 6 patches the subsets are far from equally likely."""
    trees = random_trees(1, 6)
    trees = type(trees)(*(x.expand(2000, -1) for x in (trees.parent, trees.height, trees.rank)))
    mask = hierarchical_mask(trees, 3, torch.arange(2000), mask_ratio=0.5)
    assert stats.chisquare(subset_counts(mask)).pvalue < 1e-10


def partly_masked(hierarchy, num_nodes: int, mask: torch.Tensor) -> torch.Tensor:
    """`(B,)`: nodes of the cut that are neither wholly masked nor wholly visible."""
    nodes = torch.nn.functional.one_hot(hierarchy.cut(num_nodes), num_nodes)  # (B, N, K)
    hidden, size = (nodes * mask[..., None]).sum(1), nodes.sum(1)
    return ((hidden > 0) & (hidden < size)).sum(1)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 5, 8, 20])
def test_at_most_one_node_is_partly_masked(num_nodes):
    trees = random_trees(200, 49)
    mask = hierarchical_mask(trees, num_nodes, torch.arange(200), 0.6)
    split = partly_masked(trees, num_nodes, mask)
    assert split.max() == 1
    assert num_nodes > 1 or split.min() == 1  # one node: it must be split, at random


def test_whole_halves_are_masked_each_as_often():
    mask = hierarchical_mask(two_halves(1000), 2, torch.arange(1000), 0.5)
    first, second = mask[:, :8], mask[:, 8:]
    assert torch.equal(first.all(1), first.any(1)) and torch.equal(second.all(1), ~first.any(1))
    assert stats.binomtest(int(first.all(1).sum()), 1000).pvalue > 0.01


def test_a_split_node_is_split_at_random():
    """One node of 16 patches, half of it masked: every patch as often."""
    mask = hierarchical_mask(two_halves(4000), 1, torch.arange(4000), 0.5)
    deviation = mask.double().sum(0) - 2000
    assert stats.chi2.sf(float((deviation**2).sum() / 1000 * 15 / 16), 15) > 0.01


def test_softness_one_is_random_masking():
    seeds = torch.arange(50)
    assert torch.equal(mask_scores(random_trees(50, 49), 4, seeds, softness=1.0), random_scores(seeds, 49))


@pytest.mark.parametrize("softness", [0.2, 0.7])
def test_score_is_the_documented_blend(softness):
    trees, seeds = random_trees(5, 49), torch.arange(5)
    node, patch = (keyed_uniform(seeds, 49, stream).double() for stream in (NODE_STREAM, PATCH_STREAM))
    blend = (1 - softness) * node.gather(1, trees.cut(6)) + softness * patch
    assert torch.equal(mask_scores(trees, 6, seeds, softness).argsort(1), blend.argsort(1))


def test_where_each_patch_is_a_node_trees_make_no_difference():
    seeds = torch.arange(5)
    alone = node_scores(torch.arange(49).expand(5, -1), seeds, 0.2)
    for seed in range(3):
        assert torch.equal(mask_scores(random_trees(5, 49, seed), 49, seeds, 0.2), alone)


def test_more_softness_splits_more_nodes():
    trees, seeds = random_trees(400, 49), torch.arange(400)
    split = []
    for softness in (0.0, 0.25, 0.5, 0.75, 1.0):
        mask = hierarchical_mask(trees, 12, seeds, 0.6, softness)
        split.append(partly_masked(trees, 12, mask).double().mean().item())
    assert split[0] <= 1
    assert all(later > earlier + 0.1 for earlier, later in itertools.pairwise(split)), split


def test_mask_is_a_function_of_seed_and_tree():
    trees = random_trees(4, 49)
    seeds = torch.tensor([7, 8, -9, 10])
    mask = hierarchical_mask(trees, 6, seeds)
    assert torch.equal(hierarchical_mask(trees, 6, seeds.clone()), mask)
    assert (hierarchical_mask(trees, 6, seeds + 1) != mask).any(1).all()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = type(trees)(trees.parent[order], trees.height[order], trees.rank[order])
    assert torch.equal(hierarchical_mask(shuffled, 6, seeds[order]), mask[order])
    alone = type(trees)(trees.parent[1:2], trees.height[1:2], trees.rank[1:2])
    assert torch.equal(hierarchical_mask(alone, 6, seeds[1:2]), mask[1:2])


def test_a_node_count_for_each_image():
    trees, seeds = random_trees(3, 16), torch.arange(3)
    scores = mask_scores(trees, torch.tensor([16, 4, 1]), seeds)
    for image, num_nodes in enumerate((16, 4, 1)):
        assert torch.equal(scores[image], mask_scores(trees, num_nodes, seeds)[image])


def test_mask_from_scores_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.3], [4.0, 3.0, 2.0, 1.0]])
    assert mask_from_scores(scores, 1).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert mask_from_scores(scores, 3).tolist() == [[False, True, True, True], [True, True, True, False]]
    for num_hidden in (0, 4, 5, -1):
        with pytest.raises(ValueError, match=rf"num_hidden={num_hidden} must lie in \[1, 3\]"):
            mask_from_scores(scores, num_hidden)


def test_several_masks_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.3], [4.0, 3.0, 2.0, 1.0]])
    shown = [row.logical_not().nonzero()[:, 0].tolist() for row in mask_from_scores(scores, 3, 4)]
    assert shown == [[0], [3], [2], [1], [3], [2], [1], [0]]
    shown = [row.logical_not().nonzero()[:, 0].tolist() for row in mask_from_scores(scores, 2, 2)]
    assert shown == [[0, 3], [1, 2], [2, 3], [0, 1]]
    with pytest.raises(ValueError, match="num_masks=0 must be at least 1"):
        mask_from_scores(scores, 2, 0)


@pytest.mark.parametrize(("num_patches", "num_hidden", "num_masks"), [(16, 12, 4), (49, 37, 4), (16, 8, 3), (10, 2, 7)])
def test_several_masks_share_as_few_visible_patches_as_can_be(num_patches, num_hidden, num_masks):
    """Each patch is visible in as many masks as any other, or one fewer; the first mask is that of a single one."""
    scores = random_scores(torch.arange(5), num_patches)
    masks = mask_from_scores(scores, num_hidden, num_masks).unflatten(0, (5, num_masks))
    assert (masks.sum(2) == num_hidden).all()
    times_visible = masks.logical_not().sum(1)  # (B, N)
    assert (times_visible.amax(1) - times_visible.amin(1) <= 1).all()
    assert torch.equal(masks[:, 0], mask_from_scores(scores, num_hidden))


@pytest.mark.parametrize("softness", [-0.1, 1.1, float("nan")])
def test_softness_outside_its_range(softness):
    with pytest.raises(ValueError, match=rf"softness={softness} is not in \[0, 1\]"):
        mask_scores(random_trees(1, 4), 2, torch.tensor([0]), softness)


@pytest.mark.parametrize(
    ("curve", "counts"),
    [
        ("linear", [64, 50, 36, 22, 8]),  # 64 - 56 * progress
        ("log", [64, 38, 23, 13, 8]),  # 64 / 8 ** progress = 64, 38.05, 22.6, 13.5, 8
        ("cosine", [64, 56, 36, 16, 8]),  # 36 + 28 * cos(pi * progress) = 64, 55.8, 36, 16.2, 8
    ],
)
def test_node_counts_by_hand(curve, counts):
    assert [num_nodes_at(progress, 64, 8, curve) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)] == counts


@pytest.mark.parametrize("curve", ["linear", "log", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(196, 24), (16, 1), (5, 5), (2, 1)])
def test_node_counts_never_rise(curve, start, end):
    counts = [num_nodes_at(step / 1000, start, end, curve) for step in range(1001)]
    assert (counts[0], counts[-1]) == (start, end)
    assert all(later <= earlier for earlier, later in itertools.pairwise(counts))


def test_default_curve_is_epms():
    assert [num_nodes_at(progress, 40, 10) for progress in (0, 0.5, 1)] == [40, 25, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.01, 8, 2), r"progress=-0.01 is not in \[0, 1\]; pass step / max_steps, not an epoch"),
        ((3, 8, 2), r"progress=3 is not in \[0, 1\]"),
        ((float("nan"), 8, 2), r"progress=nan is not in \[0, 1\]"),
        ((0.5, 8, 9), r"num_nodes_end=9 must lie in \[1, num_nodes_start=8\]"),
        ((0.5, 8, 0), r"num_nodes_end=0 must lie in \[1, num_nodes_start=8\]"),
        ((0.5, 8, 2, "sqrt"), "num_nodes_curve='sqrt' is not one of linear, log, cosine"),
    ],
)
def test_refused_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        num_nodes_at(*arguments)


def test_evolution_rests_and_still_ends_with_training():
    progress = (0, 0.25, 0.5, 0.75, 1)
    assert [evolution_at(p, 0) for p in progress] == list(progress)
    assert [evolution_at(p, 0.5) for p in progress] == [0, 0, 0, 0.5, 1]
    assert evolution_at(1, 0.1) == 1
    with pytest.raises(ValueError, match=r"progress=-0.1 is not in \[0, 1\]"):
        evolution_at(-0.1, 0.5)


def test_softness_is_linear_in_progress():
    assert [softness_at(progress, 0.2, 0.6) for progress in (0, 0.5, 1)] == pytest.approx([0.2, 0.4, 0.6])
    with pytest.raises(ValueError, match=r"progress=2 is not in \[0, 1\]"):
        softness_at(2, 0.0, 1.0)


SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_scores_drive_vit_mae(ratio):
    """The documented example: ViTMAE masks by our scores exactly what `mask_from_scores` masks."""
    model = ViTMAEForPreTraining(
        ViTMAEConfig(**SIZES, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=4)
    )
    model.config.mask_ratio = ratio
    scores = mask_scores(random_trees(6, 16), 3, torch.arange(6))
    with torch.no_grad():
        outputs = model(torch.rand(6, 3, 32, 32), noise=scores)
    assert torch.equal(outputs.mask.bool(), mask_from_scores(scores, round(16 * ratio)))


def test_masks_drive_vit_for_masked_image_modeling():
    """The documented example: what is True is hidden from the model, and is what the loss counts."""
    model = ViTForMaskedImageModeling(ViTConfig(**SIZES, encoder_stride=8)).eval()
    mask = hierarchical_mask(random_trees(2, 16), 3, torch.arange(2))
    images = torch.rand(2, 3, 32, 32)
    hidden = mask.reshape(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)  # (B, 1, H, W)
    with torch.no_grad():
        outputs = model(images, bool_masked_pos=mask)
        scrambled = model(torch.where(hidden, torch.rand(images.shape), images), bool_masked_pos=mask)
        other = model(torch.where(hidden, images, torch.rand(images.shape)), bool_masked_pos=mask)
    assert torch.equal(outputs.reconstruction, scrambled.reconstruction)
    assert not torch.allclose(outputs.reconstruction, other.reconstruction)
    expected = (outputs.reconstruction - images).abs()[hidden.expand_as(images)].mean()
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)
