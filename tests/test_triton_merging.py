"""The kernel for GPUs merges as the rounds in torch do, to the last bit. Without a GPU Triton interprets it."""

import pytest
import torch
from test_hierarchy_ehm import GRIDS, LINKAGES, attention_like_affinity, random_affinity

from modeling_ehm import build_hierarchy, hierarchical_mask
from modeling_ehm.hierarchy_ehm import MERGING, NonFiniteAffinityError, merge_in_rounds

pytest.importorskip("triton")
from modeling_ehm import triton_merging
from modeling_ehm.triton_merging import merge_on_gpu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", LINKAGES)
def test_the_kernel_merges_as_the_rounds_do(method, dtype, monkeypatch):
    """Ties, negative affinities and rounding included; masks must not depend on the device."""
    if not ON_GPU:
        monkeypatch.setattr(triton_merging, "FEW_PATCHES", (4, 128))  # several tiles of small matrices
    for grid in GRIDS if ON_GPU else [(3, 6)]:
        uneven, smooth = random_affinity(2, grid[0] * grid[1], 2, dtype), attention_like_affinity(2, grid, 3, dtype)
        for affinity in (uneven, -3 * smooth, (smooth * 40).round()):
            assert_merged_alike(affinity, method)


def assert_merged_alike(affinity: torch.Tensor, method: str) -> None:
    expected = merge_in_rounds(affinity.clone(), method)
    for values, others in zip(expected, merge_on_gpu(affinity.to(DEVICE), method), strict=True):
        assert torch.equal(values, others.cpu())


@pytest.mark.parametrize("count", [1, 2])
def test_few_patches(count):
    assert_merged_alike(random_affinity(2, count, 0), "average")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20, 0.5])
def test_the_kernel_refuses_what_cannot_be_merged(value):
    """Not finite, too large, and unlike the value on the other side; the diagonal is not read."""
    affinity = random_affinity(3, 9, 1)
    affinity[:, range(9), range(9)] = float("nan")
    before = affinity.clone()
    assert merge_on_gpu(affinity.to(DEVICE), "average") is not None
    assert torch.equal(affinity.nan_to_num(), before.nan_to_num())
    affinity[1, 2, 4] = value
    assert merge_on_gpu(affinity.to(DEVICE), "average") is None


def test_trees_and_errors_come_by_way_of_the_kernel(monkeypatch):
    calls = []
    kind = torch.device(DEVICE).type
    monkeypatch.setitem(MERGING, kind, lambda *arguments: calls.append(1) or merge_on_gpu(*arguments))
    affinity = random_affinity(2, 9, 1)
    affinity[0, 2, 4] += 1e-12  # another last bit on the other side: made symmetric
    hierarchy = build_hierarchy(affinity.to(DEVICE))
    assert len(calls) == 2
    monkeypatch.delitem(MERGING, kind)
    expected = build_hierarchy(affinity.to(DEVICE))
    seeds = torch.arange(2, device=DEVICE)
    assert torch.equal(hierarchical_mask(hierarchy, 4, seeds), hierarchical_mask(expected, 4, seeds))
    monkeypatch.setitem(MERGING, kind, merge_on_gpu)
    affinity[1, 2, 4] = float("nan")
    with pytest.raises(NonFiniteAffinityError, match="NaN"):
        build_hierarchy(affinity.to(DEVICE))
