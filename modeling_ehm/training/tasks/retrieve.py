"""Partial-duplicate retrieval with the features of a frozen encoder. Nothing is trained.

Each image is seen at its own size and aspect ratio: a crop shows things as large as the original does, and squeezing
both into one square would hide that. Images are ranked by a pooled descriptor, and the best ones again by how well
their patches find each other. The position's own part is taken out of the patches' features by subtracting those of a
grey image of the same size: a part of a picture must be found wherever it lies.
"""

import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from datasets import ClassLabel
from PIL import Image as PILImage
from torch import Tensor
from tqdm.auto import tqdm

from modeling_ehm.configuration_ehm import to_pair
from modeling_ehm.modeling_ehm import EHMModel, evaluation_mode
from modeling_ehm.training import descriptors
from modeling_ehm.training.arguments import TaskTrainingArguments
from modeling_ehm.training.data import ImageSource, Normalizer
from modeling_ehm.training.decoding import to_uint8_tensor
from modeling_ehm.training.labelled import ImageData, LabelledRows, check_channels, resized
from modeling_ehm.training.metrics import as_evaluate_metric
from modeling_ehm.training.pretrained import load_encoder
from modeling_ehm.training.recipes import Recipe, RecipeError, Schema
from modeling_ehm.training.tasks import finetuning

POOLINGS = ("mean", "gem", "cls")
THUMBNAIL = (16, 16)  # of the reference


@dataclass(kw_only=True)
class RetrievalData(ImageData):
    """The `data` section; other fields: see `ImageData`.

    Attributes:
        database: Images to search. `group_column` holds a number that an image shares with its altered copies.
        query: Images to search for; `group_column`, and `tag_columns` by whose values the figures are split.
    """

    database: ImageSource
    query: ImageSource


@dataclass
class Descriptor:
    """The `head` section.

    Attributes:
        pooling: "mean", "gem" or "cls", of the first ranking.
        gem_p: Power of "gem".
        layer: Whose output is read, counted from 1; 0 the patch embeddings, negative from the end; -1 the last.
        shrinkage: Of a PCA whitening of pooled descriptors, learnt on the database; null leaves them as they are.
        local_shrinkage: The same of the patches' features, which are always whitened.
        rerank: So many of the first ranking are ranked again by their patches; 0 for none.
        local_dims: Dimensions of whitened patch features; null keeps all.
        resolution: Share of its size at which every image is seen; below 1 is faster, and blind to small things.
        scales: Sizes at which patches of database images are looked for, as shares of their own.
        max_side: Larger images are reduced to this many pixels on their longer side.
    """

    pooling: str = "mean"
    gem_p: float = 3.0
    layer: int = -1
    shrinkage: float | None = None
    local_shrinkage: float = 0.1
    rerank: int = 100
    local_dims: int | None = 64
    resolution: float = 1.0
    scales: list[float] = field(default_factory=lambda: [1.0, 0.5])
    max_side: int = 256

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise ValueError(f"head.pooling={self.pooling!r} is not one of {', '.join(POOLINGS)}")
        for name in ("gem_p", "resolution"):
            if getattr(self, name) <= 0:
                raise ValueError(f"head.{name}={getattr(self, name)} must be positive")
        for name in ("shrinkage", "local_shrinkage"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"head.{name}={getattr(self, name)} must lie in [0, 1]")
        if not self.scales or min(self.scales) <= 0 or self.scales[0] != 1 or len(set(self.scales)) < len(self.scales):
            raise ValueError(f"head.scales={self.scales} must be different positive numbers, and 1 the first")
        for name, low in (("rerank", 0), ("local_dims", 1), ("max_side", 1)):
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise ValueError(f"head.{name}={getattr(self, name)} must be at least {low}")


SCHEMA = Schema(RetrievalData, TaskTrainingArguments, Descriptor)


@dataclass
class RetrievalTask:
    """What `prepare` hands to `execute`."""

    recipe: Recipe
    args: TaskTrainingArguments
    encoder: EHMModel
    rows: dict[str, LabelledRows]  # "database", "query"


