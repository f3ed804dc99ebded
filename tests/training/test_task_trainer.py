"""Layer-wise learning rates by MAE's rule, averaged weights, frozen encoders."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from modeling_ehm import EHMBackbone, EHMConfig, EHMForImageClassification, EHMModel
from modeling_ehm.training.arguments import TaskTrainingArguments
from modeling_ehm.training.callbacks import AVERAGE_FILE, WeightAverageCallback, ema_decay_at
from modeling_ehm.training.task_trainer import TaskTrainer, find_encoder, layer_decay_groups, layer_of

# facebookresearch/mae, util/lr_decay.py, for a 12-layer ViT: `get_layer_id_for_vit` puts cls_token, pos_embed and
# patch_embed in layer 0, block i in layer i + 1, norm, fc_norm and head in layer 13; the scale is 0.75^(13 - layer).
# Vectors, cls_token and pos_embed have no weight decay. Names on the left are theirs, on the right ours.
MAES = {
    "cls_token": ("ehm.embeddings.cls_token", 0, False),
    "patch_embed.proj.weight": ("ehm.embeddings.patch_embeddings.projection.weight", 0, True),
    "patch_embed.proj.bias": ("ehm.embeddings.patch_embeddings.projection.bias", 0, False),
    "blocks.0.norm1.weight": ("ehm.layers.0.layernorm_before.weight", 1, False),
    "blocks.0.attn.qkv.weight": ("ehm.layers.0.attention.q_proj.weight", 1, True),
    "blocks.0.attn.qkv.bias": ("ehm.layers.0.attention.k_proj.bias", 1, False),
    "blocks.5.attn.proj.weight": ("ehm.layers.5.attention.o_proj.weight", 6, True),
    "blocks.5.norm2.bias": ("ehm.layers.5.layernorm_after.bias", 6, False),
    "blocks.11.mlp.fc1.weight": ("ehm.layers.11.mlp.fc1.weight", 12, True),
    "blocks.11.mlp.fc2.bias": ("ehm.layers.11.mlp.fc2.bias", 12, False),
    "fc_norm.weight": ("ehm.layernorm.weight", 13, False),
    "fc_norm.bias": ("ehm.layernorm.bias", 13, False),
    "head.weight": ("classifier.weight", 13, True),
    "head.bias": ("classifier.bias", 13, False),
}


@pytest.fixture
def twelve_layers():
    config = EHMConfig(
        image_size=16, patch_size=8, hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=12
    )
    return EHMForImageClassification(config)


def group_of(groups, name):
    (found,) = [group for group in groups if name in group["names"]]
    return found


def test_layer_decay_is_maes_rule(twelve_layers):
    """Golden: scale 0.75^(13 - layer), and no decay for vectors and tokens."""
    groups = layer_decay_groups(twelve_layers, 1e-3, 0.05, 0.75)
    for name, layer, decays in MAES.values():
        group = group_of(groups, name)
        assert group["layer"] == layer and group["lr"] == pytest.approx(1e-3 * 0.75 ** (13 - layer), rel=1e-12), name
        assert group["weight_decay"] == (0.05 if decays else 0.0), name
    assert groups[0]["lr"] == 1e-3  # the Trainer logs the first group's rate


def test_every_parameter_is_in_one_group(twelve_layers):
    groups = layer_decay_groups(twelve_layers, 1e-3, 0.05, 0.65)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in twelve_layers.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(list(twelve_layers.parameters()))
    assert {group["layer"] for group in groups} == set(range(14))


def test_the_encoder_is_found_under_any_head(config):
    """A stock head's parameters count as the last layer, the backbone's by their own."""
    backbone = EHMConfig(**config.to_diff_dict() | {"out_features": None, "out_indices": [1, 2, 3]})
    head = UperNetConfig(backbone_config=backbone, hidden_size=8, auxiliary_in_channels=64, auxiliary_channels=8)
    model = UperNetForSemanticSegmentation(head)
    name, encoder = find_encoder(model)
    assert name == "backbone" and isinstance(encoder, EHMBackbone)
    groups = layer_decay_groups(model, 1.0, 0.0, 0.5)
    assert group_of(groups, "backbone.layers.2.mlp.fc1.weight")["lr"] == 0.5
    assert group_of(groups, "backbone.embeddings.cls_token")["lr"] == 0.5**4
    assert group_of(groups, "decode_head.classifier.weight")["lr"] == 1.0
    with pytest.raises(ValueError, match="Linear holds 0 EHM encoders"):
        find_encoder(torch.nn.Linear(1, 1))


def test_a_bare_encoder_has_no_prefix(config):
    assert find_encoder(EHMModel(config))[0] == ""
    assert layer_of("layers.2.mlp.fc1.weight", "", 3) == 3 and layer_of("layernorm.bias", "", 3) == 4


def test_frozen_parameters_are_left_out(twelve_layers):
    twelve_layers.ehm.requires_grad_(False)
    groups = layer_decay_groups(twelve_layers, 1e-3, 0.05, 0.75)
    assert sorted(name for group in groups for name in group["names"]) == ["classifier.bias", "classifier.weight"]


@pytest.mark.parametrize("field, value", [("layer_decay", 0.0), ("layer_decay", 1.5), ("weight_average_decay", 1.0)])
def test_arguments_out_of_range_are_refused(tmp_path, field, value):
    with pytest.raises(ValueError, match=rf"training\.{field}={value}"):
        TaskTrainingArguments(output_dir=str(tmp_path), **{field: value})


def test_the_average_follows_the_weights_by_hand(tmp_path):
    """Weight 0, then 1 after each step: the average is what the decays say, and loading goes on from there."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = WeightAverageCallback(0.9, warmup_steps=1)
    average.on_train_begin(None, None, None, model=model)
    torch.nn.init.ones_(model.weight)
    expected = 0.0
    for step in (1, 2, 3):
        average.on_step_end(None, type("State", (), {"global_step": step}), None, model=model)
        decay = ema_decay_at(step, 0.9, 1)
        expected = decay * expected + (1 - decay)
    assert average.average["weight"].item() == pytest.approx(expected)
    with average.applied_to(model):
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 1.0
    average.save(tmp_path)
    assert load_file(tmp_path / AVERAGE_FILE)["weight"].item() == pytest.approx(expected)
    resumed = WeightAverageCallback(0.9)
    resumed.resumed_from = tmp_path
    resumed.on_train_begin(None, None, None, model=model)
    assert resumed.average["weight"].item() == pytest.approx(expected)
    resumed.resumed_from = tmp_path / "elsewhere"
    with pytest.raises(FileNotFoundError, match="weight_average_decay"):
        resumed.on_train_begin(None, None, None, model=model)


def test_the_optimizer_uses_the_groups(tmp_path, twelve_layers):
    args = TaskTrainingArguments(output_dir=str(tmp_path), layer_decay=0.75, learning_rate=1e-3, report_to="none")
    optimizer = TaskTrainer(model=twelve_layers, args=args).create_optimizer()
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    assert rates == pytest.approx(sorted(1e-3 * 0.75**n for n in range(14)))
    assert optimizer.defaults["betas"] == (0.9, 0.999)
