"""Parse images into hierarchies with any transformers ViT: ours, ViT, ViTMAE, DINOv2, DINOv3, CLIP's vision tower, ...

The queries and keys are read where the library's own attention interface receives them, so rotary positions and the
like are in them, and the model's code stays untouched.
"""

from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .configuration_ehm import resolve_layers, to_pair
from .hierarchy_ehm import PatchHierarchy, build_hierarchy, symmetrize
from .modeling_ehm import EHMPreTrainedModel, attention_affinity, attention_map, key_affinity

RECORDER = "ehm_query_key_recorder"
_recorded: list[tuple[Tensor, Tensor, float, Tensor | None]] | None = None


def _record_and_attend(module, query, key, value, attention_mask, **kwargs):
    if _recorded is not None:
        scaling = kwargs.get("scaling")
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            raise ValueError(
                f"{type(module).__name__} masks tokens out; a model whose tokens all see each other is expected"
            )
        _recorded.append((query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, attention_mask))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(RECORDER, _record_and_attend)
AttentionMaskInterface.register(RECORDER, sdpa_mask)


@contextmanager
def _recording(model: PreTrainedModel):
    """Route the model's attention through the recorder for a while; yields the list of (query, key, scaling, bias)."""
    global _recorded
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation(RECORDER)
    model.eval()
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None
        model.set_attn_implementation(before)
        model.train(training)


@contextmanager
def _unmasked(model: PreTrainedModel):
    """ViTMAE masks in its forward, even in evaluation: keep every patch for a while."""
    ratio = getattr(model.config, "mask_ratio", None)
    if ratio is not None:
        model.config.mask_ratio = 0.0
    try:
        yield
    finally:
        if ratio is not None:
            model.config.mask_ratio = ratio


@torch.no_grad()
def parse_hierarchy(
    model: PreTrainedModel,
    pixel_values: Tensor,
    affinity: str = "attention",
    layers: list[int] | str | None = None,
    linkage: str = "average",
) -> PatchHierarchy:
    """Parse images into binary trees over their patches.

    Args:
        model: EHM model (its config decides, the other arguments must keep their defaults), or any transformers
            vision transformer with one token a patch and its prefix tokens first.
        pixel_values: `(B, C, H, W)`, as the model's image processor returns them.
        affinity: "attention", softmaxed maps averaged over heads and layers, or "keys", cosine of keys.
        layers: Layers to read, counted from 0, negative from the end, or "all". None is all for "attention", the last
            for "keys"; the default of EHM models is another, their second layer, so that weights that were converted
            parse alike with `layers=[1]` here, or with `affinity_layers="all"` there.
        linkage: "average", "single" or "complete".

    Raises:
        ValueError: the model's attention cannot be read, or its tokens do not match the patches. Nothing is ever
            substituted for a missing affinity.
    """
    if isinstance(model, EHMPreTrainedModel):
        if (affinity, layers, linkage) != ("attention", None, "average"):
            raise ValueError("an EHM model parses as its config says: set affinity, affinity_layers and linkage there")
        return (model if hasattr(model, "parse_hierarchy") else model.base_model).parse_hierarchy(pixel_values)
    if affinity not in ("attention", "keys"):
        raise ValueError(f"affinity={affinity!r} is not one of attention, keys")
    encoder = model.base_model if hasattr(model.base_model, "embeddings") else model  # without head or decoder
    grid_size = _grid_of(encoder, pixel_values)
    num_patches = grid_size[0] * grid_size[1]
    with _recording(encoder) as recorded, _unmasked(encoder):
        encoder(pixel_values, **_forward_arguments(encoder, pixel_values, num_patches))
    if not recorded:
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface, so its queries and keys cannot be"
            " read; use a model that does (ViT, ViTMAE, DINOv2, DINOv3, ...)"
        )
    if layers is None:
        layers = "all" if affinity == "attention" else [-1]
    layers = resolve_layers("layers", layers, len(recorded))
    total = 0
    for query, key, scaling, bias in (recorded[layer] for layer in layers):
        num_prefix = query.shape[2] - num_patches
        if num_prefix < 0:
            raise ValueError(
                f"{type(model).__name__} has {query.shape[2]} tokens for {num_patches} patches; a model with one"
                " token a patch is expected"
            )
        if affinity == "attention":
            total = total + attention_affinity(attention_map(query, key, scaling, bias), num_prefix)
        else:
            total = total + key_affinity(key, num_prefix)
    return build_hierarchy(symmetrize(total / len(layers)), linkage, grid_size)


def _grid_of(encoder: PreTrainedModel, pixel_values: Tensor) -> tuple[int, int]:
    if not isinstance(getattr(encoder.config, "patch_size", None), int | list | tuple):
        raise ValueError(
            f"{type(encoder).__name__} has no patch_size in its config; a vision transformer with one token a patch is"
            " expected (of a multimodal model, pass its vision tower)"
        )
    if getattr(encoder.config, "num_detection_tokens", 0):
        raise ValueError(
            f"{type(encoder).__name__} puts detection tokens after its patches; prefix tokens are expected"
        )
    (height, width), (patch_height, patch_width) = pixel_values.shape[2:], to_pair(encoder.config.patch_size)
    if height % patch_height or width % patch_width:
        raise ValueError(f"pixel_values is {height}x{width}, not a multiple of patch_size={encoder.config.patch_size}")
    return height // patch_height, width // patch_width


def _forward_arguments(encoder: PreTrainedModel, pixel_values: Tensor, num_patches: int) -> dict:
    """ViTMAE shuffles its patches by `noise`: ascending noise keeps them in order. Other grids need interpolation."""
    arguments = {}
    if encoder.config.model_type == "vit_mae":
        noise = torch.arange(num_patches, dtype=torch.float32, device=pixel_values.device)
        arguments["noise"] = noise.expand(len(pixel_values), -1)
    if encoder.config.model_type in ("vit", "vit_mae") and pixel_values.shape[2:] != to_pair(encoder.config.image_size):
        arguments["interpolate_pos_encoding"] = True
    return arguments
