"""Look a pre-training run over, while it runs or when it has ended: what is wrong, by how much, and what to do.

    python -m modeling_ehm.training.doctor RUN_FOLDER [--without-features]

Reads what the run has left in its output folder, and changes nothing there. Looks at the loss, at whether the masks
differ from random ones, at the encoder's features of 64 training images, at time spent waiting for data, at skipped
images, at checkpoints and at pushes. Exit code 1 if something is wrong.
"""

import argparse
import json
import logging
import statistics
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from modeling_ehm.configuration_ehm import EHMConfig, to_pair
from modeling_ehm.modeling_ehm import EHMModel
from modeling_ehm.training.checkpoints import checkpoints_in, fault_of, newest_whole
from modeling_ehm.training.data import Normalizer, PretrainingImages, open_samples, read_skipped
from modeling_ehm.training.mask_log import read_mask_log
from modeling_ehm.training.recipes import Recipe
from modeling_ehm.training.recorded_trainer import FAILED_PUSHES, non_finite_records
from modeling_ehm.training.tasks import load_recipe, pretrain

# Training loss by progress of shipped recipes as they were run (docs/results), with their own masks; how far off it
# may be. Other recipes have a floor alone: to predict each patch's mean gives normalised targets a loss of 1.
BANDS = {
    "demo_synthetic.yaml": ((0.04, 1.25), (0.2, 0.70), (1.0, 0.63)),
    "tin64_vit_tiny.yaml": ((0.03, 0.91), (0.1, 0.77), (0.2, 0.71), (0.5, 0.68), (0.7, 0.69), (1.0, 0.74)),
}
BAND_WIDTH = 0.15  # share
MEAN_PREDICTED = 1.0
LEARNT_BY = 0.2  # progress at which the loss must be below that
COMPACTNESS_MARGIN = 0.02  # above that of random masks, after half of the evolution
MAX_DATA_WAIT, MAX_SKIPPED = 0.2, 0.001
MIN_RANK = 3.0  # effective rank of the features of 64 images
NUM_IMAGES = 64


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        what: Its name.
        measured: What was found.
        advice: What to do; None if it is as it should be.
    """

    what: str
    measured: str
    advice: str | None = None


@dataclass(frozen=True)
class Run:
    """What a run has left in its folder."""

    folder: Path
    recipe: Recipe
    config: EHMConfig
    checkpoint: Path
    state: dict

    @property
    def logs(self) -> list[dict]:
        """Rows with a training loss."""
        return [row for row in self.state["log_history"] if "loss" in row]

    def progress(self, row: dict) -> float:
        return row["step"] / self.state["max_steps"]


def read_run(folder: Path) -> Run:
    """The run in a folder, as far as it has come: its final model, or its newest whole checkpoint.

    Raises:
        ValueError: no recipe, or nothing saved yet.
    """
    if not (folder / pretrain.RECIPE_FILE).exists():
        raise ValueError(f"{folder} has no {pretrain.RECIPE_FILE}; it is not the output folder of a pre-training run")
    finished = (folder / "model.safetensors").exists() and (folder / "trainer_state.json").exists()
    checkpoint = folder if finished else newest_whole(folder)
    if checkpoint is None:
        raise ValueError(f"{folder} holds no whole checkpoint yet; look again after the first save")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    recipe = load_recipe(folder / pretrain.RECIPE_FILE)
    return Run(folder, recipe, EHMConfig.from_pretrained(checkpoint), checkpoint, state)


def check_loss(run: Run) -> Finding:
    if not run.logs:
        return Finding("loss", "not logged yet")
    last = run.logs[-1]
    progress, loss = run.progress(last), last["loss"]
    measured = f"{loss:.3f} at {100 * progress:.0f} % of training"
    if not run.config.norm_pix_loss or run.config.objective != "mae":
        return Finding("loss", measured)
    if progress >= LEARNT_BY and min(row["loss"] for row in run.logs) > 0.97 * MEAN_PREDICTED:
        advice = "no better than each patch's mean: raise training.base_learning_rate, or look at the images and crops"
        return Finding("loss", measured, advice)
    band = BANDS.get(Path(original_recipe(run)).name)
    if band is not None and run.config.mask_policy == "ehm" and progress >= band[0][0]:
        expected = interpolate(band, progress)
        measured += f", as shipped {expected:.2f}"
        if abs(loss / expected - 1) > BAND_WIDTH:
            advice = (
                f"more than {100 * BAND_WIDTH:.0f} % off: other data or settings than the recipe's? see docs/results"
            )
            return Finding("loss", measured, advice)
    return Finding("loss", measured)


def original_recipe(run: Run) -> str:
    return json.loads((run.folder / "run.json").read_text())["recipe"]


def interpolate(points: tuple[tuple[float, float], ...], x: float) -> float:
    """Value at x of the line through points with rising first numbers."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def check_masks(run: Run) -> Finding:
    """Whether evolved masks hang together more than random ones, once the tree is cut into half as many nodes."""
    half = (1 + run.config.evolution_start) / 2
    late = [row["mask_compactness"] for row in run.logs if run.progress(row) >= half and "mask_compactness" in row]
    if run.config.mask_policy != "ehm" or not late:
        return Finding("masks", f"{run.config.mask_policy}, not looked at before {half:.0%} of training")
    ratio = run.config.mask_ratio
    random, own = ratio / (2 - ratio), statistics.mean(late)
    measured = f"compactness {own:.3f} in the last half of their evolution, random masks {random:.3f}"
    if own < random + COMPACTNESS_MARGIN:
        advice = (
            "no different from random ones: set num_nodes_end lower and softness_end to 0; if they are, the affinity is"
            " flat: look at the trees in gallery/, and train longer or with a higher rate"
        )
        return Finding("masks", measured, advice)
    return Finding("masks", measured)


