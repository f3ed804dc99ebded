"""Machine code merges as the rounds in torch do, to the last bit."""

import pytest
import torch
from test_hierarchy_ehm import GRIDS, LINKAGES, attention_like_affinity, random_affinity

from modeling_ehm import build_hierarchy
from modeling_ehm.compiled_merging import padded
from modeling_ehm.hierarchy_ehm import MERGING, merge_in_rounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", LINKAGES)
@pytest.mark.parametrize("scale", [1, -3, 8])
def test_compiled_merging_is_the_other_one_to_the_last_bit(scale, method, dtype):
    """Ties, negative affinities and rounding included; masks must not depend on what happens to be installed."""
    for grid in [*GRIDS, (5, 7)]:
        uneven, smooth = random_affinity(5, grid[0] * grid[1], 2, dtype), attention_like_affinity(5, grid, 3, dtype)
        for affinity in (uneven * scale, smooth * scale, (smooth * 40 * scale).round()):
            expected = merge_in_rounds(affinity.clone(), method)
            for values, others in zip(expected, MERGING["cpu"](affinity, method), strict=True):
                assert torch.equal(values, others)


def test_rows_as_long_as_memory_pages():
    """Of 1024 patches, which are laid out in longer rows."""
    assert [padded(n, 4) for n in (1, 32, 33, 1024)] == [32, 32, 64, 1056] and padded(512, 8) == 544
    affinity = attention_like_affinity(1, (32, 32), 3)
    for values, others in zip(
        merge_in_rounds(affinity.clone(), "average"), MERGING["cpu"](affinity, "average"), strict=True
    ):
        assert torch.equal(values, others)


def test_compiled_merging_in_several_threads(monkeypatch):
    affinity = random_affinity(7, 16, 4)
    alone = build_hierarchy(affinity)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    shared = build_hierarchy(affinity)
    for name in ("parent", "height", "rank"):
        assert torch.equal(getattr(alone, name), getattr(shared, name))
