"""Time a pre-training run on one and on two processes, and work out on paper what ImageNet-1K takes on GPUs.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/scaling.py docs/results/scaling

Measured: images a second as the run itself logs them, its first log left out, of one process, of two processes that
share the work, and of two runs of one process beside each other, which is what the machine gives to two processes that
need not talk; every process has the same number of images a step. The three take turns; medians over rounds.
On paper: a ViT-B's steps as step.py timed them on one GPU (--steps-of); for a ViT-L its operations by count, at the
speed that the ViT-B reached with the same masks. Crops as data.py measured them (--data). The price of a GPU and what
is sent between GPUs a second are assumed.
Writes OUT_STEM.json and the tables into OUT_STEM.md, between two marks.
"""

import argparse
import concurrent.futures
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from downstream import ROOT, write_json, write_tables
from step import IMAGES_ON_GPU, Shape, layer_flops

from modeling_ehm.training.tasks import pretrain

RESULTS, RECIPE = ROOT / "docs/results", ROOT / "configs/pretrain/tin64_vit_tiny.yaml"
LOGGED = ("images_per_second", "data_wait_share", "teacher_share", "mask_share")
ONE, TWO, BESIDE = "one process", "two processes", "two runs beside each other"
IMAGENET = 1_281_167  # images of ImageNet-1K's training split
SHAPES = {  # as published with MAE
    "ViT-B/16": Shape(1, 224, 16, 768, 12, 12, 512, 8, 16),
    "ViT-L/16": Shape(1, 224, 16, 1024, 24, 16, 512, 8, 16),
}


@dataclass(frozen=True)
class Masks:
    """What a mask costs beside the student.

    Attributes:
        teacher_share: Of the encoder's layers, those of the teacher.
        masks_per_image: Masks that share one pass of it.
        variant: Of step.py, which timed them.
    """

    teacher_share: float
    masks_per_image: int
    variant: str


MASKS = {
    "random": Masks(0, 1, "random masks"),
    "EHM, all layers": Masks(1, 1, "EHM, 12 layers"),
    "EHM, all layers, R = 4": Masks(1, 4, "EHM, 12 layers, R = 4"),
    "EHM, a quarter of the layers": Masks(0.25, 1, "EHM, 3 layers"),
    "EHM, a quarter of the layers, R = 4": Masks(0.25, 4, "EHM, 3 layers, R = 4"),
}


