"""Weights go in and out without loss: the same masks give the same loss, the same images the same features."""

import json
import os

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessorPil, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel, ViTModel

from modeling_ehm import EHMConfig, EHMForPreTraining, EHMModel
from modeling_ehm.conversion import export_vit, from_vit_mae, main, to_vit
from modeling_ehm.masking_ehm import mask_from_scores, random_scores
from modeling_ehm.modeling_ehm import sincos_positions

MAE_SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}


def random_mae(**changes) -> ViTMAEForPreTraining:
    """ViTMAE with every weight random: biases and tokens are 0 after initialisation and would hide a mix-up."""
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(ViTMAEConfig(**(MAE_SIZES | changes))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
        # transformers 5.23 leaves both tables at zero in a model built from scratch.
        model.vit.embeddings.position_embeddings.copy_(sincos_positions((4, 4), 64))
        model.decoder.decoder_pos_embed.copy_(sincos_positions((4, 4), 32))
    return model


@pytest.fixture
def mae_directory(tmp_path):
    random_mae().save_pretrained(tmp_path / "mae")
    return tmp_path / "mae"


@pytest.fixture
def random_ehm(config):
    torch.manual_seed(0)
    model = EHMForPreTraining(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_vit_mae_gives_the_same_loss(tmp_path, norm_pix_loss):
    mae = random_mae(norm_pix_loss=norm_pix_loss)
    mae.save_pretrained(tmp_path)
    model = from_vit_mae(tmp_path)
    images = torch.rand(3, 3, 32, 32)
    noise = random_scores(torch.tensor([3, 1, 4]), 16)
    mask = mask_from_scores(noise, 12)
    with torch.no_grad():
        ours, theirs = model(images, mask), mae(images, noise=noise)
    assert torch.equal(mask.float(), theirs.mask)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-5)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=0)
    assert not model.training


def test_vit_mae_config_is_taken_over(tmp_path):
    changes = {
        "layer_norm_eps": 1e-3,  # large, so that the features would tell
        "norm_pix_loss": True,
        "mask_ratio": 0.5,
        "qkv_bias": False,
        "num_channels": 1,
        "hidden_act": "relu",
        "initializer_range": 0.03,
    }
    mae = random_mae(**changes)
    mae.save_pretrained(tmp_path)
    model = from_vit_mae(tmp_path, teacher="ema", num_nodes_end=3, softness_end=0.25)
    for name, value in (MAE_SIZES | changes | {"teacher": "ema", "num_nodes_end": 3, "softness_end": 0.25}).items():
        assert getattr(model.config, name) == value, name
    images = torch.rand(2, 1, 32, 32)
    noise = random_scores(torch.tensor([3, 1]), 16)
    with torch.no_grad():
        ours, theirs = model(images, mask_from_scores(noise, 8)), mae(images, noise=noise)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-5)


def test_vit_mae_in_half_precision_becomes_float32(tmp_path):
    random_mae().to(torch.bfloat16).save_pretrained(tmp_path)
    model = from_vit_mae(tmp_path)
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}


def test_positions_stay_buffers_and_are_copied(mae_directory):
    model = from_vit_mae(mae_directory)
    assert not [name for name, _ in model.named_parameters() if "pos" in name.rsplit(".", 1)[-1]]
    assert torch.equal(model.ehm.embeddings.position_embeddings, sincos_positions((4, 4), 64))


def test_zero_positions_are_kept_but_told(tmp_path, caplog):
    mae = random_mae()
    mae.vit.embeddings.position_embeddings.data.zero_()
    mae.save_pretrained(tmp_path)
    model = from_vit_mae(tmp_path)
    assert not model.ehm.embeddings.position_embeddings.any()
    (message,) = [record.message for record in caplog.records]
    assert "ehm.embeddings.position_embeddings is all zeros" in message


