"""What holds on a CPU holds on a GPU. Skipped where there is none."""

import shutil

import pytest
import torch
from conftest import tiny_config
from tiny_recipes import losses_of, run_script, write_recipe

from modeling_ehm import EHMForPreTraining, EHMModel
from modeling_ehm.mask_policies_ehm import MASK_POLICIES
from modeling_ehm.training.mask_log import read_mask_log

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def no_tf32():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # torch allows it in convolutions
        yield


def images_and_seeds(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(count)


def make_model(**changes) -> EHMForPreTraining:
    torch.manual_seed(0)
    return EHMForPreTraining(tiny_config(**changes)).train()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_losses_and_gradients_are_those_of_a_cpu(attention):
    pixel_values, seeds = images_and_seeds()
    model = make_model()
    model.set_attn_implementation(attention)
    mask = model.evolve_mask(pixel_values, 0.5, seeds)
    expected = model(pixel_values, bool_masked_pos=mask).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.cuda()
    loss = model(pixel_values.cuda(), bool_masked_pos=mask.cuda()).loss
    loss.backward()
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad.cpu(), gradients[name], rtol=1e-3, atol=1e-5)
    with torch.autocast("cuda", torch.bfloat16):
        rounded = model(pixel_values.cuda(), bool_masked_pos=mask.cuda()).loss
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(expected.item(), rel=0.01)


@pytest.mark.parametrize("policy", sorted(MASK_POLICIES))
def test_masks_of_every_policy(policy):
    """Equal counts, and the same again; where no network is asked, those of a CPU, and whatever the batch is.

    A network's last digits may depend on the batch: a GPU computes products of other shapes in another order.
    """
    pixel_values, seeds = images_and_seeds()
    model = make_model(mask_policy=policy)
    on_cpu = model.evolve_mask(pixel_values, 0.7, seeds)
    model.cuda()
    mask = model.evolve_mask(pixel_values.cuda(), 0.7, seeds)
    assert mask.is_cuda and (mask.sum(1) == 12).all()
    assert torch.equal(mask, model.evolve_mask(pixel_values.cuda(), 0.7, seeds))
    if policy not in ("ehm", "epm"):
        assert torch.equal(mask.cpu(), on_cpu)
        assert torch.equal(mask[3:4], model.evolve_mask(pixel_values[3:4].cuda(), 0.7, seeds[3:4]))


def test_the_encoder_gives_the_same_twice():
    pixel_values, _ = images_and_seeds()
    model = EHMModel(tiny_config()).cuda().eval()
    first, second = (model(pixel_values.cuda()).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)


def run(folder, **training):
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder / "recipe.yaml", model={"teacher": "ema"}, training={"max_steps": 6} | training)
    done = run_script(recipe)
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.mark.parametrize("more", [{}, {"torch_compile": True}, {"gradient_checkpointing": True}], ids=str)
def test_a_run_trains_as_on_a_cpu(tmp_path, more):
    """In float32: the same samples, nearly the same losses. Trees of nearly equal affinities may differ."""
    on_cpu, on_gpu = run(tmp_path / "a"), run(tmp_path / "b", use_cpu=False, **more)
    assert losses_of(on_gpu) == pytest.approx(losses_of(on_cpu), rel=0.02)
    assert read_mask_log(on_gpu)[1] == read_mask_log(on_cpu)[1]  # the first step's masks are random


def test_a_resumed_run_is_the_unbroken_run(tmp_path):
    """In bfloat16: masks of all steps. A GPU takes some sums in any order, which may move a loss's last digits."""
    settings = {"use_cpu": False, "bf16": True, "save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path / "a", **settings)
    broken = tmp_path / "b" / "out"
    shutil.copytree(whole / "checkpoint-3", broken / "checkpoint-3")
    shutil.copy(whole / "run.json", broken)
    run(tmp_path / "b", **settings)
    masks = read_mask_log(whole)
    assert read_mask_log(broken) == {step: masks[step] for step in (4, 5, 6)} and len(masks) == 6
    assert losses_of(broken) == pytest.approx(losses_of(whole), rel=1e-3)
