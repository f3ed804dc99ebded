"""`RecordedTrainer`: transformers' Trainer, whose checkpoints are whole, hold no pickle, and tell of their run."""

import json
import logging
import math
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from modeling_ehm.training import hub
from modeling_ehm.training.checkpoints import (
    GO_ON,
    STAGING,
    CheckpointError,
    newest_whole,
    remove_old_checkpoints,
    seal_checkpoint,
)
from modeling_ehm.training.push import PushError, push_folder

logger = logging.getLogger(__name__)

EXTENTS = ("data.train.rows", "data.train.shards")  # what a run's source may say of how much there is
FAILED_PUSHES = "failed_pushes.jsonl"  # in the output folder, one line a push
ASKED = ("initial_lr", "betas", "eps", "weight_decay")  # what a recipe says of an optimiser's groups
NON_FINITE = "nonfinite-step"  # begins the names of the records of steps whose loss was not a number
TORCH_WRITERS = ("PytorchStreamWriter", "inline_container")  # in what torch.save raises on a full disk


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not a number, or infinite."""


def non_finite_records(folder: Path) -> dict[int, list[Path]]:
    """Records of steps that met a loss or gradient that is not a number, of all processes, by step."""
    records: dict[int, list[Path]] = {}
    for path in sorted(folder.glob(f"{NON_FINITE}-*-process-*.json")):
        step = int(path.name.removeprefix(f"{NON_FINITE}-").partition("-")[0])
        records.setdefault(step, []).append(path)
    return records


@dataclass
class WatchedStep:
    """What is kept of an optimiser step until it is known to be sound.

    Attributes:
        losses: Of its batches, on the device.
        batches: Of each of them what tells it, by name, as `sample_id`; may be empty.
        grad_norm: Norm of the gradient of all weights; None where float16's scaler deals with infinite ones.
    """

    losses: list[Tensor] = field(default_factory=list)
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    grad_norm: Tensor | float | None = None

    def is_finite(self) -> bool:
        return all(math.isfinite(value) for value in (*self.losses, self.grad_norm) if value is not None)


class FiniteCallback(TrainerCallback):
    """Has the trainer look at its steps: at each one on a CPU, else, not to wait for the device, before logs and saves.

    Either way before a checkpoint is written.
    """

    def __init__(self, trainer: "RecordedTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.watched[state.global_step] = self.trainer.current_step
        self.trainer.current_step = WatchedStep()
        if args.device.type == "cpu" or control.should_log or control.should_save or control.should_evaluate:
            self.trainer.check_finite()


class RecordedTrainer(Trainer):
    """Base of the trainers of all tasks.

    Args:
        run: What the model card tells of the run; see `hub.RunRecord`. None writes no card.
        args, kwargs: As for `transformers.Trainer`.
    """

    def __init__(self, *args, run: "hub.RunRecord | None" = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.run = run
        self.failed_pushes: list[str] = []  # what, and why
        self.resume_from: str | None = None
        self.current_step, self.watched = WatchedStep(), {}  # the latter by number
        self.add_callback(FiniteCallback(self))
        self._staging: Path | None = None  # while a checkpoint is written

    def announce(self) -> None:
        """Write the run's record and log what is about to happen; on the main process."""
        if not self.is_world_process_zero():
            return
        self.run.save()
        if self.resume_from is not None:
            logger.info("resuming from %s", self.resume_from)
        args = self.args
        extent = [f"{count:,} {key.rpartition('.')[2]}" for key, count in self.run.source.items() if key in EXTENTS]
        if extent:
            logger.info("%s of %s", ", ".join(extent), self.run.data)
        logger.info(
            "%d images a step, learning rate %.3g, %d steps", args.images_per_step, args.learning_rate, args.max_steps
        )

    @property
    def bare_model(self) -> PreTrainedModel:
        """The model without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    # A loss that is not a number

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.current_step.losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None:
            self.current_step.grad_norm = grad_norm
        return grad_norm

    def check_finite(self) -> None:
        """Let go of the steps watched so far, if losses and gradients were finite in all of them.

        Raises:
            NonFiniteError: they were not; what the first such step was trained on is on record then.
        """
        for step, watched in self.watched.items():
            if not watched.is_finite():
                self._record_non_finite(step, watched)
        self.watched.clear()

    def _record_non_finite(self, step: int, watched: WatchedStep) -> None:
        stem = Path(self.args.output_dir) / f"{NON_FINITE}-{step}-process-{self.args.process_index}"
        grad_norm = None if watched.grad_norm is None else float(watched.grad_norm)
        told = {"step": step, "losses": [float(loss) for loss in watched.losses], "grad_norm": grad_norm}
        stem.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
        if any(watched.batches):
            names = watched.batches[0].keys()
            batch = {name: torch.cat([one[name] for one in watched.batches]).cpu() for name in names}
            save_file(batch, stem.with_suffix(".safetensors"), metadata={"format": "pt"})
        loss = next((loss for loss in told["losses"] if not math.isfinite(loss)), told["losses"][-1])
        raise NonFiniteError(
            f"step {step}: loss {loss}, norm of the gradient {told['grad_norm']}. What it was trained on"
            f" is in {stem}.*; no checkpoint was written since. Started again as it is, the run would meet it again:"
            " lower training.base_learning_rate, or set training.max_grad_norm"
        )

    # Checkpoints

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer does, but rates, betas and weight decay are the recipe's, which may have changed since.

        Schedules that find their rates by themselves keep them; `RunRecord.begin` refuses to change those.
        """
        if checkpoint is None or self.is_deepspeed_enabled:  # DeepSpeed loads its own
            return super()._load_optimizer_and_scheduler(checkpoint)
        groups = [{key: group[key] for key in ASKED if key in group} for group in self.optimizer.param_groups]
        base_rates = getattr(self.lr_scheduler, "base_lrs", None)
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, asked in zip(self.optimizer.param_groups, groups, strict=True):
            group |= asked  # some optimisers keep their state beside these
        if isinstance(self.lr_scheduler, LambdaLR):
            step, lambdas = self.lr_scheduler.last_epoch, self.lr_scheduler.lr_lambdas
            if self.lr_scheduler.base_lrs != base_rates:
                before, now = max(self.lr_scheduler.base_lrs), max(base_rates)
                logger.warning("the learning rate was %.3g in %s and is %.3g from here on", before, checkpoint, now)
            self.lr_scheduler.base_lrs = base_rates
            rates = [base * factor(step) for base, factor in zip(base_rates, lambdas, strict=True)]
            self.lr_scheduler._last_lr = rates
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        # Stock models save under the names of older versions, which the Trainer cannot resume from (transformers issue
        # 48805): it loads what it finds by name and leaves the rest at random, with no more than a warning.
        model = self.bare_model
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del model.save_pretrained  # the instance's; that of the class stays
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        # The Trainer pickles its arguments; a pickle is nothing to share, and JSON says the same with tokens masked.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        (folder / "training_args.json").write_text(self.args.to_json_string())
        self._write_card(folder)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial) -> None:
        """As the Trainer does, but aside: the folder gets its name when it is whole, then it is pushed.

        Raises:
            CheckpointError: the disk is full, or does not take a file.
        """
        self.check_finite()  # also where a save is decided after the step's own look
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = folder / STAGING
        try:
            if self.is_world_process_zero():  # hosts that share the folder must not clear it for each other
                shutil.rmtree(self._staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._staging.mkdir(parents=True, exist_ok=True)
            super()._save_checkpoint(model, trial)
            self._rename_best(folder)
            self.accelerator.wait_for_everyone()  # each process writes the state of its own generators
            # With a folder of its own on each host, there is one to seal on each.
            for turn in (self.is_world_process_zero(), self.is_local_process_zero()):
                if turn and (self._staging / name).exists():
                    seal_checkpoint(self._staging / name, folder / name)
                self.accelerator.wait_for_everyone()
            if self.is_local_process_zero():
                shutil.rmtree(self._staging, ignore_errors=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITERS):
                raise
            shutil.rmtree(self._staging, ignore_errors=True)
            last = newest_whole(folder)
            kept = "there is no earlier one" if last is None else f"{last.name} is whole"
            raise CheckpointError(
                f"{name} could not be written to training.output_dir={str(folder)!r}: {error}; {kept}. {GO_ON}"
            ) from error
        finally:
            self._staging = None
        if self.args.should_save:
            remove_old_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _rename_best(self, folder: Path) -> None:
        """The Trainer notes the best checkpoint where it is being written; note where it is going to be."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == self._staging:
            self.state.best_model_checkpoint = str(folder / Path(best).name)
            if self.args.should_save:
                self.state.save_to_json(str(Path(best) / TRAINER_STATE_NAME))

    def save_final_model(self) -> None:
        """Save the model that was evaluated last into `output_dir`, without the push that `save_model` may make."""
        self.check_finite()
        self.save_model(_internal_call=True)

    def _write_card(self, folder: Path) -> None:
        if self.run is not None:
            (folder / "README.md").write_text(hub.model_card(self.run, self.state, self.bare_model.config, folder))

    def create_model_card(self, *args, **kwargs) -> None:
        """The card written from the run, instead of the Trainer's generic one."""
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir))

    # Pushes

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing but the name: the first push makes the repository, so that a Hub that is down stops no training."""
        self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push weights, config, code, processor and card from the finished checkpoint folder, and wait for it.

        The Trainer would copy weights and config alone into `output_dir` and push that in the background: a commit
        whose `auto_map` names code that is not there, and whose weights may change while they are read.
        """
        if self._staging is not None:  # called by the Trainer, too early
            return
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        try:
            self._push(checkpoint_folder, f"Training in progress, step {self.state.global_step}")
        except PushError as error:
            self._note_failed_push(f"step {self.state.global_step}", error)

    def _push(self, folder: str, message: str) -> str:
        args = self.args
        self.hub_model_id, commit = push_folder(
            folder, self.hub_model_id, message, args.hub_revision, args.hub_private_repo, args.push_timeout
        )
        return commit

    def _note_failed_push(self, what: str, error: PushError) -> None:
        self.failed_pushes.append(f"{what}: {error}")
        logger.warning("push of %s to %s failed: %s", what, self.hub_model_id, error)
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "what": what, "error": str(error)}
        with open(Path(self.args.output_dir) / FAILED_PUSHES, "a") as file:
            file.write(json.dumps(line) + "\n")

    def push_to_hub(self, commit_message: str = "End of training", **kwargs) -> str | None:
        """Save the final model into `output_dir` and push it; returns the commit.

        Raises:
            PushError: the Hub refuses, cannot be reached, or takes longer than `push_timeout`.
        """
        self.save_final_model()
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo()
        return self._push(self.args.output_dir, commit_message)

    def finish_pushes(self) -> None:
        """Push the final model if the recipe says so, and tell of all pushes that failed.

        Raises:
            PushError: the final push failed, and `require_push` is set.
        """
        if not self.args.push_to_hub:
            return
        final = None
        try:
            self.push_to_hub()
        except PushError as error:
            final = error
            self._note_failed_push("the final model", error)
        for failure in self.failed_pushes:
            logger.warning("a push failed: %s", failure)
        if final is not None:
            folder, repo = self.args.output_dir, self.hub_model_id
            way_out = f"push it with: python -m modeling_ehm.training.push {folder} {repo}"
            logger.warning("the final model is in %s and not on the Hub; %s", folder, way_out)
            if self.args.require_push:
                raise PushError(f"the final model was not pushed to {repo}: {final}; {way_out}") from final