@pytest.mark.parametrize("whole", [True, False])
def test_vit_has_the_features_of_the_encoder(random_ehm, whole):
    images = torch.rand(2, 3, 32, 32)
    vit = to_vit(random_ehm if whole else random_ehm.ehm)
    assert type(vit) is ViTModel and not vit.training
    with torch.no_grad():
        ours, theirs = random_ehm.ehm(images), vit(images)
    torch.testing.assert_close(theirs.last_hidden_state, ours.last_hidden_state, atol=1e-5, rtol=0)
    vit.layers[0].mlp.fc1.weight.data.zero_()  # a copy: the encoder does not follow
    assert random_ehm.ehm.layers[0].mlp.fc1.weight.any()


def test_vit_of_a_non_square_simmim_encoder(make_config):
    config = make_config(
        objective="simmim", image_size=[32, 48], patch_size=[8, 16], num_channels=5, qkv_bias=False, layer_norm_eps=1e-3
    )
    model = EHMForPreTraining(config).eval()
    vit = to_vit(model)
    images = torch.rand(2, 5, 32, 48)
    with torch.no_grad():
        ours, theirs = model.ehm(images), vit(images)
    torch.testing.assert_close(theirs.last_hidden_state, ours.last_hidden_state, atol=1e-5, rtol=0)


LOAD_PLAIN_VIT = """
import torch
from transformers import AutoImageProcessor, AutoModel
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder).eval()
assert type(model).__module__ == "transformers.models.vit.modeling_vit", type(model)
with torch.no_grad():
    features = model(torch.load(folder + "/../images.pt")).last_hidden_state
torch.save(features, folder + "/../features.pt")
print(AutoImageProcessor.from_pretrained(folder).size)
"""


def test_exported_vit_loads_where_this_package_is_missing(random_ehm, tmp_path, run_without_package):
    random_ehm.save_pretrained(tmp_path / "ehm")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "ehm")
    export_vit(tmp_path / "ehm", tmp_path / "vit")
    written = json.loads((tmp_path / "vit" / "config.json").read_text())
    assert written["model_type"] == "vit" and written["architectures"] == ["ViTModel"] and "auto_map" not in written
    assert sorted(os.listdir(tmp_path / "vit")) == ["config.json", "model.safetensors", "preprocessor_config.json"]

    images = torch.rand(2, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    result = run_without_package(LOAD_PLAIN_VIT, tmp_path / "vit")
    assert result.returncode == 0, result.stderr
    assert "height=32, width=32" in result.stdout
    with torch.no_grad():
        expected = random_ehm.ehm(images).last_hidden_state
    torch.testing.assert_close(torch.load(tmp_path / "features.pt"), expected, atol=1e-5, rtol=0)


def test_export_of_a_model_in_memory_writes_no_image_processor(random_ehm, tmp_path):
    export_vit(random_ehm.to(torch.bfloat16), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_both_commands(mae_directory, tmp_path, run_module):
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(mae_directory)
    ehm, vit = tmp_path / "ehm", tmp_path / "vit"
    first = run_module("modeling_ehm.conversion", "from-vit-mae", mae_directory, ehm)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == f"from-vit-mae: {mae_directory} -> {ehm}\n"
    second = run_module("modeling_ehm.conversion", "to-vit", ehm, vit)
    assert (second.returncode, second.stderr) == (0, "")
    assert second.stdout == f"to-vit: {ehm} -> {vit}\n"

    images = torch.rand(2, 3, 32, 32)
    order = torch.arange(16.0).expand(2, -1)  # ascending noise keeps all patches, in order
    mae = ViTMAEModel.from_pretrained(mae_directory, mask_ratio=0.0).eval()
    with torch.no_grad():
        expected = mae(images, noise=order).last_hidden_state
        ours = EHMModel.from_pretrained(ehm).eval()(images).last_hidden_state
        plain = ViTModel.from_pretrained(vit, add_pooling_layer=False).eval()(images).last_hidden_state
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=0)
    image = Image.new("RGB", (32, 32), (255, 0, 0))
    for folder in (ehm, vit):
        pixels = ViTImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt").pixel_values
        torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([0.9, -0.2, -0.3]) / 0.5)


