"""Evolved Hierarchical Masking (EHM): a ViT encoder, MAE's decoder, and masks made from the model's own hierarchy.

What is unusual, against a textbook ViT and MAE:
- The encoder never masks unless the caller passes `bool_masked_pos`; only `EHMForPreTraining` makes masks.
- Hidden patches are dropped before the patch embedding, and visible ones stay in image order: attention does not
  care about order, so nothing is shuffled back and forth.
- Positions are sin-cos tables; for another grid than the native one they are computed, not interpolated.
- The teacher pass reads queries and keys on a side path, so the main path may use any fused attention.
- Parameter names are those of transformers' ViT and ViTMAE, in memory and on disk.

Sources: MAE (He et al. 2022), SimMIM (Xie et al. 2022), EHM (Feng & Zhang 2024, arXiv:2504.09155), and EPM's code
(CVPR 2023) for the affinity: softmaxed attention over every layer and head, class token's row and column removed.

Letters: B images, C channels, H W pixels, P patch side, N patches, V visible patches, T tokens, D width, K tree nodes.
True = masked.
"""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_ehm import AUTO_MAP, EHMConfig, to_pair
from .hierarchy_ehm import PatchHierarchy, build_hierarchy, symmetrize
from .mask_policies_ehm import MaskRequest, mask_policy_named
from .masking_ehm import draw_mask_seeds, evolution_at, mask_from_scores, num_nodes_at, softness_at


@dataclass
class EHMForPreTrainingOutput(ModelOutput):
    """Output of `EHMForPreTraining`.

    Attributes:
        loss: Scalar; error of the hidden patches, mean over all masks.
        logits: `(B, N, P*P*C)`; predicted pixels of every patch, normalised per patch if `norm_pix_loss`. None in
            training mode, unless `return_logits` asks for them.
        mask: `(B, N)` bool, True = masked.
        hidden_states: Encoder states, each `(B, 1 + V, D)`, or `(B, 1 + N, D)` with the SimMIM objective.
        attentions: Encoder attention maps, each `(B, heads, T, T)`.

    With R masks an image every B is B * R, the masks of one image in sequence.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    mask: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def patchify(pixel_values: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Flatten patches in MAE's order: `(B, C, H, W)` -> `(B, N, P*P*C)`, each patch as rows, columns, channels."""
    batch, channels, height, width = pixel_values.shape
    patch_height, patch_width = patch_size
    rows, columns = height // patch_height, width // patch_width
    patches = pixel_values.reshape(batch, channels, rows, patch_height, columns, patch_width)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid_size: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: `(B, N, P*P*C)` -> `(B, C, H, W)` for a grid of (rows, columns) patches."""
    (patch_height, patch_width), (rows, columns) = patch_size, grid_size
    pixels = patches.reshape(patches.shape[0], rows, columns, patch_height, patch_width, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, rows * patch_height, columns * patch_width)


def normalize_patches(patches: Tensor) -> Tensor:
    """Zero mean and unit (unbiased) variance in each patch, as MAE's `norm_pix_loss`."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1.0e-6).sqrt()


