"""Snapshots: their parts known by hand. Pictures: that they are drawn, small, the same each time, and refuse well."""

import importlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_ehm import EHMConfig, EHMForPreTraining, EHMForPreTrainingOutput
from modeling_ehm.modeling_ehm import normalize_patches, patchify
from modeling_ehm.training import pictures
from modeling_ehm.training.pictures import load_snapshot, render_curves, render_gallery, save_snapshot, snapshot

MEAN, STD = 0.5, 0.25


def make_model(**changes) -> EHMForPreTraining:
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    decoder = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    sizes = dict(image_size=32, patch_size=8, decoder_intermediate_size=32)
    torch.manual_seed(0)
    return EHMForPreTraining(EHMConfig(**small | decoder | sizes | changes))


def make_images(channels: int = 3, height: int = 32, width: int = 32, count: int = 2) -> torch.Tensor:
    """Pixels in [0.1, 0.9], normalised."""
    pixels = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    return (pixels - MEAN) / STD


def take(model: EHMForPreTraining, images: torch.Tensor, progress: float = 0.5) -> dict[str, np.ndarray]:
    return snapshot(model, images, progress, torch.arange(len(images)), MEAN, STD)


def as_uint8(images: torch.Tensor) -> np.ndarray:
    return ((images * STD + MEAN).permute(0, 2, 3, 1) * 255).round().numpy().astype(np.uint8)


@pytest.fixture
def points():
    model, images = make_model(), make_images()
    return [(step, step / 8, take(model, images, step / 8)) for step in range(9)]


# Snapshots


def test_snapshot_shows_the_masks_and_trees_of_training():
    model, images = make_model(), make_images()
    shot = take(model, images, progress=0.75)  # 16 - 0.75 * 14 = 5.5 nodes
    assert shot["num_nodes"] == model.mask_schedule(0.75)[0] == 6
    trees = model.parse_hierarchy(images)
    assert np.array_equal(shot["labels"], trees.cut(6).numpy())
    assert np.array_equal(shot["coarse_labels"], trees.cut(6).numpy())
    model.train()
    assert np.array_equal(shot["mask"], model.evolve_mask(images, 0.75, torch.arange(2)).numpy())
    assert shot["mask"].sum(1).tolist() == [12, 12]
    assert np.array_equal(shot["image"], as_uint8(images))


def test_random_masks_come_with_the_models_hierarchy():
    model, images = make_model(mask_policy="random"), make_images()
    shot = take(model, images, progress=1.0)
    assert np.array_equal(shot["labels"], model.parse_hierarchy(images).cut(2).numpy())
    assert np.array_equal(shot["mask"], model.evolve_mask(images, None, torch.arange(2)).numpy())
    assert shot["mask_policy"] == "random"


def test_labels_show_two_nodes_at_least():
    shot = take(make_model(num_nodes_end=1), make_images(), progress=1.0)
    assert shot["num_nodes"] == 2
    assert shot["labels"].max() == 1


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_reconstructs_the_image(norm_pix_loss, monkeypatch):
    model, images = make_model(norm_pix_loss=norm_pix_loss), make_images()
    target = patchify(images, (8, 8))
    target = normalize_patches(target) if norm_pix_loss else target
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: EHMForPreTrainingOutput(logits=target))
    shot = take(model, images)
    assert np.abs(shot["reconstruction"].astype(int) - shot["image"]).max() <= 1


def test_reconstruction_keeps_visible_patches_and_predicts_hidden_ones(monkeypatch):
    model, images = make_model(norm_pix_loss=True), make_images()
    grey = EHMForPreTrainingOutput(logits=torch.zeros(2, 16, 192))  # normalised 0: the mean of the true patch
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: grey)
    shot = take(model, images)
    hidden = np.kron(shot["mask"].reshape(2, 4, 4), np.ones((1, 8, 8), bool))
    assert np.array_equal(shot["reconstruction"][~hidden], shot["image"][~hidden])
    row, column = np.argwhere(shot["mask"][0].reshape(4, 4))[0] * 8
    predicted = shot["reconstruction"][0, row : row + 8, column : column + 8]
    assert predicted.min() == predicted.max()
    assert abs(predicted.mean() - shot["image"][0, row : row + 8, column : column + 8].mean()) < 1


