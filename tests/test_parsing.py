"""Other people's models parse images through the affinities that they report themselves."""

import pytest
import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from modeling_ehm import (
    EHMBackbone,
    EHMForImageClassification,
    EHMForPreTraining,
    EHMForSemanticSegmentation,
    EHMModel,
    build_hierarchy,
    parse_hierarchy,
    parsing,
)

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}

# How many tokens come before the patches.
MODELS = {
    "vit": (ViTModel, ViTConfig(**SIZES), 1),
    "vit with a head": (ViTForImageClassification, ViTConfig(**SIZES), 1),
    "vit_mae": (ViTMAEModel, ViTMAEConfig(**SIZES, **DECODER), 1),
    "vit_mae with its decoder": (ViTMAEForPreTraining, ViTMAEConfig(**SIZES, **DECODER), 1),
    "dinov2": (Dinov2Model, Dinov2Config(**SIZES, mlp_ratio=2), 1),
    "dinov2 with registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2), 5),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig(**SIZES, num_register_tokens=2), 3),
    "clip": (CLIPVisionModel, CLIPVisionConfig(**SIZES), 1),
}


def build(name: str, implementation: str = "sdpa"):
    """With random weights and positions everywhere: ViTMAE's positions are zeros in transformers 5.23."""
    model_class, config, _ = MODELS[name]
    torch.manual_seed(0)
    model = model_class(type(config)(**config.to_diff_dict())).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    model.set_attn_implementation(implementation)
    return model


def some_images(batch: int = 2, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def reported_attentions(name: str, images: torch.Tensor) -> list[torch.Tensor]:
    """Maps `(B, heads, T, T)` of each layer that an eager twin reports, all patches kept and in image order."""
    model = build(name, "eager")
    arguments = {}
    if "vit_mae" in name:
        model.config.mask_ratio = 0.0
        arguments["noise"] = torch.arange(16.0).expand(len(images), -1)
    return list(model(images, output_attentions=True, **arguments).attentions)


@pytest.fixture
def affinity_of(monkeypatch):
    """`affinity_of(model, images, ...)`: what `parse_hierarchy` hands to `build_hierarchy`."""
    handed = []

    def record(affinity, linkage, grid_size):
        handed.append(affinity)
        return build_hierarchy(affinity, linkage, grid_size)

    def run(*arguments, **options):
        hierarchy = parse_hierarchy(*arguments, **options)
        affinity = handed.pop()
        assert torch.equal(hierarchy.height, build_hierarchy(affinity, options.get("linkage", "average")).height)
        return affinity

    monkeypatch.setattr(parsing, "build_hierarchy", record)
    return run


@pytest.mark.parametrize("layers", [None, [1], [0, -1]])
@pytest.mark.parametrize("name", MODELS)
def test_affinity_is_the_attention_that_the_model_reports(name, layers, affinity_of):
    images = some_images()
    attentions = reported_attentions(name, images)
    assert len(attentions) == 3
    prefix = MODELS[name][2]
    assert attentions[0].shape[-1] == prefix + 16
    chosen = torch.stack([attentions[layer] for layer in (layers or range(3))])
    patches = chosen.mean((0, 2))[:, prefix:, prefix:]  # over layers and heads
    assert not torch.allclose(patches[0], patches[1], atol=1e-3)
    affinity = affinity_of(build(name), images, layers=layers)
    torch.testing.assert_close(affinity, (patches + patches.transpose(1, 2)) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit", "vit_mae", "dinov2"])
def test_affinity_of_keys_is_their_cosine(name, affinity_of):
    model, images, keys = build(name), some_images(), []
    projections = [m for n, m in model.named_modules() if n.endswith(("k_proj", ".key"))]
    assert len(projections) == 3
    for projection in projections:
        projection.register_forward_hook(lambda _, inputs, output: keys.append(output[:, 1:]))
    for layers in (None, [0, 1]):
        affinity = affinity_of(model, images, affinity="keys", layers=layers)
        chosen = [keys[layer] for layer in (layers or [-1])]
        cosines = [nn.functional.cosine_similarity(k[:, :, None], k[:, None], dim=-1) for k in chosen]
        torch.testing.assert_close(affinity, sum(cosines) / len(cosines), atol=1e-5, rtol=0)
        keys.clear()


def test_patches_of_vit_mae_are_not_shuffled():
    """A bright patch in a dark image stays where it is, whatever torch's generator says."""
    model = build("vit_mae")
    trees = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        trees.append(parse_hierarchy(model, some_images()))
    assert torch.equal(trees[0].parent, trees[1].parent)
    images = torch.zeros(1, 3, 32, 32)
    images[..., 8:16, 16:24] = 3  # row 1, column 2
    model.embeddings.position_embeddings.data.zero_()  # then all other patches are exactly alike
    assert parse_hierarchy(model, images).cut(2)[0].tolist() == [int(n == 6) for n in range(16)]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "clip"])
def test_other_and_non_square_sizes(name):
    hierarchy = parse_hierarchy(build(name), some_images(2, 24, 56))
    assert hierarchy.grid_size == (3, 7) and hierarchy.parent.shape == (2, 21)


@pytest.mark.parametrize("linkage", ["single", "complete"])
def test_linkage_is_passed_on(linkage, affinity_of):
    affinity_of(build("vit"), some_images(), linkage=linkage)


