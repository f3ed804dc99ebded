"""How near other teachers' trees come to those that all layers give: their attention in float32, average linkage.

    python benchmarks/teachers.py docs/results/teachers --runs outputs/one outputs/another

Each run is the folder of a finished pre-training; its own recipe names the images, those of `data.probe_test`. Nothing
is trained: whether other trees train as well is for masking_ledger.py to say. All trees of an image are cut into as
many nodes as masks had halfway through their evolution and at its end. The partitions are held against those of all
layers by the adjusted Rand index (1: the same, 0: as alike as chance makes them). Means over images, then over runs.
Writes OUT_STEM.json and the table into OUT_STEM.md, between two marks.
"""

import argparse
import datetime
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from downstream import machine, write_tables
from torch import Tensor

from modeling_ehm.configuration_ehm import EHMConfig, to_pair
from modeling_ehm.hierarchy_ehm import PatchHierarchy, build_hierarchy
from modeling_ehm.masking_ehm import num_nodes_at
from modeling_ehm.modeling_ehm import EHMForPreTraining, sincos_positions
from modeling_ehm.training.data import Normalizer, load_labelled
from modeling_ehm.training.metrics import block_labels, partition_scores
from modeling_ehm.training.pretrained import load_for_pretraining
from modeling_ehm.training.tasks import load_recipe

BATCH = 128


@dataclass(frozen=True)
class Teacher:
    """A way to build trees.

    Attributes:
        config: Overrides of the run's configuration.
        reduction: The teacher sees every side of an image divided by this; its patches' affinities then hold for all
            patches that each of them covers.
    """

    config: dict = field(default_factory=dict)
    reduction: int = 1


REFERENCE = Teacher({"affinity": "attention", "affinity_layers": "all", "linkage": "average", "teacher_dtype": None})
TEACHERS = {
    "bfloat16": Teacher({"teacher_dtype": "bfloat16"}),
    "first layer": Teacher({"affinity_layers": [0]}),
    "second layer": Teacher({"affinity_layers": [1]}),
    "first three layers": Teacher({"affinity_layers": [0, 1, 2]}),
    "last layer": Teacher({"affinity_layers": [-1]}),
    "keys of the last layer": Teacher({"affinity": "keys", "affinity_layers": [-1]}),
    "half the resolution": Teacher(reduction=2),
    "complete linkage": Teacher({"linkage": "complete"}),
    "single linkage": Teacher({"linkage": "single"}),
}


