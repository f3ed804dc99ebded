"""Backbone, classifier and segmenter: what each computes from the encoder, and that stock code takes it as it is."""

import copy
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    DPTConfig,
    DPTForDepthEstimation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    SegformerImageProcessorPil,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTImageProcessorPil,
    pipeline,
)

from modeling_ehm import EHMBackbone, EHMForImageClassification, EHMForPreTraining, EHMForSemanticSegmentation, EHMModel
from modeling_ehm.modeling_ehm import drop_path, rescale_maps

HEADS = [EHMForImageClassification, EHMForSemanticSegmentation]


def build(model_class, config, seed: int = 0):
    """Every weight random: biases and tokens start at 0 or near it, and tests of sameness would not see them."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def some_images(batch: int, height: int = 32, width: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def some_labels(model, batch: int, height: int = 32, width: int = 32) -> torch.Tensor:
    shape = (batch,) if isinstance(model, EHMForImageClassification) else (batch, height, width)
    return torch.randint(model.config.num_labels, shape, generator=torch.Generator().manual_seed(2))


# Stochastic depth


def test_drop_path_by_hand():
    """Whole images are dropped, a share `rate` of them, and the others scaled so that the mean stays."""
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 2, 3), 0.25, training=True)
    images = dropped[:, 0, 0]
    assert torch.equal(dropped, images[:, None, None].expand(-1, 2, 3))
    torch.testing.assert_close(images.unique(), torch.tensor([0, 4 / 3]))
    assert (images == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert drop_path(torch.ones(2, 3), 0.5, training=True).dtype == torch.float32
    assert drop_path(torch.ones(2, 3, dtype=torch.bfloat16), 0.5, training=True).dtype == torch.bfloat16


def test_drop_path_outside_training_and_at_rate_0_draws_nothing(make_config):
    ones = torch.ones(4, 2)
    assert drop_path(ones, 0.5, training=False) is ones and drop_path(ones, 0, training=True) is ones
    expected = build(EHMModel, make_config())(some_images(2)).last_hidden_state
    for rate, training in ((0.9, False), (0.0, True)):
        model = build(EHMModel, make_config(drop_path_rate=rate)).train(training)
        states = torch.get_rng_state()
        features = model(some_images(2)).last_hidden_state
        assert torch.equal(torch.get_rng_state(), states)
        assert torch.equal(features, expected)


def test_drop_path_grows_linearly_over_the_layers(make_config):
    model = EHMForPreTraining(make_config(drop_path_rate=0.3))
    assert [layer.drop_path_rate for layer in model.ehm.layers] == pytest.approx([0, 0.15, 0.3])
    assert [layer.drop_path_rate for layer in model.decoder.decoder_layers] == [0]


def test_a_dropped_layer_leaves_the_image_as_it_was(make_config):
    """Both branches of the last layer have their own draw; with both dropped, the state passes unchanged."""
    model = build(EHMModel, make_config(drop_path_rate=0.8, num_hidden_layers=2)).train()
    torch.manual_seed(0)
    before, after = model(some_images(64), output_hidden_states=True).hidden_states[1:]
    passed = (before == after).flatten(1).all(1).float().mean().item()
    assert passed == pytest.approx(0.8**2, abs=0.2)


# Image classification


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_classifier_reads_what_pooling_says(make_config, pooling):
    model = build(EHMForImageClassification, make_config(pooling=pooling, num_labels=5))
    images = some_images(3)
    tokens = model.ehm(images).last_hidden_state
    pooled = tokens[:, 1:].mean(1) if pooling == "mean" else tokens[:, 0]
    logits = model(images).logits
    torch.testing.assert_close(logits, pooled @ model.classifier.weight.T + model.classifier.bias)
    assert model(images).loss is None and logits.shape == (3, 5)


def test_classification_loss_by_hand(make_config):
    model = build(EHMForImageClassification, make_config(num_labels=3))
    images, labels = some_images(4), torch.tensor([0, 2, 1, 2])
    outputs = model(images, labels)
    log_probability = outputs.logits - outputs.logits.exp().sum(1, keepdim=True).log()
    expected = -sum(log_probability[n, label] for n, label in enumerate(labels.tolist())) / 4
    torch.testing.assert_close(outputs.loss, expected)
    loss, logits = model(images, labels, return_dict=False)
    assert torch.equal(loss, outputs.loss) and torch.equal(logits, outputs.logits)


def test_loss_of_soft_labels_is_the_mixture_of_hard_losses(make_config):
    model = build(EHMForImageClassification, make_config(num_labels=3))
    images, first, second = some_images(4), torch.tensor([0, 2, 1, 2]), torch.tensor([1, 1, 0, 2])
    soft = 0.3 * F.one_hot(first, 3) + 0.7 * F.one_hot(second, 3)
    expected = 0.3 * model(images, first).loss + 0.7 * model(images, second).loss
    torch.testing.assert_close(model(images, soft).loss, expected)


# Semantic segmentation


def test_segmenter_labels_each_patch_and_enlarges(make_config):
    """In evaluation mode the head is linear in each token; the logits at patch level are enlarged bilinearly."""
    model = build(EHMForSemanticSegmentation, make_config(num_labels=4))
    model.norm.running_mean.normal_(generator=torch.Generator().manual_seed(3))
    images = some_images(2, 16, 48)
    tokens = model.ehm(images).last_hidden_state[:, 1:]
    normed = (tokens - model.norm.running_mean) / (1 + model.norm.eps) ** 0.5 * model.norm.weight + model.norm.bias
    coarse = normed @ model.classifier.weight[:, :, 0, 0].T + model.classifier.bias  # (B, N, num_labels)
    coarse = coarse.transpose(1, 2).reshape(2, 4, 2, 6)
    expected = F.interpolate(coarse, size=(16, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(images).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(images).logits[..., 0, 0], coarse[..., 0, 0], atol=1e-4, rtol=1e-4)


def test_ignored_pixels_take_no_part_in_the_loss(make_config):
    model = build(EHMForSemanticSegmentation, make_config(num_labels=4, semantic_loss_ignore_index=99))
    images = some_images(2)
    labels = some_labels(model, 2)
    labels[:, 5:20] = 99
    outputs = model(images, labels)
    known = labels != 99
    logits = outputs.logits.permute(0, 2, 3, 1)[known]  # (labelled pixels, num_labels)
    expected = -logits.log_softmax(-1)[torch.arange(len(logits)), labels[known]].mean()
    torch.testing.assert_close(outputs.loss, expected)
    assert EHMForSemanticSegmentation(make_config()).config.semantic_loss_ignore_index == 255


# Weights


@pytest.mark.parametrize("head", HEADS)
def test_pretraining_checkpoint_starts_a_head(make_config, tmp_path, head):
    """The encoder is the checkpoint's, and all that is new has defined values: MAE's small ones, a fresh batch norm."""
    pretrained = build(EHMForPreTraining, make_config())
    pretrained.save_pretrained(tmp_path)
    auto = AutoModelForImageClassification if head is HEADS[0] else AutoModelForSemanticSegmentation
    model, report = auto.from_pretrained(tmp_path, num_labels=7, output_loading_info=True)
    assert type(model) is head and not report["unexpected_keys"]
    for name, weight in pretrained.ehm.state_dict().items():
        assert torch.equal(model.ehm.state_dict()[name], weight), name
    assert {name.split(".")[0] for name in report["missing_keys"]} <= {"classifier", "norm"}
    assert not model.classifier.bias.any() and model.classifier.weight.std() > 1e-6
    for training in (False, True):
        loss = model.train(training)(some_images(2), some_labels(model, 2)).loss
        assert loss.item() == pytest.approx(np.log(7), abs=1.0)
    if head is EHMForImageClassification:
        assert model.classifier.weight.std().item() == pytest.approx(2e-5, rel=0.2)
    else:
        fresh = auto.from_pretrained(tmp_path, num_labels=7).norm
        assert torch.equal(fresh.running_var, torch.ones(64)) and torch.equal(fresh.weight, torch.ones(64))
        assert not fresh.running_mean.any() and not fresh.bias.any() and fresh.num_batches_tracked == 0


@pytest.mark.parametrize("head", [*HEADS, EHMBackbone])
def test_saved_and_loaded_again(make_config, tmp_path, head):
    scales = {"out_indices": [1, 3], "feature_scales": [2, 0.5], "pooling": "cls", "drop_path_rate": 0.1}
    model = build(head, make_config(num_labels=5, **scales))
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in scales} == scales
    assert loaded.config.out_features == ["stage1", "stage3"] and loaded.config.num_labels == 5
    assert list(loaded.state_dict()) == list(model.state_dict())
    found, expected = loaded(some_images(2)), model(some_images(2))
    if head is EHMBackbone:
        pairs = zip(found.feature_maps, expected.feature_maps, strict=True)
    else:
        pairs = [(found.logits, expected.logits)]
    for one, other in pairs:  # convolutions round as the memory is aligned
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("head", [*HEADS, EHMBackbone])
def test_gradient_checkpointing_gives_equal_gradients(make_config, head):
    """Dropped paths too are the same in the second forward."""
    model = build(head, make_config(num_labels=5, drop_path_rate=0.5)).train()

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        if head is EHMBackbone:
            model(some_images(4)).feature_maps[0].pow(2).mean().backward()
        else:
            model(some_images(4), some_labels(model, 4)).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    expected = gradients()
    calls = []
    for layer in model.base_model.layers:
        layer.attention.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert len(calls) == 6, "each of 3 layers runs twice"


# The backbone


def test_feature_maps_are_the_tokens_of_the_encoder(make_config):
    model = build(EHMBackbone, make_config(out_indices=[0, 2, 3]))
    encoder = build(EHMModel, make_config())
    encoder.load_state_dict(model.state_dict())
    images = some_images(2, 24, 40)  # 3 rows, 5 columns
    maps = model(images).feature_maps
    outputs = encoder(images, output_hidden_states=True)
    assert [tuple(one.shape) for one in maps] == [(2, 64, 3, 5)] * 3
    tokens = [encoder.layernorm(outputs.hidden_states[stage]) for stage in (0, 2)] + [outputs.last_hidden_state]
    for one, expected in zip(maps, tokens, strict=True):
        torch.testing.assert_close(one[:, :, 2, 1], expected[:, 1 + 2 * 5 + 1])
        torch.testing.assert_close(one.flatten(2).transpose(1, 2), expected[:, 1:])


def test_stages_by_name_or_number(make_config):
    numbered, named = make_config(out_indices=[1, 3]), make_config(out_features=["stage1", "stage3"])
    assert numbered.out_features == named.out_features and list(numbered.out_indices) == list(named.out_indices)
    model = build(EHMBackbone, named)
    assert model.channels == [64, 64] and len(model(some_images(1)).feature_maps) == 2
    assert EHMBackbone(make_config()).out_features == ["stage3"]
    with pytest.raises(ValueError, match="stage4"):
        make_config(out_features=["stage4"])


def test_maps_without_norm_and_without_shape(make_config):
    images = some_images(2)
    plain = build(EHMBackbone, make_config(out_indices=[1, 3], apply_layernorm=False))
    outputs = plain(images, output_hidden_states=True)
    for stage, one in zip((1, 3), outputs.feature_maps, strict=True):
        assert torch.equal(one.flatten(2).transpose(1, 2), outputs.hidden_states[stage][:, 1:])
    assert plain(images).hidden_states is None and len(plain(images, return_dict=False)) == 1
    sequences = build(EHMBackbone, make_config(reshape_hidden_states=False))
    (sequence,) = sequences(images).feature_maps
    assert torch.equal(sequence, EHMModel.forward(sequences, images).last_hidden_state)  # (B, 1 + N, D)


def test_feature_scales_make_a_pyramid(make_config):
    model = build(EHMBackbone, make_config(out_indices=[0, 1, 2, 3], feature_scales=[4, 2, 1, 0.5]))
    plain = build(EHMBackbone, make_config(out_indices=[0, 1, 2, 3]))
    maps, expected = model(some_images(2)).feature_maps, plain(some_images(2)).feature_maps
    assert [tuple(one.shape[2:]) for one in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert torch.equal(maps[2], expected[2])
    torch.testing.assert_close(maps[3][:, :, 0, 1], expected[3][:, :, :2, 2:].mean((2, 3)))
    assert list(model.state_dict()) == list(plain.state_dict()), "scales have no weights"


def test_rescaling_by_hand():
    maps = torch.tensor([[0.0, 2.0], [4.0, 6.0]])[None, None]
    rows, columns = torch.tensor([0.0, 1.0, 3.0, 4.0]), torch.tensor([0.0, 0.5, 1.5, 2.0])
    torch.testing.assert_close(rescale_maps(maps, 2)[0, 0], rows[:, None] + columns)
    assert rescale_maps(maps, 0.5).tolist() == [[[[3.0]]]]
    assert rescale_maps(maps, 0.1).shape == (1, 1, 1, 1)
    assert rescale_maps(maps, 1) is maps


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_scales": [1, 2]}, r"feature_scales=\[1, 2\] must hold one positive number for each of out_features"),
        ({"feature_scales": [0]}, r"feature_scales=\[0\] must hold one positive number"),
        ({"feature_scales": [2], "reshape_hidden_states": False}, "needs maps, but reshape_hidden_states=False"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0 must lie in \[0, 1\)"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate=-0.1 must lie in \[0, 1\)"),
        ({"pooling": "max"}, "pooling='max' is not one of mean, cls"),
    ],
)
def test_refused_settings(make_config, fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        make_config(**fields)


# Stock heads on the backbone


def assert_learns(head, loss) -> None:
    """The loss reaches the first and the last layer of the backbone."""
    assert loss.isfinite()
    loss.backward()
    backbone = next(module for module in head.modules() if isinstance(module, EHMBackbone))
    for weight in (backbone.embeddings.patch_embeddings.projection.weight, backbone.layers[-1].mlp.fc2.weight):
        assert weight.grad.isfinite().all() and weight.grad.any()


def test_auto_backbone_from_config(make_config):
    config = make_config(out_indices=[1, 3])
    model = AutoBackbone.from_config(config)
    assert type(model) is EHMBackbone and model.out_features == ["stage1", "stage3"]


def test_upernet(make_config, tmp_path):
    backbone = build(EHMBackbone, make_config(out_indices=[0, 1, 2, 3], feature_scales=[4, 2, 1, 0.5]))
    sizes = {"hidden_size": 16, "auxiliary_in_channels": 64, "auxiliary_channels": 8, "num_labels": 4}
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone.config, **sizes))
    assert model.backbone.load_state_dict(backbone.state_dict()).missing_keys == []
    labels = torch.randint(4, (2, 32, 32))
    outputs = model.train()(some_images(2), labels=labels)
    assert outputs.logits.shape == (2, 4, 32, 32)
    assert_learns(model, outputs.loss)
    model.save_pretrained(tmp_path)
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())
    torch.testing.assert_close(loaded(some_images(1)).logits, model.eval()(some_images(1)).logits)


def test_rt_detr(make_config):
    backbone = make_config(image_size=64, out_indices=[1, 2, 3], feature_scales=[2, 1, 0.5])
    config = RTDetrConfig(
        backbone_config=backbone,
        feat_strides=[4, 8, 16],
        encoder_in_channels=[64] * 3,
        encoder_hidden_dim=16,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        decoder_in_channels=[16] * 3,
        decoder_ffn_dim=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        num_queries=10,
        num_denoising=0,
        num_labels=2,
    )
    torch.manual_seed(0)
    model = RTDetrForObjectDetection(config).train()
    labels = [{"class_labels": torch.tensor([n]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])} for n in range(2)]
    outputs = model(some_images(2, 64, 64), labels=labels)
    assert outputs.pred_boxes.shape == (2, 10, 4)
    assert_learns(model, outputs.loss)


def test_dpt_depth(make_config):
    """DPT makes its own pyramid, and reads token sequences."""
    backbone = make_config(out_indices=[0, 1, 2, 3], reshape_hidden_states=False)
    config = DPTConfig(
        backbone_config=backbone,
        hidden_size=64,
        patch_size=8,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
        readout_type="ignore",
    )
    torch.manual_seed(0)
    model = DPTForDepthEstimation(config).train()
    depth = model(some_images(2)).predicted_depth
    assert depth.shape[0] == 2
    assert_learns(model, depth.square().mean())


# Pipelines and remote code


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8))


def test_feature_pipeline(config):
    model, processor = build(EHMModel, config), ViTImageProcessorPil(size={"height": 32, "width": 32})
    extract = pipeline("image-feature-extraction", model=model, image_processor=processor, device="cpu")
    pixels = processor(picture(), return_tensors="pt").pixel_values
    found = extract(picture(), return_tensors=True)
    torch.testing.assert_close(found, model(pixels).last_hidden_state)
    torch.testing.assert_close(extract(picture(), return_tensors=True, pool=True), model(pixels).pooler_output)


def test_classification_pipeline(make_config):
    config = make_config(id2label={0: "cat", 1: "dog", 2: "owl"})
    model, processor = build(EHMForImageClassification, config), ViTImageProcessorPil(size={"height": 32, "width": 32})
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    found = {row["label"]: row["score"] for row in classify(picture())}
    probability = model(processor(picture(), return_tensors="pt").pixel_values).logits.softmax(-1)[0]
    assert found == pytest.approx(dict(zip(["cat", "dog", "owl"], probability.tolist(), strict=True)), abs=1e-5)


def test_segmentation_pipeline(make_config):
    """ViT's image processor cannot segment; Segformer's does, and resizes to the picture's own size."""
    model = build(EHMForSemanticSegmentation, make_config(id2label={0: "sky", 1: "road", 2: "tree"}))
    processor = SegformerImageProcessorPil(size={"height": 32, "width": 32})
    segment = pipeline("image-segmentation", model=model, image_processor=processor, device="cpu")
    logits = model(processor(picture(), return_tensors="pt").pixel_values).logits
    best = F.interpolate(logits, size=(40, 56), mode="bilinear", align_corners=False)[0].argmax(0)
    found = {row["label"]: torch.from_numpy(np.array(row["mask"])) == 255 for row in segment(picture())}
    names = ["sky", "road", "tree"]
    assert set(found) == {names[n] for n in best.unique()} and len(found) > 1
    for name, mask in found.items():
        assert torch.equal(mask, best == names.index(name))


