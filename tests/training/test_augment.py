import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from modeling_ehm.training import augment
from modeling_ehm.training.augment import (
    ERASING_DRAWS,
    MIX_DRAWS,
    OPERATIONS,
    RAND_AUGMENT_DRAWS,
    apply_operation,
    check_mix,
    check_rand_augment,
    cutmix_box,
    keyed_normal,
    mix_pair,
    mixed_target,
    rand_augment,
    random_erasing,
    symmetric_beta,
)

GREY = (124, 116, 104)
FILLS = {"L": (117,), "RGB": GREY, "RGBA": (*GREY, 255)}
WITH_IDENTITY = [
    name for name in OPERATIONS if name not in ("AutoContrast", "Equalize", "Invert", "PosterizeIncreasing")
]


def noise_image(mode: str, width: int = 20, height: int = 20, seed: int = 0) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8))


def grey_values(*values: int) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=np.uint8))


def applied(image: Image.Image, name: str, magnitude: float) -> np.ndarray:
    return np.asarray(apply_operation(image, name, magnitude, FILLS[image.mode])).astype(int)


def draws(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).random(count)


# RandAugment: each operation


@pytest.mark.parametrize(
    ("name", "magnitude", "before", "after"),
    [
        ("AutoContrast", 9, [51, 61, 102, 90], [0, 50, 255, 195]),
        ("Invert", 9, [0, 100, 255], [255, 155, 0]),
        ("PosterizeIncreasing", 0, [0xAB, 0xFF, 0x0F], [0xA0, 0xF0, 0]),  # 4 bits are kept
        ("PosterizeIncreasing", 9, [127, 128, 255], [0, 128, 128]),  # 1 bit: 4 - int(3.6)
        ("PosterizeIncreasing", -9, [127, 128, 255], [0, 128, 128]),
        ("PosterizeIncreasing", 10, [127, 128, 255], [0, 0, 0]),
        ("SolarizeIncreasing", 5, [0, 127, 128, 255], [0, 127, 127, 0]),  # from 128 on inverted
        ("SolarizeIncreasing", 9, [25, 26, 255], [25, 229, 0]),  # from 256 - int(230.4) on
        ("SolarizeIncreasing", -10, [0, 100, 255], [255, 155, 0]),
        ("SolarizeAdd", 10, [0, 127, 128, 255], [110, 237, 128, 255]),
        ("SolarizeAdd", 5, [0, 127, 128, 255], [55, 182, 128, 255]),
        ("BrightnessIncreasing", 10, [0, 100, 200], [0, 190, 255]),
        ("BrightnessIncreasing", -5, [0, 100, 200], [0, 55, 110]),
        ("BrightnessIncreasing", -10, [0, 100, 200], [0, 10, 20]),
        ("ContrastIncreasing", 5, [60, 140], [42, 158]),  # 100 -+ 40 * 1.45
        ("ContrastIncreasing", -10, [60, 140], [96, 104]),
        ("ColorIncreasing", 10, [0, 100, 200], [0, 100, 200]),  # grey has no colour
    ],
)
def test_operation_on_grey_values(name, magnitude, before, after):
    assert applied(grey_values(*before), name, magnitude)[0].tolist() == after
    # A greyscale RGB image goes through the same tables.
    rgb = applied(grey_values(*before).convert("RGB"), name, magnitude)[0]
    assert rgb.tolist() == [[value] * 3 for value in after]


def test_equalize_spreads_two_values_over_the_whole_range():
    image = Image.fromarray(np.repeat([[10, 20]], 255, axis=0).astype(np.uint8))
    assert np.unique(applied(image, "Equalize", 9)).tolist() == [0, 255]


def test_color_moves_towards_or_away_from_grey():
    image = Image.new("RGB", (1, 1), (200, 100, 0))  # luma 0.299 * 200 + 0.587 * 100 = 118.5
    np.testing.assert_allclose(applied(image, "ColorIncreasing", -10)[0, 0], [126.65, 116.65, 106.65], atol=1)
    np.testing.assert_allclose(applied(image, "ColorIncreasing", 5)[0, 0], [236.7, 91.7, 0], atol=1)


