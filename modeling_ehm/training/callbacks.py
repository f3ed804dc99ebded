"""What the Trainer must tell the model: how far training is; and weights that follow the trained ones."""

import copy
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from modeling_ehm.modeling_ehm import EHMModel
from modeling_ehm.training.mask_log import MaskLog, forget_steps_after

TEACHER_FILE = "ema_teacher.safetensors"
AVERAGE_FILE = "weight_average.safetensors"


class ProgressCallback(TrainerCallback):
    """Hands the finished fraction of training to the model before each step. All that a plain `Trainer` needs."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.progress = state.global_step / state.max_steps


def ema_decay_at(step: int, decay: float, warmup_steps: int) -> float:
    """Decay of the moving average at an optimiser step: `1 - 1 / (1 + step / warmup_steps)`, at most `decay`."""
    return decay if warmup_steps == 0 else min(decay, 1 - 1 / (1 + step / warmup_steps))


class MaskLogCallback(TrainerCallback):
    """Begins the log of masks where training begins, and writes it whenever the Trainer logs."""

    def __init__(self, mask_log: MaskLog):
        self.mask_log = mask_log

    def on_train_begin(self, args, state, control, **kwargs):
        # The first host before the others, which find nothing left to cut if they share its folder.
        for turn in (args.process_index == 0, args.local_process_index == 0):
            if turn:
                forget_steps_after(args.output_dir, state.global_step)
            PartialState().wait_for_everyone()

    def on_log(self, args, state, control, **kwargs):
        self.mask_log.write()

    def on_train_end(self, args, state, control, **kwargs):
        self.mask_log.write()


class EMATeacherCallback(TrainerCallback):
    """Keeps the moving average of the encoder that builds the hierarchies when `teacher="ema"`.

    The average lives beside the model, not in it: it is not trained, not wrapped, and its file in a checkpoint is
    `ema_teacher.safetensors`.
    """

    def __init__(self):
        self.encoder: EHMModel | None = None
        self.resumed_from: Path | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if model.config.teacher != "ema":
            return
        self.encoder = copy.deepcopy(model.ehm).requires_grad_(False).eval()
        if self.resumed_from is not None:
            self.load(self.resumed_from)
        elif state.global_step > 0:
            raise RuntimeError(
                f"training resumes at step {state.global_step}, but not with the moving average of teacher='ema':"
                " resume with EHMTrainer, or set resumed_from to the checkpoint's folder"
            )
        model.attach_teacher(self.encoder)

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.encoder is None:
            return
        decay = ema_decay_at(state.global_step, model.config.teacher_decay, model.config.teacher_warmup_steps)
        for average, weight in zip(self.encoder.parameters(), model.ehm.parameters(), strict=True):
            average.lerp_(weight.detach().to(average), 1 - decay)

    def save(self, folder: str | Path) -> None:
        """Write the average into a checkpoint folder; nothing if there is none."""
        if self.encoder is not None:
            save_file(self.encoder.state_dict(), Path(folder) / TEACHER_FILE, metadata={"format": "pt"})

    def load(self, folder: str | Path) -> None:
        """Read the average from a checkpoint folder.

        Raises:
            FileNotFoundError: the folder has none; a fresh average would silently change the masks.
        """
        path = Path(folder) / TEACHER_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing, and teacher='ema' cannot resume without it; set teacher='online'"
            )
        self.encoder.load_state_dict(load_file(path))


class WeightAverageCallback(TrainerCallback):
    """Keeps a moving average of all weights of a model, to be evaluated and saved in their place.

    Buffers, as the statistics of batch norms, are taken over as they are. The average is a file of its own in a
    checkpoint, `weight_average.safetensors`, so that resuming goes on with both.

    Args:
        decay: Per optimiser step.
        warmup_steps: As in `ema_decay_at`.
    """

    def __init__(self, decay: float, warmup_steps: int = 10):
        self.decay, self.warmup_steps = decay, warmup_steps
        self.average: dict[str, torch.Tensor] | None = None
        self.resumed_from: Path | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        if self.resumed_from is not None:
            path = self.resumed_from / AVERAGE_FILE
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing, and training.weight_average_decay cannot resume without it; set it to null"
                )
            for name, weight in load_file(path).items():
                self.average[name].copy_(weight)

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        decay = ema_decay_at(state.global_step, self.decay, self.warmup_steps)
        for name, weight in model.named_parameters():
            self.average[name].lerp_(weight.detach(), 1 - decay)

    def save(self, folder: str | Path) -> None:
        """Write the average into a checkpoint folder; nothing before training."""
        if self.average is not None:
            save_file(self.average, Path(folder) / AVERAGE_FILE, metadata={"format": "pt"})

    @contextmanager
    def applied_to(self, model: torch.nn.Module):
        """The model with the averaged weights for a while; with its own before training."""
        if self.average is None:
            yield
            return
        own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self._fill(model, self.average)
        try:
            yield
        finally:
            self._fill(model, own)

    @staticmethod
    @torch.no_grad()
    def _fill(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])
