"""The model: what the encoder sees, what the loss counts, whose hierarchy makes the masks, what a directory loads."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForPreTraining, Trainer, TrainerCallback, TrainingArguments
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from modeling_ehm import EHMForPreTraining, EHMModel, build_hierarchy, hierarchical_mask
from modeling_ehm.mask_policies_ehm import MASK_POLICIES
from modeling_ehm.masking_ehm import mask_from_scores, random_scores
from modeling_ehm.modeling_ehm import normalize_patches, patchify, sincos_positions, unpatchify


def randomize(model):
    """Every weight random: biases and tokens start at 0 or near it, and tests of sameness would not see them."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def build(model_class, config, seed: int = 0):
    torch.manual_seed(seed)
    return randomize(model_class(config)).eval()


def some_images(batch: int, height: int = 32, width: int = 32, channels: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def some_masks(batch: int, count: int = 16, hidden: int = 12) -> torch.Tensor:
    return mask_from_scores(random_scores(torch.arange(batch) + 5, count), hidden)


# Positions and initial weights


def test_golden_position_table():
    """MAE's code names height what runs along the width; ViTMAE rotates the halves of the plain table to match."""
    plain = build_2d_sinusoidal_position_embedding(14, 14, embed_dim=192, cls_token=True, dtype=torch.float64)
    rotated = torch.cat([plain[:, 96:], plain[:, :96]], dim=1)
    table = sincos_positions((14, 14), 192)
    assert table.dtype == torch.float32 and table.shape == (1, 197, 192)
    torch.testing.assert_close(table[0].double(), rotated, atol=1e-6, rtol=0)


def test_position_table_by_hand():
    table = sincos_positions((2, 3), 8)[0]
    assert not table[0].any()  # class token
    x, y = 2.0, 1.0  # the last patch
    angles = torch.tensor([x, x / 100, y, y / 100], dtype=torch.float64)
    expected = torch.cat([angles[:2].sin(), angles[:2].cos(), angles[2:].sin(), angles[2:].cos()])
    torch.testing.assert_close(table[6].double(), expected, atol=1e-6, rtol=0)


def test_positions_survive_construction_and_loading(config, tmp_path):
    model = EHMForPreTraining(config)
    model.save_pretrained(tmp_path)
    for loaded in (model, EHMForPreTraining.from_pretrained(tmp_path)):
        assert torch.equal(loaded.ehm.embeddings.position_embeddings, sincos_positions((4, 4), 64))
        assert torch.equal(loaded.decoder.decoder_pos_embed, sincos_positions((4, 4), 32))
        assert not [name for name, _ in loaded.named_parameters() if "position" in name or "pos_embed" in name]


def test_initial_weights_are_maes(config):
    """Bounds are sqrt(6 / (fan-in + fan-out)); to MAE q, k and v are one matrix, and a patch is one vector."""
    torch.manual_seed(0)
    model = EHMForPreTraining(config)
    attention = model.ehm.layers[0].attention
    patches = model.ehm.embeddings.patch_embeddings.projection
    bounds = {
        "q_proj": (attention.q_proj.weight, (6 / (64 + 3 * 64)) ** 0.5),
        "k_proj": (attention.k_proj.weight, (6 / (64 + 3 * 64)) ** 0.5),
        "v_proj": (attention.v_proj.weight, (6 / (64 + 3 * 64)) ** 0.5),
        "decoder q_proj": (model.decoder.decoder_layers[0].attention.q_proj.weight, (6 / (32 + 3 * 32)) ** 0.5),
        "o_proj": (attention.o_proj.weight, (6 / (64 + 64)) ** 0.5),
        "fc1": (model.ehm.layers[0].mlp.fc1.weight, (6 / (64 + 128)) ** 0.5),
        "patch projection": (patches.weight, (6 / (64 + 8 * 8 * 3)) ** 0.5),
        "decoder_pred": (model.decoder.decoder_pred.weight, (6 / (32 + 192)) ** 0.5),
    }
    for name, (weight, bound) in bounds.items():
        largest = weight.abs().max().item()
        assert 0.98 * bound < largest <= bound, f"{name} is drawn up to {largest:.4f} and not up to {bound:.4f}"
    biases = {name: bias for name, bias in model.named_parameters() if name.endswith("bias")}
    assert [name for name, bias in biases.items() if bias.any()] == []
    assert 0.015 < model.ehm.embeddings.cls_token.std() < 0.025
    assert 0.013 < model.decoder.mask_token.std() < 0.027


def test_loading_an_encoder_for_pretraining_keeps_its_weights(config, tmp_path):
    """The decoder is new and must be initialised; nothing that the directory holds may be."""
    encoder = build(EHMModel, config)
    encoder.save_pretrained(tmp_path)
    model = EHMForPreTraining.from_pretrained(tmp_path)
    for name, weight in encoder.state_dict().items():
        assert torch.equal(model.ehm.state_dict()[name], weight), name
    assert model.decoder.mask_token.any() and model.decoder.decoder_pos_embed.any()
    assert not model.decoder.decoder_pred.bias.any()


# The encoder


@pytest.mark.parametrize("objective", ["mae", "simmim"])
def test_encoder_never_masks_by_itself(make_config, objective):
    model = build(EHMModel, make_config(objective=objective))
    images = some_images(2)
    for training in (False, True):
        model.train(training)
        features = model(images).last_hidden_state
        assert features.shape == (2, 17, 64)
        assert torch.equal(model(images).last_hidden_state, features)
        nothing = torch.zeros(2, 16, dtype=torch.bool)
        torch.testing.assert_close(model(images, nothing).last_hidden_state, features, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("objective", "tokens"), [("mae", 16), ("simmim", 17)])
def test_encoder_never_sees_hidden_pixels(make_config, objective, tokens):
    model = build(EHMModel, make_config(objective=objective))
    image = some_images(1)
    mask = torch.arange(16)[None] == 0  # (1, 16): only the top-left patch is hidden
    changed = image.clone()
    changed[..., :8, :8] = 1 - changed[..., :8, :8]
    features = model(image, mask).last_hidden_state
    assert features.shape == (1, tokens, 64)
    assert torch.equal(features, model(changed, mask).last_hidden_state)
    assert not torch.allclose(features, model(changed, ~mask.roll(1, 1)).last_hidden_state[:, :1])
    changed = image.clone()
    changed[..., :8, 8:16] += 1  # its visible neighbour
    assert not torch.allclose(features, model(changed, mask).last_hidden_state, atol=1e-3)


def test_visible_patches_keep_their_places(config):
    """One layer would not do: the states of the visible patches enter as in the unmasked image, in image order."""
    model = build(EHMModel, config)
    images, mask = some_images(2), some_masks(2)
    everything = model.embeddings(images)  # (B, 17, D)
    visible = model.embeddings(images, mask)  # (B, 5, D)
    for image in range(2):
        kept = [0] + [1 + n for n in range(16) if not mask[image, n]]
        torch.testing.assert_close(visible[image], everything[image, kept], atol=1e-5, rtol=0)


def test_simmim_puts_the_mask_token_at_hidden_places(make_config):
    model = build(EHMModel, make_config(objective="simmim"))
    images, mask = some_images(2), some_masks(2)
    everything, masked = model.embeddings(images), model.embeddings(images, mask)
    positions = sincos_positions((4, 4), 64)[:, 1:]
    hidden = (model.embeddings.mask_token + positions).expand(2, -1, -1)
    torch.testing.assert_close(masked[:, 1:], torch.where(mask[..., None], hidden, everything[:, 1:]))
    assert model.embeddings.mask_token.abs().min() > 0


def test_patch_embedding_is_the_convolution_of_vit(make_config):
    model = build(EHMModel, make_config(image_size=[32, 48], patch_size=[8, 16], num_channels=5))
    images = some_images(2, 32, 48, channels=5)
    expected = model.embeddings.patch_embeddings.projection(images).flatten(2).transpose(1, 2)  # (B, N, D)
    expected = expected + sincos_positions((4, 3), 64)[:, 1:]
    torch.testing.assert_close(model.embeddings(images)[:, 1:], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("height", "width", "channels"), [(32, 32, 1), (48, 32, 3), (16, 56, 5), (64, 64, 3), (8, 16, 3)]
)
def test_other_sizes_have_exact_positions(make_config, height, width, channels):
    """An image of another size gets the features of a model that was built for that size."""
    model = build(EHMModel, make_config(num_channels=channels))
    native = build(EHMModel, make_config(num_channels=channels, image_size=[height, width], mask_ratio=0.5), seed=1)
    weights = {name: weight for name, weight in model.state_dict().items() if "position" not in name}
    assert native.load_state_dict(weights, strict=False).missing_keys == ["embeddings.position_embeddings"]
    images = some_images(2, height, width, channels)
    features = model(images).last_hidden_state
    assert features.shape == (2, 1 + height * width // 64, 64)
    torch.testing.assert_close(features, native(images).last_hidden_state)
    assert torch.equal(features, model(images, interpolate_pos_encoding=True).last_hidden_state)


def test_other_sizes_pretrain(make_config):
    model = build(EHMForPreTraining, make_config(image_size=[32, 64], patch_size=[8, 16], num_channels=1))
    for height, width in ((32, 64), (16, 64), (40, 48)):
        images = some_images(2, height, width, channels=1).requires_grad_()
        outputs = model(images, mask_seed=torch.arange(2))
        count = (height // 8) * (width // 16)
        assert outputs.logits.shape == (2, count, 128)
        assert outputs.mask.sum(1).tolist() == [round(0.75 * count)] * 2
        outputs.loss.backward()
        assert images.grad.isfinite().all()


def test_pooler_output_is_the_mean_of_the_normed_patches(config):
    model = build(EHMModel, config)
    outputs = model(some_images(2), output_hidden_states=True)
    normed = model.layernorm(outputs.hidden_states[-1])  # the last state comes before the final norm
    torch.testing.assert_close(outputs.last_hidden_state, normed)
    torch.testing.assert_close(outputs.pooler_output, normed[:, 1:].mean(1))


def test_states_and_maps_on_request_are_those_of_eager_attention(config):
    model = build(EHMForPreTraining, config)
    images, mask = some_images(2), some_masks(2)
    assert model.config._attn_implementation == "sdpa"
    plain = model(images, mask)
    assert plain.hidden_states is None and plain.attentions is None
    fused = model(images, mask, output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation("eager")
    eager = model(images, mask, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in fused.hidden_states] == [(2, 5, 64)] * 4  # 1 + V tokens, 1 + 3 layers
    assert [tuple(weights.shape) for weights in fused.attentions] == [(2, 4, 5, 5)] * 3
    for one, other in zip(fused.hidden_states + fused.attentions, eager.hidden_states + eager.attentions, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    for weights in fused.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
    torch.testing.assert_close(plain.logits, eager.logits, atol=1e-5, rtol=0)


def test_tuple_instead_of_output(config):
    model = build(EHMForPreTraining, config)
    images, mask = some_images(2), some_masks(2)
    named = model(images, mask)
    loss, logits, returned = model(images, mask, return_dict=False)
    assert torch.equal(loss, named.loss) and torch.equal(logits, named.logits) and torch.equal(returned, mask)
    assert torch.equal(model.ehm(images, return_dict=False)[0], model.ehm(images).last_hidden_state)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_gradient_checkpointing_gives_equal_gradients(config):
    model = build(EHMForPreTraining, config).train()
    inputs = {"pixel_values": some_images(2), "mask_seed": torch.arange(2), "progress": 0.5}
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    calls = []
    for layer in model.ehm.layers:
        layer.attention.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    model(**inputs).loss.backward()
    assert calls.count(True) == 6, "each layer runs once with its gradient and once more in the backward pass"
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def test_bfloat16(config):
    model = build(EHMForPreTraining, config).to(torch.bfloat16).train()
    outputs = model(some_images(2).to(torch.bfloat16), mask_seed=torch.arange(2), progress=0.5, return_logits=True)
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16 and outputs.loss.dtype == torch.float32
    assert outputs.logits.isfinite().all() and outputs.loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_bfloat16_autocast(config):
    model = build(EHMForPreTraining, config).train()
    inputs = {"pixel_values": some_images(2), "bool_masked_pos": some_masks(2)}
    exact = model(**inputs).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
        assert model(some_images(2), mask_seed=torch.arange(2), progress=0.5).loss.isfinite()
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_autocast_casts_what_attention_reads_once(config, monkeypatch):
    """And not once for queries, keys and values each; the loss is the same to the bit."""
    model, seen = build(EHMForPreTraining, config).train(), []
    assert all(parameter.any() for parameter in model.parameters())  # biases too
    model.ehm.layers[0].attention.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].dtype))
    arguments = {"pixel_values": some_images(2), "bool_masked_pos": some_masks(2)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        once = model(**arguments).loss
        monkeypatch.setattr("modeling_ehm.modeling_ehm.as_autocast", lambda hidden_states: hidden_states)
        thrice = model(**arguments).loss
    assert seen == [torch.bfloat16, torch.float32] and once.item() == thrice.item()


def test_without_autocast_nothing_is_cast(config):
    model, seen = build(EHMModel, config), []
    model.layers[0].attention.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].dtype))
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)(some_images(2).to(dtype))
    assert seen == [torch.float32, torch.float64]
    assert model.to("meta")(some_images(2).to("meta", dtype)).last_hidden_state.shape == (2, 17, 64)