def prepare(recipe: Recipe) -> RetrievalTask:
    """Load encoder and data, and check that every query has an answer."""
    finetuning.refuse_options(recipe, finetuning.TRAINING_OPTIONS)
    args, _ = finetuning.start(recipe)
    data = recipe.data
    encoder = load_encoder(recipe.pretrained, args.attn_implementation, **recipe.model).to(args.device)
    config = encoder.config
    check_channels(config, data.image_mean)
    layers = config.num_hidden_layers
    if not -layers - 1 <= recipe.head.layer <= layers:
        raise RecipeError(f"head.layer={recipe.head.layer} is not in [0, {layers}]; the encoder has {layers} layers")
    rows = {}
    for name, source in (("database", data.database), ("query", data.query)):
        columns = {"group": source.group_column} | {f"tag_{n}": tag for n, tag in enumerate(source.tag_columns or [])}
        rows[name] = LabelledRows(source, columns, to_pair(config.image_size), config.num_channels, data.max_pixels)
    for name, r in rows.items():
        for row, group in enumerate(r.column("group")):
            if not isinstance(group, int):
                raise RecipeError(
                    f"{r.source.path}: row {row} of data.{name} has {group!r} in"
                    f" group_column={r.source.group_column!r}, which should hold whole numbers"
                )
    known = set(rows["database"].column("group"))
    for row, group in enumerate(rows["query"].column("group")):
        if group not in known:
            raise RecipeError(
                f"{data.query.path}: row {row}, a query of group {group!r}, has no match in data.database; add one, or"
                " drop the query"
            )
    return RetrievalTask(recipe, args, encoder, rows)


def tags_of(rows: LabelledRows, count: int | None = None) -> list[str] | None:
    """Values of the first `count` tag columns of each row, joined; numbers that are 0 or missing are left out."""
    columns = [name for name in rows.features if name.startswith("tag_")][:count]
    if not columns:
        return None
    parts = []
    for name in columns:
        feature, values = rows.features[name], rows.column(name)
        named = feature.int2str(values) if isinstance(feature, ClassLabel) else values
        parts.append(["" if value in (None, 0) else str(value) for value in named])
    return ["".join(of_row) for of_row in zip(*parts, strict=True)]


def execute(task: RetrievalTask) -> dict[str, float]:
    """Describe, search, rank again; figures in percent."""
    recipe, args, rows = task.recipe, task.args, task.rows
    started = time.perf_counter()
    run = finetuning.describe_run(recipe, args)
    run.begin(None, args.world_size)
    if args.process_index != 0:
        return {}  # one process searches
    similarity = rank(task)
    figures = figures_of(similarity, task)
    thumbnails = {name: thumbnail_features(rows[name]) for name in rows}
    reference = thumbnails["query"] @ thumbnails["database"].T
    run.references = figures_of(reference, task)
    finetuning.report(run, figures, {"steps": 0, "seconds": time.perf_counter() - started})
    return figures


def figures_of(similarity: Tensor, task: RetrievalTask) -> dict[str, float]:
    """Figures in percent, split by the first tag column and by all of them."""
    query, database = task.rows["query"], task.rows["database"].column("group")
    figures = {}
    for tags in (tags_of(query, 1), tags_of(query)):
        metric = as_evaluate_metric("retrieval_map")
        metric.add_batch(predictions=list(similarity.numpy()), references=query.column("group"))
        figures |= metric.compute(database_groups=database, tags=tags)
    return {name: 100 * value for name, value in figures.items()}


def thumbnail_features(rows: LabelledRows) -> Tensor:
    """The reference: bilinear 16x16 thumbnails of unit length, the mean of each taken off; `(n, C * 256)`."""
    images = (rows[row]["image"].resize(THUMBNAIL, PILImage.Resampling.BILINEAR) for row in range(len(rows)))
    features = torch.stack([to_uint8_tensor(image).flatten() for image in images]).float()
    return F.normalize(features - features.mean(1, keepdim=True), dim=1)


