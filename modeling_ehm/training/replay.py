"""Rebuild the masks of any past step of a run from its folder, and the loss of each image under them.

    python -m modeling_ehm.training.replay RUN_FOLDER --step N [--out FILE.npz] [section.key=value ...]

Trains again, in one process and without saving anything in the run's folder, from the newest whole checkpoint before
that step (from the beginning if there is none), with the recipe that the run left there. Start it where the run was
started, since relative paths of data stay relative. The masks are held against the log that the run kept. They can
differ in a few images, which is said then, where sums are taken in another order than in the run: on another device,
or by another number of processes.
"""

import argparse
import dataclasses
import json
import logging
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from modeling_ehm.modeling_ehm import evaluation_mode
from modeling_ehm.training.arguments import EHMTrainingArguments
from modeling_ehm.training.checkpoints import checkpoints_in, fault_of, step_of
from modeling_ehm.training.mask_log import digest_of, read_mask_log
from modeling_ehm.training.recipes import RecipeError
from modeling_ehm.training.recorded_trainer import NonFiniteError, non_finite_records
from modeling_ehm.training.tasks import load_recipe, pretrain
from modeling_ehm.training.trainer import EHMTrainer

LEFT_OUT = (  # of a run that is replayed
    *pretrain.UNMEASURED,
    'training.save_strategy="no"',
    'training.report_to="none"',
    'training.logging_strategy="no"',
    "training.push_to_hub=false",
    "training.require_push=false",
)


@dataclass
class ReplayedStep:
    """What one optimiser step was trained on.

    Attributes:
        step: Its number, counted from 1.
        sample_id: `(B,)` int64, row in the data, in streams `shard << 40 | row in the shard`.
        mask_seed: `(B,)` int64.
        mask: `(B * R, rows, columns)` bool, the masks of one image in sequence, True = masked.
        loss: `(B * R,)` float32, the loss of each image under its mask, before the step.
    """

    step: int
    sample_id: np.ndarray
    mask_seed: np.ndarray
    mask: np.ndarray
    loss: np.ndarray

    def digest(self) -> str:
        mask = torch.from_numpy(self.mask).flatten(1)
        return f"{int(digest_of(torch.from_numpy(self.mask_seed), mask)) % 2**64:016x}"


@dataclass
class Captured:
    """Batches of the step that is looked for, as they pass by."""

    sample_id: list[Tensor] = field(default_factory=list)
    mask_seed: list[Tensor] = field(default_factory=list)
    mask: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)


class StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class ReplayingTrainer(EHMTrainer):
    """Trains up to a step and keeps what that is trained on. `step` is set before training."""

    step: int = 0

    def train(self, *args, **kwargs):
        self.captured = Captured()
        self.add_callback(StopAfter(self.step))
        self.remove_callback(PrinterCallback)
        return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.state.global_step + 1 == self.step:
            self.captured.sample_id.append(self._sample_id.cpu())
            self.captured.mask_seed.append(inputs["mask_seed"].cpu())
            self.captured.mask.append(outputs.mask.cpu())
            self.captured.loss.append(self.losses_of_images(inputs["pixel_values"], outputs.mask))
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def losses_of_images(self, pixel_values: Tensor, mask: Tensor) -> Tensor:
        """`(B * R,)`, one image at a time, without dropout."""
        model = self.bare_model
        times = len(mask) // len(pixel_values)
        with evaluation_mode(model), self.compute_loss_context_manager():
            losses = [
                model(pixel_values[row // times][None], bool_masked_pos=mask[row][None]).loss.float()
                for row in range(len(mask))
            ]
        return torch.stack(losses).cpu()


def replay(run: str | Path, step: int, overrides: list[str] = ()) -> ReplayedStep:
    """What a run was trained on in its step of this number.

    Raises:
        RecipeError: the run has no such step, or left no recipe or no log of masks; or its affinities were no numbers
            in that step, so that there are no masks.
    """
    run = Path(run)
    if not (run / pretrain.RECIPE_FILE).exists():
        raise RecipeError(f"{run} has no {pretrain.RECIPE_FILE}; it is not the output folder of a pre-training run")
    log, records = read_mask_log(run), non_finite_records(run)
    if step not in log and step not in records:
        known = f"its log of masks goes from {min(log)} to {max(log)}" if log else "it has no log of masks"
        raise RecipeError(f"step={step} was not taken by the run in {run}: {known}")
    before = [path for path in checkpoints_in(run) if step_of(path) < step and fault_of(path) is None]
    with tempfile.TemporaryDirectory() as folder:
        given = [f"training.output_dir={folder}/replay", *LEFT_OUT]
        given.append(f"training.resume_from_checkpoint={before[0] if before else 'auto'}")
        given.append(f"training.global_batch_size={images_a_step(run)}")
        recipe = load_recipe(run / pretrain.RECIPE_FILE, [*given, *overrides])
        trainer = pretrain.prepare(recipe, ReplayingTrainer)
        trainer.step = step
        try:
            trainer.train(resume_from_checkpoint=trainer.resume_from)
        except NonFiniteError as error:
            if not trainer.captured.sample_id:  # met before, or where the trees of this step are made
                told = ", ".join(str(path.with_suffix(".*")) for path in records.get(step, [])) or "on no record"
                raise RecipeError(
                    f"step {step} has no masks in the replay: {str(error).partition('. ')[0]}. What it was to be"
                    f" trained on: {told}. Replay a step before that"
                ) from error
            logging.getLogger(__name__).warning("the run's error comes again: %s", error)
        finally:
            trainer.train_dataset.close()
    captured = trainer.captured
    grid_size = trainer.bare_model.config.grid_size
    return ReplayedStep(
        step,
        torch.cat(captured.sample_id).numpy(),
        torch.cat(captured.mask_seed).numpy(),
        torch.cat(captured.mask).unflatten(1, grid_size).numpy(),
        torch.cat(captured.loss).numpy(),
    )


def images_a_step(run: Path) -> int:
    """Images of all processes in an optimiser step of a run."""
    training = load_recipe(run / pretrain.RECIPE_FILE).training
    if (images := training.get("global_batch_size")) is not None:
        return images
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    defaults = {field.name: field.default for field in dataclasses.fields(EHMTrainingArguments)}
    per_device, accumulated = (training.get(name, defaults[name]) for name in names)
    return per_device * accumulated * json.loads((run / "run.json").read_text())["starts"][-1]["processes"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_ehm.training.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="output folder of a pre-training run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for train_ehm.py")
    parser.add_argument("--step", type=int, required=True, help="counted from 1")
    parser.add_argument("--out", type=Path, help="write the arrays of ReplayedStep into this .npz")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        replayed = replay(options.run, options.step, options.overrides)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    count, digest = read_mask_log(options.run).get(options.step, (0, None))
    hardest = np.argsort(-np.nan_to_num(replayed.loss, nan=np.inf))[:5]
    times = len(replayed.mask) // len(replayed.sample_id)
    images = len(replayed.sample_id)
    print(f"step {replayed.step}: {len(replayed.mask)} masks of {images} images, digest {replayed.digest()}")
    print(
        "highest losses: "
        + ", ".join(f"sample {replayed.sample_id[i // times]} {replayed.loss[i]:.4g}" for i in hardest)
    )
    if options.out is not None:
        np.savez_compressed(options.out, **vars(replayed))
        print(f"wrote {options.out}")
    if digest is None:
        sys.exit("the run's log does not have this step, which came to no masks then")
    if count != len(replayed.mask):
        sys.exit(f"the run's log has {count} of these masks: lines of a process are missing, which may have died")
    if replayed.digest() != digest:
        sys.exit(f"the run's log has digest {digest}: some masks are not those of the run (see --help)")
    print("equal to the run's log")


if __name__ == "__main__":
    main()