def test_a_teacher_in_bfloat16_beside_a_student_in_float32(make_config):
    """Its affinities are those of autocast; the loss is in float32, and autocast ends with the teacher."""
    model = build(EHMForPreTraining, make_config(teacher_dtype="bfloat16")).train()
    images = some_images(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model.ehm.patch_affinity(images)
    found = model.patch_affinity(images)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert not torch.equal(found, model.ehm.patch_affinity(images))
    seen = []
    model.ehm.layernorm.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    model(images, progress=0.5, mask_seed=torch.arange(2)).loss.backward()
    assert seen == [torch.float32]


@pytest.mark.parametrize("affinity", ["attention", "keys"])
def test_affinity_keeps_its_precision_under_autocast(make_config, affinity):
    """Eight bits of a bfloat16 cosine are full of ties, and ties are merged by place, not by content."""
    model = build(EHMModel, make_config(affinity=affinity))
    exact = model.patch_affinity(some_images(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model.patch_affinity(some_images(2))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0)
    upper = rough[0][tuple(torch.triu_indices(16, 16, 1))]
    assert len(upper.unique()) > 115, "of 120 pairs hardly any are tied"


# The loss


def test_policies_compute_in_float32_and_the_teacher_as_its_caller(make_config, monkeypatch):
    seen = []

    def policy(request):
        seen.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
        request.affinity()
        return torch.rand(len(request.mask_seed), request.num_patches)

    monkeypatch.setitem(MASK_POLICIES, "mine", policy)
    model = build(EHMForPreTraining, make_config(mask_policy="mine")).train()
    model.ehm.layers[0].attention.q_proj.register_forward_hook(lambda _, inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.evolve_mask(some_images(2))
    model.evolve_mask(some_images(2))
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.float32]


def test_patchify_by_hand():
    image = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6).float()
    patches = patchify(image, (2, 3))
    # Patch 3 is bottom right; per pixel both channels, rows 2-3, columns 3-5.
    expected = [[int(image[0, c, y, x]) for y in (2, 3) for x in (3, 4, 5) for c in (0, 1)]]
    assert patches[:, 3].int().tolist() == expected
    assert torch.equal(unpatchify(patches, (2, 3), (2, 2)), image)


@pytest.mark.parametrize("objective", ["mae", "simmim"])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_by_hand(make_config, objective, norm_pix_loss):
    model = build(EHMForPreTraining, make_config(objective=objective, norm_pix_loss=norm_pix_loss))
    images, mask = some_images(2), some_masks(2)
    with torch.no_grad():
        outputs = model(images, mask)
    errors = []
    for image in range(2):
        for patch in mask[image].nonzero()[:, 0].tolist():
            top, left = 8 * (patch // 4), 8 * (patch % 4)
            pixels = images[image, :, top : top + 8, left : left + 8].permute(1, 2, 0).reshape(-1).double()
            if norm_pix_loss:
                pixels = (pixels - pixels.mean()) / (((pixels - pixels.mean()) ** 2).sum() / 191 + 1e-6) ** 0.5
            difference = outputs.logits[image, patch].double() - pixels
            errors.append((difference**2 if objective == "mae" else difference.abs()).mean().item())
    assert len(errors) == 24
    assert outputs.loss.item() == pytest.approx(sum(errors) / 24, rel=1e-5)
    assert torch.equal(outputs.mask, mask)


def test_normalized_patches_have_zero_mean_and_unit_variance():
    patches = normalize_patches(3 * some_images(2).reshape(2, 16, 192) + 5)
    torch.testing.assert_close(patches.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.var(-1), torch.ones(2, 16), atol=1e-4, rtol=0)
    assert not normalize_patches(torch.full((1, 1, 192), 0.5)).any()  # a flat patch: no division by zero


def test_decoder_puts_every_token_at_its_place(config):
    model = build(EHMForPreTraining, config)
    images, mask = some_images(2), some_masks(2)
    seen = []
    model.decoder.decoder_layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images, mask)
        embedded = model.decoder.decoder_embed(model.ehm(images, mask).last_hidden_state)  # (B, 1 + V, D)
    positions = sincos_positions((4, 4), 32)[0]
    for image in range(2):
        torch.testing.assert_close(seen[0][image, 0], embedded[image, 0] + positions[0])
        order = sorted(range(16), key=mask[image].tolist().__getitem__)  # visible ones first, both in image order
        for place, patch in enumerate(order, start=1):
            token = model.decoder.mask_token[0, 0] if mask[image, patch] else embedded[image, place]
            torch.testing.assert_close(seen[0][image, place], token + positions[1 + patch])


@pytest.mark.parametrize("objective", ["mae", "simmim"])
def test_predicting_hidden_patches_alone_gives_the_same_loss_and_gradients(make_config, objective):
    model = build(EHMForPreTraining, make_config(objective=objective)).train()
    inputs = {"pixel_values": some_images(2), "bool_masked_pos": some_masks(2)}
    assert model(**inputs).logits is None and model.eval()(**inputs).logits.shape == (2, 16, 192)
    found = []
    for return_logits in (False, True):
        model.train().zero_grad()
        outputs = model(**inputs, return_logits=return_logits)
        outputs.loss.backward()
        found.append((outputs.loss, gradients(model)))
        assert (outputs.logits is None) != return_logits
    (loss, own), (other_loss, others) = found
    torch.testing.assert_close(loss, other_loss)
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, others[name], atol=1e-6, rtol=1e-4, msg=name)
    assert model(**inputs, return_loss=False).logits.shape == (2, 16, 192)


