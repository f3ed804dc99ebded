"""Pre-train vision backbones with Evolved Hierarchical Masking (EHM) inside the Hugging Face ecosystem.

Importing this package registers `model_type = "ehm"` with AutoConfig, AutoModel, AutoModelForPreTraining,
AutoModelForImageClassification, AutoModelForSemanticSegmentation and AutoBackbone, so that a saved directory loads
without remote code. Its image processor is transformers' own ViTImageProcessor.
"""

import os
import shutil
from importlib.util import find_spec

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
    from .triton_merging import merge_on_gpu

    return merge_on_gpu(affinity, linkage)


if find_spec("numba") is not None:
    MERGING["cpu"] = _merge_compiled
if find_spec("triton") is not None and any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
    MERGING["cuda"] = _merge_on_gpu  # Triton has a C compiler build what starts a kernel

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
