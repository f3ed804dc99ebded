"""Progress and moving average, against numbers worked out by hand."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from modeling_ehm import EHMForPreTraining
from modeling_ehm.training.callbacks import TEACHER_FILE, EMATeacherCallback, ProgressCallback, ema_decay_at


@pytest.fixture
def model(make_config):
    torch.manual_seed(0)
    return EHMForPreTraining(make_config(teacher="ema", teacher_decay=0.7, teacher_warmup_steps=2))


def call(callback, event, model, step=0, max_steps=10):
    state = TrainerState(global_step=step, max_steps=max_steps)
    getattr(callback, event)(None, state, TrainerControl(), model=model)


@pytest.mark.parametrize("step, max_steps, progress", [(0, 8, 0.0), (2, 8, 0.25), (7, 8, 0.875), (3, 1000, 0.003)])
def test_progress_is_the_finished_share_of_the_steps(model, step, max_steps, progress):
    """Before step 3 of 8, two are finished: a quarter."""
    call(ProgressCallback(), "on_step_begin", model, step, max_steps)
    assert model.progress == progress


@pytest.mark.parametrize(
    "step, decay, warmup, expected",
    [
        (0, 0.9999, 10, 0.0),  # 1 - 1 / 1: the average is the weights
        (10, 0.9999, 10, 0.5),  # 1 - 1 / 2
        (90, 0.9999, 10, 0.9),  # 1 - 1 / 10
        (10_000_000, 0.9999, 10, 0.9999),  # the cap
        (1, 0.3, 1, 0.3),  # 1 - 1 / 2 is above the cap
        (0, 0.99, 0, 0.99),  # no warm-up
    ],
)
def test_the_decay_grows_until_its_cap(step, decay, warmup, expected):
    """`1 - 1 / (1 + step / warmup)`, worked out by hand."""
    assert ema_decay_at(step, decay, warmup) == pytest.approx(expected, rel=1e-12)


def test_the_average_after_three_steps_is_the_one_worked_out_by_hand(model):
    """Decays 1/3, 1/2, 3/5 for steps 1 to 3 at warm-up 2, below the cap of 0.7: of weights a, b, c from a start s."""
    callback = EMATeacherCallback()
    start = copy.deepcopy(model.ehm.state_dict())
    call(callback, "on_train_begin", model)
    assert model.teacher_encoder() is callback.encoder and callback.encoder is not model.ehm
    steps = []
    for step in (1, 2, 3):
        with torch.no_grad():
            for parameter in model.ehm.parameters():
                parameter.add_(torch.randn_like(parameter))
        steps.append(copy.deepcopy(model.ehm.state_dict()))
        call(callback, "on_step_end", model, step)
    # s / 3 + 2 a / 3, halved and b / 2 added, three fifths of that and 2 c / 5 added:
    shares = [1 / 10, 2 / 10, 3 / 10, 4 / 10]
    for name, average in callback.encoder.named_parameters():
        expected = sum(share * weights[name] for share, weights in zip(shares, [start, *steps], strict=True))
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
        assert not average.requires_grad


def test_an_online_teacher_keeps_no_average(config, tmp_path):
    """Nothing is copied, attached or written."""
    model, callback = EHMForPreTraining(config), EMATeacherCallback()
    call(callback, "on_train_begin", model)
    call(callback, "on_step_end", model, 1)
    callback.save(tmp_path)
    assert callback.encoder is None and model.teacher_encoder() is model.ehm and list(tmp_path.iterdir()) == []


def test_a_saved_average_comes_back_bit_by_bit(model, tmp_path):
    """Weights that differ from the model's are written to their file and are what resuming starts with."""
    callback = EMATeacherCallback()
    call(callback, "on_train_begin", model)
    with torch.no_grad():
        for parameter in callback.encoder.parameters():
            parameter.add_(1)
    callback.save(tmp_path)
    resumed = EMATeacherCallback()
    resumed.resumed_from = tmp_path
    call(resumed, "on_train_begin", model)
    saved, weights = load_file(tmp_path / TEACHER_FILE), callback.encoder.state_dict()
    assert saved.keys() == weights.keys()
    for name, tensor in resumed.encoder.state_dict().items():
        assert torch.equal(tensor, weights[name]) and torch.equal(saved[name], weights[name])
    assert not torch.equal(next(resumed.encoder.parameters()), next(model.ehm.parameters()))


def test_a_checkpoint_without_the_average_cannot_be_resumed(model, tmp_path):
    """A fresh average would change the masks without a word; the error names the file and the way out."""
    callback = EMATeacherCallback()
    callback.resumed_from = tmp_path
    with pytest.raises(
        FileNotFoundError, match=f"{TEACHER_FILE} is missing, and teacher='ema' .*; set teacher='online'"
    ):
        call(callback, "on_train_begin", model)
