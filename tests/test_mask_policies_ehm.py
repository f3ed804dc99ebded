"""Every policy keeps count, polarity and determinism, and masks what its name says."""

from functools import partial

import pytest
import torch

from modeling_ehm.checks import check_mask_policy, small_model
from modeling_ehm.mask_policies_ehm import (
    MASK_POLICIES,
    MaskRequest,
    cluster_patches,
    mask_policy_named,
    register_mask_policy,
)
from modeling_ehm.masking_ehm import keyed_uniform, mask_from_scores


def scores_of(name: str, grid_size: tuple[int, int], num_images: int, progress: float = 0.5) -> torch.Tensor:
    """`(B, N)` of a policy that looks at no picture."""
    request = MaskRequest(
        config=None,
        grid_size=grid_size,
        mask_seed=torch.arange(num_images),
        pixel_values=None,
        progress=lambda: progress,
        schedule=lambda: (8, 0.0),
        affinity=None,
        hierarchy=None,
    )
    return mask_policy_named(name)(request)


@pytest.fixture
def registry(monkeypatch):
    """A copy, so that what a test registers is forgotten."""
    policies = dict(MASK_POLICIES)
    monkeypatch.setattr("modeling_ehm.mask_policies_ehm.MASK_POLICIES", policies)
    return policies


@pytest.mark.parametrize("name", MASK_POLICIES)
def test_every_policy_keeps_the_rules(name):
    check_mask_policy(name)


def test_the_policies():
    assert set(MASK_POLICIES) == {"ehm", "random", "block", "grid", "color_noise", "epm"}


@pytest.mark.parametrize("name", ["random", "block", "grid", "color_noise"])
def test_scores_order_the_patches(name):
    """A permutation of 0, 1/N, ..., so that any number of them may be hidden."""
    scores = scores_of(name, (6, 8), 5)
    assert torch.equal(scores.sort(dim=1).values, (torch.arange(48) / 48).expand(5, -1))


def test_grid_shows_one_place_of_each_tile():
    masks = mask_from_scores(scores_of("grid", (6, 8), 40), 36).reshape(40, 6, 8)
    shown = set()
    for mask in masks:
        tiles = mask.unflatten(0, (3, 2)).unflatten(2, (4, 2))  # (3, 2, 4, 2)
        places = tiles.permute(0, 2, 1, 3).reshape(12, 4).logical_not()
        assert (places == places[0]).all() and places[0].sum() == 1
        shown.add(int(places[0].to(torch.uint8).argmax()))
    assert shown == {0, 1, 2, 3}


def neighbours_alike(masks: torch.Tensor) -> float:
    """Share of neighbouring patches of which both or none are masked; `(B, rows, columns)`."""
    across, down = masks[:, :, 1:] == masks[:, :, :-1], masks[:, 1:] == masks[:, :-1]
    return float(torch.cat([across.flatten(), down.flatten()]).float().mean())


def test_blocks_and_coloured_noise_hide_connected_patches():
    """Of random masks 0.75² + 0.25² = 0.625 of the neighbours are alike."""
    alike = {}
    for name in ("random", "block", "color_noise"):
        masks = mask_from_scores(scores_of(name, (14, 14), 64), 147)
        alike[name] = neighbours_alike(masks.reshape(64, 14, 14))
    assert alike["random"] == pytest.approx(0.625, abs=0.01)
    assert alike["block"] > 0.75 and 0.67 < alike["color_noise"] < alike["block"]


def test_the_first_block_is_a_rectangle():
    """As many patches hidden as the first block has: they are one rectangle."""
    heights, widths = set(), set()
    for scores in scores_of("block", (14, 14), 50):
        sizes = []
        for count in range(10, 70):
            rows, columns = mask_from_scores(scores[None], count).reshape(14, 14).nonzero().unbind(1)
            height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
            if height * width == count:
                sizes.append((height, width))
        assert sizes, "for no count the hidden patches are a rectangle"
        heights.add(sizes[0][0])
        widths.add(sizes[0][1])
    assert len(heights) > 3 and len(widths) > 3


