"""What a mask policy of yours must keep, tried out."""

import torch

from .configuration_ehm import EHMConfig
from .mask_policies_ehm import mask_policy_named
from .modeling_ehm import EHMForPreTraining


def check_mask_policy(name: str, grid_size: tuple[int, int] = (6, 8), num_images: int = 4) -> None:
    """Try a registered mask policy on a small model of random weights, at several points of training and two ratios.

    Args:
        name: As in `EHMConfig.mask_policy`.
        grid_size: Patches along height and width; different ones find mixed-up axes.
        num_images: Images of a batch.

    Raises:
        ValueError: no such policy is registered, or its scores have another shape.
        AssertionError: a mask has another count than asked for; it changes from call to call, with the batch around an
            image or with torch's generator, or draws from that; or `mask_seed` has no part in it.
    """
    mask_policy_named(name)
    sides = [8 * side for side in grid_size]
    pixel_values = torch.rand(num_images, 3, *sides, generator=torch.Generator().manual_seed(0))
    mask_seed = torch.arange(num_images)
    for mask_ratio in (0.75, 0.4):
        model = small_model(mask_policy=name, image_size=sides, mask_ratio=mask_ratio).train()
        hidden = model.config.num_hidden_patches(model.config.num_patches)
        for progress in (0.0, 0.5, 1.0):
            where = f"mask_policy={name!r} at progress {progress}, mask_ratio={mask_ratio}"
            state = torch.get_rng_state()
            mask = model.evolve_mask(pixel_values, progress, mask_seed)
            require(torch.equal(state, torch.get_rng_state()), f"{where} draws from torch's generator; use mask_seed")
            require((mask.sum(1) == hidden).all(), f"{where} masks {mask.sum(1).tolist()} patches, not {hidden}")
            again = model.evolve_mask(pixel_values, progress, mask_seed)
            require(torch.equal(mask, again), f"{where} gives another mask when called again")
            for image in range(num_images):
                alone = slice(image, image + 1)
                own = model.evolve_mask(pixel_values[alone], progress, mask_seed[alone])
                require(torch.equal(mask[alone], own), f"{where}: the mask of image {image} depends on its batch")
            other = model.evolve_mask(pixel_values, progress, mask_seed + 1000)
            require(not torch.equal(mask, other), f"{where} gives the same masks for other values of mask_seed")


def require(condition: bool, message: str) -> None:
    """An assertion that `python -O` keeps."""
    if not condition:
        raise AssertionError(message)


def small_model(**fields) -> EHMForPreTraining:
    """A model of two layers with random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = EHMConfig(
            **{"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | fields,
            intermediate_size=64,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=64,
        )
        return EHMForPreTraining(config)