def implementations_of(model) -> list[str]:
    """Attention of each module that has a config; ViTMAE's decoder has its own."""
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_it_was(name, implementation):
    model, images = build(name, implementation), some_images()
    arguments = {"noise": torch.rand(2, 16)} if "vit_mae" in name else {}
    before = model(images, **arguments)[0]
    implementations = implementations_of(model)
    assert implementation in implementations
    for training in (True, False):
        model.train(training)
        parse_hierarchy(model, images)
        assert implementations_of(model) == implementations
        assert {module.training for module in model.modules()} == {training}
    assert getattr(model.config, "mask_ratio", 0.75) == 0.75
    assert torch.equal(model(images, **arguments)[0], before)


def test_the_model_is_left_as_it_was_after_an_error():
    model = build("vit_mae").train()
    with pytest.raises(ValueError, match="num_channels|channel"):
        parse_hierarchy(model, torch.rand(1, 1, 32, 32))
    assert model.config._attn_implementation == "sdpa" and model.training and model.config.mask_ratio == 0.75
    assert len(model(some_images()).last_hidden_state[0]) == 5  # masks again, and nothing is recorded any more
    assert parsing._recorded is None


def test_dropout_does_not_reach_the_affinity():
    model = ViTModel(ViTConfig(**SIZES, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)).train()
    first, second = (parse_hierarchy(model, some_images()) for _ in range(2))
    assert torch.equal(first.height, second.height)


@pytest.mark.parametrize(
    "model_class", [EHMModel, EHMForPreTraining, EHMBackbone, EHMForImageClassification, EHMForSemanticSegmentation]
)
def test_our_models_follow_their_config(make_config, model_class):
    torch.manual_seed(0)
    model = model_class(make_config(affinity="keys", linkage="complete", affinity_layers=[1])).eval()
    encoder = model if isinstance(model, EHMModel) else model.ehm
    images = some_images(2, 24, 56)
    expected = build_hierarchy(encoder.patch_affinity(images), "complete")
    hierarchy = parse_hierarchy(model, images)
    assert torch.equal(hierarchy.parent, expected.parent) and hierarchy.grid_size == (3, 7)
    for options in ({"affinity": "keys"}, {"layers": [1]}, {"linkage": "complete"}):
        with pytest.raises(ValueError, match="an EHM model parses as its config says"):
            parse_hierarchy(model, images, **options)


def test_our_encoder_and_its_plain_vit_parse_alike(make_config, affinity_of):
    from modeling_ehm.conversion import to_vit

    torch.manual_seed(0)
    model = EHMModel(make_config()).eval()
    second, whole = affinity_of(to_vit(model), some_images(), layers=[1]), affinity_of(to_vit(model), some_images())
    torch.testing.assert_close(second, model.patch_affinity(some_images()))
    model.config.affinity_layers = "all"
    torch.testing.assert_close(whole, model.patch_affinity(some_images()))
    assert torch.equal(whole, affinity_of(to_vit(model), some_images(), layers="all"))
    assert (second - whole).abs().max() > 1e-4


class OwnAttention(PreTrainedModel):
    """Attends without transformers' attention interface, as models on the Hub often do."""

    config_class = PreTrainedConfig
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self):
        config = PreTrainedConfig()
        config.patch_size, config.image_size = 8, 32
        super().__init__(config)
        self.embeddings = nn.Conv2d(3, 32, 8, 8)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.post_init()

    def forward(self, pixel_values):
        tokens = self.embeddings(pixel_values).flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens)


def test_nothing_is_made_up_when_no_attention_can_be_read():
    model = OwnAttention()
    with pytest.raises(ValueError, match="OwnAttention does not use transformers' attention interface"):
        parse_hierarchy(model, some_images())


def test_models_without_a_token_for_each_patch_are_refused():
    """Swin attends in windows and merges patches."""
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    with pytest.raises(ValueError, match="SwinModel has 16 tokens for 64 patches"):
        parse_hierarchy(SwinModel(SwinConfig(**sizes, window_size=4)), some_images())


def test_models_without_patches_are_refused():
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    with pytest.raises(ValueError, match="ResNetModel"):
        parse_hierarchy(model, some_images())


def test_biases_that_beit_adds_to_its_attention_count(affinity_of):
    """They come as an attention mask, apart from queries and keys."""
    torch.manual_seed(0)
    model = BeitModel(BeitConfig(**SIZES, use_relative_position_bias=True)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    affinity = affinity_of(model, some_images())
    model.set_attn_implementation("eager")
    attentions = model(some_images(), output_attentions=True).attentions
    patches = torch.stack(attentions).mean((0, 2))[:, 1:, 1:]
    torch.testing.assert_close(affinity, (patches + patches.transpose(1, 2)) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"affinity": "values"}, "affinity='values' is not one of attention, keys"),
        ({"layers": [3]}, r"layers=\[3\] must be a list of layers, as \[1\], each in \[-3, 2\], or \"all\""),
        ({"layers": [-4]}, r"layers=\[-4\] must be a list of layers"),
        ({"layers": []}, r"layers=\[\] must be a list of layers"),
        ({"layers": "first"}, r"layers='first' must be a list of layers"),
        ({"linkage": "ward"}, "linkage='ward' is not one of average, single, complete"),
        ({"pixel_values": some_images(1, 32, 36)}, "pixel_values is 32x36, not a multiple of patch_size=8"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        parse_hierarchy(build("vit"), **({"pixel_values": some_images()} | options))