def test_sharpness_moves_towards_or_away_from_the_smoothed_image():
    pixels = np.zeros((5, 5), dtype=np.uint8)
    pixels[2, 2] = 130  # smoothed: 5/13 of it at the centre, 1/13 around
    sharper, softer = (applied(Image.fromarray(pixels), "SharpnessIncreasing", m) for m in (10, -10))
    assert (sharper[2, 2], sharper[2, 1]) == (50 + 1.9 * 80, 0)
    assert (softer[2, 2], softer[2, 1]) == (50 + 0.1 * 80, 9)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_translations_move_by_whole_pixels_and_fill_with_the_given_colour(mode):
    image = noise_image(mode, width=20, height=40)
    pixels, fill = np.asarray(image), np.array(FILLS[mode]).squeeze()
    for magnitude, kept, source, filled in (
        (10, slice(0, 11), slice(9, 20), slice(11, 20)),
        (-10, slice(9, 20), slice(0, 11), slice(0, 9)),
    ):
        moved = applied(image, "TranslateXRel", magnitude)  # 0.45 * 20 = 9 pixels
        assert (moved[:, kept] == pixels[:, source]).all() and (moved[:, filled] == fill).all()
    down = applied(image, "TranslateYRel", -5)  # 0.225 * 40 = 9 pixels
    assert (down[9:] == pixels[:31]).all() and (down[:9] == fill).all()


def test_shears_move_rows_in_proportion_to_their_height():
    image, magnitude = noise_image("L", 30, 30), 10 * (2 / 7) / 0.3  # row y moves by 2/7 (y + 1/2) pixels
    pixels, sheared = np.asarray(image).astype(int), applied(image, "ShearX", magnitude)
    for row, shift in ((3, 1), (10, 3), (17, 5)):
        assert abs(sheared[row, : 29 - shift] - pixels[row, shift:29]).max() <= 1
        assert sheared[row, 31 - shift :].tolist() == [117] * (shift - 1)
    turned = Image.fromarray(np.asarray(image).T)
    assert (applied(turned, "ShearY", magnitude) == sheared.T).all()
    backwards = applied(image, "ShearX", -magnitude)
    assert abs(backwards[3, 2:] - pixels[3, 1:-1]).max() <= 1


def test_rotation_turns_by_30_degrees_about_the_centre():
    y, x = np.mgrid[:61, :61]
    dot = Image.fromarray((200 * np.exp(-((x - 50) ** 2 + (y - 30) ** 2) / 8)).astype(np.uint8))  # 20 to the right
    for magnitude, sign in ((10, 1), (-10, -1)):
        turned = np.asarray(apply_operation(dot, "Rotate", magnitude, (0,))).astype(float)
        centre = [(turned * axis).sum() / turned.sum() for axis in (x, y)]
        # Upwards is towards smaller y.
        np.testing.assert_allclose(centre, [30 + 20 * math.cos(math.pi / 6), 30 - sign * 10], atol=0.1)
    assert applied(noise_image("RGB"), "Rotate", 9)[0, 0].tolist() == list(GREY)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("name", WITH_IDENTITY)
def test_magnitude_0_changes_nothing(name, mode):
    image = noise_image(mode)
    if mode == "RGBA":
        image.putalpha(255)
    assert (applied(image, name, 0) == np.asarray(image)).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_size_and_mode_and_leave_their_input_alone(name, mode):
    image = noise_image(mode, width=24, height=16)
    before = image.tobytes()
    changed = apply_operation(image, name, 9, FILLS[mode])
    assert (changed.size, changed.mode) == (image.size, mode)
    assert image.tobytes() == before
    unchanged_names = {"L": ["AutoContrast", "ColorIncreasing"], "RGB": ["AutoContrast"], "RGBA": ["AutoContrast"]}
    if name not in unchanged_names[mode]:  # noise has full contrast, grey has no colour
        assert changed.tobytes() != before


@pytest.mark.parametrize("name", OPERATIONS)
def test_rgba_is_rgb_with_its_alpha(name):
    rgb = noise_image("RGB")
    alpha = noise_image("L", seed=1)
    rgba = rgb.copy()
    if name in augment.COLOUR_OPERATIONS:
        rgba.putalpha(alpha)
        changed = applied(rgba, name, 9)
        assert (changed[..., 3] == np.asarray(alpha)).all()
    else:  # where all is opaque, colours are those of RGB
        rgba.putalpha(255)
        changed = applied(rgba, name, 9)
        assert (changed[..., 3] == 255).all()
    assert (changed[..., :3] == applied(rgb, name, 9)).all()