def test_snapshot_leaves_no_trace():
    model, images = make_model(hidden_dropout_prob=0.5), make_images()
    model.train()
    model.ehm.layers[0].eval()  # frozen by a caller
    model.timings = {}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    first, second = take(model, images), take(model, images)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.timings == {}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels_becomes_a_picture(channels):
    images = make_images(channels)
    shot = take(make_model(num_channels=channels), images)
    expected = as_uint8(images)[..., :3] if channels >= 3 else np.repeat(as_uint8(images)[..., :1], 3, axis=-1)
    assert np.array_equal(shot["image"], expected)
    assert shot["reconstruction"].shape == (2, 32, 32, 3)


def test_mean_and_std_per_channel():
    images = make_images()
    shot = snapshot(make_model(), images, 0.5, torch.arange(2), (0.5, 0.4, 0.3), [0.25, 0.25, 0.25])
    assert np.array_equal(shot["image"][..., 0], as_uint8(images)[..., 0])
    assert (as_uint8(images).astype(int) - shot["image"]).max((0, 1, 2)) == pytest.approx([0, 25.5, 51], abs=1)
    with pytest.raises(ValueError, match=r"mean=\[0.5, 0.5\] has 2 numbers for 3 channels"):
        snapshot(make_model(), images, 0.5, torch.arange(2), [0.5, 0.5], STD)
    with pytest.raises(ValueError, match="progress=7"):
        take(make_model(), images, progress=7)


def test_snapshot_survives_a_file_without_pickle(tmp_path):
    shot = take(make_model(), make_images())
    save_snapshot(tmp_path / "new" / "step-1.npz", shot)
    loaded = load_snapshot(tmp_path / "new" / "step-1.npz")
    assert loaded.keys() == shot.keys()
    assert all(np.array_equal(loaded[name], shot[name]) and loaded[name].dtype == shot[name].dtype for name in shot)
    with pytest.raises(ValueError, match="must end in .npz"):
        save_snapshot(tmp_path / "step-1.npy", shot)
    with pytest.raises(ValueError, match=r"snapshot\['note'\] is an array of Python objects"):
        save_snapshot(tmp_path / "step-2.npz", shot | {"note": np.array([None])})


# Gallery


def test_gallery_is_one_small_picture_the_same_each_time(points, tmp_path):
    pytest.importorskip("matplotlib")
    first = render_gallery(points, tmp_path / "new" / "gallery.png")
    again = render_gallery(points[::-1], tmp_path / "again.png")  # sorted by step
    assert first.read_bytes() == again.read_bytes()
    with Image.open(first) as picture:
        assert picture.size[0] <= 1600
    assert first.stat().st_size <= 600_000


def test_gallery_spreads_its_points_over_training(points, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "_draw_gallery", lambda chosen, path: drawn.extend(step for step, *_ in chosen))
    render_gallery(points, tmp_path / "gallery.png")
    assert drawn == [0, 2, 4, 6, 8]


def test_gallery_of_one_point_of_many_oblong_images(tmp_path):
    pytest.importorskip("matplotlib")
    model, images = make_model(num_channels=1, image_size=(16, 40)), make_images(1, 16, 40, count=7)
    path = render_gallery([(0, 0.5, take(model, images))], tmp_path / "gallery.png")
    with Image.open(path) as picture:
        assert 700 <= picture.size[0] <= 1600
        assert np.asarray(picture.convert("L"))[:, -6:].min() > 250  # no line of the caption runs out of the picture


