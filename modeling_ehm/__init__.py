"""Pre-train vision backbones with Evolved Hierarchical Masking (EHM) inside the Hugging Face ecosystem.

Importing this package registers `model_type = "ehm"` with AutoConfig, AutoModel, AutoModelForPreTraining,
AutoModelForImageClassification, AutoModelForSemanticSegmentation and AutoBackbone, so that a saved directory loads
without remote code. Its image processor is transformers' own ViTImageProcessor.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
)

from .configuration_ehm import EHMConfig
from .fast_merging import available_merging
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

MERGING.update(available_merging())

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
