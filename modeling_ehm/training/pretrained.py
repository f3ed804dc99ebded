"""Weights a run starts from: drawn at random, or of an EHM or ViTMAE checkpoint, each of which must find its place.

All are float32, whatever the checkpoint holds: optimisers take steps too small for less. `training.bf16` says in which
precision a run computes.
"""

import logging

import torch
from transformers import AutoConfig, PreTrainedModel

from modeling_ehm.configuration_ehm import EHMConfig
from modeling_ehm.conversion import check_keys, from_vit_mae, quiet_loading
from modeling_ehm.modeling_ehm import EHMForPreTraining, EHMModel, sincos_positions
from modeling_ehm.training.recipes import RecipeError

logger = logging.getLogger(__name__)

HEADS = ("classifier", "norm")  # first parts of the names of weights of our classification and segmentation heads
DECODER = "decoder"  # that of our pre-training decoder or linear head
# Tables, made anew, without interpolation, for another grid of patches.
POSITIONS = ("embeddings.position_embeddings", "decoder.decoder_pos_embed")


def load_encoder(pretrained: str | None, attn_implementation: str, **config_overrides) -> EHMModel:
    """The encoder of a checkpoint, or one with random weights.

    Args:
        pretrained: Directory or Hub id of an EHM checkpoint with or without decoder or head, or of a ViTMAE; None
            draws the weights from torch's generator.
        attn_implementation: Attention kernels.
        config_overrides: Fields of `EHMConfig` that differ from the checkpoint's. For another `image_size` or channel
            order nothing is interpolated: the sin-cos positions are made anew for the grid.

    Raises:
        ValueError: another kind of model; weights missing, left over or of another shape (all named).
        OSError: the directory lacks a file; transformers names it.
    """
    if pretrained is None:
        return EHMModel._from_config(EHMConfig(**config_overrides), attn_implementation=attn_implementation)
    if _kind_of(pretrained) == "vit_mae":
        encoder = from_vit_mae(pretrained, **config_overrides).ehm
    else:
        encoder, missing = _load(EHMModel, pretrained, (*HEADS, DECODER), config_overrides)
        check_keys(f"the weights in {pretrained} do not fit EHMModel", missing, (), ())
    encoder.set_attn_implementation(attn_implementation)
    return encoder.train()


def load_for_pretraining(pretrained: str | None, attn_implementation: str, **config_overrides) -> EHMForPreTraining:
    """Encoder and decoder of a checkpoint, or of MAE's random weights.

    Args:
        pretrained: As in `load_encoder`; beside an encoder without a decoder a new one is drawn, and it is told.
        attn_implementation: Attention kernels.
        config_overrides: As in `load_encoder`.

    Raises:
        ValueError, OSError: as in `load_encoder`.
    """
    if pretrained is None:
        config = EHMConfig(**config_overrides)
        return EHMForPreTraining._from_config(config, attn_implementation=attn_implementation)
    if _kind_of(pretrained) == "vit_mae":
        model = from_vit_mae(pretrained, **config_overrides)
    else:
        model, missing = _load(EHMForPreTraining, pretrained, HEADS, config_overrides)
        if missing == {f"{DECODER}.{name}" for name in model.decoder.state_dict()}:
            logger.warning("model.pretrained=%r holds no decoder: a new one starts with random weights", pretrained)
        else:
            check_keys(f"the weights in {pretrained} do not fit EHMForPreTraining", missing, (), ())
    model.set_attn_implementation(attn_implementation)
    return model.train()


def _kind_of(pretrained: str) -> str:
    """`ehm` or `vit_mae`.

    Raises:
        RecipeError: another kind.
        OSError: no checkpoint there.
    """
    try:
        kind = AutoConfig.from_pretrained(pretrained).model_type
    except OSError as error:  # names neither the field nor, for what looks like a Hub id, the missing folder
        raise OSError(
            f"model.pretrained={pretrained!r} is no directory that holds a model, nor could it be read from the Hub:"
            f" {error}"
        ) from None
    if kind not in ("ehm", "vit_mae"):
        raise RecipeError(f"model.pretrained={pretrained!r} is of type {kind!r}; ehm and vit_mae can be used")
    return kind


def _load(
    model_class: type[PreTrainedModel], pretrained: str, left_aside: tuple[str, ...], config_overrides: dict
) -> tuple[PreTrainedModel, set[str]]:
    """A model of ours in float32, and the names of the weights that the checkpoint lacks.

    Weights whose names begin with `left_aside` may be left over.

    Raises:
        ValueError: others are, or some have another shape.
    """
    config = EHMConfig.from_pretrained(pretrained, **config_overrides)
    with quiet_loading():
        model, report = model_class.from_pretrained(
            pretrained, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    if config.grid_size != EHMConfig.from_pretrained(pretrained).grid_size:
        mismatched = {name for name in mismatched if not name.endswith(POSITIONS)}
        for name, table in model.state_dict().items():
            if name.endswith(POSITIONS):  # also one that fits: 4x8 patches are as many as 8x4
                table.copy_(sincos_positions(config.grid_size, table.shape[-1]))
    unused = {key for key in report["unexpected_keys"] if key.split(".")[0] not in left_aside}
    check_keys(f"the weights in {pretrained} do not fit {model_class.__name__}", (), unused, mismatched)
    return model, set(report["missing_keys"])
