"""Augmentation for fine-tuning: RandAugment, random erasing, mixup and CutMix, with their numbers given from outside.

The recipe is that of MAE's fine-tuning (He et al. 2022, arXiv:2111.06377, table 9), which took it from DeiT (Touvron et
al. 2021, arXiv:2012.12877) and BEiT: `rand-m9-mstd0.5-inc1`, random erasing with probability 0.25 and noise for each
pixel, mixup 0.8, CutMix 1.0, label smoothing 0.1. The names and scales are those of timm, which these papers ran on.

Every function here is pure: equal numbers give equal results, in any process and order. The numbers are uniform in
[0, 1), and the constants below say how many of them a function takes.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageEnhance, ImageOps
from torch import Tensor

MAX_MAGNITUDE = 10
RAND_AUGMENT_DRAWS = 4  # for each operation: which one, whether it is applied, its magnitude, its direction
ERASING_DRAWS = 23  # whether to erase, ten tries of area and ratio, the place
MIX_DRAWS = 5  # mixup or CutMix, two for lambda, the place of the box


# RandAugment


def _posterize(image: PILImage.Image, strength: float) -> PILImage.Image:
    # ImageOps.posterize refuses to keep no bits, which at full strength is what timm's scale asks for: a black image.
    kept = 256 - (1 << 4 + int(abs(strength) * 4))
    return image.point([value & kept for value in range(256)] * len(image.getbands()))


def _solarize(image: PILImage.Image, strength: float) -> PILImage.Image:
    return ImageOps.solarize(image, 256 - int(abs(strength) * 256))


def _solarize_add(image: PILImage.Image, strength: float) -> PILImage.Image:
    add = int(abs(strength) * 110)
    table = [value + add if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhance(kind: type) -> Callable[[PILImage.Image, float], PILImage.Image]:
    # A factor of 1 changes nothing, 0 removes colour, contrast, brightness or detail.
    return lambda image, strength: kind(image).enhance(max(0.1, 1 + 0.9 * strength))


def _affine(matrix: Callable[[float, int, int], tuple]) -> Callable:
    """Operation from a matrix that takes (x, y) of the result to (x, y) of the image, by strength, width and height."""
    return lambda image, strength, fill: image.transform(
        image.size,
        PILImage.Transform.AFFINE,
        matrix(strength, *image.size),
        PILImage.Resampling.BICUBIC,
        fillcolor=fill,
    )


# Colour operations take (image, strength), geometric ones (image, strength, fill). The strength is magnitude / 10, with
# a sign where an operation has two directions. Scales as in timm's auto_augment.
COLOUR_OPERATIONS = {
    "AutoContrast": lambda image, strength: ImageOps.autocontrast(image),
    "Equalize": lambda image, strength: ImageOps.equalize(image),
    "Invert": lambda image, strength: ImageOps.invert(image),
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _enhance(ImageEnhance.Color),
    "ContrastIncreasing": _enhance(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhance(ImageEnhance.Brightness),
    "SharpnessIncreasing": _enhance(ImageEnhance.Sharpness),
}
GEOMETRIC_OPERATIONS = {
    "Rotate": lambda image, strength, fill: image.rotate(30 * strength, PILImage.Resampling.BICUBIC, fillcolor=fill),
    "ShearX": _affine(lambda strength, width, height: (1, 0.3 * strength, 0, 0, 1, 0)),
    "ShearY": _affine(lambda strength, width, height: (1, 0, 0, 0.3 * strength, 1, 0)),
    "TranslateXRel": _affine(lambda strength, width, height: (1, 0, 0.45 * strength * width, 0, 1, 0)),
    "TranslateYRel": _affine(lambda strength, width, height: (1, 0, 0, 0, 1, 0.45 * strength * height)),
}
OPERATIONS = (*COLOUR_OPERATIONS, *GEOMETRIC_OPERATIONS)


def apply_operation(image: PILImage.Image, name: str, magnitude: float, fill: Sequence[int]) -> PILImage.Image:
    """One operation of RandAugment.

    Colour operations leave the alpha of RGBA images alone; geometric ones move colour and alpha together, in
    premultiplied colours, so that invisible pixels do not shine through.

    Args:
        image: L, RGB or RGBA; left as it is.
        name: One of `OPERATIONS`.
        magnitude: Between -10 and 10. Rotations, shears and translations go the other way where it is negative, colour,
            contrast, brightness and sharpness become less; the other operations take no notice of the sign.
        fill: Colour that comes in from outside the image, one number in 0 ... 255 a channel.

    Returns:
        Image of the same size and mode.
    """
    strength = magnitude / MAX_MAGNITUDE
    if name in COLOUR_OPERATIONS:
        if image.mode != "RGBA":
            return COLOUR_OPERATIONS[name](image, strength)
        changed = COLOUR_OPERATIONS[name](image.convert("RGB"), strength)
        changed.putalpha(image.getchannel("A"))
        return changed
    if image.mode != "RGBA":
        return GEOMETRIC_OPERATIONS[name](image, strength, tuple(fill))
    *colour, alpha = fill
    premultiplied = (*(round(value * alpha / 255) for value in colour), alpha)
    return GEOMETRIC_OPERATIONS[name](image.convert("RGBa"), strength, premultiplied).convert("RGBA")


def rand_augment(
    image: PILImage.Image,
    uniform: np.ndarray,
    fill: Sequence[int],
    num_ops: int = 2,
    magnitude: float = 9,
    magnitude_std: float = 0.5,
) -> PILImage.Image:
    """RandAugment as timm's policy `rand-m9-mstd0.5-inc1`: some operations, drawn with replacement, one after another.

    Each operation drawn is applied with probability 0.5, at a magnitude that varies normally and is clipped to [0, 10],
    in a random direction where it has two. Resampling is bicubic, as in MAE.

    Source: Cubuk et al. 2020, RandAugment (arXiv:1909.13719); the set of operations, their scales, the probability and
    the noise are those of timm's auto_augment.

    Args:
        image: L, RGB or RGBA.
        uniform: `(num_ops * RAND_AUGMENT_DRAWS,)` numbers in [0, 1).
        fill: Colour that comes in from outside the image, the mean of the data: one number in 0 ... 255 a channel.
        num_ops: Operations drawn; 0 leaves images as they are.
        magnitude: Mean strength in [0, 10].
        magnitude_std: Standard deviation of the strength; 0 switches its noise off.

    Returns:
        Image of the same size and mode.

    Raises:
        ValueError: a magnitude outside [0, 10], a negative or infinite deviation, a negative number of operations, or a
            fill that does not have one number for each channel.
    """
    check_rand_augment(num_ops, magnitude, magnitude_std)
    if len(fill) != len(image.getbands()):
        raise ValueError(f"fill={tuple(fill)} must have one number for each of the channels {image.getbands()}")
    for u_name, u_apply, u_magnitude, u_direction in uniform.reshape(num_ops, RAND_AUGMENT_DRAWS).tolist():
        if u_apply >= 0.5:
            continue
        noise = NormalDist().inv_cdf(max(u_magnitude, 2.0**-54))  # 0 would be minus infinity
        drawn = min(max(magnitude + magnitude_std * noise, 0), MAX_MAGNITUDE)
        name = OPERATIONS[int(u_name * len(OPERATIONS))]
        image = apply_operation(image, name, drawn if u_direction < 0.5 else -drawn, fill)
    return image


def check_rand_augment(num_ops: int, magnitude: float, magnitude_std: float) -> None:
    """Raise ValueError if `rand_augment` does not take these settings."""
    _check("num_ops", num_ops, 0, math.inf, "0 switches RandAugment off")
    _check("magnitude", magnitude, 0, MAX_MAGNITUDE, "timm's m9 is 9")
    _check("magnitude_std", magnitude_std, 0, math.inf, "0 switches the noise off")


# Random erasing


def random_erasing(
    pixels: Tensor,
    uniform: np.ndarray,
    noise_key: int,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> Tensor:
    """Replace one rectangle by standard normal noise, drawn for each pixel: timm's mode `pixel`, count 1.

    Source: Zhong et al. 2020, Random Erasing Data Augmentation (arXiv:1708.04896), in DeiT's variant.

    Args:
        pixels: `(C, H, W)` float32, normalised by mean and standard deviation; left as it is.
        uniform: `(ERASING_DRAWS,)` numbers in [0, 1): whether to erase, ten tries of area and ratio, the place.
        noise_key: Key of the noise, in [0, 2**64): noise is a pure function of it, and independent between keys.
        probability: Share of images in which a rectangle is erased, in [0, 1].
        area: Smallest and largest share of the image's area, drawn evenly.
        ratio: Smallest and largest height over width, drawn on a log scale.

    Returns:
        `(C, H, W)` float32. Like timm, `pixels` itself if none of the ten rectangles is smaller than the image.

    Raises:
        ValueError: a probability outside [0, 1].
    """
    _check("probability", probability, 0, 1, "0 switches erasing off")
    if uniform[0] >= probability:
        return pixels
    _, height, width = pixels.shape
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for u_area, u_ratio in uniform[1:21].reshape(10, 2).tolist():
        size = height * width * (area[0] + (area[1] - area[0]) * u_area)
        aspect = math.exp(log_low + (log_high - log_low) * u_ratio)
        h, w = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = int(uniform[21] * (height - h + 1)), int(uniform[22] * (width - w + 1))
            erased = pixels.clone()
            erased[:, top : top + h, left : left + w] = keyed_normal(noise_key, (len(pixels), h, w))
            return erased
    return pixels


def keyed_normal(key: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 numbers of this shape, a pure function of a key in [0, 2**64)."""
    # Raw Philox output is the same in every numpy; Generator.standard_normal may change between versions (NEP 19).
    bits = np.random.Philox(key=key).random_raw(math.prod(shape))
    uniform = ((bits >> np.uint64(12)) + 0.5) * 2.0**-52  # strictly between 0 and 1
    return torch.special.ndtri(torch.from_numpy(uniform)).float().reshape(shape)