def test_clusters_are_the_blocks_of_an_affinity():
    """Three groups of patches that attend to themselves alone."""
    group = torch.tensor([0, 0, 1, 2, 1, 1, 2, 2, 0, 0, 1, 2])
    affinity = (group[:, None] == group).float()[None].repeat(20, 1, 1) * 2
    parts = cluster_patches(affinity, 6, torch.arange(20))
    apart = 0
    for part in parts:
        for number in range(3):
            assert len(part[group == number].unique()) == 1, "patches alike in every respect are one part"
        apart += len(part.unique()) == 3
    assert apart >= 15


def test_parts_replace_the_grid_as_training_advances():
    """At progress 0 the masks are the grid's, at 1 whole parts."""
    model = small_model(mask_policy="epm", image_size=64, num_nodes_start=8, num_nodes_end=4).train()
    images, seeds = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    assert torch.equal(model.evolve_mask(images, 0.0, seeds), mask_from_scores(scores_of("grid", (8, 8), 8), 48))
    maps = 4 * model.patch_affinity(images)  # two layers with two heads each
    parts = cluster_patches(maps, 4, seeds)
    for mask, part in zip(model.evolve_mask(images, 1.0, seeds), parts, strict=True):
        split = [n for n in part.unique() if 0 < int(mask[part == n].sum()) < int((part == n).sum())]
        assert len(split) <= 1


def test_parts_begin_with_the_evolution():
    model = small_model(mask_policy="epm", image_size=64, evolution_start=0.5).train()
    images, seeds = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    at = partial(model.evolve_mask, images, mask_seed=seeds)
    model.config.evolution_start = 0.0
    expected = at(0.0), at(0.5)
    model.config.evolution_start = 0.5
    assert torch.equal(at(0.75), expected[1]) and not torch.equal(*expected)
    model.patch_affinity = None  # calling it would fail
    assert torch.equal(at(0.5), expected[0])


def test_a_policy_of_ones_own(registry):
    @register_mask_policy("stripes")
    def stripes_scores(request):
        rows, columns = request.grid_size
        row = torch.arange(rows * columns, device=request.mask_seed.device) // columns
        return keyed_uniform(request.mask_seed, rows, stream=16)[:, row]

    check_mask_policy("stripes")
    mask = small_model(mask_policy="stripes", image_size=64).eval()(torch.rand(2, 3, 64, 64)).mask
    assert set(mask.reshape(2, 8, 8).sum(2).flatten().tolist()) == {0, 8}

    def other(request):
        return None

    with pytest.raises(ValueError, match=r"mask_policy='stripes' is already .*stripes_scores; choose another"):
        register_mask_policy("stripes")(other)
    other.__qualname__ = stripes_scores.__qualname__
    register_mask_policy("stripes")(other)  # as a module that is loaded again
    other.__module__ = "elsewhere"
    with pytest.raises(ValueError, match="choose another"):
        register_mask_policy("stripes")(stripes_scores)
    register_mask_policy("half")(partial(stripes_scores))  # callables without a name of their own
    with pytest.raises(ValueError, match="mask_policy='half' is already functools"):
        register_mask_policy("half")(stripes_scores)


BROKEN = {
    "draws": lambda request: torch.rand(len(request.mask_seed), request.num_patches),
    "batch": lambda request: (
        keyed_uniform(request.mask_seed, request.num_patches, 16) * request.mask_seed.sum() % 1
        + keyed_uniform(request.mask_seed.sum()[None], request.num_patches, 17)
    ),
    "seedless": lambda request: torch.arange(request.num_patches).expand(len(request.mask_seed), -1).float(),
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("draws", "draws from torch's generator; use mask_seed"),
        ("batch", "the mask of image 0 depends on its batch"),
        ("seedless", "gives the same masks for other values of mask_seed"),
    ],
)
def test_broken_policies_are_found(registry, name, message):
    registry[name] = BROKEN[name]
    with pytest.raises(AssertionError, match=message):
        check_mask_policy(name)


def test_unknown_policies_and_scores_of_another_shape(registry):
    model = small_model(mask_policy="spirals", image_size=64)  # it loads; only masks need the policy
    with pytest.raises(
        ValueError, match="mask_policy='spirals' is not one of ehm, random, block, .*registers it first"
    ):
        model(torch.rand(2, 3, 64, 64))
    registry["spirals"] = lambda request: torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match=r"mask_policy='spirals' gave scores of shape \(2, 3\); \(2 images, 64 patches\)"
    ):
        model(torch.rand(2, 3, 64, 64))
