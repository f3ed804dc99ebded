"""The trees are scipy's, tie or no tie, whatever else is in the batch."""

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import cophenet, fcluster, is_valid_linkage, linkage
from scipy.spatial.distance import squareform

from modeling_ehm import PatchHierarchy, build_hierarchy
from modeling_ehm.hierarchy_ehm import MERGING, symmetrize

LINKAGES = ("average", "single", "complete")
GRIDS = [(4, 4), (7, 7), (8, 8), (14, 14), (5, 12)]


@pytest.fixture(autouse=True, params=["in rounds", "compiled"])
def merging(request, monkeypatch):
    """Everything holds for the merging that goes to the Hub, and for the one of this package."""
    if request.param == "in rounds":
        monkeypatch.delitem(MERGING, "cpu")


def random_affinity(batch: int, count: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    """`(B, N, N)` uniform in [0, 1)."""
    values = torch.rand(batch, count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return symmetrize(values.to(dtype))


def attention_like_affinity(batch: int, grid: tuple[int, int], seed: int, dtype=torch.float64) -> torch.Tensor:
    """`(B, N, N)` softmax of near places and smooth random features: what a young encoder's attention looks like."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = grid
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()  # (N, 2)
    waves = torch.randn(batch, 2, 6, generator=generator, dtype=torch.float64) / 2
    features = (place @ waves).sin()  # (B, N, 6)
    logits = features @ features.transpose(1, 2) - torch.cdist(place, place) / 2
    logits = logits + 0.01 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    return symmetrize(logits.softmax(-1).to(dtype))


def canonical(labels) -> list[int]:
    """Number the clusters in the order of their smallest members, as `cut` does."""
    seen = {}
    return [seen.setdefault(label, len(seen)) for label in np.asarray(labels).tolist()]


def scipy_tree(affinity: torch.Tensor, method: str) -> np.ndarray:
    distance = (1 - affinity.double()).numpy().copy()
    np.fill_diagonal(distance, 0)
    return linkage(squareform(distance, checks=False), method)


def assert_same_trees(affinity: torch.Tensor, method: str) -> None:
    """Every cut into 1 ... N nodes is scipy's."""
    hierarchy = build_hierarchy(affinity, method)
    count = affinity.shape[1]
    cuts = [hierarchy.cut(k) for k in range(1, count + 1)]
    for image in range(len(affinity)):
        tree = scipy_tree(affinity[image], method)
        for k, cut in enumerate(cuts, start=1):
            assert cut[image].tolist() == canonical(fcluster(tree, k, "maxclust")), (image, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", LINKAGES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_cut_equals_scipys(grid, method, dtype):
    count = grid[0] * grid[1]
    affinity = [random_affinity(2, count, 1, dtype), attention_like_affinity(2, grid, 2, dtype)]
    assert_same_trees(torch.cat(affinity), method)


def test_reference_distinguishes_the_linkages():
    """The comparison above would be worth little if the three linkages agreed."""
    affinity = attention_like_affinity(1, (7, 7), 2)
    cuts = {tuple(build_hierarchy(affinity, method).cut(10)[0].tolist()) for method in LINKAGES}
    assert len(cuts) == 3


def test_a_tree_by_hand():
    affinity = torch.tensor([[0.0, 0.1, 0.9, 0.3], [0.1, 0, 0.2, 0.7], [0.9, 0.2, 0, 0.5], [0.3, 0.7, 0.5, 0]])[None]
    # {0, 2} at 0.9, {1, 3} at 0.7, then both at the mean of 0.1, 0.3, 0.2, 0.5.
    hierarchy = build_hierarchy(affinity, grid_size=(2, 2))
    assert hierarchy.parent.tolist() == [[0, 0, 0, 1]]
    assert hierarchy.rank.tolist() == [[3, 2, 0, 1]]
    assert hierarchy.height[0, 0] == float("inf")
    torch.testing.assert_close(hierarchy.height[0, 1:], torch.tensor([0.275, 0.9, 0.7]))
    cuts = [hierarchy.cut(k)[0].tolist() for k in (1, 2, 3, 4)]
    assert cuts == [[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 0, 2], [0, 1, 2, 3]]
    assert (hierarchy.num_patches, len(hierarchy), hierarchy.grid_size) == (4, 1, (2, 2))
    assert build_hierarchy(affinity, "single").height[0, 1] == 0.5
    assert build_hierarchy(affinity, "complete").height[0, 1] == pytest.approx(0.1)


@pytest.mark.parametrize("method", LINKAGES)
def test_linkage_matrix_is_scipys(method):
    affinity = torch.cat([random_affinity(1, 60, 3), attention_like_affinity(1, (5, 12), 4)])
    hierarchy = build_hierarchy(affinity, method)
    for image in range(2):
        ours, theirs = hierarchy.to_linkage(image).numpy(), scipy_tree(affinity[image], method)
        assert is_valid_linkage(ours, throw=True)
        np.testing.assert_allclose(cophenet(ours), cophenet(theirs), atol=1e-12)
        np.testing.assert_allclose(ours[:, 2:], theirs[:, 2:], atol=1e-12)  # distances and sizes
        for k in (1, 2, 7, 30, 60):
            assert canonical(fcluster(ours, k, "maxclust")) == hierarchy.cut(k)[image].tolist()


def test_linkage_matrix_of_affinities_above_one():
    hierarchy = build_hierarchy(10 * random_affinity(1, 16, 5))
    matrix = hierarchy.to_linkage(0).numpy()
    assert is_valid_linkage(matrix, throw=True)
    assert matrix[0, 2] == 0 and (np.diff(matrix[:, 2]) >= 0).all()


def tied_affinities() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    integers = torch.randint(0, 4, (1, 49, 49), generator=generator).float()
    blocks = (torch.arange(49)[:, None] // 7 == torch.arange(49) // 7).float()[None]
    return {
        "constant": torch.full((1, 49, 49), 0.1),  # not exact in binary: means of equal numbers may round
        "zero": torch.zeros(1, 49, 49),
        "negative": -torch.ones(1, 49, 49),
        "integers": torch.maximum(integers, integers.transpose(1, 2)),
        "blocks": blocks,
        "two values": torch.maximum(integers, integers.transpose(1, 2)).clamp(max=1),
    }


@pytest.mark.parametrize("method", LINKAGES)
@pytest.mark.parametrize("name", tied_affinities())
def test_ties(name, method):
    affinity = tied_affinities()[name]
    hierarchy = build_hierarchy(affinity, method)
    again = build_hierarchy(affinity.clone(), method)
    # Among others: one random image, so that more rounds are run, and the same tied one twice.
    batch = torch.cat([random_affinity(1, 49, 7, torch.float32), affinity, affinity])
    in_batch = build_hierarchy(batch, method)
    for field in ("parent", "height", "rank"):
        value = getattr(hierarchy, field)
        assert torch.equal(getattr(again, field), value)
        assert torch.equal(getattr(in_batch, field)[1:2], value)
        assert torch.equal(getattr(in_batch, field)[2:], value)
    assert_is_a_tree(hierarchy)


def test_blocks_are_found_despite_ties():
    hierarchy = build_hierarchy(tied_affinities()["blocks"])
    assert hierarchy.cut(7)[0].tolist() == [n // 7 for n in range(49)]


def test_constant_affinity_is_merged_from_the_smallest_indices():
    assert build_hierarchy(torch.ones(1, 4, 4)).to_linkage(0)[0, :2].tolist() == [0, 1]


def assert_is_a_tree(hierarchy: PatchHierarchy) -> None:
    """What must hold of any tree: order, nesting, exact node counts."""
    batch, count = hierarchy.parent.shape
    assert (hierarchy.parent[:, 1:] < torch.arange(1, count)).all() and not hierarchy.parent[:, 0].any()
    assert torch.equal(hierarchy.rank.sort(1).values, torch.arange(count).expand(batch, -1))
    assert (hierarchy.rank[:, 0] == count - 1).all()
    heights = hierarchy.height.gather(1, hierarchy.rank.argsort(1))[:, :-1]  # in the order of merging
    assert (heights.diff(dim=1) <= 0).all(), "heights must never rise with rank"
    for image in range(batch):  # parts are merged before their whole, or clusters of scipy's form would be lost
        matrix = hierarchy.to_linkage(image).numpy()
        assert is_valid_linkage(matrix, throw=True) and matrix[-1, 3] == count
    coarse = hierarchy.cut(1)
    assert not coarse.any()
    for k in range(2, count + 1):
        fine = hierarchy.cut(k)
        assert (fine.max(1).values == k - 1).all()
        for image in range(batch):
            pairs = torch.stack([fine[image], coarse[image]], 1).unique(dim=0)
            assert len(pairs) == k, "each node of the finer cut lies in one node of the coarser"
            assert fine[image].tolist() == canonical(fine[image])
        coarse = fine
    assert torch.equal(coarse, torch.arange(count).expand(batch, -1))


@pytest.mark.parametrize("method", LINKAGES)
def test_cuts_are_nested_and_heights_fall(method):
    affinity = torch.cat([random_affinity(2, 49, 8), attention_like_affinity(2, (7, 7), 9)])
    assert_is_a_tree(build_hierarchy(affinity.float(), method))


@pytest.mark.parametrize("method", LINKAGES)
def test_heights_fall_in_the_face_of_rounding(method):
    """Means of nearly equal float32 numbers round above their parts."""
    generator = torch.Generator().manual_seed(10)
    affinity = symmetrize(1 + 1e-6 * torch.rand(4, 36, 36, generator=generator))
    assert_is_a_tree(build_hierarchy(affinity, method))


@pytest.mark.parametrize("method", LINKAGES)
def test_an_image_does_not_depend_on_its_batch(method):
    affinity = torch.cat(
        [
            attention_like_affinity(3, (7, 7), 11, torch.float32),
            random_affinity(3, 49, 12, torch.float32),
            swallowing_affinity(49)[None].float(),
            torch.ones(1, 49, 49),
        ]
    )
    together = build_hierarchy(affinity, method)
    order = torch.tensor([5, 0, 7, 3, 1, 6, 2, 4])
    shuffled = build_hierarchy(affinity[order], method)
    for field in ("parent", "height", "rank"):
        alone = torch.cat([getattr(build_hierarchy(image[None], method), field) for image in affinity])
        assert torch.equal(getattr(together, field), alone)
        assert torch.equal(getattr(shuffled, field), alone[order])


def swallowing_affinity(count: int) -> torch.Tensor:
    """Patch n is as alike to every earlier patch as `1 - n / N`: cluster {0, ..., n - 1} swallows leaf after leaf."""
    place = torch.arange(count, dtype=torch.float64)
    return 1 - torch.maximum(place[:, None], place) / count


@pytest.mark.parametrize("method", LINKAGES)
def test_one_cluster_swallows_leaf_after_leaf(method):
    hierarchy = build_hierarchy(swallowing_affinity(64)[None], method)
    assert not hierarchy.parent.any()  # all into the cluster of patch 0
    assert hierarchy.rank[0].tolist() == [63, *range(63)]
    torch.testing.assert_close(hierarchy.height[0, 1:], 1 - torch.arange(1, 64, dtype=torch.float64) / 64)
    assert hierarchy.cut(3)[0].tolist() == [0] * 62 + [1, 2]


def test_a_long_chain_of_pointers():
    """63 -> 62 -> ... -> 2 -> 0, absorbed from the far end, and 1 -> 0 last: a cut must follow 62 pointers."""
    parent = torch.tensor([[0, 0, 0, *range(2, 63)]])
    rank = torch.tensor([[63, *range(62, -1, -1)]])
    hierarchy = PatchHierarchy(parent, -rank.float(), rank)
    assert not hierarchy.cut(1).any()
    assert hierarchy.cut(2)[0].tolist() == [0, 1] + [0] * 62
    assert hierarchy.cut(3)[0].tolist() == [0, 1] + [2] * 62
    assert hierarchy.cut(64)[0].tolist() == list(range(64))


def test_a_node_count_for_each_image():
    hierarchy = build_hierarchy(random_affinity(4, 16, 13))
    counts = [1, 16, 5, 2]
    cut = hierarchy.cut(torch.tensor(counts))
    for image, count in enumerate(counts):
        assert torch.equal(cut[image], hierarchy.cut(count)[image])


def test_one_and_two_patches():
    one = build_hierarchy(torch.zeros(2, 1, 1))
    assert (one.parent.tolist(), one.rank.tolist()) == ([[0], [0]], [[0], [0]])
    assert one.cut(1).tolist() == [[0], [0]]
    assert one.to_linkage(0).shape == (0, 4)
    two = build_hierarchy(torch.tensor([[[9.0, 0.25], [0.25, 9.0]]]))
    assert two.cut(1).tolist() == [[0, 0]] and two.cut(2).tolist() == [[0, 1]]
    assert two.to_linkage(0).tolist() == [[0, 1, 0.75, 2]]


def test_diagonal_is_not_read():
    affinity = random_affinity(1, 16, 14)
    filled = affinity.clone()
    filled[0].fill_diagonal_(float("nan"))
    assert torch.equal(build_hierarchy(filled).height, build_hierarchy(affinity).height)


def test_half_precision_is_computed_in_float32():
    affinity = random_affinity(1, 16, 15).to(torch.bfloat16)
    hierarchy = build_hierarchy(affinity)
    assert hierarchy.height.dtype == torch.float32
    assert torch.equal(hierarchy.height, build_hierarchy(affinity.float()).height)


def test_input_is_left_alone_and_needs_no_gradient():
    affinity = random_affinity(1, 16, 16).requires_grad_()
    before = affinity.detach().clone()
    assert not build_hierarchy(affinity).height.requires_grad
    assert torch.equal(affinity.detach(), before)


def test_last_bits_may_be_asymmetric():
    """Two orders of one sum differ in the last bits; the tree is that of the symmetric matrix."""
    affinity = random_affinity(1, 16, 17, torch.float32)
    wobbly = affinity * (1 + 2e-7 * torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(wobbly, wobbly.transpose(1, 2))
    assert torch.equal(build_hierarchy(wobbly).parent, build_hierarchy(affinity).parent)


def one_bad(value: float) -> torch.Tensor:
    affinity = random_affinity(2, 4, 18)
    affinity[1, 2, 3] = affinity[1, 3, 2] = value
    return affinity


@pytest.mark.parametrize(
    ("affinity", "arguments", "message"),
    [
        (one_bad(float("nan")), {}, "affinity holds NaN or infinite values"),
        (one_bad(float("inf")), {}, "affinity holds NaN or infinite values"),
        (one_bad(float("-inf")), {}, "affinity holds NaN or infinite values"),
        (one_bad(1e38), {}, r"affinity holds values of 1e\+15 or beyond"),
        (one_bad(-1e15), {}, r"affinity holds values of 1e\+15 or beyond"),
        (torch.rand(1, 4, 4), {}, r"affinity is not symmetric; pass symmetrize\(affinity\)"),
        (torch.zeros(4, 4), {}, r"affinity has shape \(4, 4\); \(images, patches, patches\) is expected"),
        (torch.zeros(1, 4, 5), {}, r"affinity has shape \(1, 4, 5\)"),
        (torch.zeros(0, 4, 4), {}, r"affinity has shape \(0, 4, 4\)"),
        (torch.zeros(1, 0, 0), {}, r"affinity has shape \(1, 0, 0\)"),
        (torch.zeros(1, 4, 4, dtype=torch.long), {}, "affinity has dtype torch.int64; a floating point type"),
        (torch.zeros(1, 4, 4), {"linkage": "ward"}, "linkage='ward' is not one of average, single, complete"),
        (torch.zeros(1, 4, 4), {"grid_size": (2, 3)}, r"grid_size=\(2, 3\) does not hold 4 patches"),
    ],
)
def test_refused_affinities(affinity, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_hierarchy(affinity, **arguments)


@pytest.mark.parametrize(
    ("num_nodes", "message"),
    [
        (0, r"num_nodes=0 is not in \[1, 4\], the number of patches"),
        (5, r"num_nodes=5 is not in \[1, 4\]"),
        (torch.tensor([1, 5]), r"num_nodes=5 is not in \[1, 4\]"),
        (torch.tensor([0, 4]), r"num_nodes=0 is not in \[1, 4\]"),
        (torch.tensor([2]), r"num_nodes has shape \(1,\); give one int or a tensor \(2,\)"),
        (torch.tensor(2), r"num_nodes has shape \(\)"),
    ],
)
def test_refused_node_counts(num_nodes, message):
    hierarchy = build_hierarchy(random_affinity(2, 4, 19))
    with pytest.raises(ValueError, match=message):
        hierarchy.cut(num_nodes)
