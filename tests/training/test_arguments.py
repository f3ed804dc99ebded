"""MAE's published recipe is what a recipe without further settings trains with; the golden numbers are theirs."""

import math

import pytest
import torch
from torch.utils.data import Dataset

from modeling_ehm import EHMForPreTraining
from modeling_ehm.training import arguments as arguments_module
from modeling_ehm.training.arguments import EHMTrainingArguments
from modeling_ehm.training.trainer import EHMTrainer

# He et al. 2022 (arXiv:2111.06377), Table 8, and facebookresearch/mae: main_pretrain.py, util/lr_sched.py.
BASE_RATE, BATCH, BETAS, DECAY, WARMUP_EPOCHS = 1.5e-4, 4096, (0.9, 0.95), 0.05, 40
STEPS_PER_EPOCH = 1_281_167 // BATCH  # ImageNet-1K, drop_last


def mae_rate(step, epochs):
    """util/lr_sched.py: `epoch` is fractional, the rate is set before each iteration."""
    epoch, rate = step / STEPS_PER_EPOCH, BASE_RATE * BATCH / 256
    if epoch < WARMUP_EPOCHS:
        return rate * epoch / WARMUP_EPOCHS
    return rate * 0.5 * (1 + math.cos(math.pi * (epoch - WARMUP_EPOCHS) / (epochs - WARMUP_EPOCHS)))


