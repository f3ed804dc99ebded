"""Which of the faster ways to merge clusters this machine can use; all find the trees of `merge_in_rounds`."""

import os
import shutil
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from .hierarchy_ehm import MERGING, build_hierarchy

Merged = tuple[Tensor, Tensor, Tensor]


def available_merging() -> dict[str, Callable[[Tensor, str], Merged | None]]:
    """By type of device, for `MERGING`. Libraries are imported by the first tree: who builds none need not wait."""
    found = {}
    if find_spec("numba") is not None:
        found["cpu"] = merge_on_cpu
    if find_spec("triton") is not None and can_build_kernels():
        found["cuda"] = merge_on_gpu_or_in_rounds
    return found


def can_build_kernels() -> bool:
    """On NVIDIA's GPUs, by Triton, which has a C compiler build what starts a kernel; on AMD's nothing was tried."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return torch.version.hip is None and any(map(shutil.which, compilers))


def merge_on_cpu(affinity: Tensor, linkage: str) -> Merged | None:
    from .compiled_merging import merge_compiled

    return merge_compiled(affinity, linkage)


def merge_on_gpu_or_in_rounds(affinity: Tensor, linkage: str) -> Merged | None:
    """By Triton's kernel. Where that fails the rounds take over, with a warning, from then on at once."""
    try:
        from .triton_merging import merge_on_gpu

        return merge_on_gpu(affinity, linkage)
    except torch.OutOfMemoryError:  # rounds need more
        raise
    except Exception as error:  # a kernel is built at its first use, which may lack headers, a folder, a version
        warnings.warn(
            f"trees are merged by slower rounds of torch, with the same result, since Triton's kernel fails: {error!r}",
            stacklevel=2,
        )
        MERGING.pop("cuda", None)
        hierarchy = build_hierarchy(affinity, linkage)
        return hierarchy.parent, hierarchy.height, hierarchy.rank


__all__ = ["available_merging"]