def check_features(run: Run) -> Finding:
    """Whether different images have different features."""
    features = encode_some(run)
    rank = effective_rank(features)
    measured = f"effective rank {rank:.1f} of {len(features)} images' features, {features.shape[1]} wide"
    if rank < MIN_RANK:
        advice = (
            "collapsed: all images look alike to the encoder; lower the rate, lengthen the warm-up, look at the images"
        )
        return Finding("features", measured, advice)
    return Finding("features", measured)


@torch.no_grad()
def encode_some(run: Run) -> Tensor:
    """Mean patch tokens `(n, D)` of the first training images, cropped as in training."""
    data, size = run.recipe.data, to_pair(run.config.image_size)
    samples = open_samples(data.train, 0, NUM_IMAGES, size)
    images = PretrainingImages(samples, data, 0, size, run.config.num_channels, num_positions=NUM_IMAGES)
    pixels = torch.stack([images[position]["pixel_values"] for position in range(NUM_IMAGES)])
    images.close()
    encoder = EHMModel.from_pretrained(run.checkpoint).eval()
    return encoder(Normalizer(data.image_mean, data.image_std)(pixels)).pooler_output


def effective_rank(features: Tensor) -> float:
    """Exponential of the entropy of the spectrum of centred features `(n, D)` (Roy & Vetterli 2007); 1 is a line."""
    spectrum = torch.linalg.svdvals(features.double() - features.double().mean(0))
    share = spectrum / spectrum.sum().clamp(min=1e-300)
    return float(torch.exp(-(share * share.clamp(min=1e-300).log()).sum()))


def check_data(run: Run) -> Finding:
    waits = [row["data_wait_share"] for row in run.logs if "data_wait_share" in row]
    if not waits:
        return Finding("data", "not logged yet")
    share = statistics.mean(waits[len(waits) // 2 :])
    measured = f"{100 * share:.0f} % of the time spent waiting for it"
    if share > MAX_DATA_WAIT:
        advice = (
            "raise training.dataloader_num_workers, try data.decoder=simplejpeg, store smaller images, read from the"
            " local disk (streaming: false), or take several masks an image (masks_per_image)"
        )
        return Finding("data", measured, advice)
    return Finding("data", measured)


def check_skipped(run: Run) -> Finding:
    record = run.folder / "skipped_images.jsonl"
    skipped, log = read_skipped(record), read_mask_log(run.folder)
    seen = sum(count for count, _ in log.values()) // run.config.masks_per_image
    share = len(skipped) / max(1, seen + len(skipped))
    measured = f"{len(skipped)} times an image was skipped, {100 * share:.2g} % of those asked for"
    if share > MAX_SKIPPED:
        kinds = {line["error"].split(":")[0] for line in skipped}
        return Finding("skipped images", measured, f"see {record} ({', '.join(sorted(kinds))}); mend or remove them")
    return Finding("skipped images", measured)


def check_checkpoints(run: Run) -> Finding:
    faults = {path.name: fault for path in checkpoints_in(run.folder) if (fault := fault_of(path)) is not None}
    whole = len(checkpoints_in(run.folder)) - len(faults)
    # What a checkpoint has got past was a number when it was taken again.
    records = {step: paths for step, paths in non_finite_records(run.folder).items() if step > run.state["global_step"]}
    if records:
        advice = (
            f"{records[min(records)][0].name} tells of a loss that was not a number; replay that step, lower the rate"
            " or clip gradients"
        )
        return Finding("checkpoints", f"{whole} whole", advice)
    if faults:
        told = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        return Finding(
            "checkpoints", f"{whole} whole, not whole: {told}", "harmless if the run was killed; remove them"
        )
    return Finding("checkpoints", f"{whole} whole")


def check_pushes(run: Run) -> Finding:
    path = run.folder / FAILED_PUSHES
    failed = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not failed:
        return Finding("pushes", "none failed")
    advice = "push the folder with: python -m modeling_ehm.training.push FOLDER REPO"
    return Finding("pushes", f"{len(failed)} failed, the last: {failed[-1]['error']}", advice)


def examine(folder: str | Path, with_features: bool = True) -> list[Finding]:
    """Look a run over.

    Args:
        folder: Its output folder; relative paths of its data are read from the working directory.
        with_features: Whether to load the model and 64 training images.

    Raises:
        ValueError: the folder holds no run, or nothing is saved yet.
    """
    run = read_run(Path(folder))
    checks = [check_loss, check_masks, check_data, check_skipped, check_checkpoints, check_pushes]
    return [check(run) for check in (checks[:2] + [check_features] * with_features + checks[2:])]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_ehm.training.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="output folder of a pre-training run")
    parser.add_argument("--without-features", action="store_true", help="do not load the model and images")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        findings = examine(options.run, not options.without_features)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    for finding in findings:
        print(f"{'ok' if finding.advice is None else 'LOOK':5}{finding.what:16}{finding.measured}")
        if finding.advice is not None:
            print(f"{'':21}-> {finding.advice}")
    if wrong := [finding.what for finding in findings if finding.advice is not None]:
        sys.exit(f"to look at: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