def test_gallery_shrinks_to_its_limit(points, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    large = render_gallery(points, tmp_path / "large.png").stat().st_size
    monkeypatch.setattr(pictures, "MAX_BYTES", large // 2)
    assert render_gallery(points, tmp_path / "small.png").stat().st_size <= large // 2


def test_captions_say_how_the_pictures_were_made(points):
    text = " ".join(pictures._caption(points))
    assert "75% of the patches are hidden" in text and "whole nodes at a time" in text
    assert "norm_pix_loss" in text and "true patch's mean and variance" in text
    images = make_images()
    model = make_model(norm_pix_loss=False, mask_policy="random")
    text = " ".join(pictures._caption([(0, 0.0, take(model, images))]))
    assert "drawn at random" in text and "norm_pix_loss" not in text
    soft = take(make_model(softness_end=0.5), images, progress=1.0)
    text = " ".join(pictures._caption([(0, 1.0, take(make_model(num_nodes_end=2), images, progress=1.0))]))
    assert "Where K is below 6" in text
    assert "softness" in " ".join(pictures._caption([(0, 1.0, soft)]))


def test_panels_known_by_hand():
    image = np.zeros((2, 4, 3), np.uint8)
    image[:, :2], image[:, 2:] = 100, 200
    shot = {"image": image[None], "mask": np.array([[True, False]]), "grid_size": np.array([1, 2])}
    assert pictures._masked_image(shot, 0)[0, :, 0].tolist() == [128, 128, 200, 200]
    # One node: three quarters its mean colour, 150, one quarter the image.
    assert pictures._mean_colours(image, np.array([0, 0]), (1, 2))[0, :, 0].tolist() == [138, 138, 162, 162]


def test_gallery_errors(points, tmp_path):
    with pytest.raises(ValueError, match="snapshots is empty"):
        render_gallery([], tmp_path / "gallery.png")
    other = take(make_model(), make_images().flip(0))
    with pytest.raises(ValueError, match="images of step 9 differ from those of step 0"):
        render_gallery([*points, (9, 1.0, other)], tmp_path / "gallery.png")


# Curves


def test_curves_show_the_series_that_exist(tmp_path):
    pytest.importorskip("matplotlib")
    log = [{"step": step, "loss": 1 / (1 + step), "epoch": 0.1} for step in range(50)]
    log += [{"step": 10, "eval_knn": 0.3}, {"step": 40, "eval_knn": 0.5}, {"train_runtime": 3.0}]
    both = {"ours": log, "random masks": log[:20]}
    one = render_curves(both, tmp_path / "one.png", keys=["eval_knn", "eval_nothing"])
    two = render_curves(both, tmp_path / "two.png")
    with_reference = render_curves(both, tmp_path / "reference.png", references={"eval_knn": 0.4, "eval_linear": 0.4})
    assert with_reference.read_bytes() != two.read_bytes()
    with Image.open(one) as small, Image.open(two) as large:
        assert 2 * small.size[0] == large.size[0] <= 1600
    assert two.read_bytes() == render_curves(both, tmp_path / "again.png").read_bytes()


def test_series_keeps_the_later_of_two_values_of_a_step():
    log = [{"step": 2, "loss": 3.0}, {"step": 1, "loss": 4}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": None}]
    assert pictures._series(log, "loss") == ([1, 2], [4.0, 1.0])


def test_curves_without_series_say_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"keys=\['eval_f1'\].*\['loss', 'rate'\]"):
        render_curves({"run": [{"step": 1, "loss": 1.0, "rate": 2.0}]}, tmp_path / "curves.png", keys=["eval_f1"])


def test_without_matplotlib_runs_still_record_themselves(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # import matplotlib now fails
    module = importlib.reload(pictures)
    images = make_images()
    shot = module.snapshot(make_model(), images, 0.5, torch.arange(2), MEAN, STD)
    with pytest.raises(ImportError, match=r"pip install modeling_ehm\[viz\]"):
        module.render_gallery([(0, 0.5, shot)], tmp_path / "gallery.png")
    with pytest.raises(ImportError, match=r"pip install modeling_ehm\[viz\]"):
        module.render_curves({"run": [{"step": 1, "loss": 1.0}]}, tmp_path / "curves.png")
