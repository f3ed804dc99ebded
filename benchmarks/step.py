"""Time training steps against transformers' ViTMAE: same shapes, weights, optimiser, precision and attention.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/step.py docs/results/step

All variants take turns in one process, each step in the order of a new permutation; what is compared is the median of
ratios to ViTMAE's step of the same round. A variant with R masks an image gets a Rth of the images, so that all steps
train on as many masks. On a CPU the process's own time is read, on a GPU the clock, synchronised.
Before and after, a matrix product shows what the machine reaches at best; a run in which that moved by more than a
tenth is refused. Peak memory is that of a process of its own for each variant, less what it had without a model; on a
GPU what the allocator counts in this one.
Writes OUT_STEM.json and the tables into OUT_STEM.md, between two marks.
"""

import argparse
import datetime
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from downstream import machine, write_json, write_tables
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from modeling_ehm import build_hierarchy
from modeling_ehm.conversion import from_vit_mae, quiet_loading
from modeling_ehm.modeling_ehm import sincos_positions

REFERENCE = "ViTMAE"
ALL_LAYERS = {"affinity": "attention", "affinity_layers": "all"}
THREE_LAYERS = {"affinity": "attention", "affinity_layers": [0, 1, 2]}
VARIANTS = {  # fields of EHMConfig; the first is held against ViTMAE's loss
    "random masks": {"mask_policy": "random"},
    "EHM, default": {},
    "EHM, 12 layers": ALL_LAYERS | {"masks_per_image": 1},
    "EHM, 12 layers, bfloat16 teacher": ALL_LAYERS | {"masks_per_image": 1, "teacher_dtype": "bfloat16"},
    "EHM, 12 layers, R = 4": ALL_LAYERS | {"masks_per_image": 4},
    "EHM, 3 layers": THREE_LAYERS | {"masks_per_image": 1},
    "EHM, 3 layers, R = 4": THREE_LAYERS | {"masks_per_image": 4},
    "EHM, default, R = 4": {"masks_per_image": 4},
    "EHM, keys of the last layer": {"affinity": "keys", "affinity_layers": [-1]},
    "EHM, until masks evolve": {"evolution_start": 0.9},  # steps are timed at progress 0.5
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a ViTMAE, and the images of a step."""

    batch_size: int
    image_size: int
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    decoder_hidden_size: int
    decoder_num_hidden_layers: int
    decoder_num_attention_heads: int

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def config(self, attention: str) -> ViTMAEConfig:
        fields = asdict(self)
        del fields["batch_size"]
        return ViTMAEConfig(
            **fields,
            intermediate_size=4 * self.hidden_size,
            decoder_intermediate_size=4 * self.decoder_hidden_size,
            norm_pix_loss=True,
            attn_implementation=attention,
        )

    def flops(self) -> float:
        """Of a ViTMAE step on one image, two a multiply-add, the backward pass counted as twice the forward pass."""
        visible = 1 + self.num_patches - int(0.75 * self.num_patches)
        pixels = 3 * self.patch_size**2
        embedding = 2 * self.num_patches * pixels * self.hidden_size
        encoder = self.num_hidden_layers * layer_flops(visible, self.hidden_size)
        width, tokens = self.decoder_hidden_size, 1 + self.num_patches
        decoder = self.decoder_num_hidden_layers * layer_flops(tokens, width)
        decoder += 2 * visible * self.hidden_size * width + 2 * tokens * width * pixels
        return 2 * embedding + 3 * (encoder + decoder)


def layer_flops(tokens: int, width: int) -> float:
    """Of the forward pass of a transformer layer whose MLP is four times as wide."""
    return 2 * 12 * tokens * width**2 + 4 * tokens**2 * width


SHAPES = {
    "tiny": Shape(64, 64, 8, 192, 12, 3, 128, 2, 4),
    "base": Shape(4, 224, 16, 768, 12, 12, 512, 8, 16),
}
IMAGES_ON_GPU = {"tiny": 1024, "base": 256}  # of a step, where fewer would leave the device idle


@dataclass(frozen=True)
class Setting:
    """Where and in which precision steps run."""

    device: torch.device
    dtype: torch.dtype
    attention: str
    compiled: bool

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def save_vit_mae(shape: Shape, folder: Path, attention: str) -> None:
    """Random weights, with the positions that a ViTMAE made from a config lacks (transformers 5)."""
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(shape.config(attention))
    grid_size = (shape.image_size // shape.patch_size,) * 2
    model.vit.embeddings.position_embeddings.data = sincos_positions(grid_size, shape.hidden_size)
    model.decoder.decoder_pos_embed.data = sincos_positions(grid_size, shape.decoder_hidden_size)
    model.save_pretrained(folder)


def load(variant: str, folder: Path, setting: Setting) -> nn.Module:
    with quiet_loading():
        if variant == REFERENCE:
            model = ViTMAEForPreTraining.from_pretrained(folder, attn_implementation=setting.attention)
        else:
            model = from_vit_mae(folder, **VARIANTS[variant])
            model.set_attn_implementation(setting.attention)
    return model.to(setting.device).train()


def some_images(model: nn.Module, shape: Shape, setting: Setting, number: int) -> dict[str, Tensor]:
    """Arguments of a model for the step of this number: as many images as give the batch's masks."""
    count = shape.batch_size // getattr(model.config, "masks_per_image", 1)
    generator = torch.Generator(setting.device).manual_seed(number)
    size = (count, 3, shape.image_size, shape.image_size)
    arguments = {"pixel_values": torch.randn(size, generator=generator, device=setting.device)}
    if model.config.model_type == "ehm":
        seeds = torch.arange(count) + number * count
        arguments |= {"progress": 0.5, "mask_seed": seeds.to(setting.device)}
    return arguments


def make_step(model: nn.Module, setting: Setting) -> Callable[[dict[str, Tensor]], float]:
    """A function that takes one optimiser step on these arguments of the model, and returns the loss."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    run = torch.compile(model) if setting.compiled else model

    def step(arguments: dict[str, Tensor]) -> float:
        with setting.autocast():
            loss = run(**arguments).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def loss_difference(folder: Path, shape: Shape, setting: Setting) -> float:
    """Relative difference of the first variant's loss to ViTMAE's, same weights and masks."""
    theirs, ours = (load(variant, folder, setting) for variant in (REFERENCE, next(iter(VARIANTS))))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape.batch_size, 3, shape.image_size, shape.image_size, generator=generator)
    noise = torch.rand(shape.batch_size, shape.num_patches, generator=generator)
    hidden = noise.argsort(dim=1).argsort(dim=1) >= shape.num_patches - int(0.75 * shape.num_patches)
    images, noise, hidden = (x.to(setting.device) for x in (images, noise, hidden))
    with torch.no_grad(), setting.autocast():
        a, b = theirs(images, noise=noise).loss.item(), ours(images, bool_masked_pos=hidden).loss.item()
    return abs(a - b) / a


def matmul_peak(setting: Setting) -> float:
    """Operations a second of a square matrix product, the best of several after as many others."""
    side, rounds = (8192, 200) if setting.device.type == "cuda" else (2048, 6)  # a GPU's clock rises with the work
    a, times = torch.randn(side, side, device=setting.device, dtype=setting.dtype), []
    for _ in range(rounds):
        started = setting.now()
        a @ a
        times.append(setting.now() - started)
    return 2 * side**3 / min(times[rounds // 2 :])


def time_steps(models: dict[str, nn.Module], shape: Shape, rounds: int, setting: Setting) -> dict[str, list[float]]:
    """Seconds of each variant's steps, two rounds of warming up left out."""
    order, seconds = random.Random(0), {name: [] for name in models}
    steps = {name: make_step(model, setting) for name, model in models.items()}
    for number in range(rounds + 2):
        for name in order.sample(list(models), len(models)):
            arguments = some_images(models[name], shape, setting, number)
            started = setting.now()
            steps[name](arguments)
            if number >= 2:
                seconds[name].append(setting.now() - started)
    return seconds


def measure_memory(variant: str, shape: Shape, setting: Setting) -> float:
    """MiB that three steps take at most, weights and moments included: more than the process has without a model."""
    if setting.device.type == "cuda":
        return measure_device_memory(variant, shape, setting)
    build_hierarchy(torch.zeros(1, 2, 2))  # what compiles the trees' code takes memory once, whatever the batch
    begun = resident_memory()
    with tempfile.TemporaryDirectory() as folder:
        save_vit_mae(shape, Path(folder), setting.attention)
        model = load(variant, Path(folder), setting)
    step, highest, ended = make_step(model, setting), [begun], threading.Event()

    def watch() -> None:  # the system's own high-water mark would be that of loading
        while not ended.wait(0.002):
            highest.append(resident_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(3):
        step(some_images(model, shape, setting, number))
    ended.set()
    watcher.join()
    return max(highest) - begun


def measure_device_memory(variant: str, shape: Shape, setting: Setting) -> float:
    """The same on a GPU, whose allocator keeps the high-water mark: more than is there already."""
    torch.cuda.empty_cache()
    begun = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        save_vit_mae(shape, Path(folder), setting.attention)
        model = load(variant, Path(folder), setting)
    step = make_step(model, setting)
    for number in range(3):
        step(some_images(model, shape, setting, number))
    return (torch.cuda.max_memory_allocated() - begun) / 2**20


def resident_memory() -> float:
    """MiB of this process in the main memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(shape: Shape, variants: list[str], setting: Setting, rounds: int) -> dict:
    """Figures of one shape: milliseconds, ratios to ViTMAE's, share of the peak, and how far the losses are apart.

    Raises:
        RuntimeError: the machine's speed moved by more than a tenth meanwhile.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_vit_mae(shape, folder, setting.attention)
        models = {name: load(name, folder, setting) for name in [REFERENCE, *variants]}
        before = matmul_peak(setting)
        seconds = time_steps(models, shape, rounds, setting)
        after = matmul_peak(setting)
        difference = loss_difference(folder, shape, setting)
    if abs(after / before - 1) > 0.1:
        raise RuntimeError(f"a matrix product ran at {before:.3g} before and {after:.3g} after; use an idle machine")
    peak, figures = max(before, after), {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[REFERENCE], strict=True)]
        figures[name] = {
            "milliseconds": 1e3 * statistics.median(own),
            "ratio": statistics.median(ratios),
            "ratios": [min(ratios), max(ratios)],
            "share_of_peak": shape.flops() * shape.batch_size / statistics.median(own) / peak,
        }
    return {"figures": figures, "loss_difference": difference, "peak": peak}


def memory_of(variant: str, shape: str, options: argparse.Namespace) -> float:
    """Peak memory of a variant, on a CPU in a process of its own."""
    if options.device == "cuda":
        return measure_memory(variant, shape_named(shape, options), setting_of(options))
    command = [sys.executable, __file__, "-", "--memory-of", variant, "--shapes", shape, "--dtype", options.dtype]
    command += ["--attention", options.attention, "--device", options.device]
    command += ["--compile"] if options.compile else []
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(ended.stdout.split()[-1])


def shape_named(name: str, options: argparse.Namespace) -> Shape:
    shape = SHAPES[name]
    return replace(shape, batch_size=IMAGES_ON_GPU[name]) if options.device == "cuda" else shape


def setting_of(options: argparse.Namespace) -> Setting:
    dtype = getattr(torch, options.dtype)
    return Setting(torch.device(options.device), dtype, options.attention, compiled=options.compile)


def as_markdown(results: dict) -> str:
    lines = ["| shape | step | milliseconds | ratio to ViTMAE (lowest, highest) | share of the peak | memory, ratio |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for shape, result in results.items():
        for name, one in result["figures"].items():
            low, high = one["ratios"]
            lines.append(
                f"| {shape} | {name} | {one['milliseconds']:.1f} | {one['ratio']:.3f} ({low:.2f}, {high:.2f}) |"
                f" {100 * one['share_of_peak']:.0f} % | {one['memory_ratio']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_stem", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory-of", metavar="VARIANT", help="only print the peak memory of one, in MiB")
    options = parser.parse_args()
    setting = setting_of(options)
    if options.memory_of is not None:
        print(measure_memory(options.memory_of, shape_named(options.shapes[0], options), setting))
        return
    results = {}
    for name in options.shapes:
        results[name] = measure(shape_named(name, options), options.variants, setting, options.rounds)
        memory = {variant: memory_of(variant, name, options) for variant in results[name]["figures"]}
        for variant, one in results[name]["figures"].items():
            one["memory"] = memory[variant]
            one["memory_ratio"] = memory[variant] / memory[REFERENCE]
    write_json(options.out_stem.with_suffix(".json"), results, options)
    text = f"""{datetime.date.today()}; {machine()}; {torch.get_num_threads()} thread(s); {options.dtype},
{options.attention} attention{", compiled" if options.compile else ""}; {options.rounds} rounds;
images a step: {", ".join(f"{shape_named(name, options).batch_size} ({name})" for name in results)}.

{as_markdown(results)}
"""
    write_tables(options.out_stem.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
