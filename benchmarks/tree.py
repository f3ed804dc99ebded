"""Time the trees: milliseconds an image and core for several numbers of patches, and how they grow with it.

    OMP_NUM_THREADS=1 python benchmarks/tree.py docs/results/tree

Ours (machine code where numba is installed, one kernel on GPUs with Triton), the rounds in torch that travel with a
checkpoint, on a CPU scipy's linkage image by image, and the clustering of the forerunner's code (25 parts, 15
iterations), all from the same affinities in float32: uniform random ones, and smooth ones as a young encoder's
attention. They take turns, in one process with one thread; medians of process time on a CPU, on a GPU of the clock. Our
share of scipy's time is the median of ratios of the same round.
Writes OUT_STEM.json and the tables into OUT_STEM.md, between two marks.
"""

import argparse
import datetime
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from downstream import machine, write_json, write_tables
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from step import Setting
from torch import Tensor

from modeling_ehm import build_hierarchy
from modeling_ehm.hierarchy_ehm import MERGING, symmetrize
from modeling_ehm.mask_policies_ehm import cluster_patches
from modeling_ehm.masking_ehm import mask_from_scores, mask_scores

SIDES = (8, 14, 16, 24, 32)
NUM_PARTS = 25
SHARE = "ours / scipy"
FIT_FROM = 196  # patches; below, what does not grow with them weighs in


def smooth_affinity(batch: int, side: int, seed: int) -> Tensor:
    """`(B, N, N)`: softmax of nearness and of smooth random features."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()  # (N, 2)
    features = (place @ (torch.randn(batch, 2, 6, generator=generator) / 2)).sin()  # (B, N, 6)
    logits = features @ features.transpose(1, 2) - torch.cdist(place, place) / 2
    noise = torch.randn(logits.shape, generator=generator)
    return symmetrize((logits + 0.01 * noise).softmax(-1))


def random_affinity(batch: int, side: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return symmetrize(torch.rand(batch, side**2, side**2, generator=generator))


def in_rounds(affinity: Tensor) -> None:
    compiled = MERGING.pop(affinity.device.type, None)
    try:
        build_hierarchy(affinity)
    finally:
        if compiled is not None:
            MERGING[affinity.device.type] = compiled


def by_scipy(affinity: Tensor) -> None:
    for one in affinity.numpy():
        distance = 1 - one
        np.fill_diagonal(distance, 0)
        linkage(squareform(distance, checks=False), "average")


def by_expectation(affinity: Tensor) -> None:
    cluster_patches(affinity, NUM_PARTS, torch.arange(len(affinity), device=affinity.device))


def ways_of(device: torch.device) -> dict[str, Callable[[Tensor], None]]:
    ways = {"rounds in torch": in_rounds, "EPM's clustering": by_expectation}
    if device.type == "cpu":
        ways = {"scipy": by_scipy} | ways
    return {"ours": build_hierarchy} | ways


def measure(affinity: Tensor, setting: Setting, rounds: int) -> dict[str, float]:
    """Milliseconds an image of each way, and of cutting and drawing a mask; on a CPU our share of scipy's."""
    count, seeds = affinity.shape[1], torch.arange(len(affinity), device=affinity.device)
    hierarchy = build_hierarchy(affinity)
    ways = ways_of(affinity.device)
    ways["cut and draw"] = lambda _: mask_from_scores(mask_scores(hierarchy, count // 4, seeds), count * 3 // 4)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = setting.now()
            way(affinity)
            if number:  # the first may compile
                seconds[name].append(setting.now() - started)
    figures = {name: 1e3 * statistics.median(own) / len(affinity) for name, own in seconds.items()}
    if "scipy" in seconds:
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["scipy"], strict=True)]
        figures[SHARE] = statistics.median(ratios)
    return figures


def exponent(times: dict[int, float]) -> float:
    """Slope of the logarithm of time over that of the number of patches, by least squares, from `FIT_FROM` on."""
    times = {n: time for n, time in times.items() if n >= FIT_FROM}
    x, y = [math.log(n) for n in times], [math.log(t) for t in times.values()]
    return statistics.linear_regression(x, y).slope


def as_markdown(results: dict[str, dict[int, dict[str, float]]]) -> str:
    counts = [side**2 for side in SIDES]
    lines = ["| affinity | milliseconds an image | " + " | ".join(f"N = {n}" for n in counts)]
    lines[0] += f" | exponent from {FIT_FROM} on | from {counts[-2]} on |"
    lines.append("| --- | --- |" + " --- |" * (len(counts) + 2))
    for kind, by_count in results.items():
        for name in by_count[counts[0]]:
            if name == SHARE:
                lines.append(
                    f"| {kind} | {name} | " + " | ".join(f"{by_count[n][name]:.2f}" for n in counts) + " | | |"
                )
                continue
            times = {n: by_count[n][name] for n in counts}
            cells = [f"{time:.4f}" for time in times.values()] + [f"{exponent(times):.2f}"]
            cells.append(f"{exponent({n: times[n] for n in counts[-2:]}):.2f}")
            lines.append(f"| {kind} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_stem", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patches", type=int, help="of a batch, so that larger images are fewer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    patches = options.patches or (256 * 196 if options.device == "cuda" else 2**14)
    setting = Setting(torch.device(options.device), torch.float32, "sdpa", compiled=False)
    results: dict[str, dict[int, dict[str, float]]] = {}
    for kind, make in (("random", random_affinity), ("smooth", smooth_affinity)):
        for side in SIDES:
            affinity = make(max(4, patches // side**2), side, side).to(setting.device)
            results.setdefault(kind, {})[side**2] = measure(affinity, setting, options.rounds)
    write_json(options.out_stem.with_suffix(".json"), results, options)
    text = f"""{datetime.date.today()}; {machine()}; {torch.get_num_threads()} thread(s); {options.rounds} rounds;
{patches} patches a batch, so {patches // 196} images of 196.

{as_markdown(results)}
"""
    write_tables(options.out_stem.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