def spread(affinity: Tensor, grid_size: tuple[int, int], reduction: int) -> Tensor:
    """Affinities of coarse patches `(B, n, n)` as those of the patches of `grid_size` that they cover, `(B, N, N)`.

    Patches in the same coarse one are taken to be more alike than any others, so that they merge first.
    """
    own = torch.eye(affinity.shape[1], dtype=torch.bool, device=affinity.device)
    affinity = torch.where(own, affinity.amax((1, 2), keepdim=True) + 1, affinity)
    rows, columns = (torch.arange(side) // reduction for side in grid_size)
    coarse = (rows[:, None] * (grid_size[1] // reduction) + columns).flatten()  # (N,)
    return affinity[:, coarse][:, :, coarse]


def load(run: Path, teacher: Teacher) -> EHMForPreTraining:
    config = REFERENCE.config | teacher.config
    if teacher.reduction == 1:
        return load_for_pretraining(str(run), "sdpa", **config)
    fine = EHMConfig.from_pretrained(run)
    if any(side % teacher.reduction for side in fine.grid_size):
        raise ValueError(f"{fine.grid_size} patches cannot be taken together in squares of side {teacher.reduction}")
    config["image_size"] = [side // teacher.reduction for side in to_pair(fine.image_size)]
    model = load_for_pretraining(str(run), "sdpa", **config)
    positions = sincos_positions(fine.grid_size, fine.hidden_size)[:, 1:].unflatten(1, fine.grid_size)  # (1, h, w, D)
    coarse = F.avg_pool2d(positions.permute(0, 3, 1, 2), teacher.reduction).flatten(2).transpose(1, 2)
    model.ehm.embeddings.position_embeddings[:, 1:] = coarse  # those of the grid itself are of places never seen
    return model


def parse(model: EHMForPreTraining, pixel_values: Tensor, reduction: int) -> PatchHierarchy:
    grid_size = model.get_input_embeddings().grid_of(pixel_values)
    affinity = model.patch_affinity(F.avg_pool2d(pixel_values, reduction))
    return build_hierarchy(spread(affinity, grid_size, reduction), model.config.linkage, grid_size)


def partitions(run: Path, teacher: Teacher, pixel_values: Tensor, counts: tuple[int, ...]) -> dict[int, Tensor]:
    """Nodes of the patches by number of nodes, each `(n, N)`."""
    model = load(run, teacher).eval()
    trees = [parse(model, batch, teacher.reduction) for batch in pixel_values.split(BATCH)]
    return {count: torch.cat([tree.cut(count) for tree in trees]) for count in counts}


def agreement(nodes: Tensor, reference: Tensor) -> dict[str, float]:
    """Means over images of the adjusted Rand index, and of the largest node's share of an image's patches."""
    sizes = F.one_hot(nodes).sum(1)  # (n, K)
    return {
        "ari": partition_scores(nodes, reference)["ari"].mean().item(),
        "largest": (sizes.amax(1) / nodes.shape[1]).mean().item(),
    }


def halfway_and_last(config: EHMConfig) -> tuple[int, ...]:
    """Numbers of nodes that masks are drawn from, halfway through their evolution and at its end."""
    nodes = config.num_nodes_range(config.num_patches)
    return tuple(num_nodes_at(evolved, *nodes, config.num_nodes_curve) for evolved in (0.5, 1.0))


def measure(run: Path, num_images: int) -> dict[str, dict[str, dict[str, float]]]:
    """By teacher, by number of nodes."""
    recipe = load_recipe(run / "recipe.yaml", [f"data.probe_test.max_images={num_images}"])
    config = EHMConfig.from_pretrained(run)
    loaded = load_labelled(recipe.data.probe_test, to_pair(config.image_size), config.num_channels)
    pixel_values = Normalizer(recipe.data.image_mean, recipe.data.image_std)(loaded["pixels"])
    counts = halfway_and_last(config)
    reference = partitions(run, REFERENCE, pixel_values, counts)
    found = {"all layers": reference}
    found |= {name: partitions(run, teacher, pixel_values, counts) for name, teacher in TEACHERS.items()}
    found["none, blocks"] = {
        count: block_labels(config.grid_size, count).expand(len(pixel_values), -1) for count in counts
    }
    return {
        name: {str(count): agreement(nodes[count], reference[count]) for count in counts}
        for name, nodes in found.items()
    }


def as_markdown(measured: list[dict]) -> str:
    counts = list(measured[0]["all layers"])
    header = ["teacher", *(f"agreement, {count} nodes" for count in counts), f"largest of {counts[-1]} nodes"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name in measured[0]:
        values = [statistics.mean(one[name][count]["ari"] for one in measured) for count in counts]
        largest = statistics.mean(one[name][counts[-1]]["largest"] for one in measured)
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + f" | {largest:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_stem", type=Path)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of finished pre-training runs")
    parser.add_argument("--images", type=int, default=512)
    options = parser.parse_args()
    measured = [measure(run, options.images) for run in options.runs]
    told = {"machine": machine(), "date": f"{datetime.date.today()}", "images": options.images}
    options.out_stem.parent.mkdir(parents=True, exist_ok=True)
    options.out_stem.with_suffix(".json").write_text(json.dumps(told | {"runs": measured}, indent=1) + "\n")
    text = f"{told['date']}; {len(measured)} runs, {options.images} images; {told['machine']}.\n\n"
    write_tables(options.out_stem.with_suffix(".md"), text + as_markdown(measured))
    print(f"wrote {options.out_stem}.md and .json")


if __name__ == "__main__":
    main()
