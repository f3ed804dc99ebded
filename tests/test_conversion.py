"""Weights go in and out without loss: the same masks give the same loss, the same images the same features."""

import json
import os

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    Dinov2Backbone,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from modeling_ehm import (
    EHMBackbone,
    EHMConfig,
    EHMForImageClassification,
    EHMForPreTraining,
    EHMForSemanticSegmentation,
    EHMModel,
)
from modeling_ehm.conversion import (
    export_dinov2_backbone,
    export_vit,
    from_vit_mae,
    load_encoder_or_classifier,
    main,
    to_dinov2_backbone,
    to_vit,
)
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


def build(model_class, config):
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


@pytest.fixture
def random_ehm(config):
    return build(EHMForPreTraining, config)


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


def test_vit_for_another_size_has_its_positions(random_ehm):
    images = torch.rand(2, 3, 48, 16)
    vit = to_vit(random_ehm, image_size=(48, 16))
    with torch.no_grad():
        ours, theirs = random_ehm.ehm(images), vit(images)
    torch.testing.assert_close(theirs.last_hidden_state, ours.last_hidden_state, atol=1e-5, rtol=0)
    assert torch.equal(random_ehm.ehm.embeddings.position_embeddings, sincos_positions((4, 4), 64))
    for convert in (to_vit, to_dinov2_backbone):
        with pytest.raises(ValueError, match="image_size=36 is not a multiple of patch_size=8"):
            convert(random_ehm, image_size=36)


def test_vit_classifier_of_the_class_token(make_config, tmp_path):
    names = {0: "cat", 1: "dog", 2: "owl"}
    config = make_config(pooling="cls", id2label=names, label2id={name: n for n, name in names.items()})
    model = build(EHMForImageClassification, config)
    model.save_pretrained(tmp_path / "ehm")
    main(["to-vit", str(tmp_path / "ehm"), str(tmp_path / "vit")])
    vit = AutoModelForImageClassification.from_pretrained(tmp_path / "vit").eval()
    assert type(vit) is ViTForImageClassification
    assert vit.config.id2label == names and vit.config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([2, 0, 1, 1])
    with torch.no_grad():
        ours, theirs = model(images, labels), vit(images, labels=labels)
    torch.testing.assert_close(theirs.logits, ours.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.loss, ours.loss, atol=1e-5, rtol=0)


def test_vit_has_no_mean_pooling(make_config, tmp_path):
    model = build(EHMForImageClassification, make_config(num_labels=3))
    with pytest.raises(ValueError, match=r"pooling='mean'.*pooling='cls', or call to_vit\(model\.ehm\).*export"):
        to_vit(model)
    assert type(to_vit(model.ehm)) is ViTModel
    model.save_pretrained(tmp_path / "ehm")
    assert "pooling='mean'" in error_of("to-vit", tmp_path / "ehm", tmp_path / "vit")
    assert not (tmp_path / "vit").exists()


def test_a_segmentation_checkpoint_is_converted_as_its_encoder(make_config, tmp_path):
    model = build(EHMForSemanticSegmentation, make_config(num_labels=3))
    model.save_pretrained(tmp_path)
    loaded = load_encoder_or_classifier(tmp_path)
    assert type(loaded) is EHMModel and type(to_vit(model)) is ViTModel
    for name, weight in model.ehm.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"apply_layernorm": False},
        {"reshape_hidden_states": False},
        {"objective": "simmim", "hidden_act": "relu", "qkv_bias": False, "layer_norm_eps": 1e-3, "num_channels": 1},
        {"patch_size": [8, 16], "feature_scales": [1, 1.0, 1]},
    ],
    ids=str,
)
def test_dinov2_backbone_has_the_maps_of_ours(make_config, changes):
    model = build(EHMBackbone, make_config(out_indices=[0, 2, 3], **changes))
    dinov2 = to_dinov2_backbone(model)
    assert type(dinov2) is Dinov2Backbone and not dinov2.training
    assert dinov2.out_features == ["stem", "stage2", "stage3"] and dinov2.channels == [64, 64, 64]
    images = torch.rand(2, model.config.num_channels, 32, 32)
    with torch.no_grad():
        pairs = list(zip(model(images).feature_maps, dinov2(images).feature_maps, strict=True))
    for ours, theirs in pairs:  # theirs convolves, ours multiplies: some patch shapes round differently
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    dinov2.encoder.layer[0].mlp.fc1.weight.data.zero_()  # a copy: ours does not follow
    assert model.layers[0].mlp.fc1.weight.any()


