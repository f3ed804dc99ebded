"""Mask policies: how the patches of each image are scored; those of highest score are masked.

A policy is a function of a `MaskRequest` that returns scores `(B, N)`, registered under the name that
`EHMConfig.mask_policy` gives. Count and polarity are kept by what follows it (`mask_from_scores`); what it must keep
itself: an image's scores are a function of its own `mask_seed`, content and progress, never of the batch. It computes
in full precision; the teacher in that of the training.

    @register_mask_policy("stripes")
    def stripes_scores(request):
        rows, columns = request.grid_size
        row = torch.arange(rows * columns, device=request.mask_seed.device) // columns
        return keyed_uniform(request.mask_seed, rows, stream=16)[:, row]  # streams from 16 on are free

`check_mask_policy("stripes")` in modeling_ehm.checks tries it out.

Letters: B images, N patches, K nodes or parts. True = masked.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_ehm import EHMConfig
from .hierarchy_ehm import PatchHierarchy
from .masking_ehm import evolution_at, keyed_uniform, mask_scores, node_scores, random_scores, rank_scores

# Streams of a sample's randomness; 0 to 2 are taken by masking_ehm.
BLOCK_STREAM, GRID_STREAM, NOISE_STREAM, START_STREAM, PART_STREAM, TIE_STREAM = 3, 4, 5, 6, 7, 8

# Of "block": rectangles drawn, their share of the image, their height over width; BEiT's masks have at least 16 of 196
# patches and sides in proportions up to 1 : 0.3.
NUM_BLOCKS, BLOCK_AREA, BLOCK_ASPECT = 48, (16 / 196, 1 / 3), 0.3
# Of "color_noise": standard deviations, in patches, of the two Gaussians whose difference filters the noise.
NARROW, WIDE = 0.75, 1.5
# Of "epm", from its authors' code: sharpness of the soft assignment, and iterations.
SHARPNESS, EM_STEPS = 40.0, 15


@dataclass(frozen=True)
class MaskRequest:
    """What a policy may look at. The functions are called by those policies alone that need what they give.

    Attributes:
        config: Settings of the model.
        grid_size: Patches along height and width.
        mask_seed: `(B,)` int64, one number a sample: the only source of randomness.
        pixel_values: `(B, C, H, W)`.
        progress: Gives the finished fraction of pre-training, in [0, 1]; raises ValueError if it is not known.
        schedule: Gives the number of nodes (or parts) and the softness at this progress.
        affinity: Gives `(B, N, N)`, how alike the patches are to the teacher; runs it.
        hierarchy: Gives the trees; runs the teacher.
    """

    config: EHMConfig
    grid_size: tuple[int, int]
    mask_seed: Tensor
    pixel_values: Tensor
    progress: Callable[[], float]
    schedule: Callable[[], tuple[int, float]]
    affinity: Callable[[], Tensor]
    hierarchy: Callable[[], PatchHierarchy]

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]


MaskPolicy = Callable[[MaskRequest], Tensor]
MASK_POLICIES: dict[str, MaskPolicy] = {}


def register_mask_policy(name: str) -> Callable[[MaskPolicy], MaskPolicy]:
    """Decorator: make a policy known under a name.

    Raises:
        ValueError: another function has that name. (A module that is loaded again replaces its own.)
    """

    def register(policy: MaskPolicy) -> MaskPolicy:
        known, own = (
            f"{one.__module__}.{getattr(one, '__qualname__', one)}" for one in (MASK_POLICIES.get(name, policy), policy)
        )
        if known != own:
            raise ValueError(f"mask_policy={name!r} is already {known}; choose another")
        MASK_POLICIES[name] = policy
        return policy

    return register


def mask_policy_named(name: str) -> MaskPolicy:
    """The registered policy.

    Raises:
        ValueError: no such policy is registered.
    """
    if name not in MASK_POLICIES:
        raise ValueError(
            f"mask_policy={name!r} is not one of {', '.join(MASK_POLICIES)}; import the module that registers it first"
        )
    return MASK_POLICIES[name]


@register_mask_policy("ehm")
def ehm_policy(request: MaskRequest) -> Tensor:
    """Whole nodes of the model's own trees, ever larger ones (Feng & Zhang 2024).

    Where each patch is a node of its own all trees are alike, and the teacher is spared; but not at progress 0, so that
    what keeps it from running is known at the first step.
    """
    num_nodes, softness = request.schedule()
    if num_nodes < request.num_patches or request.progress() == 0:
        return mask_scores(request.hierarchy(), num_nodes, request.mask_seed, softness)
    node = torch.arange(request.num_patches, device=request.mask_seed.device).expand(len(request.mask_seed), -1)
    return node_scores(node, request.mask_seed, softness)


@register_mask_policy("random")
def random_policy(request: MaskRequest) -> Tensor:
    """MAE's masks (He et al. 2022)."""
    return random_scores(request.mask_seed, request.num_patches)


