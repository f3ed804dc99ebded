"""Configuration of Evolved Hierarchical Masking (EHM): ViT encoder, MAE decoder, hierarchy, masks, and the heads."""

import dataclasses

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

# One saved directory serves every Auto class: these entries go into each config.json that is saved with the code.
AUTO_MAP = {
    "AutoConfig": "configuration_ehm.EHMConfig",
    "AutoModel": "modeling_ehm.EHMModel",
    "AutoModelForPreTraining": "modeling_ehm.EHMForPreTraining",
    "AutoModelForImageClassification": "modeling_ehm.EHMForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_ehm.EHMForSemanticSegmentation",
    "AutoBackbone": "modeling_ehm.EHMBackbone",
}

OBJECTIVES = ("mae", "simmim")
SCHEDULED_POLICIES = ("ehm", "epm")  # mask policies that mask ever fewer, ever larger nodes or parts
TEACHERS = ("online", "ema")
TEACHER_DTYPES = (None, "bfloat16")
AFFINITIES = ("attention", "keys")
LINKAGES = ("average", "single", "complete")
NODE_CURVES = ("linear", "log", "cosine")
POOLINGS = ("mean", "cls")
NODE_NUMBERS = ("num_nodes_start", "num_nodes_end")
SECOND_LAYER = 1  # counted from 0; why its attention is the default: docs/results/ledger.md
OUTPUTS = ("out_features", "out_indices", "_out_features", "_out_indices")  # all say which feature maps there are


