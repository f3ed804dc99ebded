"""The kernel for GPUs merges as the rounds in torch do, to the last bit. Without a GPU Triton interprets it."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from test_hierarchy_ehm import GRIDS, LINKAGES, attention_like_affinity, random_affinity
from tiny_recipes import child_environment

from modeling_ehm import build_hierarchy, hierarchical_mask
from modeling_ehm.fast_merging import available_merging, merge_on_gpu_or_in_rounds
from modeling_ehm.hierarchy_ehm import MERGING, NonFiniteAffinityError, merge_in_rounds

pytest.importorskip("triton")
from modeling_ehm import triton_merging
from modeling_ehm.triton_merging import merge_on_gpu

ON_GPU = torch.cuda.is_available()
if not ON_GPU and "TRITON_INTERPRET" not in os.environ:
    pytest.skip("torch does not use the GPU that is here", allow_module_level=True)
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", LINKAGES)
def test_the_kernel_merges_as_the_rounds_do(method, dtype, monkeypatch):
    """Ties, negative affinities and rounding included; masks must not depend on the device."""
    if not ON_GPU:  # several tiles of small matrices, with either pair of sizes
        monkeypatch.setattr(triton_merging, "FEW_PATCHES", (4, 64))
        monkeypatch.setattr(triton_merging, "MANY_PATCHES", (4, 128))
        monkeypatch.setattr(triton_merging, "MOST_OF_FEW", 16)
    for grid in [*GRIDS, (18, 18), (24, 24), (32, 32)] if ON_GPU else [(3, 4), (3, 6)]:
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e20])
def test_the_kernel_refuses_what_cannot_be_merged(value):
    """On both sides of the diagonal, which itself is not read."""
    affinity = random_affinity(3, 9, 1).to(DEVICE)
    affinity[:, range(9), range(9)] = float("nan")
    before = affinity.clone()
    assert merge_on_gpu(affinity, "average") is not None
    assert torch.equal(affinity.nan_to_num(), before.nan_to_num())
    affinity[1, 2, 4] = affinity[1, 4, 2] = value
    assert merge_on_gpu(affinity, "average") is None


def test_the_kernel_refuses_what_is_not_symmetric():
    affinity = random_affinity(3, 9, 1).to(DEVICE)
    affinity[1, 2, 4] += 1e-12
    assert merge_on_gpu(affinity, "average") is None


AHEAD_OF_TIME = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from modeling_ehm.triton_merging import UNFUSED, _merge

for dtype in ("fp32", "fp64"):
    kinds = dict.fromkeys(_merge.arg_names, f"*{dtype}")
    kinds |= {"cluster_indices": "*i32", "parent": "*i64", "merged_in": "*i64", "outcome": "*i32", "count": "i32"}
    constants = {"LINKAGE": 0, "COLUMNS": 32, "ROWS": 8, "IN_DOUBLE": dtype == "fp64"}
    source = ASTSource(_merge, kinds | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    assembly = compile(source, target=GPUTarget("cuda", 90, 32), options=UNFUSED).asm["ptx"]
    assert "fma." not in assembly and "bar.sync" in assembly
"""


def test_the_kernel_compiles_ahead_of_time(tmp_path):
    """For an H100, where there is none: the interpreter takes what the compiler refuses."""
    environment = child_environment(tmp_path) | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", AHEAD_OF_TIME], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_where_the_kernel_cannot_be_built_rounds_merge(monkeypatch):
    """With a warning that tells why, and from then on at once; the same trees."""

    def fail(*arguments):
        raise RuntimeError("Failed to find C compiler")

    affinity = random_affinity(2, 9, 1).to(DEVICE)
    monkeypatch.setitem(MERGING, "cuda", merge_on_gpu_or_in_rounds)
    monkeypatch.setattr(triton_merging, "merge_on_gpu", fail)
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        merged = merge_on_gpu_or_in_rounds(affinity, "average")
    assert "cuda" not in MERGING
    for values, others in zip(merged, merge_in_rounds(affinity.clone(), "average"), strict=True):
        assert torch.equal(values, others)


def test_what_does_not_fit_into_memory_is_no_reason_for_rounds(monkeypatch):
    """Who asked for smaller batches until they fit has to be told."""

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(MERGING, "cuda", merge_on_gpu_or_in_rounds)
    monkeypatch.setattr(triton_merging, "merge_on_gpu", fail)
    with pytest.raises(torch.OutOfMemoryError):
        merge_on_gpu_or_in_rounds(random_affinity(2, 9, 1).to(DEVICE), "average")
    assert "cuda" in MERGING


def test_without_a_compiler_there_is_no_kernel(monkeypatch):
    """As Triton looks for one: by CC alone if that is set."""
    monkeypatch.setattr(shutil, "which", {"clang": "/usr/bin/clang"}.get)
    monkeypatch.delenv("CC", raising=False)
    assert "cuda" in available_merging()
    monkeypatch.setenv("CC", "icc")
    assert "cuda" not in available_merging()


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