@pytest.mark.parametrize("objective", ["mae", "simmim"])
def test_every_parameter_gets_a_gradient(make_config, objective):
    model = build(EHMForPreTraining, make_config(objective=objective)).train()
    model(some_images(2), mask_seed=torch.arange(2), progress=0.5).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    # Softmax does not see what is added to all logits of a row, so these gradients are zero but for rounding.
    vanishing = [n for n, w in model.named_parameters() if not n.endswith("k_proj.bias") and w.grad.abs().max() < 1e-7]
    assert vanishing == []


def test_no_loss_on_request(config):
    model = build(EHMForPreTraining, config)
    assert model(some_images(1), return_loss=False, mask_seed=torch.tensor([1])).loss is None
    nothing = torch.zeros(1, 16, dtype=torch.bool)
    assert model(some_images(1), nothing, return_loss=False).logits.shape == (1, 16, 192)


# Masks from the model's own hierarchy


def test_same_seeds_same_loss_in_another_order(config):
    model = build(EHMForPreTraining, config).train()
    images, seeds, order = some_images(6), torch.arange(6) * 2**40, torch.tensor([4, 2, 0, 5, 1, 3])
    outputs = model(images, mask_seed=seeds, progress=0.6)
    shuffled = model(images[order], mask_seed=seeds[order], progress=0.6)
    assert torch.equal(shuffled.mask, outputs.mask[order])
    assert shuffled.loss.item() == pytest.approx(outputs.loss.item(), rel=1e-5)
    alone = model(images[2:3], mask_seed=seeds[2:3], progress=0.6)
    assert torch.equal(alone.mask, outputs.mask[2:3])
    other = model(images, mask_seed=seeds + 1, progress=0.6)
    assert not torch.equal(other.mask, outputs.mask)