def to_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """`(height, width)` of a size given as one number or as a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def resolve_layers(name: str, layers: list[int] | str, depth: int) -> tuple[int, ...]:
    """The layers that are named, ascending, without repetition, all counted from 0.

    Args:
        name: Of the argument, for the message.
        layers: Counted from 0, negative from the end, or "all".
        depth: How many layers there are.

    Raises:
        ValueError: none is named, or one that is not there.
    """
    if layers == "all":
        return tuple(range(depth))
    if isinstance(layers, str) or not layers or not all(-depth <= layer < depth for layer in layers):
        raise ValueError(
            f'{name}={layers!r} must be a list of layers, as [1], each in [-{depth}, {depth - 1}], or "all"; None takes'
            " the default"
        )
    return tuple(sorted({layer % depth for layer in layers}))


@strict
class EHMConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of `EHMModel`, `EHMForPreTraining`, `EHMBackbone` and the heads.

    Fields shared with `ViTMAEConfig` bear its names. Types are checked, and so are values, when the object is built.

    Args:
        hidden_size: Width of the encoder; a multiple of 4 (sin-cos positions) and of `num_attention_heads`.
        num_hidden_layers: Encoder layers.
        num_attention_heads: Encoder heads.
        intermediate_size: Width of the encoder's MLP.
        hidden_act: Activation of the MLPs.
        hidden_dropout_prob: Dropout after attention and MLP.
        attention_probs_dropout_prob: Dropout on attention weights.
        initializer_range: Standard deviation of class and mask tokens at initialisation.
        layer_norm_eps: MAE's published code uses 1e-6; transformers' `ViTMAEConfig` defaults to 1e-12.
        image_size: Native size in pixels, one number or (height, width); other multiples of the patch work too.
        patch_size: Patch side in pixels, one number or (height, width).
        num_channels: Channels of the images, any number.
        qkv_bias: Whether queries, keys and values have biases.
        decoder_num_attention_heads: Decoder heads.
        decoder_hidden_size: Width of the decoder; a multiple of 4 and of its heads.
        decoder_num_hidden_layers: Decoder layers.
        decoder_intermediate_size: Width of the decoder's MLP.
        mask_ratio: Share of patches hidden, strictly between 0 and 1.
        masks_per_image: Masks drawn from one tree, and trained on, for each image of a training batch; their visible
            patches differ as far as the ratio allows. Pixels are decoded and the teacher runs once for all of them.
            (`base_learning_rate` of a recipe counts images, not masks.)
        norm_pix_loss: Whether targets are normalised per patch (the better choice in MAE's Table 1).
        objective: "mae": the encoder sees visible patches only, a decoder predicts the others, squared error.
            "simmim": mask tokens inside the encoder, a linear head, absolute error.
        mask_policy: "ehm": masks from the model's own hierarchy. "random": MAE's random masks, no teacher pass. Others,
            and how to add your own: `mask_policies_ehm.py`.
        teacher: Whose affinities build the hierarchy: "online", the present weights; "ema", their moving average.
        teacher_decay: Decay of the moving average per optimiser step; EPM used 0.99996, a horizon of 25,000 steps.
        teacher_warmup_steps: The decay grows as `1 - 1 / (1 + step / teacher_warmup_steps)` until `teacher_decay`,
            so that a short run does not keep its random start as the teacher; 0 switches the warm-up off.
        teacher_dtype: "bfloat16" lets the teacher compute in it where the rest does not (autocast); None leaves it as
            the caller has it. Affinities are float32 in any case.
        affinity: "attention": softmaxed maps averaged over heads and layers. "keys": cosine of keys.
        affinity_layers: Layers the affinity reads, counted from 0, negative from the end, or "all", as EPM does. None
            is the second for "attention" (all for the mask policy "epm") and the last one for "keys". The teacher pass
            stops after the last of them.
        linkage: Affinity of two nodes: mean ("average"), largest ("single") or smallest ("complete") of their members.
            Single linkage adds patch after patch to one node, and so its masks are nearly random ones.
        evolution_start: Progress until which masks are drawn as at progress 0, in [0, 1); number of nodes and softness
            change from there on. Meanwhile, if every patch is a node, no teacher runs after the first step, and a step
            costs what MAE's does.
        num_nodes_start: Nodes masked or kept as wholes at progress 0; None is every patch: MAE's random masking.
        num_nodes_end: Nodes at progress 1; None is an eighth of the patches, at least 2.
        num_nodes_curve: How the number falls with progress: "linear", "log" (geometric) or "cosine".
        softness_start: Share of per-patch noise in the mask score at progress 0; 0 hides whole nodes, 1 is random.
        softness_end: The same at progress 1.
        drop_path_rate: Share of images whose layer is left out in training (stochastic depth), at the last encoder
            layer; the share grows linearly from 0 at the first.
        pooling: What a classifier reads: "mean", the mean of the final-norm patch tokens; "cls", the class token.
        semantic_loss_ignore_index: Pixels with this label take no part in the loss of semantic segmentation.
        out_features: Stages whose feature maps the backbone gives: "stem" and "stage1" to "stageL"; or give
        out_indices: their numbers. Neither: the last stage.
        feature_scales: Of the backbone: by how much each feature map is enlarged (2, 4) or reduced (0.5), one number
            an output stage, so that a plain ViT serves heads that expect a pyramid; None leaves all at one patch.
        apply_layernorm: Of the backbone: whether the final norm is applied to each feature map.
        reshape_hidden_states: Of the backbone: whether maps are `(B, D, rows, columns)`, or token sequences
            `(B, 1 + N, D)` with the class token.
    """

    model_type = "ehm"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True

    decoder_num_attention_heads: int = 16
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_intermediate_size: int = 2048
    mask_ratio: float = 0.75
    masks_per_image: int = 1
    norm_pix_loss: bool = True
    objective: str = "mae"

    mask_policy: str = "ehm"
    teacher: str = "online"
    teacher_decay: float | int = 0.9999
    teacher_warmup_steps: int = 10
    teacher_dtype: str | None = None
    affinity: str = "attention"
    affinity_layers: list[int] | str | None = None
    linkage: str = "average"
    evolution_start: float | int = 0.0
    num_nodes_start: int | None = None
    num_nodes_end: int | None = None
    num_nodes_curve: str = "linear"
    softness_start: float | int = 0.0
    softness_end: float | int = 0.0

    drop_path_rate: float | int = 0.0
    pooling: str = "mean"
    semantic_loss_ignore_index: int = 255
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    feature_scales: list[float | int] | None = None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True

    def __post_init__(self, **kwargs):
        kwargs.pop("stage_names", None)  # a saved file has it; it follows from num_hidden_layers
        self.stage_names = ["stem"] + [f"stage{number}" for number in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As for all configs, but overrides are built in with the rest, so that their values are checked as its are.

        The library sets them on the finished object, where nothing is checked and nothing follows from them.

        Args:
            config_dict: Fields as saved.
            kwargs: Fields that win over them, and what the library adds.

        Raises:
            StrictDataclassError: values that do not go together; the field is named.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in own.union(OUTPUTS)}
        saved, depth = dict(config_dict), config_dict.get("num_hidden_layers", cls.num_hidden_layers)
        is_default = saved.get("out_features") == [f"stage{depth}"]  # the last one, which moves with the depth
        if overrides.keys() & set(OUTPUTS) or (is_default and overrides.get("num_hidden_layers", depth) != depth):
            saved = {name: value for name, value in saved.items() if name not in OUTPUTS}
        fields = saved | overrides
        numbers = [name for name in NODE_NUMBERS if name not in overrides and fields.get(name) is not None]
        if numbers and overrides.keys() & {"image_size", "patch_size"}:  # as `num_nodes_range` does for other images
            count = cls(**{name: value for name, value in fields.items() if name not in NODE_NUMBERS}).num_patches
            fields |= {name: min(fields[name], count) for name in numbers}
        return super().from_dict(fields, **kwargs)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches along height and width of an image of the native size."""
        (height, width), (patch_height, patch_width) = to_pair(self.image_size), to_pair(self.patch_size)
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        """Patches of an image of the native size."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""
        patch_height, patch_width = to_pair(self.patch_size)
        return patch_height * patch_width * self.num_channels

    @property
    def resolved_affinity_layers(self) -> tuple[int, ...]:
        """The layers the affinity reads, ascending, without repetition, all counted from 0."""
        depth, layers = self.num_hidden_layers, self.affinity_layers
        if layers is None and self.affinity == "keys":
            layers = [-1]
        elif layers is None:  # EPM's sharpness is made for the sum over all layers
            layers = "all" if self.mask_policy == "epm" else [min(SECOND_LAYER, depth - 1)]
        return resolve_layers("affinity_layers", layers, depth)

    def num_hidden_patches(self, num_patches: int) -> int:
        """Patches hidden out of `num_patches`. Rounded: `int(n * (1 - ratio))` would keep 9 of 100 at ratio 0.9."""
        return round(self.mask_ratio * num_patches)

    def num_nodes_range(self, num_patches: int) -> tuple[int, int]:
        """Nodes at progress 0 and at progress 1 for an image of `num_patches` patches."""
        start = num_patches if self.num_nodes_start is None else min(self.num_nodes_start, num_patches)
        end = max(2, num_patches // 8) if self.num_nodes_end is None else self.num_nodes_end
        return start, min(end, start)

    def validate_fields(self):
        # One validator, since the library calls several in alphabetical order: sizes must be sound before they count.
        self._check_sizes()
        self._check_widths()
        self._check_numbers()
        self._check_choices()
        self._check_mask_ratio()
        self._check_hierarchy()
        self._check_feature_maps()

    def _check_sizes(self):
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            sides = [value] * 2 if isinstance(value, int) else value
            if len(sides) != 2 or min(sides) < 1:
                raise ValueError(f"{name}={value} must be a positive number of pixels or a pair (height, width)")
        pairs = zip(("height", "width"), to_pair(self.image_size), to_pair(self.patch_size), strict=True)
        for side, image, patch in pairs:
            if image % patch:
                near = sorted({max(image // patch, 1) * patch, (image // patch + 1) * patch})
                raise ValueError(
                    f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size} in {side};"
                    f" {' or '.join(map(str, near))} would be"
                )
        if self.num_channels < 1:
            raise ValueError(f"num_channels={self.num_channels} must be at least 1")
        if self.patch_dim == 1 and self.norm_pix_loss:
            raise ValueError(
                f"patch_size={self.patch_size} with num_channels=1 leaves one number a patch, which norm_pix_loss"
                " cannot normalise; make the patch larger, or set norm_pix_loss to False"
            )

    def _check_widths(self):
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, f"{prefix}hidden_size"), getattr(self, f"{prefix}num_attention_heads")
            if width < 4 or width % 4:
                raise ValueError(
                    f"{prefix}hidden_size={width} must be a positive multiple of 4: sin-cos positions have 4 parts"
                )
            if heads < 1 or width % heads:
                raise ValueError(
                    f"{prefix}hidden_size={width} is not a multiple of {prefix}num_attention_heads={heads}"
                )
            if getattr(self, f"{prefix}num_hidden_layers") < 1:
                raise ValueError(
                    f"{prefix}num_hidden_layers={getattr(self, prefix + 'num_hidden_layers')} must be at least 1"
                )

    def _check_numbers(self):
        for name in ("intermediate_size", "decoder_intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("layer_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is no activation of transformers, as gelu and relu are")

    def _check_mask_ratio(self):
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio={self.mask_ratio} must lie strictly between 0 and 1")
        if self.masks_per_image < 1:
            raise ValueError(f"masks_per_image={self.masks_per_image} must be at least 1")
        hidden = self.num_hidden_patches(self.num_patches)
        if not 0 < hidden < self.num_patches:
            raise ValueError(
                f"mask_ratio={self.mask_ratio} hides {hidden} of {self.num_patches} patches; at least one patch must be"
                " hidden and one visible: change mask_ratio, or make patch_size smaller"
            )

    def _check_choices(self):
        for name, allowed in (
            ("objective", OBJECTIVES),
            ("teacher", TEACHERS),
            ("teacher_dtype", TEACHER_DTYPES),
            ("affinity", AFFINITIES),
            ("linkage", LINKAGES),
            ("num_nodes_curve", NODE_CURVES),
            ("pooling", POOLINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(str, allowed))}")

    def _check_hierarchy(self):
        if not 0 <= self.teacher_decay < 1:
            raise ValueError(f"teacher_decay={self.teacher_decay} must lie in [0, 1)")
        if self.teacher_warmup_steps < 0:
            raise ValueError(f"teacher_warmup_steps={self.teacher_warmup_steps} must be 0 (no warm-up) or more")
        if self.affinity_layers is not None:
            resolve_layers("affinity_layers", self.affinity_layers, self.num_hidden_layers)
        if not 0 <= self.evolution_start < 1:
            raise ValueError(f"evolution_start={self.evolution_start} must lie in [0, 1): a fraction of pre-training")
        start, end = self.num_nodes_start, self.num_nodes_end
        for name, value in (("num_nodes_start", start), ("num_nodes_end", end)):
            if value is not None and not 1 <= value <= self.num_patches:
                raise ValueError(f"{name}={value} must lie in [1, {self.num_patches}], the number of patches")
        if start is not None and end is not None and end > start:
            raise ValueError(f"num_nodes_end={end} exceeds num_nodes_start={start}: nodes merge as training advances")
        for name in ("softness_start", "softness_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")

    def _check_feature_maps(self):
        scales = self.feature_scales
        if scales is None:
            return
        if len(scales) != len(self.out_features) or min(scales) <= 0:
            raise ValueError(
                f"feature_scales={scales} must hold one positive number for each of out_features={self.out_features}"
            )
        if not self.reshape_hidden_states:
            raise ValueError(
                f"feature_scales={scales} needs maps, but reshape_hidden_states=False gives token sequences; set it"
                " to True, or feature_scales to None"
            )


__all__ = ["AUTO_MAP", "EHMConfig"]