class Nothing(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise IndexError


def arguments(tmp_path, **changes):
    return EHMTrainingArguments(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"} | changes)


def trainer_with(config, args):
    trainer = EHMTrainer(model=EHMForPreTraining(config), args=args, train_dataset=Nothing())
    trainer.create_optimizer_and_scheduler(args.max_steps)
    return trainer


@pytest.mark.parametrize("epochs, warmup", [(400, {}), (800, {"warmup_steps": 0.05})])
def test_the_learning_rate_is_maes_at_every_step(tmp_path, config, epochs, warmup):
    """2.4e-3 for 4,096 images, linear from 0 over 40 epochs, then half a cosine to 0; 40 of 400 is the default."""
    steps = epochs * STEPS_PER_EPOCH
    args = arguments(tmp_path, global_batch_size=BATCH, base_learning_rate=BASE_RATE, max_steps=steps, **warmup)
    assert args.learning_rate == pytest.approx(2.4e-3, rel=1e-12)
    scheduler = trainer_with(config, args).lr_scheduler
    (rate_of,) = set(scheduler.lr_lambdas)
    warmup_end = WARMUP_EPOCHS * STEPS_PER_EPOCH
    for step in (0, 1, 100, warmup_end - 1, warmup_end, warmup_end + 1, steps // 2, steps - 1, steps):
        ours = scheduler.base_lrs[0] * rate_of(step)
        assert ours == pytest.approx(mae_rate(step, epochs), rel=1e-9, abs=1e-18), step


def test_the_optimizer_is_maes(tmp_path, config):
    """AdamW, betas 0.9 and 0.95, decay 0.05 on everything but vectors and biases, each parameter once, no clipping."""
    args = arguments(tmp_path, global_batch_size=BATCH, base_learning_rate=BASE_RATE, max_steps=10)
    trainer = trainer_with(config, args)
    assert isinstance(trainer.optimizer, torch.optim.AdamW) and args.max_grad_norm == 0
    groups = trainer.optimizer.param_groups
    assert {(group["betas"], group["eps"]) for group in groups} == {(BETAS, 1e-8)}
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    found = {decay: set() for decay in (0.0, DECAY)}
    for group in groups:
        found[group["weight_decay"]] |= {names[id(parameter)] for parameter in group["params"]}
    expected = {0.0: set(), DECAY: set()}
    for name, parameter in trainer.model.named_parameters():  # timm's rule, by which MAE groups
        expected[0.0 if parameter.ndim == 1 or name.endswith(".bias") else DECAY].add(name)
    assert found == expected
    assert "ehm.layers.0.layernorm_before.weight" in found[0.0] and "ehm.embeddings.cls_token" in found[DECAY]
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_defaults_say_what_they_should(tmp_path):
    """No averaging over NaN losses, columns kept, curves written where TensorBoard is installed."""
    args = EHMTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.lr_scheduler_type, args.warmup_steps, args.weight_decay) == ("cosine", 0.1, 0.05)
    assert not args.logging_nan_inf_filter and not args.remove_unused_columns


def test_tensorboard_is_on_by_default_where_it_is_installed(tmp_path):
    """A run without any setting leaves curves; "none" switches them off."""
    pytest.importorskip("tensorboard")
    assert EHMTrainingArguments(output_dir=str(tmp_path), use_cpu=True).report_to == ["tensorboard"]
    assert EHMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none").report_to == []


def test_a_logger_whose_package_is_missing_is_refused(tmp_path, monkeypatch):
    """Named beside those that are there; the Trainer would end in a traceback. Flyte is in no list of transformers."""
    monkeypatch.setattr(arguments_module, "get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setattr(arguments_module, "find_spec", lambda package: None)
    assert arguments(tmp_path, report_to=["tensorboard"]).report_to == ["tensorboard"]
    for name in ("wandb", "flyte"):
        with pytest.raises(ValueError, match=f"names {name}, which is unknown or not installed; here are tensorboard:"):
            arguments(tmp_path, report_to=["tensorboard", name])
    monkeypatch.setattr(arguments_module, "find_spec", lambda package: package == "flytekit")
    assert arguments(tmp_path, report_to="flyte").report_to == ["flyte"]


# Splitting the batch


@pytest.mark.parametrize("processes, accumulated, each", [(1, 1, 4096), (8, 1, 512), (8, 4, 128), (64, 2, 32)])
def test_a_global_batch_is_split_over_processes_and_accumulated_steps(
    tmp_path, monkeypatch, processes, accumulated, each
):
    """However it is split, a step takes 4,096 images and the rate stays 2.4e-3."""
    monkeypatch.setattr(EHMTrainingArguments, "world_size", property(lambda self: processes))
    sizes = {"global_batch_size": 4096, "gradient_accumulation_steps": accumulated}
    args = arguments(tmp_path, base_learning_rate=BASE_RATE, **sizes)
    assert args.per_device_train_batch_size == each and args.images_per_step == 4096
    assert args.learning_rate == pytest.approx(2.4e-3, rel=1e-12)


@pytest.mark.parametrize(
    "batch, processes, accumulated, multiple", [(10, 1, 4, 4), (4, 8, 1, 8), (0, 1, 1, 1), (-8, 2, 2, 4)]
)
def test_a_batch_that_cannot_be_split_is_refused(tmp_path, monkeypatch, batch, processes, accumulated, multiple):
    """The three numbers, and of what the batch must be a multiple."""
    monkeypatch.setattr(EHMTrainingArguments, "world_size", property(lambda self: processes))
    message = (
        f"training.global_batch_size={batch} cannot be split over {processes} processes x"
        f" gradient_accumulation_steps={accumulated}; make it a multiple of {multiple}"
    )
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, global_batch_size=batch, gradient_accumulation_steps=accumulated)


def test_without_the_two_the_trainers_own_settings_stand(tmp_path):
    """`learning_rate` and `per_device_train_batch_size` are left alone."""
    args = arguments(tmp_path, learning_rate=3e-4, per_device_train_batch_size=6, gradient_accumulation_steps=2)
    assert (args.learning_rate, args.per_device_train_batch_size, args.images_per_step) == (3e-4, 6, 12)


# Refusals


def test_a_token_in_the_recipe_is_refused_and_not_repeated(tmp_path):
    """The message names the field and the ways out, and does not print the secret."""
    with pytest.raises(
        ValueError, match="training.hub_token would be written to files; .*hf auth login.* HF_TOKEN"
    ) as error:
        arguments(tmp_path, hub_token="hf_secret")
    assert "hf_secret" not in str(error.value)


def test_a_second_shuffling_is_refused(tmp_path):
    """Field, value, rule and reason."""
    message = "training.train_sampling_strategy='random' must stay 'sequential': .* shuffled by"
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, train_sampling_strategy="random")


def test_how_long_to_train_can_be_said_in_samples(tmp_path):
    """70 images in steps of 16 are 4 whole steps, so that a stream without a length needs no epochs."""
    assert arguments(tmp_path, num_samples=70, global_batch_size=16).max_steps == 4
    with pytest.raises(
        ValueError, match="num_samples=70 and training.max_steps=3 both say how long to train; give one"
    ):
        arguments(tmp_path, num_samples=70, global_batch_size=16, max_steps=3)
    with pytest.raises(ValueError, match="num_samples=7 is less than one step of 16 images"):
        arguments(tmp_path, num_samples=7, global_batch_size=16)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True: smaller batches would end the run before"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True: a resumed run would see images again"),
        ({"save_only_model": True}, "save_only_model=True: without the optimiser's state no run goes on exactly"),
        ({"save_strategy": "epoch"}, "save_strategy='epoch': .* set it to steps, and save_steps"),
        ({"logging_strategy": "epoch"}, "logging_strategy='epoch': .* set it to steps, and logging_steps"),
        ({"eval_strategy": "epoch"}, "eval_strategy='epoch': .* set it to steps, and eval_steps"),
        ({"fp16": True}, "fp16=True: CPUs do not train in float16; set bf16"),
        ({"gradient_accumulation_steps": 0, "global_batch_size": 8}, "gradient_accumulation_steps=0 must be at least"),
        ({"base_learning_rate": float("nan")}, "base_learning_rate=nan must be a number"),
        ({"base_learning_rate": -1.0}, "base_learning_rate=-1.0 must be a number of at least 0"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps"}, "load_best_model_at_end=True would save"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1 must be at least 0"),
        ({"report_to": "wandbb"}, r"report_to=\['wandbb'\] names wandbb, which is unknown or not installed; here are"),
    ],
)
def test_what_would_train_something_else_or_break_off_later_is_refused(tmp_path, options, problem):
    with pytest.raises(ValueError, match=f"training.{problem}"):
        arguments(tmp_path, **options)