LOAD_EVERY_CLASS = """
import torch
from PIL import Image
from transformers import (
    AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining,
    AutoModelForSemanticSegmentation, pipeline,
)
torch.set_num_threads(1)
folder, inputs, outputs = sys.argv[1:]
images = torch.load(inputs)
allowed = {"trust_remote_code": True}
whole = AutoModelForPreTraining.from_pretrained(folder, **allowed)
encoders = {
    "EHMModel": AutoModel.from_pretrained(folder, **allowed),
    "EHMForPreTraining": whole.ehm,
    "EHMForImageClassification": AutoModelForImageClassification.from_pretrained(folder, num_labels=5, **allowed),
    "EHMForSemanticSegmentation": AutoModelForSemanticSegmentation.from_pretrained(folder, num_labels=5, **allowed),
}
with torch.no_grad():
    assert encoders["EHMForImageClassification"].eval()(images).logits.shape == (2, 5)
    assert encoders["EHMForSemanticSegmentation"].eval()(images).logits.shape == (2, 5, 32, 32)
    features = {name: model.base_model.eval()(images).last_hidden_state for name, model in encoders.items()}
    assert all(type(model).__name__ == name for name, model in encoders.items() if name != "EHMForPreTraining")
    assert type(whole).__name__ == "EHMForPreTraining"
    # AutoBackbone.from_pretrained takes no local directory; its class does.
    config = AutoConfig.from_pretrained(folder, out_indices=[1, 3], **allowed)
    backbone = type(AutoBackbone.from_config(config, **allowed)).from_pretrained(folder, config=config).eval()
    assert type(backbone).__name__ == "EHMBackbone"
    maps = backbone(images).feature_maps
    extract = pipeline("image-feature-extraction", model=folder, device="cpu", **allowed)
    pooled = extract(Image.new("RGB", (50, 40), (255, 0, 0)), return_tensors=True, pool=True)
    classify = pipeline("image-classification", model=folder, device="cpu", **allowed)
    assert len(classify(Image.new("RGB", (50, 40), (255, 0, 0)))) == 2
modules = {type(model).__module__ for model in (whole, backbone, *encoders.values())}
assert all(name.startswith("transformers_modules.") for name in modules), modules
torch.save({"features": features, "maps": maps, "pooled": pooled}, outputs)
"""