# Mixup and CutMix


def symmetric_beta(alpha: float, uniform: np.ndarray) -> float:
    """Number in [0, 1] that follows Beta(alpha, alpha), from two uniform numbers in [0, 1).

    A symmetric beta variable is a Student t variable with 2 alpha degrees of freedom, squeezed into [0, 1]: with t,
    `(1 + t / sqrt(2 alpha + t^2)) / 2` (Devroye 1986, Non-Uniform Random Variate Generation, chapter IX). Bailey 1994
    (Polar generation of random variates with the t-distribution) gives t in closed form: `t^2 / (2 alpha)` is
    `(u^(-1/alpha) - 1) cos^2(2 pi v)`, and the cosine's sign is that of t. No rejection, and exact for all alpha > 0.
    """
    u, v = 1 - float(uniform[0]), float(uniform[1])  # u in (0, 1]
    cosine = math.cos(2 * math.pi * v)
    radius = u ** (1 / alpha)  # multiplied through by it, nothing overflows where alpha is tiny
    spread = (1 - radius) * cosine**2
    return (1 + math.copysign(math.sqrt(spread / (radius + spread)), cosine)) / 2


def cutmix_box(size: tuple[int, int], lam: float, uniform: np.ndarray) -> tuple[int, int, int, int]:
    """Box of CutMix: sides in proportion to the image's, area 1 - lam before the image's edges cut it.

    Source: Yun et al. 2019, CutMix (arXiv:1905.04899), equation 2; half sides are rounded down, as in its code.

    Args:
        size: (height, width) of the images.
        lam: Share of the image that the box goes into.
        uniform: Two numbers in [0, 1), the place of the centre.

    Returns:
        (top, bottom, left, right) in pixels; bottom and right lie outside the box.
    """
    edges = []
    for length, u in zip(size, uniform, strict=True):
        half, centre = int(length * math.sqrt(1 - lam)) // 2, int(u * length)
        edges += [max(centre - half, 0), min(centre + half, length)]
    return tuple(edges)