def run(processes: int, images: int, steps: int, overrides: list[str]) -> dict[str, float]:
    """Means over a run of what it logs, its first log left out."""
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        arguments = [f"training.max_steps={steps}", f"training.global_batch_size={processes * images}"]
        arguments += [f"training.output_dir={folder}/run", "training.logging_steps=10", 'training.save_strategy="no"']
        arguments += ["training.disable_tqdm=true", *pretrain.UNMEASURED, *overrides]
        command = [sys.executable, *(launch if processes > 1 else []), "train_ehm.py", str(RECIPE), *arguments]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stderr[-2000:]}")
        state = json.loads(Path(folder, "run/trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "loss" in row][1:]
    return {name: statistics.mean(row[name] for row in rows) for name in LOGGED}


def measure(images: int, steps: int, rounds: int, overrides: list[str]) -> dict[str, list[dict[str, float]]]:
    """Figures of each way, one entry a round."""
    figures = {ONE: [], TWO: [], BESIDE: []}
    for _ in range(rounds):
        figures[ONE].append(run(1, images, steps, overrides))
        figures[TWO].append(run(2, images, steps, overrides))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            both = list(pool.map(partial(run, 1, images, steps), [overrides] * 2))
        mean = {name: statistics.mean(one[name] for one in both) for name in LOGGED}
        figures[BESIDE].append(mean | {"images_per_second": sum(one["images_per_second"] for one in both)})
    return figures


def measured_table(figures: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| | images a second, times one process | waiting for data | teacher | trees and masks |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for way, rounds in figures.items():
        pairs = zip(rounds, figures[ONE], strict=True)
        ratio = statistics.median(a["images_per_second"] / b["images_per_second"] for a, b in pairs)
        shares = [f"{100 * statistics.median(one[name] for one in rounds):.1f} %" for name in LOGGED[1:]]
        lines.append(f"| {way} | {ratio:.2f} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def flops_a_mask(shape: Shape, masks: Masks) -> float:
    """Operations of a step for one mask: the student's, forward and backward, and its part of the teacher's pass."""
    teacher = shape.num_hidden_layers * layer_flops(1 + shape.num_patches, shape.hidden_size)
    return shape.flops() + masks.teacher_share * teacher / masks.masks_per_image


def speeds(steps: dict) -> dict[str, float]:
    """Operations a second that a GPU kept up with each kind of masks, from the steps of ViT-B that step.py timed."""
    figures, images = steps["results"]["base"]["figures"], IMAGES_ON_GPU["base"]
    return {
        name: flops_a_mask(SHAPES["ViT-B/16"], masks) * images / (1e-3 * figures[masks.variant]["milliseconds"])
        for name, masks in MASKS.items()
    }


def num_weights(shape: Shape) -> float:
    """Weights of encoder and decoder, norms and biases left out."""
    pixels = 3 * shape.patch_size**2
    encoder = shape.num_hidden_layers * 12 * shape.hidden_size**2 + pixels * shape.hidden_size
    decoder = shape.decoder_num_hidden_layers * 12 * shape.decoder_hidden_size**2
    return encoder + decoder + shape.decoder_hidden_size * (shape.hidden_size + pixels)


def paper_table(options: argparse.Namespace, speed_of: dict[str, float], crops_a_second: float) -> str:
    """Hours and cost of `options.epochs` times as many masks as ImageNet-1K has images."""
    header = ["model", "masks", "GPUs", "hours", "GPU hours", "cost", "crops a second", "cores", "gradients / step"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name, shape in SHAPES.items():
        for label, masks in MASKS.items():
            for gpus, gigabytes in zip(options.gpus, options.bandwidth, strict=True):
                speed = gpus * speed_of[label]
                seconds = options.epochs * IMAGENET * flops_a_mask(shape, masks) / speed
                crops = options.epochs * IMAGENET / masks.masks_per_image / seconds
                step = options.batch * flops_a_mask(shape, masks) / speed
                # A ring sends every gradient twice, but for the part that is the GPU's own; float32.
                transfer = 2 * (gpus - 1) / gpus * 4 * num_weights(shape) / (1e9 * gigabytes)
                hours = seconds / 3600
                cells = [name, label, str(gpus), f"{hours:.1f}", f"{hours * gpus:.0f}"]
                cells += [f"{hours * gpus * options.price:,.0f}", f"{crops:,.0f}", f"{crops / crops_a_second:.0f}"]
                lines.append("| " + " | ".join([*cells, f"{transfer / step:.2f}"]) + " |")
    return "\n".join(lines)


def report(options: argparse.Namespace, measured: dict) -> str:
    """The tables, with what was measured here and on a GPU."""
    steps, data = (json.loads(path.read_text()) for path in (options.steps_of, options.data))
    crops_a_second, own = 1e6 / data["results"]["ours"]["microseconds"], measured["options"]
    return f"""{measured["date"]}; {measured["machine"]};
one thread a process; {RECIPE.stem}, {own["images"]} images a step and process, {own["steps"]} steps,
{own["rounds"]} rounds.

{measured_table(measured["results"])}

On paper, {options.epochs} times as many masks as ImageNet-1K has images, with steps as timed on one GPU
({steps["date"]}; {steps["machine"]}; {steps["options"]["dtype"]}).
Assumed: that ViT-L's operations take as long as ViT-B's, {options.price:g} dollars an hour,
{", ".join(f"{b:g}" for b in options.bandwidth)} GB/s a GPU between {", ".join(map(str, options.gpus))} GPUs.
Cores: of the crops a second, by those that one core makes ({crops_a_second:.0f}; {data["date"]},
{data["machine"]}).
Last column: time in which the gradients of a step of {options.batch} masks are summed, over the step's own; what is
well below 1 can pass beside the backward pass.

{paper_table(options, speeds(steps), crops_a_second)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_stem", type=Path)
    parser.add_argument("--images", type=int, default=128, help="a step and process")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="overrides of the recipe")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4096, help="masks a step, for the share of gradients")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--bandwidth", nargs="+", type=float, default=[400, 40], help="GB a second and GPU, for each")
    parser.add_argument("--steps-of", type=Path, default=RESULTS / "step_h200.json", help="JSON of step.py on a GPU")
    parser.add_argument("--data", type=Path, default=RESULTS / "data.json", help="JSON of data.py")
    parser.add_argument("--paper", action="store_true", help="measure nothing; OUT_STEM.json is there")
    parser.add_argument("--price", type=float, default=3, help="dollars of a GPU for an hour, assumed")
    options = parser.parse_args()
    path = options.out_stem.with_suffix(".json")
    if not options.paper:
        write_json(path, measure(options.images, options.steps, options.rounds, options.set), options)
    text = report(options, json.loads(path.read_text()))
    write_tables(options.out_stem.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