def rank(task: RetrievalTask) -> Tensor:
    """Similarity of each query with each database image, `(n, m)`; what was ranked again stands above the rest."""
    head, encoder = task.recipe.head, task.encoder
    keep_local = head.rerank > 0
    scales = head.scales if keep_local else [1.0]
    with tqdm(total=sum(len(r) for r in task.rows.values()), unit=" images", disable=task.args.disable_tqdm) as bar:
        pooled, local = describe(task, "database", scales, keep_local, bar)
        fitted = local_fitted = None
        if head.shrinkage is not None:
            fitted = descriptors.fit_whitening(pooled, head.shrinkage)
        if keep_local:
            tokens = torch.cat([image[0].float() for image in local])
            kept = min(head.local_dims or encoder.config.hidden_size, encoder.config.hidden_size)
            local_fitted = descriptors.fit_whitening(tokens, head.local_shrinkage, kept)
            del tokens
        query_pooled, query_local = describe(task, "query", [1.0], keep_local, bar, local_fitted)
    pooled, query_pooled = (
        F.normalize(x, dim=1) if fitted is None else descriptors.whiten(x, *fitted) for x in (pooled, query_pooled)
    )
    similarity = query_pooled @ pooled.T
    if not keep_local:
        return similarity
    views = [
        descriptors.padded([descriptors.whiten(image[view].float(), *local_fitted) for image in local])
        for view in range(len(scales))
    ]
    candidates = descriptors.nearest(pooled, query_pooled, min(head.rerank, len(pooled)))
    bar = tqdm(candidates, unit=" queries", disable=task.args.disable_tqdm)
    for row, chosen in enumerate(bar):
        query = query_local[row][0]
        found = [descriptors.local_similarity(query, tokens[chosen], is_token[chosen]) for tokens, is_token in views]
        there, back = (torch.stack(parts).amax(0) for parts in zip(*found, strict=True))
        similarity[row, chosen] = 3 + there + back  # each in [-1, 1]: never below a cosine that was not ranked again
    return similarity


@torch.no_grad()
def describe(task, name: str, scales: list[float], keep_local: bool, bar, fitted=None) -> tuple[Tensor, list]:
    """Pooled descriptors `(n, D)` of all rows, and, for each image and scale, its patch features `(N, D)` float16.

    With `fitted`, the whitening of patches, these are whitened instead: `(N, K)` float32 of unit length.
    """
    head, encoder, rows = task.recipe.head, task.encoder, task.rows[name]
    normalize = Normalizer(task.recipe.data.image_mean, task.recipe.data.image_std)
    grey: dict[tuple[int, int], Tensor] = {}
    pooled, local = [], []
    with evaluation_mode(encoder):
        for row in range(len(rows)):
            image, views = rows[row]["image"], []
            for scale in scales:
                pixels = normalize(
                    to_uint8_tensor(at_scale(image, head.resolution * scale, head.max_side, encoder))[None]
                )
                states = tokens_of(encoder, pixels, head.layer)
                size = pixels.shape[2:]
                if size not in grey:
                    grey[size] = tokens_of(encoder, torch.zeros_like(pixels), head.layer)
                if scale == 1:
                    pooled.append(descriptors.pool(states, head.pooling, head.gem_p)[0].cpu())
                if keep_local:
                    patches = (states - grey[size])[0, 1:].cpu()
                    views.append(patches.half() if fitted is None else descriptors.whiten(patches, *fitted))
            local.append(views)
            bar.update()
    return torch.stack(pooled), local


def at_scale(image: PILImage.Image, scale: float, max_side: int, encoder: EHMModel) -> PILImage.Image:
    """The image at a share of its size, reduced to `max_side` before, its sides snapped to multiples of the patch."""
    scale = scale * min(1.0, max_side / max(image.size))
    return resized(image, descriptors.snapped_size(image.size[::-1], scale, to_pair(encoder.config.patch_size)))


def tokens_of(encoder: EHMModel, pixels: Tensor, layer: int) -> Tensor:
    """Output of a layer, `(1, 1 + N, D)` float32; the last one's after the final norm."""
    outputs = encoder(pixels.to(encoder.device), output_hidden_states=True)
    last = layer in (-1, encoder.config.num_hidden_layers)
    return (outputs.last_hidden_state if last else outputs.hidden_states[layer]).float()