def test_masks_without_seeds_follow_torchs_generator(config):
    model = build(EHMForPreTraining, config)
    torch.manual_seed(5)
    first, second = model(some_images(4)).mask, model(some_images(4)).mask
    torch.manual_seed(5)
    assert torch.equal(model(some_images(4)).mask, first)
    assert not torch.equal(first, second)


def test_mask_is_that_of_the_hierarchy_at_this_progress(make_config):
    config = make_config(num_nodes_start=12, num_nodes_end=4, softness_start=0.5, softness_end=0.0, mask_ratio=0.5)
    model = build(EHMForPreTraining, config).train()
    images, seeds = some_images(4), torch.arange(4)
    trees = model.parse_hierarchy(images)
    for progress, num_nodes, softness in ((0.0, 12, 0.5), (0.5, 8, 0.25), (1.0, 4, 0.0)):
        assert model.mask_schedule(progress) == (num_nodes, softness)
        expected = hierarchical_mask(trees, num_nodes, seeds, 0.5, softness)
        assert torch.equal(model(images, progress=progress, mask_seed=seeds).mask, expected)
        assert torch.equal(model.evolve_mask(images, progress, seeds), expected)


def test_masks_evolve_from_evolution_start_on(make_config):
    early, late = (build(EHMForPreTraining, make_config(evolution_start=start)).train() for start in (0.0, 0.5))
    images, seeds = some_images(4), torch.arange(4)
    assert [late.mask_schedule(progress)[0] for progress in (0.0, 0.5, 0.75, 1.0)] == [16, 16, 9, 2]
    for progress, evolved in ((0.0, 0.0), (0.3, 0.0), (0.5, 0.0), (0.75, 0.5), (1.0, 1.0)):
        expected = early.evolve_mask(images, evolved, seeds)
        assert torch.equal(late.evolve_mask(images, progress, seeds), expected), progress