def test_invisible_pixels_do_not_shine_through_and_the_fill_has_its_own_alpha():
    pixels = np.zeros((4, 20, 4), dtype=np.uint8)
    pixels[:, :10] = (255, 0, 0, 0)  # invisible red beside opaque blue
    pixels[:, 10:] = (0, 0, 255, 255)
    moved = np.asarray(apply_operation(Image.fromarray(pixels), "TranslateXRel", 5, (100, 50, 200, 128)))  # 4.5 pixels
    assert (moved[..., 0][:, :15] == 0).all()
    assert 0 < moved[0, 5, 3] < 255 and moved[0, 5, 2] == 255  # the border is half visible and wholly blue
    np.testing.assert_allclose(moved[0, -1], (100, 50, 200, 128), atol=1)


# RandAugment: the policy


def policy_draws(*operations: tuple[str, float, float, float]) -> np.ndarray:
    return np.array([((OPERATIONS.index(name) + 0.5) / 15, *rest) for name, *rest in operations]).flatten()


def test_operations_are_those_of_timms_increasing_set():
    assert set(OPERATIONS) == {
        *("AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"),
        *("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"),
        *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
    }
    assert len(OPERATIONS) == 15


def test_policy_applies_the_drawn_operations_in_order():
    image = noise_image("RGB")
    uniform = policy_draws(("TranslateXRel", 0.49, 0.5, 0.0), ("ColorIncreasing", 0.0, 0.5, 0.5))
    by_hand = apply_operation(image, "TranslateXRel", 9, GREY)
    by_hand = apply_operation(by_hand, "ColorIncreasing", -9, GREY)
    assert rand_augment(image, uniform, GREY).tobytes() == by_hand.tobytes()


def test_an_operation_drawn_as_unused_changes_nothing():
    image = noise_image("RGB")
    uniform = policy_draws(("Invert", 0.5, 0.5, 0.5), ("Rotate", 0.99, 0.5, 0.5))
    assert rand_augment(image, uniform, GREY) is image
    assert rand_augment(image, np.empty(0), GREY, num_ops=0) is image


@pytest.mark.parametrize(
    ("u_magnitude", "magnitude_std", "drawn"),
    [
        (0.5, 0.5, 9),
        (NormalDist().cdf(1), 0.5, 9.5),
        (NormalDist().cdf(-2), 0.5, 8),
        (NormalDist().cdf(1), 0, 9),
        (0.999, 0.5, 10),  # 10.5, clipped
        (0.0, 5, 0),  # far below 0, clipped
    ],
)
def test_magnitude_varies_normally_and_is_clipped(monkeypatch, u_magnitude, magnitude_std, drawn):
    seen = []
    monkeypatch.setattr(augment, "apply_operation", lambda image, name, magnitude, fill: seen.append(magnitude))
    uniform = policy_draws(("Rotate", 0, u_magnitude, 0))
    rand_augment(noise_image("RGB"), uniform, GREY, num_ops=1, magnitude_std=magnitude_std)
    assert seen == pytest.approx([drawn], abs=1e-6)


def test_operations_are_drawn_evenly_half_of_them_are_used_and_half_of_these_turn_back(monkeypatch):
    seen = []

    def record(image, name, magnitude, fill):
        seen.append((name, magnitude))
        return image

    monkeypatch.setattr(augment, "apply_operation", record)
    image = noise_image("RGB")
    for uniform in draws(0, 3000 * 2 * RAND_AUGMENT_DRAWS).reshape(3000, -1):
        rand_augment(image, uniform, GREY)
    assert len(seen) == pytest.approx(3000, abs=5 * 39)  # binomial(6000, 1/2)
    names = [name for name, _ in seen]
    for name in OPERATIONS:
        assert names.count(name) == pytest.approx(200, abs=5 * 14)
    magnitudes = np.array([magnitude for _, magnitude in seen])
    assert (magnitudes < 0).mean() == pytest.approx(0.5, abs=0.05)
    assert np.median(abs(magnitudes)) == pytest.approx(9, abs=0.05)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_policy_is_a_function_of_its_numbers(mode):
    image = noise_image(mode)
    results = []
    for seed in range(20):
        uniform = draws(seed, 2 * RAND_AUGMENT_DRAWS)
        result = rand_augment(image, uniform, FILLS[mode])
        np.random.seed(seed)  # whatever else draws from global generators
        assert rand_augment(image, uniform, FILLS[mode]).tobytes() == result.tobytes()
        results.append(result.tobytes())
    assert len(set(results)) > 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"magnitude": 11}, r"magnitude=11 must be in \[0, 10\]"),
        ({"magnitude": -1}, r"magnitude=-1 must be in \[0, 10\]"),
        ({"magnitude_std": -0.5}, "magnitude_std=-0.5 must be finite and at least 0"),
        ({"magnitude_std": math.inf}, "magnitude_std=inf must be finite"),
        ({"num_ops": -1}, "num_ops=-1 must be finite and at least 0"),
        ({"fill": (1, 2)}, r"fill=\(1, 2\) must have one number for each of the channels \('R', 'G', 'B'\)"),
    ],
)
def test_policy_refuses_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        rand_augment(noise_image("RGB"), draws(0, 8), **{"fill": GREY, **settings})