def test_one_pretraining_directory_serves_every_auto_class(make_config, tmp_path, run_without_package):
    model, processor = build(EHMForPreTraining, make_config()), ViTImageProcessorPil(size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    images = some_images(2)
    torch.save(images, tmp_path / "images.pt")
    result = run_without_package(LOAD_EVERY_CLASS, tmp_path / "model", tmp_path / "images.pt", tmp_path / "outputs.pt")
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        expected = model.ehm(images).last_hidden_state
        red = processor(Image.new("RGB", (50, 40), (255, 0, 0)), return_tensors="pt").pixel_values
        assert torch.equal(found["pooled"], model.ehm(red).pooler_output)
        backbone = EHMBackbone(make_config(out_indices=[1, 3])).eval()
        backbone.load_state_dict(model.ehm.state_dict())
        maps = backbone(images).feature_maps
    assert len(found["features"]) == 4
    assert all(torch.equal(features, expected) for features in found["features"].values())
    assert all(torch.equal(one, other) for one, other in zip(found["maps"], maps, strict=True))


# LoRA


@pytest.mark.parametrize("model_class", [EHMModel, EHMForImageClassification])
def test_lora(make_config, tmp_path, model_class):
    classifies = model_class is EHMForImageClassification
    base = build(model_class, make_config(num_labels=5))
    untouched = copy.deepcopy(base)
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"] if classifies else None
    )
    model = peft.get_peft_model(base, settings).train()
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len([name for name in trainable if "lora_" in name]) == 3 * 2 * 2  # layers, projections, A and B
    others = {name.split(".modules_to_save")[0].split(".")[-1] for name in trainable if "lora_" not in name}
    assert others == ({"classifier"} if classifies else set())

    images, labels = some_images(4), torch.tensor([0, 1, 2, 3])
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if name not in trainable}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    for _ in range(2):
        outputs = model(pixel_values=images, **({"labels": labels} if classifies else {}))
        (outputs.loss if classifies else outputs.last_hidden_state[:, 0].pow(4).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in model.named_parameters():
        assert name in trainable or torch.equal(weight, frozen[name]), name

    def result(some_model):
        with torch.no_grad():
            outputs = some_model.eval()(pixel_values=images)
        return outputs.logits if classifies else outputs.last_hidden_state

    expected = result(model)
    assert not torch.allclose(expected, result(untouched), atol=1e-2)
    model.save_pretrained(tmp_path)
    assert torch.equal(result(peft.PeftModel.from_pretrained(untouched, tmp_path)), expected)
    merged = model.merge_and_unload()
    assert type(merged) is model_class
    torch.testing.assert_close(result(merged), expected, atol=1e-5, rtol=0)


def test_fine_tuning_by_the_documentation(config, tmp_path, monkeypatch, capsys):
    """The code of docs/downstream.md, on six pictures of two classes, ends with a loss."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home")
    EHMForPreTraining(config).save_pretrained("outputs/mine")
    height, width = config.image_size if isinstance(config.image_size, tuple | list) else (config.image_size,) * 2
    ViTImageProcessorPil(size={"height": height, "width": width}).save_pretrained("outputs/mine")
    for name in ("train/cat/1", "train/cat/2", "train/dog/3", "train/dog/4", "test/cat/5", "test/dog/6"):
        path = tmp_path / "pets" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 30), 20 * int(name[-1])).save(path)
    text = (Path(__file__).parents[1] / "docs/downstream.md").read_text()
    code = next(part for part in text.split("```")[1::2] if "trainer.train()" in part)
    exec(code.removeprefix("python"), {})
    assert "'eval_loss'" in capsys.readouterr().out.splitlines()[-1]