def mix_pair(
    first: Tensor,
    second: Tensor,
    uniform: np.ndarray,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    switch_prob: float = 0.5,
) -> tuple[Tensor, float]:
    """Mix a second image into the first, by mixup or CutMix.

    The share lambda and the box depend on `uniform` alone, so the call with the images swapped and the same numbers
    makes the partner's example: together they are a pair of timm's `mode="pair"`.

    Source: Zhang et al. 2018, mixup (arXiv:1710.09412); Yun et al. 2019, CutMix (arXiv:1905.04899). MAE draws one
    lambda for a whole batch instead, which would tie examples to the batch they are in.

    Args:
        first, second: `(C, H, W)` float32, of equal shape; left as they are.
        uniform: `(MIX_DRAWS,)` numbers in [0, 1): mixup or CutMix, two for lambda, the box's centre (y, x).
        mixup_alpha: Mixup's lambda follows Beta(alpha, alpha); 0 switches mixup off.
        cutmix_alpha: The same for CutMix.
        switch_prob: Share of CutMix where both are on.

    Returns:
        The mixed image `(C, H, W)` float32, and the share of `first` in it: lambda in mixup, the true share of its
        pixels in CutMix. If both are off, `first` itself and 1.

    Raises:
        ValueError: a negative or infinite alpha, a `switch_prob` outside [0, 1].
    """
    check_mix(mixup_alpha, cutmix_alpha, switch_prob)
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return first, 1.0
    use_cutmix = cutmix_alpha > 0 and (mixup_alpha == 0 or uniform[0] < switch_prob)
    lam = symmetric_beta(cutmix_alpha if use_cutmix else mixup_alpha, uniform[1:3])
    if not use_cutmix:
        return first * lam + second * (1 - lam), lam
    _, height, width = first.shape
    top, bottom, left, right = cutmix_box((height, width), lam, uniform[3:5])
    mixed = first.clone()
    mixed[:, top:bottom, left:right] = second[:, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def check_mix(mixup_alpha: float, cutmix_alpha: float, switch_prob: float) -> None:
    """Raise ValueError if `mix_pair` does not take these settings."""
    _check("mixup_alpha", mixup_alpha, 0, math.inf, "0 switches mixup off")
    _check("cutmix_alpha", cutmix_alpha, 0, math.inf, "0 switches CutMix off")
    _check("switch_prob", switch_prob, 0, 1, "it is the share of CutMix")


def mixed_target(
    label_first: int, label_second: int, lam: float, num_classes: int, label_smoothing: float = 0.0
) -> Tensor:
    """Target of a mixed example: lam of the first label and 1 - lam of the second, smoothed as timm's `mixup_target`.

    Smoothing spreads its share evenly over all classes, so a sole label gets 1 - smoothing + smoothing / num_classes.

    Args:
        label_first, label_second: Classes in 0 ... num_classes - 1.
        lam: Share of the first, in [0, 1], as `mix_pair` returns it.
        num_classes: Number of classes.
        label_smoothing: Share that is spread, in [0, 1].

    Returns:
        `(num_classes,)` float32 that sums to 1.

    Raises:
        ValueError: a label that is not a class, or a smoothing outside [0, 1].
    """
    _check("label_smoothing", label_smoothing, 0, 1, "0 switches smoothing off")
    for label in (label_first, label_second):
        if not 0 <= label < num_classes:
            raise ValueError(f"label {label} is not in 0 ... {num_classes - 1}; num_classes={num_classes}")
    target = torch.full((num_classes,), label_smoothing / num_classes)
    target[label_first] += lam * (1 - label_smoothing)
    target[label_second] += (1 - lam) * (1 - label_smoothing)
    return target


def _check(name: str, value: float, low: float, high: float, hint: str) -> None:
    if not (low <= value <= high and math.isfinite(value)):
        bounds = f"in [{low}, {high}]" if math.isfinite(high) else f"finite and at least {low}"
        raise ValueError(f"{name}={value} must be {bounds}; {hint}")
