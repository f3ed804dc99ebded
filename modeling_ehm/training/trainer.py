"""`EHMTrainer`: the Trainer of pre-training, with a log that explains itself and probes as evaluation."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, Dataset

from modeling_ehm.configuration_ehm import SCHEDULED_POLICIES
from modeling_ehm.hierarchy_ehm import NonFiniteAffinityError
from modeling_ehm.modeling_ehm import evaluation_mode
from modeling_ehm.training.callbacks import EMATeacherCallback, MaskLogCallback, ProgressCallback
from modeling_ehm.training.evaluation import Evaluator
from modeling_ehm.training.mask_log import MaskLog
from modeling_ehm.training.metrics import mask_statistics
from modeling_ehm.training.recorded_trainer import RecordedTrainer, WatchedStep


class StepClock:
    """Seconds since the last log, by part: waiting for data, whole steps, and of the measured steps masks and teacher.

    The teacher's are among those of the masks.
    """

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.started, self.images, self.paused = time.perf_counter(), 0, 0.0
        self.seconds = {"data": 0.0, "step": 0.0, "measured": 0.0, "masks": 0.0, "teacher": 0.0}

    def add(self, part: str, seconds: float) -> None:
        self.seconds[part] += seconds

    def figures(self, num_processes: int) -> dict[str, float]:
        """`images_per_second` of all processes, and this one's shares of the time since the last log.

        Evaluations are left out of that time.
        """
        wall = max(time.perf_counter() - self.started - self.paused, 1e-9)
        measured = max(self.seconds["measured"], 1e-9)
        step_share = self.seconds["step"] / wall  # masks are measured within steps
        return {
            "images_per_second": self.images * num_processes / wall,
            "data_wait_share": self.seconds["data"] / wall,
            "teacher_share": self.seconds["teacher"] / measured * step_share,
            "mask_share": (self.seconds["masks"] - self.seconds["teacher"]) / measured * step_share,
        }


class EHMTrainer(RecordedTrainer):
    """Trainer for `EHMForPreTraining`. A plain Trainer with `ProgressCallback` trains the same weights.

    Args:
        evaluators: Called at each evaluation with (model, step, progress); their figures are logged as `eval_...`.
        normalize: Makes normalised floats of uint8 `pixel_values` on the device, so that a quarter of their bytes is
            moved there; None where the collator does it.
        args, kwargs: As for `RecordedTrainer`.
    """

    def __init__(
        self,
        *args,
        evaluators: list[Evaluator] = (),
        normalize: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.normalize = normalize
        self.evaluators = list(evaluators)
        self.clock = StepClock()
        self.ema_teacher = EMATeacherCallback()
        self.add_callback(ProgressCallback())
        self.add_callback(self.ema_teacher)
        self.mask_log = MaskLog(self.args.output_dir, self.args.process_index)
        self.add_callback(MaskLogCallback(self.mask_log))
        self._last_mask: torch.Tensor | None = None
        self._sample_id: torch.Tensor | None = None  # of the batch at hand

    def train(self, *args, **kwargs):
        self.clock.restart()
        return super().train(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = super()._prepare_inputs(inputs)
        self._sample_id = inputs.pop("sample_id", None)
        if self.normalize is None:
            return inputs
        return inputs | {"pixel_values": self._prepare_input(self.normalize(inputs["pixel_values"]))}

    # Timing and logging

    def get_batch_samples(self, *args, **kwargs):
        started = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self.clock.add("data", time.perf_counter() - started)
        return batches

    def training_step(self, model, inputs, *args, **kwargs):
        started, bare = time.perf_counter(), self.bare_model
        # Measuring synchronises a GPU, so there only the step before a log is measured.
        due = (self.state.global_step + 1) % max(1, self.state.logging_steps) == 0
        bare.timings = {} if due or self.args.device.type != "cuda" else None
        loss = super().training_step(model, inputs, *args, **kwargs)
        if bare.timings is not None:
            bare._now()  # waits for the GPU
            self.clock.add("measured", time.perf_counter() - started)
            for part, seconds in bare.timings.items():
                self.clock.add(part, seconds)
        self.clock.add("step", time.perf_counter() - started)
        self.clock.images += len(inputs["pixel_values"])
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        try:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        except NonFiniteAffinityError:  # the weights have diverged in the step before, whose own loss was a number
            step = WatchedStep([torch.tensor(float("nan"))], grad_norm=float("nan"))
            known = {"sample_id": self._sample_id, "mask_seed": inputs.get("mask_seed")}
            step.batches.append({name: value for name, value in known.items() if value is not None})
            self._record_non_finite(self.state.global_step + 1, step)
        self._last_mask = outputs.mask
        if model.training and (mask_seed := inputs.get("mask_seed")) is not None:
            self.mask_log.add(self.state.global_step + 1, mask_seed, outputs.mask)
            batch = {"mask_seed": mask_seed, "mask": outputs.mask.to(torch.uint8)}
            if self._sample_id is not None:
                batch["sample_id"] = self._sample_id
            self.current_step.batches.append(batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._last_mask is not None:
            model = self.bare_model
            progress = max(self.state.global_step - 1, 0) / self.state.max_steps  # of the step that made these masks
            logs["progress"] = progress
            samples_per_pass = getattr(getattr(self.train_dataset, "samples", None), "samples_per_pass", None)
            if samples_per_pass:  # `epoch` counts passes over the positions, that is over the whole run
                logs["data_pass"] = self.state.global_step * self.args.images_per_step / samples_per_pass
            if model.config.mask_policy in SCHEDULED_POLICIES:
                logs["num_nodes"], logs["softness"] = model.mask_schedule(progress)
            for name, value in mask_statistics(self._last_mask[:64].cpu(), model.config.grid_size).items():
                logs[f"mask_{name}"] = value
            logs.update(self.clock.figures(self.args.world_size))
            self.clock.restart()
        super().log(logs, *args, **kwargs)

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """The loss on held-out images, if there are any, under the final masks, then every evaluator: one row."""
        started = time.perf_counter()
        figures = {}
        if self.is_world_process_zero():
            if held_out := eval_dataset or self.eval_dataset:  # neither None nor without images
                figures[f"{metric_key_prefix}_loss"] = self.held_out_loss(held_out)
            progress = self.state.global_step / self.state.max_steps if self.state.max_steps else 0.0
            for evaluator in self.evaluators:
                measured = evaluator(self.bare_model, self.state.global_step, progress)
                figures |= {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        figures = broadcast_object_list([figures])[0]
        figures[f"{metric_key_prefix}_runtime"] = time.perf_counter() - started
        self.clock.paused += time.perf_counter() - started
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    @torch.no_grad()
    def held_out_loss(self, dataset: Dataset) -> float:
        """Mean loss per image under the final masks, on this process alone.

        The Trainer's own loop pads the last batches of several processes with repeated images, which would make the
        figure depend on their number.
        """
        loader = DataLoader(dataset, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        total = 0.0
        with evaluation_mode(self.bare_model):
            for batch in loader:
                batch = self._prepare_inputs(batch)
                total += float(self.bare_model(**batch).loss) * len(batch["pixel_values"])
        return total / len(dataset)

    # Checkpoints

    def _record_non_finite(self, step, watched) -> None:
        self.mask_log.write()
        super()._record_non_finite(step, watched)

    def _save_checkpoint(self, model, trial) -> None:
        self.mask_log.write()  # a log cut back to a checkpoint must reach as far as that
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.ema_teacher.save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.ema_teacher.resumed_from = Path(resume_from_checkpoint)