def test_dinov2_backbone_at_another_size(random_ehm, make_config):
    """Exact when made for that size; DINOv2 interpolates otherwise, which is near and not equal."""
    ours = build(EHMBackbone, make_config())
    ours.load_state_dict(random_ehm.ehm.state_dict())
    images = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        (expected,) = ours(images).feature_maps
        (made,) = to_dinov2_backbone(random_ehm, image_size=48)(images).feature_maps
        (interpolated,) = to_dinov2_backbone(random_ehm)(images).feature_maps
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)
    assert made.shape == interpolated.shape == (2, 64, 6, 6)
    assert 1e-3 < (interpolated - expected).abs().max() < 5


def test_what_dinov2_cannot_be_is_refused(make_config):
    scaled = EHMBackbone(make_config(out_indices=[1, 3], feature_scales=[2, 1]))
    with pytest.raises(ValueError, match=r"feature_scales=\[2, 1\].*set feature_scales to None and rescale behind"):
        to_dinov2_backbone(scaled)
    with pytest.raises(ValueError, match="intermediate_size=96 is not a multiple of hidden_size=64"):
        to_dinov2_backbone(EHMModel(make_config(intermediate_size=96)))
    oblong = EHMModel(make_config(image_size=[32, 64]))
    with pytest.raises(ValueError, match=r"image_size=\[32, 64\] is not square.*give a square image_size"):
        to_dinov2_backbone(oblong)
    assert to_dinov2_backbone(oblong, image_size=64).config.image_size == 64


LOAD_DINOV2 = """
import torch
from transformers import AutoImageProcessor, Dinov2Backbone, UperNetConfig, UperNetForSemanticSegmentation
torch.set_num_threads(1)
folder, images = sys.argv[1], torch.load(sys.argv[2])
backbone = Dinov2Backbone.from_pretrained(folder).eval()
config = UperNetConfig(backbone_config=backbone.config, hidden_size=16, num_labels=3, auxiliary_in_channels=64,
                       auxiliary_channels=8)
upernet = UperNetForSemanticSegmentation(config).eval()
upernet.backbone.load_state_dict(backbone.state_dict())
with torch.no_grad():
    assert upernet(images).logits.shape == (2, 3, 32, 32)
    torch.save([backbone(images).feature_maps, upernet.backbone(images).feature_maps], sys.argv[3])
print(AutoImageProcessor.from_pretrained(folder).size)
"""


def test_exported_dinov2_backbone_loads_where_this_package_is_missing(
    random_ehm, make_config, tmp_path, run_without_package
):
    random_ehm.save_pretrained(tmp_path / "ehm")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "ehm")
    export_dinov2_backbone(tmp_path / "ehm", tmp_path / "dinov2", out_indices=[0, 1, 2, 3])
    written = json.loads((tmp_path / "dinov2" / "config.json").read_text())
    assert written["model_type"] == "dinov2" and "auto_map" not in written
    assert sorted(os.listdir(tmp_path / "dinov2")) == ["config.json", "model.safetensors", "preprocessor_config.json"]

    ours = build(EHMBackbone, make_config(out_indices=[0, 1, 2, 3]))
    ours.load_state_dict(random_ehm.ehm.state_dict())
    images = torch.rand(2, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    result = run_without_package(LOAD_DINOV2, tmp_path / "dinov2", tmp_path / "images.pt", tmp_path / "maps.pt")
    assert result.returncode == 0, result.stderr
    assert "height=32, width=32" in result.stdout
    with torch.no_grad():
        expected = ours(images).feature_maps
    for maps in torch.load(tmp_path / "maps.pt"):
        for one, other in zip(maps, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_dinov2_command_for_another_size(random_ehm, tmp_path):
    """The processor follows: the same cut of the picture, at the new size."""
    source, target = tmp_path / "ehm", tmp_path / "dinov2"
    random_ehm.to(torch.bfloat16).save_pretrained(source)
    sizes = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    ViTImageProcessorPil(**sizes).save_pretrained(source)
    main(["to-dinov2", str(source), str(target), "--out-indices", "1", "3", "--image-size", "64"])
    backbone = Dinov2Backbone.from_pretrained(target)
    assert backbone.out_features == ["stage1", "stage3"] and backbone.config.image_size == 64
    assert backbone.dtype == torch.bfloat16
    processor = ViTImageProcessorPil.from_pretrained(target)
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (80, 64)
    message = error_of("to-dinov2", source, tmp_path / "other", "--image-size", "64", "64", "64")
    assert "--image-size 64 64 64: one number, or height and width" in message
    assert "out_indices" in error_of("to-dinov2", source, tmp_path / "other", "--out-indices", "9")


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
    assert message == (f"{prefix}{mae_directory} has model_type='vit_mae' in its config.json; 'ehm' is expected")
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