def sincos_positions(grid_size: tuple[int, int], width: int) -> Tensor:
    """Sin-cos positions of MAE for a grid, with a zero row for the class token.

    MAE lays them out as `[sin x | cos x | sin y | cos y]` (its code swaps the names of h and w; weights rely on it).

    Args:
        grid_size: Patches along height and width.
        width: Length of an embedding, a multiple of 4.

    Returns:
        `(1, 1 + N, width)` float32.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64, device="cpu") for n in grid_size), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (x, y)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table])[None].float()


def count_hidden(bool_masked_pos: Tensor, batch_size: int, num_patches: int, several: bool = False) -> int:
    """How many patches each row of a mask hides; waits for a GPU to know it.

    Args:
        bool_masked_pos: `(B, N)` bool; if `several`, `(B * R, N)` for any R.
        batch_size: B.
        num_patches: N.
        several: Whether an image may have several masks, one after the other.

    Raises:
        ValueError: another dtype or shape, rows with different counts, or a row without a visible patch.
    """
    is_matrix = bool_masked_pos.dtype == torch.bool and bool_masked_pos.shape[1:] == (num_patches,)
    masks_per_image = len(bool_masked_pos) / max(1, batch_size) if is_matrix else 0
    if masks_per_image != 1 and not (several and masks_per_image >= 1 and masks_per_image.is_integer()):
        raise ValueError(
            f"bool_masked_pos has dtype {bool_masked_pos.dtype} and shape {tuple(bool_masked_pos.shape)};"
            f" bool and ({batch_size} images{' x R masks' if several else ''}, {num_patches} patches) are expected,"
            " True = masked"
        )
    hidden = bool_masked_pos.sum(1)
    low, high = hidden.aminmax()
    if low != high:
        raise ValueError(
            f"bool_masked_pos masks between {int(low)} and {int(high)} patches a row; mask equally many in each image"
        )
    if high == num_patches:
        raise ValueError(f"bool_masked_pos masks all {num_patches} patches; the encoder needs at least one visible")
    return int(high)


def visible_first(bool_masked_pos: Tensor) -> Tensor:
    """Patch indices, the visible ones ascending, then the hidden ones ascending: `(B, N)` bool -> `(B, N)` int64."""
    return bool_masked_pos.to(torch.uint8).argsort(dim=1, stable=True)


def take_patches(patches: Tensor, index: Tensor) -> Tensor:
    """`(B, N, D)` and R rows of indices for each image in sequence, `(B * R, M)` -> `(B * R, M, D)`.

    Copies whole patches, which on CPUs is far faster than `gather`.
    """
    batch, count, width = patches.shape
    image = torch.arange(len(index), device=index.device) * batch // len(index)  # of each row
    taken = patches.reshape(-1, width).index_select(0, (index + image[:, None] * count).flatten())
    return taken.view(*index.shape, width)


class EHMPatchEmbeddings(nn.Module):
    """Linear projection of flattened patches; its weight has the shape of ViT's convolution."""

    def __init__(self, config: EHMConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = to_pair(config.patch_size)
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=self.patch_size, stride=self.patch_size
        )

    def grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """Patches along height and width; errors on pixels that this model cannot take."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; (images, num_channels={self.num_channels},"
                " height, width) is expected: set do_convert_rgb in the image processor, or num_channels in the config"
            )
        if not pixel_values.is_floating_point():  # values of 0 to 255 would train, and badly
            raise ValueError(
                f"pixel_values has dtype {pixel_values.dtype}; normalised floats are expected: use the image processor,"
                " or in training normalize=... of modeling_ehm.training.trainer.EHMTrainer or"
                " modeling_ehm.training.data.NormalizingCollator"
            )
        (height, width), (patch_height, patch_width) = pixel_values.shape[2:], self.patch_size
        if height % patch_height or width % patch_width or not height or not width:
            raise ValueError(
                f"pixel_values is {height}x{width} (height x width), not a multiple of patch_size={self.patch_size};"
                " resize or crop the images"
            )
        return height // patch_height, width // patch_width

    def forward(self, patches: Tensor) -> Tensor:
        """`(B, V, P*P*C)` in the order of `patchify` -> `(B, V, D)`."""
        weight = self.projection.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P*P*C)
        return F.linear(patches.to(weight.dtype), weight, self.projection.bias)


class EHMEmbeddings(nn.Module):
    """Patches and class token with their positions; patches may be left out or replaced by mask tokens."""

    def __init__(self, config: EHMConfig):
        super().__init__()
        self.grid_size = config.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        # Only SimMIM shows the encoder mask tokens; in MAE they belong to the decoder.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.objective == "simmim" else None
        self.patch_embeddings = EHMPatchEmbeddings(config)
        # A buffer: `from_pretrained` makes every float parameter trainable, and this table is fixed.
        self.register_buffer("position_embeddings", torch.zeros(1, 1 + config.num_patches, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def positions(self, grid_size: tuple[int, int]) -> Tensor:
        """`(1, 1 + N, D)` for any grid."""
        return positions_for(grid_size, self.grid_size, self.position_embeddings)

    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, num_hidden: int | None = None
    ) -> Tensor:
        grid_size = self.patch_embeddings.grid_of(pixel_values)
        positions = self.positions(grid_size)
        patches = patchify(pixel_values, self.patch_embeddings.patch_size)  # (B, N, P*P*C)
        if bool_masked_pos is not None and num_hidden is None:
            num_hidden = count_hidden(bool_masked_pos, *patches.shape[:2], several=True)
        if bool_masked_pos is None or self.mask_token is not None:
            hidden_states = self.patch_embeddings(patches)  # (B, N, D)
            if bool_masked_pos is not None:
                hidden_states = hidden_states.repeat_interleave(len(bool_masked_pos) // len(patches), dim=0)
                mask_token = self.mask_token.to(hidden_states.dtype)
                hidden_states = torch.where(bool_masked_pos[..., None], mask_token, hidden_states)
            hidden_states = hidden_states + positions[:, 1:]
        else:
            ids_keep = visible_first(bool_masked_pos)[:, : patches.shape[1] - num_hidden]  # (B * R, V)
            visible = take_patches(patches, ids_keep)  # (B * R, V, P*P*C)
            hidden_states = self.patch_embeddings(visible) + positions[0, 1:][ids_keep]  # (B * R, V, D)
        cls_token = (self.cls_token + positions[:, :1]).expand(hidden_states.shape[0], -1, -1).to(hidden_states.dtype)
        return self.dropout(torch.cat([cls_token, hidden_states], dim=1))  # (B, 1 + V, D)


def positions_for(grid_size: tuple[int, int], native_grid: tuple[int, int], table: Tensor) -> Tensor:
    """The stored table on the native grid, else the exact sin-cos positions of `grid_size`; `(1, 1 + N, D)`."""
    # torch.export with dynamic sizes keeps one branch for all grids: it must be the one that computes.
    symbolic = any(isinstance(side, torch.SymInt) for side in grid_size)
    if not symbolic and grid_size == native_grid:
        return table
    return sincos_positions(grid_size, table.shape[-1]).to(table)


def attention_map(query: Tensor, key: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Softmaxed attention `(B, heads, T, T)` in float32; `bias`, added to the logits, broadcasts to that shape."""
    logits = (query @ key.transpose(2, 3)) * scaling
    return (logits if bias is None else logits + bias).softmax(dim=-1, dtype=torch.float32)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask=None,
    scaling=None,
    dropout=0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention that keeps its map: `(B, heads, T, head_dim)` -> `(B, T, heads, head_dim)`, `(B, heads, T, T)`."""
    weights = attention_map(query, key, scaling, attention_mask).to(query.dtype)
    output = F.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2).contiguous(), weights


def as_autocast(hidden_states: Tensor) -> Tensor:
    """In the type that autocast gives products, cast once: each of several products would cast its input anew."""
    device_type = hidden_states.device.type
    casts = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    if not casts or hidden_states.dtype == torch.float64:  # which it leaves alone
        return hidden_states
    return hidden_states.to(torch.get_autocast_dtype(device_type))


class EHMAttention(nn.Module):
    def __init__(self, config: EHMConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            # MAE draws queries, keys and values as one (3D, D) matrix: fan-in + fan-out is 4D where ours has 2D.
            projection.init_gain = 0.5**0.5

    def split_heads(self, projected: Tensor) -> Tensor:
        """`(B, T, D)` -> `(B, heads, T, head_dim)`."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def query_key(self, hidden_states: Tensor, num_queries: int | None = None) -> tuple[Tensor, Tensor]:
        """Queries of the last `num_queries` tokens (None: of all) and keys, each `(B, heads, T, head_dim)`."""
        asking = hidden_states if num_queries is None else hidden_states[:, -num_queries:]
        if asking.dtype.itemsize < 4:  # of what is not in one piece a product is rounded before its bias is added
            asking = asking.contiguous()
        return self.split_heads(self.q_proj(asking)), self.split_heads(self.k_proj(hidden_states))

    def read(self, hidden_states: Tensor, what: str) -> Tensor:
        """What an affinity is made of: "attention", the map `(B, heads, T, T)`, or "keys" `(B, heads, T, head_dim)`."""
        if what == "keys":
            return self.split_heads(self.k_proj(hidden_states))
        return attention_map(*self.query_key(hidden_states), self.scaling)

    def attend_by(self, weights: Tensor, hidden_states: Tensor) -> Tensor:
        """Output of an attention whose map `(B, heads, T, T)` is known."""
        value = self.split_heads(self.v_proj(hidden_states))
        return self.o_proj((weights.to(value.dtype) @ value).transpose(1, 2).flatten(2))

    def forward(self, hidden_states: Tensor, num_queries: int | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
        query, key = self.query_key(hidden_states, num_queries)
        value = self.split_heads(self.v_proj(hidden_states))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        if kwargs.get("output_attentions"):
            attention = eager_attention  # fused kernels keep no map and would return none without a word
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        output, weights = attention(self, query, key, value, None, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(2)), weights


class EHMMLP(nn.Module):
    def __init__(self, config: EHMConfig, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


def drop_path(residual: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (Huang et al. 2016): zero for a random share `rate` of images, the others scaled up."""
    if rate == 0 or not training:
        return residual
    kept = torch.rand(len(residual), *[1] * (residual.ndim - 1), device=residual.device) >= rate
    return residual * (kept / (1 - rate)).to(residual.dtype)


class EHMLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer of the encoder and of the decoder; the sizes are arguments."""

    def __init__(
        self, config: EHMConfig, hidden_size: int, num_heads: int, intermediate_size: int, drop_path_rate: float = 0.0
    ):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.attention = EHMAttention(config, hidden_size, num_heads)
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = EHMMLP(config, hidden_size, intermediate_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        num_queries: int | None = None,
        read: str | None = None,
        read_only: bool = False,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`(B, T, D)` -> `(B, T, D)`.

        Args:
            hidden_states: Tokens.
            num_queries: The last so many tokens alone ask, and are returned; None is all.
            read: Of the teacher: what `EHMAttention.read` shall give; it is returned after the tokens. A flag of
                `forward`, so that wrappers which gather sharded weights around a layer's call also serve the teacher.
            read_only: Return what is read alone, and compute nothing else.
        """
        normed = as_autocast(self.layernorm_before(hidden_states))
        found = None if read is None else self.attention.read(normed, read)
        if read_only:
            return found
        if read == "attention":  # the map is there: no kernel need make it again
            attended = self.attention.attend_by(found, normed)
        else:
            attended, _ = self.attention(normed, num_queries=num_queries, **kwargs)
        hidden_states = hidden_states if num_queries is None else hidden_states[:, -num_queries:]
        hidden_states = hidden_states + self._drop(attended)
        hidden_states = hidden_states + self._drop(self.mlp(self.layernorm_after(hidden_states)))
        return hidden_states if read is None else (hidden_states, found)

    def _drop(self, residual: Tensor) -> Tensor:
        return drop_path(self.dropout(residual), self.drop_path_rate, self.training)


def attention_affinity(weights: Tensor, num_prefix: int = 1) -> Tensor:
    """Maps `(B, heads, T, T)` averaged over heads, prefix tokens' rows and columns removed; `(B, N, N)`."""
    return weights[..., num_prefix:, num_prefix:].mean(1)


def key_affinity(key: Tensor, num_prefix: int = 1) -> Tensor:
    """Cosine of the patches' keys, all heads joined; `(B, heads, T, head_dim)` -> `(B, N, N)` float32."""
    joined = F.normalize(key.transpose(1, 2).flatten(2)[:, num_prefix:].float(), dim=-1)
    with torch.autocast(key.device.type, enabled=False):  # bfloat16 would round neighbours into ties
        return joined @ joined.transpose(1, 2)


class EHMPreTrainedModel(PreTrainedModel):
    config: EHMConfig
    base_model_prefix = "ehm"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["EHMEmbeddings", "EHMLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": EHMLayer, "attentions": EHMAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """MAE's initialisation. `init.*` leaves alone what a checkpoint has filled.

        The library calls this for modules that hold parameters of their own, not for those that only hold modules.
        """
        if isinstance(module, EHMClassifier):
            init.trunc_normal_(module.weight, std=CLASSIFIER_STD)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight, gain=getattr(module, "init_gain", 1.0))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                init.ones_(tensor)
            for tensor in (module.bias, module.running_mean, module.num_batches_tracked):
                init.zeros_(tensor)
        elif isinstance(module, nn.Conv2d):  # the patch projection, drawn as the linear map that it is
            bound = (6 / (module.weight.shape[0] + module.weight[0].numel())) ** 0.5
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, EHMEmbeddings):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            if module.mask_token is not None:
                init.normal_(module.mask_token, std=self.config.initializer_range)
            init.copy_(module.position_embeddings, sincos_positions(self.config.grid_size, self.config.hidden_size))
        elif isinstance(module, EHMDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)
            table = sincos_positions(self.config.grid_size, self.config.decoder_hidden_size)
            init.copy_(module.decoder_pos_embed, table)

    def save_pretrained(self, save_directory, **kwargs):
        """As usual, and the directory then serves AutoModel and AutoModelForPreTraining alike, code included."""
        if self.is_remote_code():
            self.config.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(save_directory, **kwargs)


class EHMModel(EHMPreTrainedModel):
    """The encoder. It never masks by itself, so two forwards in eval mode give equal tensors."""

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]  # a pre-training checkpoint holds them too

    def __init__(self, config: EHMConfig):
        super().__init__(config)
        self.embeddings = EHMEmbeddings(config)
        sizes = config.hidden_size, config.num_attention_heads, config.intermediate_size
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            [EHMLayer(config, *sizes, config.drop_path_rate * n / last) for n in range(config.num_hidden_layers)]
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, num_hidden: int | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `(B, C, H, W)`, normalised as the image processor does; H and W multiples of the patch.
            bool_masked_pos: `(B, N)` bool, True = masked, the same count in each row. Masked patches are left out
                (objective "mae") or replaced by the mask token ("simmim"). `(B * R, N)`: R masks for each image in
                sequence, and as many rows in what is returned. None: nothing is masked.
            num_hidden: How many each row masks, from a caller who knows: the mask is not checked then, for which a GPU
                would have to be waited for.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`. `interpolate_pos_encoding` is accepted
                for stock pipelines and changes nothing: positions are made for the grid at hand.

        Returns:
            `last_hidden_state` `(B, 1 + V, D)`, after the final norm, class token first, patches in image order;
            `pooler_output` `(B, D)`, the mean of its patch tokens (no weights, no class token); `hidden_states`, the
            last of them before the final norm; `attentions`.
        """
        kwargs.pop("interpolate_pos_encoding", None)
        hidden_states = self.embeddings(pixel_values, bool_masked_pos, num_hidden)  # (B, 1 + V, D)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=hidden_states[:, 1:].mean(dim=1)
        )

    @torch.no_grad()
    def patch_affinity(self, pixel_values: Tensor) -> Tensor:
        """How alike the patches of each image are to this encoder, as `affinity` and `affinity_layers` say.

        Runs over all patches, without gradient and dropout, and stops after the last layer it reads.

        Returns:
            `(B, N, N)` float32, symmetric, larger = more alike.
        """
        chosen = self.config.resolved_affinity_layers
        with evaluation_mode(self):  # dropout would make affinities random
            hidden_states = self.embeddings(pixel_values)  # (B, 1 + N, D)
            total = 0
            for index, layer in enumerate(self.layers[: chosen[-1] + 1]):
                if index not in chosen:
                    hidden_states = layer(hidden_states)
                    continue
                if index == chosen[-1]:
                    found = layer(hidden_states, read=self.config.affinity, read_only=True)
                else:
                    hidden_states, found = layer(hidden_states, read=self.config.affinity)
                if self.config.affinity == "attention":
                    total = total + attention_affinity(found)
                else:
                    total = total + key_affinity(found)
        return symmetrize(total / len(chosen))

    def parse_hierarchy(self, pixel_values: Tensor) -> PatchHierarchy:
        """Parse images `(B, C, H, W)` into binary trees over their patches."""
        grid_size = self.embeddings.patch_embeddings.grid_of(pixel_values)
        return build_hierarchy(self.patch_affinity(pixel_values), self.config.linkage, grid_size)


@contextmanager
def evaluation_mode(model: nn.Module):
    """Evaluation mode for a while; restored part by part, since a caller may have frozen some parts in it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class EHMDecoder(nn.Module):
    """MAE's decoder: visible tokens and mask tokens at all positions -> pixels of every patch."""

    def __init__(self, config: EHMConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.grid_size = config.grid_size
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", torch.zeros(1, 1 + config.num_patches, width))
        sizes = width, config.decoder_num_attention_heads, config.decoder_intermediate_size
        self.decoder_layers = nn.ModuleList([EHMLayer(config, *sizes) for _ in range(config.decoder_num_hidden_layers)])
        self.decoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, config.patch_dim)

    def forward(self, visible: Tensor, order: Tensor, grid_size: tuple[int, int], hidden_only: bool = False) -> Tensor:
        """Pixels of all patches or, in less time, of the hidden ones alone.

        Attention does not care about order, so tokens stand in one that needs no moving: class, visible, hidden.

        Args:
            visible: `(B, 1 + V, D)`.
            order: `(B, N)`, as `visible_first` gives it.
            grid_size: Patches along height and width.
            hidden_only: Whether the hidden patches alone are predicted.

        Returns:
            `(B, N, P*P*C)` in image order; with `hidden_only` `(B, H, P*P*C)`, the hidden ones in image order.
        """
        num_hidden = order.shape[1] + 1 - visible.shape[1]
        positions = positions_for(grid_size, self.grid_size, self.decoder_pos_embed)[0]  # (1 + N, D_dec)
        positions = torch.cat([positions[:1].expand(len(order), 1, -1), positions[1:][order]], dim=1)
        hidden_states = self.decoder_embed(visible)  # (B, 1 + V, D_dec)
        mask_tokens = self.mask_token.to(hidden_states.dtype).expand(len(order), num_hidden, -1)
        hidden_states = torch.cat([hidden_states, mask_tokens], dim=1) + positions  # (B, 1 + N, D_dec)
        for layer in self.decoder_layers[:-1]:
            hidden_states = layer(hidden_states)
        hidden_states = self.decoder_layers[-1](hidden_states, num_queries=num_hidden if hidden_only else None)
        pixels = self.decoder_pred(self.decoder_norm(hidden_states))
        return pixels if hidden_only else take_patches(pixels[:, 1:], order.argsort(dim=1))


class EHMForPreTraining(EHMPreTrainedModel):
    """Masked image modelling whose masks come from the hierarchy that the model itself sees in each image.

    Attributes:
        progress: Finished fraction of pre-training, in [0, 1]; a callback of the Trainer sets it before each step.
        timings: None, or a dict into which the seconds of "masks", their whole making, and of the "teacher" within it
            are added (synchronises the device).
    """

    # The loss is a mean over this batch's hidden patches; Trainer must divide it by the accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: EHMConfig):
        super().__init__(config)
        self.progress: float | None = None
        self.timings: dict[str, float] | None = None
        self._teacher: tuple[EHMModel] | None = None  # in a tuple, out of the module tree: not trained, not saved
        self.ehm = EHMModel(config)
        if config.objective == "mae":
            self.decoder = EHMDecoder(config)
        else:
            self.decoder = nn.Linear(config.hidden_size, config.patch_dim)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.ehm.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        progress: float | None = None,
        mask_seed: Tensor | None = None,
        return_loss: bool = True,
        return_logits: bool | None = None,
        **kwargs,
    ) -> EHMForPreTrainingOutput:
        """Hide patches, encode the others, reconstruct the hidden ones.

        Args:
            pixel_values: `(B, C, H, W)`, as the image processor returns them.
            bool_masked_pos: `(B, N)` bool, True = masked, the same count in each row, or `(B * R, N)`, R masks for
                each image in sequence. None: made from the model's own hierarchy, in training mode
                `config.masks_per_image` of them for each image, else one.
            progress: Finished fraction of pre-training, in [0, 1]. None: `self.progress` in training mode, 1 (the
                final masks, so that losses of different checkpoints compare) in evaluation mode.
            mask_seed: `(B,)` int64, one number a sample; the mask is a pure function of it and the image's tree,
                whatever the batch, process or device. None draws from torch's generator.
            return_loss: Whether to compute the loss.
            return_logits: Whether to predict every patch. None: in evaluation mode, or without a loss; else the hidden
                patches alone are predicted, for the loss, which takes less time.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: pixels or a mask that do not fit; training without progress; `progress` outside [0, 1].
        """
        unknown = kwargs.keys() - {"output_hidden_states", "output_attentions"}
        if unknown:  # a mask under a misspelt name would be ignored, and another one drawn in its place
            raise TypeError(f"forward() got unknown arguments {sorted(unknown)}; masks are given as bool_masked_pos")
        rows, columns = grid_size = self.get_input_embeddings().grid_of(pixel_values)
        if bool_masked_pos is None:
            bool_masked_pos = self.evolve_mask(pixel_values, progress, mask_seed)  # (B * R, N), True = masked
            num_hidden = self.config.num_hidden_patches(rows * columns)
        else:
            num_hidden = count_hidden(bool_masked_pos, len(pixel_values), rows * columns, several=True)
        # (B * R, 1 + V, D); with the SimMIM objective (B * R, 1 + N, D)
        outputs = self.ehm(pixel_values, bool_masked_pos, num_hidden, return_dict=True, **kwargs)
        order = visible_first(bool_masked_pos)  # (B * R, N)
        hidden = order[:, rows * columns - num_hidden :]  # (B * R, H)
        if return_loss and num_hidden == 0:
            raise ValueError("bool_masked_pos masks no patch, so there is nothing to predict; mask at least one a row")
        hidden_only = return_loss and self.training if return_logits is None else not return_logits
        if self.config.objective == "mae":
            predicted = self.decoder(outputs.last_hidden_state, order, grid_size, hidden_only)
        else:
            patches = outputs.last_hidden_state[:, 1:]
            predicted = self.decoder(take_patches(patches, hidden) if hidden_only else patches)
        loss = None
        if return_loss:
            compared = predicted if hidden_only else take_patches(predicted, hidden)
            loss = self.reconstruction_loss(compared, pixel_values, hidden)
        return EHMForPreTrainingOutput(
            loss=loss,
            logits=None if hidden_only else predicted,
            mask=bool_masked_pos,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def reconstruction_loss(self, predicted: Tensor, pixel_values: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared ("mae") or absolute ("simmim") error over the hidden patches, in float32.

        Args:
            predicted: `(B * R, H, P*P*C)`.
            pixel_values: `(B, C, H, W)`.
            hidden: `(B * R, H)`, indices of the hidden patches, R rows for each image in sequence.
        """
        target = take_patches(patchify(pixel_values.float(), to_pair(self.config.patch_size)), hidden)
        if self.config.norm_pix_loss:
            target = normalize_patches(target)
        error = F.mse_loss if self.config.objective == "mae" else F.l1_loss
        return error(predicted.float(), target)

    @torch.compiler.disable  # rounds of merging depend on the data
    @torch.no_grad()
    def evolve_mask(
        self, pixel_values: Tensor, progress: float | None = None, mask_seed: Tensor | None = None
    ) -> Tensor:
        """Masks for these images at this point of training; arguments as in `forward`.

        Returns:
            `(B, N)` bool, in training mode `(B * config.masks_per_image, N)`; True = masked, `round(mask_ratio * N)`
            True in each row.
        """
        rows, columns = self.get_input_embeddings().grid_of(pixel_values)
        device_type = pixel_values.device.type
        as_caller = torch.autocast(  # the teacher's precision is the caller's
            device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
        )
        if mask_seed is None:
            mask_seed = draw_mask_seeds(len(pixel_values), pixel_values.device)
        elif not isinstance(mask_seed, Tensor) or mask_seed.shape != (len(pixel_values),):
            given = f"has shape {tuple(mask_seed.shape)}" if isinstance(mask_seed, Tensor) else f"is {mask_seed!r}"
            raise ValueError(f"mask_seed {given}; one number an image, ({len(pixel_values)},), in a tensor is expected")
        request = MaskRequest(
            self.config,
            (rows, columns),
            mask_seed.to(pixel_values.device),
            pixel_values,
            progress=lambda: self._known(progress),
            schedule=lambda: self.mask_schedule(progress, rows * columns),
            affinity=lambda: as_caller(self.patch_affinity)(pixel_values),
            hierarchy=lambda: as_caller(self.parse_hierarchy)(pixel_values),
        )
        with self._timed("masks"), torch.autocast(device_type, enabled=False):  # bfloat16 would round scores into ties
            return self._draw_masks(request)

    def _draw_masks(self, request: MaskRequest) -> Tensor:
        """Masks by the policy that the config names; shape as of `evolve_mask`.

        Raises:
            ValueError: the policy's scores have another shape than `(B, N)`.
        """
        scores, count = mask_policy_named(self.config.mask_policy)(request), len(request.pixel_values)
        if scores.shape != (count, request.num_patches):
            raise ValueError(
                f"mask_policy={self.config.mask_policy!r} gave scores of shape {tuple(scores.shape)};"
                f" ({count} images, {request.num_patches} patches) is expected"
            )
        num_masks = self.config.masks_per_image if self.training else 1
        return mask_from_scores(scores, self.config.num_hidden_patches(request.num_patches), num_masks)

    def mask_schedule(self, progress: float | None = None, num_patches: int | None = None) -> tuple[int, float]:
        """Node count and softness at this point of training; native number of patches if None."""
        config = self.config
        evolved = evolution_at(self._known(progress), config.evolution_start)
        start, end = config.num_nodes_range(config.num_patches if num_patches is None else num_patches)
        softness = softness_at(evolved, config.softness_start, config.softness_end)
        return num_nodes_at(evolved, start, end, config.num_nodes_curve), softness

    def _known(self, progress: float | None) -> float:
        if progress is None:
            progress = self.progress if self.training else 1.0
        if progress is None:
            raise ValueError(
                "progress is not known, and evolved masks depend on it: pass progress=step / max_steps, or add"
                " ProgressCallback() from modeling_ehm.training to the Trainer"
            )
        return progress

    @torch.no_grad()
    def patch_affinity(self, pixel_values: Tensor) -> Tensor:
        """How alike the patches of each image are to the teacher that the config names; `(B, N, N)` float32."""
        teacher = self.teacher_encoder()
        in_bfloat16 = self.config.teacher_dtype == "bfloat16"
        precision = torch.autocast(pixel_values.device.type, torch.bfloat16) if in_bfloat16 else nullcontext()
        with self._timed("teacher"), precision:
            return teacher.patch_affinity(pixel_values)

    @torch.no_grad()
    def parse_hierarchy(self, pixel_values: Tensor) -> PatchHierarchy:
        """Parse images `(B, C, H, W)` into trees, with the teacher that the config names."""
        grid_size = self.get_input_embeddings().grid_of(pixel_values)
        affinity = self.patch_affinity(pixel_values)
        return build_hierarchy(affinity, self.config.linkage, grid_size)

    def teacher_encoder(self) -> EHMModel:
        """The encoder whose affinities build the trees: this one, or the attached moving average of it.

        Raises:
            RuntimeError: `teacher="ema"` in training, and none is attached. In evaluation mode, and so after
                `from_pretrained`, the weights at hand are the finished model's and serve as their own teacher.
        """
        if self.config.teacher == "online" or (self._teacher is None and not self.training):
            return self.ehm
        if self._teacher is None:
            raise RuntimeError(
                "teacher='ema' but no moving average is attached: add EMATeacherCallback() from modeling_ehm.training"
                " to the Trainer, call attach_teacher(encoder), or set teacher='online'"
            )
        return self._teacher[0]

    def attach_teacher(self, encoder: EHMModel | None) -> None:
        """Let `encoder` build the trees when `teacher="ema"`. It is neither trained, nor moved, nor saved from here."""
        self._teacher = None if encoder is None else (encoder,)

    @contextmanager
    def _timed(self, part: str):
        if self.timings is None:
            yield
            return
        started = self._now()
        yield
        self.timings[part] = self.timings.get(part, 0.0) + self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class EHMBackbone(BackboneMixin, EHMModel):
    """The encoder as a backbone of transformers' dense heads (UperNet, DETR and its kin, Mask2Former, DPT, ...).

    A plain ViT has one resolution. `config.feature_scales` makes a pyramid of it without weights of its own: larger
    maps are bilinear enlargements, smaller ones means over areas; the heads' own convolutions do the rest. (ViTDet and
    BEiT learn transposed convolutions here. Ours keeps the backbone's weights those of the encoder.)
    """

    def __init__(self, config: EHMConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        """Feature maps of the stages that `config.out_features` names.

        Args:
            pixel_values: `(B, C, H, W)`; H and W multiples of the patch.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `feature_maps`, each `(B, D, rows * scale, columns * scale)`, or `(B, 1 + N, D)` without
            `reshape_hidden_states`.
        """
        rows, columns = self.embeddings.patch_embeddings.grid_of(pixel_values)
        kwargs |= {"output_hidden_states": True, "return_dict": True}  # older transformers do not ask for states
        outputs = EHMModel.forward(self, pixel_values, **kwargs)  # super() would be the mixin's
        scales = self.config.feature_scales or [1] * len(self.out_features)
        states = dict(zip(self.stage_names, outputs.hidden_states, strict=True))
        feature_maps = []
        for stage, scale in zip(self.out_features, scales, strict=True):
            hidden_state = self.layernorm(states[stage]) if self.config.apply_layernorm else states[stage]
            if self.config.reshape_hidden_states:
                maps = hidden_state[:, 1:].transpose(1, 2).unflatten(2, (rows, columns)).contiguous()
                hidden_state = rescale_maps(maps, scale)
            feature_maps.append(hidden_state)
        return BackboneOutput(
            feature_maps=tuple(feature_maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def rescale_maps(maps: Tensor, scale: float) -> Tensor:
    """`(B, D, rows, columns)` enlarged bilinearly or reduced by means over areas; sizes are rounded, at least 1."""
    if scale == 1:
        return maps
    size = [max(1, round(side * scale)) for side in maps.shape[2:]]
    if scale < 1:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


CLASSIFIER_STD = 2e-5  # MAE's fine-tuning code draws its head this small (main_finetune.py)


class EHMClassifier(nn.Linear):
    """A linear layer that starts near zero, as in MAE's fine-tuning."""


class EHMForImageClassification(EHMPreTrainedModel):
    """The encoder with a linear classifier on its mean patch token or its class token (`config.pooling`).

    MAE's fine-tuning replaces the final norm by a new one after pooling; here the pre-trained norm stays before it.
    """

    accepts_loss_kwargs = False  # the loss is a mean over this batch
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: EHMConfig):
        super().__init__(config)
        self.ehm = EHMModel(config)
        self.classifier = EHMClassifier(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.ehm.get_input_embeddings()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: `(B, C, H, W)`; H and W multiples of the patch.
            labels: `(B,)` int64 classes, or `(B, num_labels)` floats, each row a distribution over the classes, as
                mixup, cutmix and label smoothing make them.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `loss`, the mean cross-entropy, if `labels` are given; `logits` `(B, num_labels)`.
        """
        outputs = self.ehm(pixel_values, return_dict=True, **kwargs)
        pooled = outputs.pooler_output if self.config.pooling == "mean" else outputs.last_hidden_state[:, 0]
        logits = self.classifier(pooled)  # (B, num_labels)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class EHMForSemanticSegmentation(EHMPreTrainedModel):
    """The encoder with a linear classifier on each patch token: batch norm and a 1x1 convolution.

    The plainest head, for judging features (as in DINOv2's linear segmentation). For the best masks put `EHMBackbone`
    under transformers' `UperNetForSemanticSegmentation`.
    """

    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: EHMConfig):
        super().__init__(config)
        self.ehm = EHMModel(config)
        self.norm = nn.BatchNorm2d(config.hidden_size)
        self.classifier = nn.Conv2d(config.hidden_size, config.num_labels, kernel_size=1)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.ehm.get_input_embeddings()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> SemanticSegmenterOutput:
        """Label every pixel.

        Args:
            pixel_values: `(B, C, H, W)`; H and W multiples of the patch.
            labels: `(B, H, W)` int64; pixels of `config.semantic_loss_ignore_index` take no part in the loss.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `loss`, the mean cross-entropy over labelled pixels (0 if there are none), if `labels` are given; `logits`
            `(B, num_labels, H, W)`, enlarged bilinearly from one vector a patch.
        """
        rows, columns = self.get_input_embeddings().grid_of(pixel_values)
        outputs = self.ehm(pixel_values, return_dict=True, **kwargs)
        maps = outputs.last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))  # (B, D, rows, columns)
        logits = self.classifier(self.norm(maps))
        logits = F.interpolate(logits, size=pixel_values.shape[2:], mode="bilinear", align_corners=False)
        loss = None
        if labels is not None:
            ignored = self.config.semantic_loss_ignore_index
            total = F.cross_entropy(logits.float(), labels, ignore_index=ignored, reduction="sum")
            loss = total / (labels != ignored).sum().clamp(min=1)
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


EHMModel.register_for_auto_class("AutoModel")
EHMForPreTraining.register_for_auto_class("AutoModelForPreTraining")
EHMBackbone.register_for_auto_class("AutoBackbone")
EHMForImageClassification.register_for_auto_class("AutoModelForImageClassification")
EHMForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")

__all__ = [
    "EHMBackbone",
    "EHMForImageClassification",
    "EHMForPreTraining",
    "EHMForPreTrainingOutput",
    "EHMForSemanticSegmentation",
    "EHMModel",
    "EHMPreTrainedModel",
]