def error_of(*arguments) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    assert isinstance(exit_info.value.code, str), "an error must give a message and so exit code 1"
    assert "\n" not in exit_info.value.code
    return exit_info.value.code


def test_command_refuses_to_overwrite(mae_directory, tmp_path):
    target = tmp_path / "full"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    message = error_of("from-vit-mae", mae_directory, target)
    assert f"{target} is not empty; give another directory, or --overwrite" in message
    assert os.listdir(target) == ["notes.txt"]
    main(["from-vit-mae", str(mae_directory), str(target), "--overwrite"])
    assert (target / "notes.txt").read_text() == "mine" and (target / "model.safetensors").exists()
    assert "is the source itself" in error_of("to-vit", target, target, "--overwrite")
    assert "is a file; a directory is expected" in error_of("to-vit", target, target / "notes.txt")


def test_command_errors_are_one_clear_line(mae_directory, tmp_path):
    prefix = "python -m modeling_ehm.conversion to-vit: error: "
    missing = tmp_path / "missing"
    message = error_of("to-vit", missing, tmp_path / "out")
    assert message == f"{prefix}{missing} is neither a directory nor a Hub id (owner/name)"
    message = error_of("to-vit", mae_directory, tmp_path / "out")
    assert message == (
        f"{prefix}{mae_directory} has model_type='vit_mae' in its config.json; 'ehm' is expected"
    )
    (tmp_path / "empty").mkdir()
    assert "config.json" in error_of("from-vit-mae", tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_and_unused_and_misshapen_weights_are_named(mae_directory, tmp_path):
    file = mae_directory / "model.safetensors"
    weights = load_file(file)
    (encoder_bias,) = [name for name in weights if name.endswith("layer.0.output.dense.bias") and "vit." in name]
    changed = dict(weights, extra=torch.zeros(1)) | {"decoder.decoder_pred.bias": torch.zeros(7)}
    del changed[encoder_bias]
    save_file(changed, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit ViTMAEForPreTraining") as error:
        from_vit_mae(mae_directory)
    assert "missing: vit.layers.0.mlp.fc2.bias" in str(error.value)
    assert "unused: extra" in str(error.value)
    assert "of another shape: decoder.decoder_pred.bias" in str(error.value)


def test_encoder_without_decoder_is_refused(tmp_path):
    random_mae().vit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: decoder\.decoder_embed\.bias, .* and \d+ more"):
        from_vit_mae(tmp_path)


def test_overrides_are_checked(mae_directory):
    with pytest.raises(ValueError, match="EHMConfig has no field techer"):
        from_vit_mae(mae_directory, techer="ema")
    with pytest.raises(ValueError, match=r"do not fit EHMForPreTraining.*unused: .*ehm\.layers\.1"):
        from_vit_mae(mae_directory, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"image_size.*of another shape: decoder\.decoder_pos_embed, ehm\.embeddings"):
        from_vit_mae(mae_directory, image_size=64)


def test_incomplete_ehm_directory_is_refused(random_ehm, tmp_path):
    random_ehm.save_pretrained(tmp_path / "ehm")
    weights = load_file(tmp_path / "ehm" / "model.safetensors")
    del weights["ehm.layernorm.weight"]
    save_file(weights, tmp_path / "ehm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit EHMModel; missing: layernorm\.weight"):
        export_vit(tmp_path / "ehm", tmp_path / "vit")


def test_fields_of_the_three_configs_are_complete():
    """A field that a later version of ours shares with ViTMAE must be converted too."""
    import dataclasses

    from transformers import PreTrainedConfig, ViTConfig

    from modeling_ehm.conversion import DECODER_FIELDS, ENCODER_FIELDS

    names = [{f.name for f in dataclasses.fields(c)} for c in (EHMConfig, ViTMAEConfig, ViTConfig, PreTrainedConfig)]
    ours, mae, vit, every = names
    assert set(ENCODER_FIELDS) == (ours & vit) - every
    assert set(ENCODER_FIELDS + DECODER_FIELDS) == (ours & mae) - every