def test_while_each_patch_is_a_node_no_teacher_runs(make_config):
    """But at the first step, where what is wrong with it is to be known."""

    def refuse(images):
        raise RuntimeError("teacher")

    model = build(EHMForPreTraining, make_config(evolution_start=0.5)).train()
    coarse = build(EHMForPreTraining, make_config(evolution_start=0.5, num_nodes_start=15)).train()
    model.parse_hierarchy = coarse.parse_hierarchy = refuse
    images, seeds = some_images(2), torch.arange(2)
    for progress in (1e-6, 0.25, 0.5):
        assert model.evolve_mask(images, progress, seeds).sum() == 24
    for one, progress in ((model, 0.0), (model, 0.75), (coarse, 0.25)):
        with pytest.raises(RuntimeError, match="teacher"):
            one.evolve_mask(images, progress, seeds)


def test_schedule_of_another_number_of_patches(make_config):
    model = build(EHMForPreTraining, make_config(num_nodes_end=6))
    assert model.mask_schedule(0.0, num_patches=4) == (4, 0.0)
    assert model.mask_schedule(1.0, num_patches=4) == (4, 0.0)
    assert model.mask_schedule(1.0, num_patches=64) == (6, 0.0)


def test_random_policy_has_no_teacher_pass_and_needs_no_progress(make_config):
    model = build(EHMForPreTraining, make_config(mask_policy="random")).train()
    model.parse_hierarchy = None  # calling it would fail
    seeds = torch.arange(3)
    mask = model(some_images(3), mask_seed=seeds).mask
    assert torch.equal(mask, mask_from_scores(random_scores(seeds, 16), 12))