def test_settings_can_be_checked_before_there_is_an_image():
    check_rand_augment(2, 9, 0.5)
    check_mix(0.8, 1.0, 0.5)
    with pytest.raises(ValueError, match="magnitude=30"):
        check_rand_augment(2, 30, 0.5)
    with pytest.raises(ValueError, match="cutmix_alpha=-1"):
        check_mix(0.8, -1, 0.5)


# Random erasing


def erased_box(pixels: torch.Tensor, erased: torch.Tensor) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the pixels that changed, which must be all in this box."""
    changed = (pixels != erased).all(0)
    assert torch.equal(changed, (pixels != erased).any(0))
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    assert changed.sum() == (bottom - top) * (right - left)
    return top, bottom, left, right


def erasing_draws(area: float, ratio: float, y: float, x: float) -> np.ndarray:
    return np.array([0, *[area, ratio] * 10, y, x])


@pytest.mark.parametrize(
    ("uniform", "box"),
    [
        (erasing_draws(0.5, 0.5, 0, 0), (0, 42, 0, 42)),  # square of area (0.02 + 1/3) / 2 * 10,000 = 1,767
        (erasing_draws(0.5, 0.5, 0.9999, 0.9999), (58, 100, 58, 100)),
        (erasing_draws(0, 0, 0.9999, 0), (92, 100, 0, 26)),  # area 200, height / width 0.3
    ],
)
def test_erased_rectangle_by_hand(uniform, box):
    pixels = torch.full((3, 100, 100), 9.0)
    assert erased_box(pixels, random_erasing(pixels, uniform, 1, 1.0)) == box


def test_erased_rectangles_lie_inside_and_have_the_right_area_and_ratio():
    pixels = torch.full((3, 96, 128), 9.0)
    shares, ratios = [], []
    for seed in range(200):
        erased = random_erasing(pixels, draws(seed, ERASING_DRAWS), seed, 1.0)
        top, bottom, left, right = erased_box(pixels, erased)
        shares.append((bottom - top) * (right - left) / (96 * 128))
        ratios.append((bottom - top) / (right - left))
    assert 0.018 < min(shares) < 0.04 and 0.29 < max(shares) < 0.345  # sides are rounded to whole pixels
    assert np.mean(shares) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.025)
    assert 0.27 < min(ratios) < 0.4 and 2.5 < max(ratios) < 3.7
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.2)
    assert bool((pixels == 9).all())


def test_a_rectangle_that_does_not_fit_is_drawn_again():
    pixels = torch.full((1, 20, 60), 9.0)
    uniform = erasing_draws(0.5, 0.5, 0, 0)  # 14.6 squared
    uniform[1:3] = 0.99, 0.99  # 36 high: too high
    assert erased_box(pixels, random_erasing(pixels, uniform, 1, 1.0)) == (0, 15, 0, 15)
    line = torch.full((1, 1, 60), 9.0)
    as_high_as_the_line = erasing_draws(0, 0, 0, 0)  # 1 high, 2 wide
    assert random_erasing(line, as_high_as_the_line, 1, 1.0) is line


def test_erasing_probability():
    pixels = torch.full((3, 16, 16), 9.0)
    uniform = draws(0, 1000 * ERASING_DRAWS).reshape(1000, -1)
    count = {p: sum(random_erasing(pixels, u, i, p) is not pixels for i, u in enumerate(uniform)) for p in (0, 0.25, 1)}
    assert count[0] == 0 and count[1] == 1000
    assert count[0.25] == pytest.approx(250, abs=5 * 14)
    for probability in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"probability=.* must be in \[0, 1\]"):
            random_erasing(pixels, uniform[0], 0, probability)


def test_erasing_is_a_function_of_its_numbers_and_its_noise_of_the_key():
    pixels, uniform = torch.zeros(3, 32, 32), draws(3, ERASING_DRAWS)
    first = random_erasing(pixels, uniform, 7, 1.0)
    torch.manual_seed(1)
    assert torch.equal(first, random_erasing(pixels, uniform, 7, 1.0))
    other_noise = random_erasing(pixels, uniform, 8, 1.0)
    assert erased_box(pixels, first) == erased_box(pixels, other_noise) and not torch.equal(first, other_noise)
    assert erased_box(pixels, random_erasing(pixels, draws(4, ERASING_DRAWS), 7, 1.0)) != erased_box(pixels, first)


def test_noise_is_standard_normal_and_independent_between_keys():
    noise = torch.stack([keyed_normal(key, (3, 20, 50)) for key in (0, 1, 2**64 - 1)]).flatten(1)
    assert noise.dtype == torch.float32
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    assert noise.mean() == pytest.approx(0, abs=0.05) and noise.std() == pytest.approx(1, abs=0.05)
    correlation = torch.corrcoef(noise) - torch.eye(3)
    assert correlation.abs().max() < 5 / 3000**0.5


def test_noise_is_the_normal_quantile_of_raw_philox_numbers():
    bits = np.random.Philox(key=5).random_raw(4)
    np.testing.assert_allclose(keyed_normal(5, (2, 2)).flatten(), stats.norm.ppf(bits / 2.0**64), rtol=1e-6)


# Mixup and CutMix


@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.8, 1.0, 6.0])
def test_lambda_follows_the_symmetric_beta_distribution(alpha):
    lam = np.array([symmetric_beta(alpha, u) for u in draws(0, 40_000).reshape(-1, 2)])
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert lam.mean() == pytest.approx(0.5, abs=0.015)
    assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.005)  # 0.0962 at 0.8


def test_lambda_by_hand():
    # alpha 1 is the uniform distribution: with cos^2 = 1 it is (1 +- sqrt(1 - u)) / 2, u counted from 1 downwards.
    assert symmetric_beta(1, np.array([0.64, 0.0])) == pytest.approx(0.9)
    assert symmetric_beta(1, np.array([0.64, 0.5])) == pytest.approx(0.1)
    assert symmetric_beta(1, np.array([0.0, 0.3])) == 0.5
    for alpha in (1e-6, 1e6):
        assert 0 <= symmetric_beta(alpha, np.array([1 - 2.0**-53, 0.25])) <= 1


@pytest.mark.parametrize(
    ("lam", "uniform", "box"),
    [
        (0.75, (0.5, 0.5), (2, 6, 4, 12)),  # half of each side
        (0.75, (0.0, 0.999), (0, 2, 11, 16)),  # cut by two edges
        (0.0, (0.5, 0.5), (0, 8, 0, 16)),
        (1.0, (0.5, 0.5), (4, 4, 8, 8)),
    ],
)
def test_cutmix_box_by_hand(lam, uniform, box):
    assert cutmix_box((8, 16), lam, np.array(uniform)) == box


def test_mixup_is_the_weighted_mean():
    first, second = torch.randn(3, 6, 8), torch.randn(3, 6, 8)
    uniform = np.array([0.5, 0.64, 0.0, 0.3, 0.3])
    mixed, lam = mix_pair(first, second, uniform, mixup_alpha=1.0, cutmix_alpha=0.0)
    assert lam == pytest.approx(0.9)
    torch.testing.assert_close(mixed, 0.9 * first + 0.1 * second)
    assert mixed.dtype == torch.float32


def test_cutmix_share_is_that_of_the_pixels():
    first, second = torch.zeros(3, 30, 20), torch.ones(3, 30, 20)
    shares = []
    for seed in range(200):
        mixed, lam = mix_pair(first, second, draws(seed, MIX_DRAWS), mixup_alpha=0.0)
        assert lam == pytest.approx(1 - float(mixed.mean()), abs=1e-6)
        assert set(mixed.unique().tolist()) <= {0.0, 1.0}
        shares.append(lam)
    assert np.std(shares) > 0.1
    assert bool((first == 0).all()) and bool((second == 1).all())


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_partners_have_equal_shares_and_swapped_roles(alphas):
    first, second = torch.randn(3, 16, 16), torch.randn(3, 16, 16)
    for seed in range(20):
        uniform = draws(seed, MIX_DRAWS)
        mixed, lam = mix_pair(first, second, uniform, *alphas)
        partner, partner_lam = mix_pair(second, first, uniform, *alphas)
        assert lam == partner_lam
        torch.testing.assert_close(mixed + partner, first + second)  # what one gives, the other gets
        again, _ = mix_pair(first, second, uniform, *alphas)
        assert torch.equal(mixed, again)
    assert not torch.equal(mixed, mix_pair(first, second, draws(99, MIX_DRAWS), *alphas)[0])


def test_alpha_0_switches_a_kind_off():
    first, second = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    unmixed, lam = mix_pair(first, second, draws(0, MIX_DRAWS), 0, 0)
    assert unmixed is first and lam == 1.0
    for seed in range(50):  # mixup leaves one value everywhere, strictly between those mixed
        only_mixup, _ = mix_pair(first, second, draws(seed, MIX_DRAWS), 0.8, 0, switch_prob=1.0)
        assert len(only_mixup.unique()) == 1 and 0 < only_mixup[0, 0, 0] < 1
        only_cutmix, _ = mix_pair(first, second, draws(seed, MIX_DRAWS), 0, 1.0, switch_prob=0.0)
        assert set(only_cutmix.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("switch_prob", [0.0, 0.3, 1.0])
def test_share_of_cutmix(switch_prob):
    first, second = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    mixed = [mix_pair(first, second, draws(seed, MIX_DRAWS), switch_prob=switch_prob)[0] for seed in range(500)]
    cut = sum(set(image.unique().tolist()) <= {0.0, 1.0} for image in mixed) / 500
    assert cut == pytest.approx(switch_prob, abs=0.1 if switch_prob == 0.3 else 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup_alpha": -0.1}, "mixup_alpha=-0.1 must be finite and at least 0; 0 switches mixup off"),
        ({"cutmix_alpha": -1}, "cutmix_alpha=-1 must be finite and at least 0; 0 switches CutMix off"),
        ({"mixup_alpha": math.nan}, "mixup_alpha=nan"),
        ({"switch_prob": 1.1}, r"switch_prob=1.1 must be in \[0, 1\]"),
    ],
)
def test_mixing_refuses_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        mix_pair(torch.zeros(1, 4, 4), torch.ones(1, 4, 4), draws(0, MIX_DRAWS), **settings)


# Targets


@pytest.mark.parametrize(
    ("labels", "lam", "smoothing", "target"),
    [
        ((1, 3), 0.7, 0.0, [0, 0.7, 0, 0.3]),
        ((1, 3), 1.0, 0.1, [0.025, 0.925, 0.025, 0.025]),  # 1 - 0.1 + 0.1 / 4
        ((0, 2), 0.5, 0.2, [0.45, 0.05, 0.45, 0.05]),
        ((2, 2), 0.3, 0.1, [0.025, 0.025, 0.925, 0.025]),
        ((0, 1), 0.6, 1.0, [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_targets_by_hand(labels, lam, smoothing, target):
    mixed = mixed_target(*labels, lam, 4, smoothing)
    torch.testing.assert_close(mixed, torch.tensor(target, dtype=torch.float32))
    assert mixed.sum() == pytest.approx(1)


def test_targets_give_the_loss_of_smoothed_hard_labels():
    logits = torch.randn(1, 5)
    loss = torch.nn.functional.cross_entropy(logits, mixed_target(3, 1, 1.0, 5, 0.1)[None])
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([3]), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_targets_refuse_wrong_labels_and_smoothing():
    for labels in ((4, 0), (0, -1)):
        with pytest.raises(ValueError, match=r"is not in 0 \.\.\. 3; num_classes=4"):
            mixed_target(*labels, 0.5, 4)
    with pytest.raises(ValueError, match="label_smoothing=1.2"):
        mixed_target(0, 1, 0.5, 4, 1.2)