@register_mask_policy("block")
def block_policy(request: MaskRequest) -> Tensor:
    """Rectangles one after the other until enough is hidden, the last one in part.

    Source: BEiT's block-wise masks (Bao et al. 2022), which MAE compared with its own; the area of a block is uniform
    here and does not depend on what is already hidden.
    """
    (rows, columns), seed = request.grid_size, request.mask_seed
    drawn = keyed_uniform(seed, 4 * NUM_BLOCKS, BLOCK_STREAM).unflatten(1, (4, NUM_BLOCKS, 1))  # (B, 4, K, 1)
    area = (BLOCK_AREA[0] + (BLOCK_AREA[1] - BLOCK_AREA[0]) * drawn[:, 0]) * request.num_patches
    aspect = torch.exp((2 * drawn[:, 1] - 1) * -math.log(BLOCK_ASPECT))
    height = (area * aspect).sqrt().round().clamp(1, rows)
    width = (area / aspect).sqrt().round().clamp(1, columns)
    top, left = (drawn[:, 2] * (rows - height + 1)).floor(), (drawn[:, 3] * (columns - width + 1)).floor()
    place = torch.arange(request.num_patches, device=seed.device)
    row, column = place // columns, place % columns
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)  # (B, K, N)
    first = torch.where(inside.any(1), inside.to(torch.uint8).argmax(1), NUM_BLOCKS)  # (B, N): block that covers it
    return rank_scores(-first.float(), keyed_uniform(seed, request.num_patches, TIE_STREAM))


@register_mask_policy("grid")
def grid_policy(request: MaskRequest) -> Tensor:
    """One random tile of 2x2 patches repeated over the image: MAE's grid-wise masks if three quarters are hidden."""
    seed = request.mask_seed
    return rank_scores(grid_noise(request), keyed_uniform(seed, request.num_patches, TIE_STREAM))


def grid_noise(request: MaskRequest) -> Tensor:
    """`(B, N)`: one random 2x2 tile, repeated."""
    columns = request.grid_size[1]
    place = torch.arange(request.num_patches, device=request.mask_seed.device)
    return keyed_uniform(request.mask_seed, 4, GRID_STREAM)[:, place // columns % 2 * 2 + place % columns % 2]


@register_mask_policy("color_noise")
def color_noise_policy(request: MaskRequest) -> Tensor:
    """White noise through a band-pass filter; the largest values stay visible.

    Source: ColorMAE's green noise (Hinojosa et al. 2024), whose patterns were made beforehand; here every image has its
    own, and the widths of the two Gaussians are our choice.
    """
    rows, columns = request.grid_size
    margin = math.ceil(3 * WIDE)
    noise = keyed_uniform(request.mask_seed, (rows + 2 * margin) * (columns + 2 * margin), NOISE_STREAM)
    noise = noise.unflatten(1, (rows + 2 * margin, columns + 2 * margin)) - 0.5
    green = blur(noise, NARROW, margin) - blur(noise, WIDE, margin)
    return rank_scores(-green.flatten(1), keyed_uniform(request.mask_seed, request.num_patches, TIE_STREAM))


def blur(images: Tensor, sigma: float, margin: int) -> Tensor:
    """Gaussian blur of `(B, H, W)`, less a margin on each side; sums in a fixed order, alike on all devices."""
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-margin, margin + 1)]
    for dim in (1, 2):
        length = images.shape[dim] - 2 * margin
        images = sum(w / sum(weights) * images.narrow(dim, n, length) for n, w in enumerate(weights))
    return images


@register_mask_policy("epm")
def epm_policy(request: MaskRequest) -> Tensor:
    """Flat parts instead of a tree, blended with grid noise: the forerunner (Feng et al., CVPR 2023) as in its code.

    The number of parts follows `num_nodes_start`, `num_nodes_end` and `num_nodes_curve` (there 40 to 10, linear). Until
    `evolution_start`, which is ours, masks are the grid's, and the teacher is spared as by "ehm".
    Unlike there, each image has random starts and a tile of its own, the number has no random addition of 0 to 2, and
    the affinity is symmetric.
    """
    (num_parts, _), config = request.schedule(), request.config
    alpha = evolution_at(request.progress(), config.evolution_start) ** 0.5
    if alpha == 0 < request.progress():
        return grid_policy(request)
    # There the affinity is a sum over layers and heads, not a mean, and the sharpness is made for that.
    maps = len(config.resolved_affinity_layers) * (config.num_attention_heads if config.affinity == "attention" else 1)
    part = cluster_patches(maps * request.affinity(), num_parts, request.mask_seed)  # (B, N)
    noise = keyed_uniform(request.mask_seed, request.num_patches, PART_STREAM).gather(1, part)
    scores = (1 - alpha) * grid_noise(request) + alpha * noise
    return rank_scores(scores, keyed_uniform(request.mask_seed, request.num_patches, TIE_STREAM))


def cluster_patches(affinity: Tensor, num_parts: int, mask_seed: Tensor) -> Tensor:
    """EPM's clustering: soft k-means with unit centres on the columns of the affinity, from random centres.

    Args:
        affinity: `(B, N, N)`.
        num_parts: Centres; some may end without a patch.
        mask_seed: `(B,)` int64.

    Returns:
        `(B, N)` int64, the part of each patch.
    """
    batch, count = affinity.shape[:2]
    first, second = keyed_uniform(mask_seed, 2 * count * num_parts, START_STREAM).unflatten(1, (2, count, -1)).unbind(1)
    normal = (-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()  # Box and Muller 1958
    centers = F.normalize(normal, dim=1)  # (B, N, K)
    for _ in range(EM_STEPS):
        assigned = (SHARPNESS * affinity.transpose(1, 2) @ centers).softmax(dim=2)  # (B, N, K)
        centers = F.normalize(affinity @ (assigned / (1e-6 + assigned.sum(1, keepdim=True))), dim=1)
    assigned = (SHARPNESS * affinity.transpose(1, 2) @ centers).softmax(dim=2)
    return (assigned / (1e-6 + assigned.sum(1, keepdim=True))).argmax(dim=2)


__all__ = ["MASK_POLICIES", "MaskRequest", "mask_policy_named", "register_mask_policy"]
