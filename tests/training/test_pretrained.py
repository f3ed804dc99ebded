"""Weights that a run starts from: all found, float32, and what the recipe changes of their config is checked."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipes import MODEL, SYNTHETIC, run_script, run_task, write_recipe, write_task_recipe

from modeling_ehm import EHMConfig, EHMForImageClassification, EHMForPreTraining, EHMModel
from modeling_ehm.modeling_ehm import sincos_positions
from modeling_ehm.training.pretrained import load_encoder, load_for_pretraining

LABELLED = {
    "train": SYNTHETIC | {"max_images": 20, "label_column": "label"},
    "test": SYNTHETIC | {"split": "test", "max_images": 10, "label_column": "label"},
}
SEGMENTED = {
    name: SYNTHETIC | {"split": name, "max_images": 10, "segments_column": "segments"} for name in ("train", "test")
} | {"class_names": [f"part {number}" for number in range(40)], "crop_scale": [0.5, 1.0]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return EHMForPreTraining(EHMConfig(**MODEL | {"num_hidden_layers": 2}))


@pytest.fixture
def pretrained(model, tmp_path):
    model.save_pretrained(tmp_path / "pretrained")
    return str(tmp_path / "pretrained")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk_trains_in_float32(model, tmp_path, dtype):
    """At a rate of 1e-5 bfloat16 weights would hardly ever move."""
    half = EHMForPreTraining(model.config).to(dtype)
    half.save_pretrained(tmp_path / "half")
    start = str(tmp_path / "half")
    for loaded in (load_for_pretraining(start, "sdpa"), load_encoder(start, "sdpa")):
        assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    recipe = write_recipe(tmp_path / "recipe.yaml", {"pretrained": start, "num_hidden_layers": 2})
    run_task(recipe)
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    "task, sections",
    [("classify", {"data": LABELLED}), ("segment", {"data": SEGMENTED, "head": {"kind": "linear"}})],
)
def test_so_do_downstream_tasks(model, tmp_path, task, sections):
    EHMForPreTraining(model.config).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    run_task(write_task_recipe(tmp_path / "recipe.yaml", task, tmp_path / "half", **sections))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in saved.values() if weight.is_floating_point()} == {torch.float32}


def test_pre_training_goes_on_at_another_size(model, pretrained):
    """Both tables of positions are made anew, all else is the checkpoint's."""
    larger, weights = load_for_pretraining(pretrained, "sdpa", image_size=64), model.state_dict()
    assert torch.equal(larger.ehm.embeddings.position_embeddings, sincos_positions((8, 8), 32))
    assert torch.equal(larger.decoder.decoder_pos_embed, sincos_positions((8, 8), 16))
    for name, weight in larger.state_dict().items():
        assert "pos" in name or torch.equal(weight, weights[name])


def test_as_many_patches_in_another_grid_have_other_positions(tmp_path):
    EHMForPreTraining(EHMConfig(**MODEL | {"image_size": [64, 32]})).save_pretrained(tmp_path)
    wide = load_for_pretraining(str(tmp_path), "sdpa", image_size=[32, 64])
    assert torch.equal(wide.ehm.embeddings.position_embeddings, sincos_positions((4, 8), 32))
    assert torch.equal(wide.decoder.decoder_pos_embed, sincos_positions((4, 8), 16))
    encoder = load_encoder(str(tmp_path), "sdpa", image_size=[32, 64])
    assert torch.equal(encoder.embeddings.position_embeddings, sincos_positions((4, 8), 32))


@pytest.mark.parametrize("kind", [EHMModel, EHMForImageClassification])
def test_an_encoder_gets_a_new_decoder_and_it_is_told(model, tmp_path, caplog, kind):
    torch.manual_seed(1)
    encoder = kind(model.config)
    encoder.save_pretrained(tmp_path / "encoder")
    with caplog.at_level("WARNING"):
        loaded = load_for_pretraining(str(tmp_path / "encoder"), "sdpa")
    assert "holds no decoder: a new one starts with random weights" in caplog.text
    weights = encoder.base_model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.ehm.state_dict().items())
    with caplog.at_level("WARNING"):
        caplog.clear()
        load_for_pretraining(str(tmp_path / "encoder"), "sdpa", image_size=64)
    assert "holds no decoder" in caplog.text


@pytest.mark.parametrize(
    "overrides, problem",
    [
        ({"num_hidden_layers": 4}, r"do not fit EHMForPreTraining; missing: ehm.layers.2.attention"),
        ({"num_hidden_layers": 1}, r"unused: ehm.layers.1"),
        ({"decoder_hidden_size": 32}, r"of another shape: decoder.decoder_embed"),
        ({"objective": "simmim"}, r"missing: decoder.bias, decoder.weight, ehm.embeddings.mask_token"),
        ({"objective": "simim"}, r"objective='simim' is not one of mae, simmim"),
        ({"affinity": "key"}, r"affinity='key' is not one of attention, keys"),
        ({"num_nodes_end": 1000}, r"num_nodes_end=1000 must lie in \[1, 16\]"),
        ({"softness_end": 7}, r"softness_end=7 must lie in \[0, 1\]"),
        ({"image_size": 36}, r"image_size=36 is not a multiple of patch_size=8"),
    ],
)
def test_what_does_not_fit_is_refused(pretrained, overrides, problem):
    with pytest.raises(Exception, match=problem):
        load_for_pretraining(pretrained, "sdpa", **overrides)


def test_it_is_told_in_one_line(tmp_path, pretrained):
    """A field that is wrong, and a folder that is none."""
    recipe = write_recipe(tmp_path / "recipe.yaml", {"pretrained": pretrained, "num_hidden_layers": 2})
    for override, told in (
        ("model.pooling=max", "pooling='max' is not one of mean, cls"),
        ("model.pretrained=out/nowhere", "model.pretrained='out/nowhere' is no directory that holds a model"),
    ):
        done = run_script(recipe, override)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert told in done.stderr.strip().splitlines()[-1]