@pytest.mark.parametrize("objective", ["mae", "simmim"])
def test_several_masks_of_one_tree(make_config, objective):
    """Four masks of an image show each patch once, and count as four images in the loss; the teacher runs once."""
    model = build(EHMForPreTraining, make_config(masks_per_image=4, objective=objective)).train()
    images, seeds = some_images(2), torch.arange(2)
    parsed = []
    model.ehm.patch_affinity = lambda pixels, own=model.ehm.patch_affinity: parsed.append(len(pixels)) or own(pixels)
    outputs = model(images, progress=0.5, mask_seed=seeds, return_logits=True)
    assert parsed == [2] and outputs.mask.shape == (8, 16) and outputs.logits.shape == (8, 16, 192)
    assert (outputs.mask.unflatten(0, (2, 4)).logical_not().sum(1) == 1).all()
    single = [model(images[n // 4 : n // 4 + 1], outputs.mask[n : n + 1]).loss for n in range(8)]
    torch.testing.assert_close(outputs.loss, torch.stack(single).mean())
    torch.testing.assert_close(model(images, outputs.mask).loss, outputs.loss)  # given, not made
    assert torch.equal(outputs.mask[::4], model.eval()(images, progress=0.5, mask_seed=seeds).mask)  # then only one


@pytest.mark.parametrize("objective", ["mae", "simmim"])
def test_the_encoder_takes_several_masks_of_an_image(make_config, objective):
    """One after the other for each image, as if the image itself were repeated."""
    model = build(EHMModel, make_config(objective=objective)).eval()
    images, mask = some_images(2), some_masks(6)
    repeated = model(images.repeat_interleave(3, dim=0), mask)
    torch.testing.assert_close(model(images, mask).last_hidden_state, repeated.last_hidden_state)
    with pytest.raises(ValueError, match=r"shape \(5, 16\); bool and \(2 images x R masks, 16 patches\) are expected"):
        model(images, mask[:5])


def test_progress_rules(make_config):
    model = build(EHMForPreTraining, make_config(num_nodes_end=2, mask_ratio=0.5))
    images, seeds = some_images(8), torch.arange(8)
    early, late = (model(images, mask_seed=seeds, progress=progress).mask for progress in (0.0, 1.0))
    assert not torch.equal(early, late)
    model.progress = 0.0
    assert torch.equal(model(images, mask_seed=seeds).mask, late), "evaluation uses the final masks"
    model.train()
    assert torch.equal(model(images, mask_seed=seeds).mask, early), "training uses model.progress"
    assert torch.equal(model(images, mask_seed=seeds, progress=1.0).mask, late), "the argument wins"
    model.progress = None
    with pytest.raises(ValueError, match="progress is not known.*pass progress=step / max_steps"):
        model(images, mask_seed=seeds)
    for progress in (-0.1, 1.1, 30):
        with pytest.raises(ValueError, match=rf"progress={progress} is not in \[0, 1\]"):
            model(images, mask_seed=seeds, progress=progress)
    assert model(images, early).loss.isfinite(), "a given mask needs no progress"


# The teacher


def test_ema_teacher(make_config, tmp_path):
    model = build(EHMForPreTraining, make_config(teacher="ema", mask_ratio=0.5)).train()
    images, seeds = some_images(4), torch.arange(4)
    with pytest.raises(RuntimeError, match="teacher='ema' but no moving average is attached.*attach_teacher"):
        model(images, mask_seed=seeds, progress=1.0)
    names, weights = list(model.state_dict()), list(model.parameters())
    own = model.eval()(images, mask_seed=seeds).mask  # no teacher, evaluation: the weights at hand

    teacher = build(EHMModel, model.config, seed=9)
    model.train().attach_teacher(teacher)
    outputs = model(images, mask_seed=seeds, progress=1.0)
    expected = hierarchical_mask(teacher.parse_hierarchy(images), 2, seeds, 0.5)
    assert torch.equal(outputs.mask, expected) and not torch.equal(own, expected)
    outputs.loss.backward()
    assert all(weight.grad is None for weight in teacher.parameters())

    assert list(model.state_dict()) == names and len(list(model.parameters())) == len(weights)
    assert teacher not in list(model.modules())
    model.save_pretrained(tmp_path)
    loaded = EHMForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(loaded(images, mask_seed=seeds).mask, own)
    model.attach_teacher(None)
    with pytest.raises(RuntimeError, match="no moving average is attached"):
        model(images, mask_seed=seeds, progress=1.0)


def test_online_teacher_is_the_encoder_itself(config):
    model = build(EHMForPreTraining, config).train()
    assert model.teacher_encoder() is model.ehm
    model.attach_teacher(build(EHMModel, config, seed=9))
    assert model.teacher_encoder() is model.ehm


@pytest.mark.parametrize(
    "layers, read", [(None, [1]), ("all", [0, 1, 2]), ([1], [1]), ([0, 2], [0, 2]), ([-1], [2]), ([0], [0])]
)
def test_affinity_is_the_attention_that_the_model_reports(make_config, layers, read):
    model = build(EHMModel, make_config(affinity_layers=layers))
    images = some_images(2)
    attentions = model(images, output_attentions=True).attentions
    chosen = [attentions[layer] for layer in read]
    patches = torch.stack(chosen).mean((0, 2))[:, 1:, 1:]  # over layers and heads, class token removed
    affinity = model.patch_affinity(images)
    torch.testing.assert_close(affinity, (patches + patches.transpose(1, 2)) / 2, atol=1e-6, rtol=0)
    assert torch.equal(affinity, affinity.transpose(1, 2)) and not affinity.requires_grad
    assert not torch.allclose(patches, patches.transpose(1, 2), atol=1e-3)  # or the symmetry would show nothing


@pytest.mark.parametrize("layers", [None, [0, 1]])
def test_affinity_of_keys_is_their_cosine(make_config, layers):
    model = build(EHMModel, make_config(affinity="keys", affinity_layers=layers))
    images = some_images(2)
    states = model(images, output_hidden_states=True).hidden_states
    cosines = []
    for index in layers or [2]:
        layer = model.layers[index]
        keys = layer.attention.k_proj(layer.layernorm_before(states[index]))[:, 1:]  # (B, N, D)
        cosines.append(nn.functional.cosine_similarity(keys[:, :, None], keys[:, None], dim=-1))
    torch.testing.assert_close(model.patch_affinity(images), sum(cosines) / len(cosines), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "calls", "mlps"),
    [
        ({}, [1, 1, 0], [1, 0, 0]),  # of the last layer used, only queries and keys
        ({"affinity_layers": "all"}, [1, 1, 1], [1, 1, 0]),
        ({"affinity_layers": [0]}, [1, 0, 0], [0, 0, 0]),
        ({"affinity_layers": [1]}, [1, 1, 0], [1, 0, 0]),
        ({"affinity": "keys", "affinity_layers": [0, 1]}, [1, 1, 0], [1, 0, 0]),
    ],
)
def test_teacher_pass_stops_after_the_last_layer_used(make_config, changes, calls, mlps):
    model = build(EHMModel, make_config(**changes))
    counts = {"layer": [0, 0, 0], "mlp": [0, 0, 0]}

    def count(kind, index):
        def hook(*_):
            counts[kind][index] += 1

        return hook

    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(count("layer", index))
        layer.mlp.register_forward_hook(count("mlp", index))
    model.parse_hierarchy(some_images(1))
    assert counts == {"layer": calls, "mlp": mlps}


def test_teacher_pass_is_free_of_dropout_and_leaves_the_mode(make_config):
    config = make_config(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model = build(EHMModel, config)
    expected = model.patch_affinity(some_images(2))
    model.train()
    assert torch.equal(model.patch_affinity(some_images(2)), expected)
    assert all(module.training for module in model.modules())
    assert not torch.equal(model(some_images(2)).last_hidden_state, model(some_images(2)).last_hidden_state)


@pytest.mark.parametrize("linkage", ["average", "single", "complete"])
def test_hierarchy_follows_the_config(make_config, linkage):
    model = build(EHMForPreTraining, make_config(linkage=linkage, image_size=[32, 64]))
    images = some_images(2, 32, 64)
    for trees in (model.parse_hierarchy(images), model.ehm.parse_hierarchy(images)):
        expected = build_hierarchy(model.ehm.patch_affinity(images), linkage)
        assert torch.equal(trees.parent, expected.parent) and torch.equal(trees.height, expected.height)
        assert trees.grid_size == (4, 8)


def test_timings_on_request(config):
    model = build(EHMForPreTraining, config)
    model(some_images(1))
    assert model.timings is None
    model.timings = {}
    model(some_images(1))
    first = dict(model.timings)
    model(some_images(1))
    assert first.keys() == {"masks", "teacher"} and all(model.timings[part] > first[part] > 0 for part in first)
    assert first["masks"] > first["teacher"]


# Directories


@pytest.mark.parametrize("objective", ["mae", "simmim"])
def test_reload_through_auto_classes(make_config, tmp_path, objective):
    model = build(EHMForPreTraining, make_config(objective=objective))
    model.save_pretrained(tmp_path)
    images, mask = some_images(2), some_masks(2)
    encoder, whole = AutoModel.from_pretrained(tmp_path), AutoModelForPreTraining.from_pretrained(tmp_path)
    assert (type(encoder), type(whole)) == (EHMModel, EHMForPreTraining)
    assert torch.equal(encoder(images).last_hidden_state, model.ehm(images).last_hidden_state)
    assert torch.equal(whole(images, mask).loss, model(images, mask).loss)
    assert list(whole.state_dict()) == list(model.state_dict())


def test_encoder_directory_reloads(config, tmp_path):
    model = build(EHMModel, config)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(some_images(2)).last_hidden_state, model(some_images(2)).last_hidden_state)


LOAD_REMOTE_CODE = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining
folder = sys.argv[1]
inputs = torch.load(folder + "/../inputs.pt")
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "ehm"
encoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)
assert type(model).__name__ == "EHMForPreTraining" and type(model).__module__.startswith("transformers_modules.")
torch.set_num_threads(1)
with torch.no_grad():
    given = model(inputs["images"], inputs["mask"])
    evolved = model(inputs["images"], mask_seed=inputs["seeds"])
    features = encoder(inputs["images"]).last_hidden_state
torch.save({"given": given.loss, "evolved": evolved.loss, "mask": evolved.mask, "features": features}, sys.argv[2])
again = folder + "/../again"
model.save_pretrained(again)
torch.save(AutoModel.from_pretrained(again, trust_remote_code=True)(inputs["images"]).last_hidden_state, sys.argv[3])
"""


def test_directory_loads_where_this_package_is_missing(config, tmp_path, run_without_package):
    model = build(EHMForPreTraining, config)
    model.save_pretrained(tmp_path / "model")
    inputs = {"images": some_images(3), "mask": some_masks(3), "seeds": torch.arange(3)}
    torch.save(inputs, tmp_path / "inputs.pt")
    result = run_without_package(
        LOAD_REMOTE_CODE, tmp_path / "model", tmp_path / "outputs.pt", tmp_path / "features.pt"
    )
    assert result.returncode == 0, result.stderr
    outputs = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        assert torch.equal(outputs["given"], model(inputs["images"], inputs["mask"]).loss)
        evolved = model(inputs["images"], mask_seed=inputs["seeds"])
        assert torch.equal(outputs["mask"], evolved.mask) and torch.equal(outputs["evolved"], evolved.loss)
        features = model.ehm(inputs["images"]).last_hidden_state
    assert torch.equal(outputs["features"], features)
    assert torch.equal(torch.load(tmp_path / "features.pt"), features)


# Training with the plain Trainer


class Progress(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **kwargs):
        model.progress = state.global_step / state.max_steps


def test_plain_trainer(config, tmp_path):
    torch.manual_seed(0)
    model = EHMForPreTraining(config)
    before = copy.deepcopy(model.state_dict())
    examples = [{"pixel_values": image, "mask_seed": torch.tensor(n)} for n, image in enumerate(some_images(12))]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    progress = []
    model.register_forward_pre_hook(lambda module, _: progress.append(module.progress))
    trainer = Trainer(model, arguments, train_dataset=examples, eval_dataset=examples, callbacks=[Progress()])
    assert trainer.train().global_step == 3
    assert progress == pytest.approx([0, 1 / 3, 2 / 3])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)
    after = model.state_dict()
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert unchanged == ["ehm.embeddings.position_embeddings", "decoder.decoder_pos_embed"]
    expected = model.eval()(some_images(12), mask_seed=torch.arange(12)).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


# Refusals


def mask_of(*hidden: int, count: int = 16) -> torch.Tensor:
    """`(B, N)`: row i hides `hidden[i]` patches."""
    return torch.arange(count) < torch.tensor(hidden)[:, None]


@pytest.mark.parametrize("objective", ["mae", "simmim"])
@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        (some_images(2, channels=4), {}, r"pixel_values has shape \(2, 4, 32, 32\); \(images, num_channels=3, height"),
        (torch.rand(3, 32, 32), {}, r"pixel_values has shape \(3, 32, 32\)"),
        (some_images(2, 32, 36), {}, r"pixel_values is 32x36 .*, not a multiple of patch_size=\(8, 8\)"),
        (some_images(2, 4, 32), {}, r"pixel_values is 4x32 .*, not a multiple of patch_size"),
        (some_images(2, 0, 32), {}, "pixel_values is 0x32"),
        (some_images(2), {"bool_masked_pos": mask_of(3, 5)}, "masks between 3 and 5 patches a row; mask"),
        (some_images(2), {"bool_masked_pos": mask_of(16, 16)}, "masks all 16 patches; the encoder needs at least one"),
        (some_images(2), {"bool_masked_pos": mask_of(0, 0)}, "masks no patch, so there is nothing to predict"),
        (some_images(2), {"bool_masked_pos": mask_of(3, 3).long()}, "bool_masked_pos has dtype torch.int64"),
        (some_images(2), {"bool_masked_pos": mask_of(3, 3).float()}, "bool_masked_pos has dtype torch.float32"),
        (some_images(2), {"bool_masked_pos": mask_of(3, 3, count=15)}, r"shape \(2, 15\); bool and \(.*16 patches\)"),
        (
            some_images(2),
            {"bool_masked_pos": mask_of(3)[0]},
            r"shape \(16,\); bool and \(2 images x R masks, 16 patches",
        ),
        (some_images(2), {"bool_masked_pos": mask_of(*[12] * 3)}, r"shape \(3, 16\); bool and \(2 images x R masks"),
        (some_images(2), {"bool_masked_pos": mask_of(12)}, r"shape \(1, 16\); bool and \(2 images x R masks"),
        (some_images(2).mul(255).byte(), {}, "pixel_values has dtype torch.uint8; normalised floats are expected: use"),
        (some_images(2), {"mask_seed": 3}, r"mask_seed is 3; one number an image, \(2,\), in a tensor"),
        (some_images(2), {"mask_seed": torch.arange(3)}, r"mask_seed has shape \(3,\); one number an image, \(2,\)"),
        (some_images(2), {"mask_seed": torch.arange(2.0)}, "mask_seed has dtype torch.float32"),
    ],
)
def test_refused_inputs(make_config, objective, images, arguments, message):
    model = EHMForPreTraining(make_config(objective=objective)).eval()
    with pytest.raises(ValueError, match=message):
        model(images, **arguments)
