"""Pre-train vision backbones with Evolved Hierarchical Masking (EHM) inside the Hugging Face ecosystem.

Importing this package registers `model_type = "ehm"` with AutoConfig, AutoModel and AutoModelForPreTraining, so that
a saved directory loads without remote code. Its image processor is transformers' own ViTImageProcessor.
"""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from .configuration_ehm import EHMConfig
from .hierarchy_ehm import PatchHierarchy, build_hierarchy
from .masking_ehm import hierarchical_mask, mask_scores, num_nodes_at
from .modeling_ehm import EHMForPreTraining, EHMForPreTrainingOutput, EHMModel, EHMPreTrainedModel
from .parsing import parse_hierarchy
from .version import __version__

AutoConfig.register("ehm", EHMConfig, exist_ok=True)
AutoModel.register(EHMConfig, EHMModel, exist_ok=True)
AutoModelForPreTraining.register(EHMConfig, EHMForPreTraining, exist_ok=True)

__all__ = [
    "EHMConfig",
    "EHMForPreTraining",
    "EHMForPreTrainingOutput",
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
