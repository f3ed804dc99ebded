"""Pre-train vision backbones with Evolved Hierarchical Masking (EHM) inside the Hugging Face ecosystem.

Importing this package registers `model_type = "ehm"` with AutoConfig, AutoModel, AutoModelForPreTraining,
AutoModelForImageClassification, AutoModelForSemanticSegmentation and AutoBackbone, so that a saved directory loads
without remote code. Its image processor is transformers' own ViTImageProcessor.
"""

import os
import shutil
import warnings
from importlib.util import find_spec

import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
)

from .configuration_ehm import EHMConfig
from .hierarchy_ehm import MERGING, PatchHierarchy, build_hierarchy
from .masking_ehm import hierarchical_mask, mask_scores, num_nodes_at
from .modeling_ehm import (
    EHMBackbone,
    EHMForImageClassification,
    EHMForPreTraining,
    EHMForPreTrainingOutput,
    EHMForSemanticSegmentation,
    EHMModel,
    EHMPreTrainedModel,
)
from .parsing import parse_hierarchy
from .version import __version__

AutoConfig.register("ehm", EHMConfig, exist_ok=True)
AutoModel.register(EHMConfig, EHMModel, exist_ok=True)
AutoModelForPreTraining.register(EHMConfig, EHMForPreTraining, exist_ok=True)
AutoModelForImageClassification.register(EHMConfig, EHMForImageClassification, exist_ok=True)
AutoModelForSemanticSegmentation.register(EHMConfig, EHMForSemanticSegmentation, exist_ok=True)
AutoBackbone.register(EHMConfig, EHMBackbone, exist_ok=True)


def _merge_compiled(affinity, linkage):
    from .compiled_merging import merge_compiled  # here, so that who builds no tree need not wait for numba

    return merge_compiled(affinity, linkage)


def _merge_on_gpu(affinity, linkage):
    try:
        from .triton_merging import merge_on_gpu

        return merge_on_gpu(affinity, linkage)
    except Exception as error:  # Triton builds kernels at their first use, which may lack headers, a folder, a version
        warnings.warn(
            f"trees are merged by slower rounds of torch, with the same result, since Triton's kernel fails: {error!r}",
            stacklevel=2,
        )
        MERGING.pop("cuda", None)
        hierarchy = build_hierarchy(affinity, linkage)
        return hierarchy.parent, hierarchy.height, hierarchy.rank


def _can_build_kernels():
    """On NVIDIA's GPUs, by Triton, which has a C compiler build what starts a kernel; on AMD's nothing was tried."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return torch.version.hip is None and find_spec("triton") is not None and any(map(shutil.which, compilers))


if find_spec("numba") is not None:
    MERGING["cpu"] = _merge_compiled
if _can_build_kernels():
    MERGING["cuda"] = _merge_on_gpu

__all__ = [
    "EHMBackbone",
    "EHMConfig",
    "EHMForImageClassification",
    "EHMForPreTraining",
    "EHMForPreTrainingOutput",
    "EHMForSemanticSegmentation",
    "EHMModel",
    "EHMPreTrainedModel",
    "PatchHierarchy",
    "__version__",
    "build_hierarchy",
    "hierarchical_mask",
    "mask_scores",
    "num_nodes_at",
    "parse_hierarchy",
]
