"""Pictures of a run: what the model takes for a whole, what its masks hide, what it reconstructs, and its curves.

`snapshot` needs no matplotlib, so a run can record itself anywhere; `render_gallery` and `render_curves` do (the extra
`viz`). Both draw on the Agg canvas alone: no window, no global state of pyplot is touched.

Letters: B images, C channels, H W pixels, P patch side, N patches, K tree nodes. True = masked.
"""

import importlib.util
import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modeling_ehm.configuration_ehm import SCHEDULED_POLICIES, to_pair
from modeling_ehm.modeling_ehm import EHMForPreTraining, evaluation_mode, patchify, unpatchify

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COARSE_NODES = 6  # a cut that stays the same throughout training, so that trees of different steps compare
MAX_IMAGES, MAX_POINTS = 4, 5  # rows and groups of columns of a gallery
MAX_ANSWERS = 8  # of `render_answers`
MAX_BYTES = 600_000  # a gallery is looked at in a browser, often on a model's page
DPI = 100  # of the layout below, which is in pixels
HIDDEN_GREY = 128

Snapshot = dict[str, np.ndarray]


@torch.no_grad()
def snapshot(
    model: EHMForPreTraining,
    pixel_values: Tensor,
    progress: float,
    mask_seed: Tensor,
    mean: float | Sequence[float],
    std: float | Sequence[float],
) -> Snapshot:
    """Record what the model makes of a few fixed images at this point of training.

    The mask comes from `model.evolve_mask`, as in training. Runs in evaluation mode, without gradient, and leaves the
    model's modes and timings and the random state as they were.

    Args:
        model: Unwrapped model (not the DDP or FSDP wrapper).
        pixel_values: `(B, C, H, W)`, normalised; moved to the model's device.
        progress: Finished fraction of pre-training, in [0, 1].
        mask_seed: `(B,)` int64; the same at each call, so that only tree and schedule change the masks.
        mean: Per channel, or one for all; what was subtracted from pixels in [0, 1].
        std: Per channel, or one for all; what they were divided by.

    Returns:
        "image": `(B, H, W, 3)` uint8; grey if there are fewer than 3 channels, the first three if there are more.
        "labels": `(B, N)` int64, node of each patch at the scheduled number of nodes, at least 2.
        "coarse_labels": `(B, N)` int64, the same for 6 nodes.
        "mask": `(B, N)` bool, True = masked.
        "reconstruction": `(B, H, W, 3)` uint8; visible patches are the image's own. If the model predicts normalised
            patches, the hidden ones are given the mean and variance of the true patch.
        "num_nodes", "softness", "progress", "norm_pix_loss", "mask_policy": scalars; "grid_size": `(2,)`.

    Raises:
        ValueError: pixels, seeds, mean or std that do not fit; `progress` outside [0, 1].
    """
    pixel_values = pixel_values.to(model.device)
    rows, columns = model.get_input_embeddings().grid_of(pixel_values)
    num_nodes, softness = model.mask_schedule(progress, rows * columns)
    num_nodes = min(max(2, num_nodes), rows * columns)
    timings, model.timings = model.timings, None  # pictures are no part of the cost of training
    with evaluation_mode(model):
        mask = model.evolve_mask(pixel_values, progress, mask_seed)  # (B, N)
        hierarchy = model.parse_hierarchy(pixel_values)
        logits = model(pixel_values, bool_masked_pos=mask, return_loss=False).logits
    model.timings = timings
    pixel_values = pixel_values.float()
    return {
        "image": _displayable(pixel_values, mean, std),
        "labels": hierarchy.cut(num_nodes).cpu().numpy(),
        "coarse_labels": hierarchy.cut(min(COARSE_NODES, rows * columns)).cpu().numpy(),
        "mask": mask.cpu().numpy(),
        "reconstruction": _displayable(_reconstruct(model, logits.float(), pixel_values, mask), mean, std),
        "num_nodes": np.array(num_nodes),
        "softness": np.array(float(softness)),
        "grid_size": np.array([rows, columns]),
        "progress": np.array(float(progress)),
        "norm_pix_loss": np.array(model.config.norm_pix_loss),
        "mask_policy": np.array(model.config.mask_policy),
    }


def _reconstruct(model: EHMForPreTraining, logits: Tensor, pixel_values: Tensor, mask: Tensor) -> Tensor:
    """`(B, C, H, W)`: predicted hidden patches among the true visible ones."""
    patch_size = to_pair(model.config.patch_size)
    truth = patchify(pixel_values, patch_size)  # (B, N, P*P*C)
    if model.config.norm_pix_loss:  # the inverse of the target's normalisation
        variance, mean = torch.var_mean(truth, dim=-1, keepdim=True)
        logits = logits * (variance + 1.0e-6).sqrt() + mean
    patches = torch.where(mask[..., None], logits, truth)
    return unpatchify(patches, patch_size, model.get_input_embeddings().grid_of(pixel_values))


def _displayable(pixel_values: Tensor, mean: float | Sequence[float], std: float | Sequence[float]) -> np.ndarray:
    """`(B, C, H, W)` normalised -> `(B, H, W, 3)` uint8."""
    channels = pixel_values.shape[1]
    mean, std = (_per_channel(name, value, channels) for name, value in (("mean", mean), ("std", std)))
    pixels = pixel_values.cpu() * std + mean
    pixels = pixels[:, :3] if channels >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> Tensor:
    numbers = torch.as_tensor(value, dtype=torch.float32).flatten()
    if len(numbers) not in (1, channels):
        raise ValueError(f"{name}={value} has {len(numbers)} numbers for {channels} channels; give 1 or {channels}")
    return numbers[:, None, None]


def save_snapshot(path: str | Path, snapshot: Snapshot) -> None:
    """Write a snapshot as a compressed `.npz` of plain arrays."""
    path = _npz(path)
    for name, value in snapshot.items():
        if np.asarray(value).dtype.hasobject:
            raise ValueError(f"snapshot[{name!r}] is an array of Python objects; plain numbers and strings are stored")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **snapshot)


def load_snapshot(path: str | Path) -> Snapshot:
    """Read what `save_snapshot` wrote; nothing is unpickled, so files of strangers are safe to open."""
    with np.load(_npz(path), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _npz(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"path={str(path)!r} must end in .npz")
    return path


def require_matplotlib() -> None:
    """Raise now, rather than when the first picture is due, if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "pictures are drawn with matplotlib, which is not installed: pip install modeling_ehm[viz], or set"
            " training.num_gallery_images=0. Recording (snapshot, save_snapshot) works without it"
        )


def _new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in pixels, on the Agg canvas."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


# The gallery


def render_gallery(snapshots: Sequence[tuple[int, float, Snapshot]], path: str | Path) -> Path:
    """Draw one PNG of how hierarchy, masks and reconstructions change while a model trains.

    A row is an image (the first 4); a group of three columns is a point of training (up to 5, spread evenly, the first
    and the last among them). At most 1600 pixels wide and 600 KB large.

    Args:
        snapshots: `(step, progress, snapshot)`, of the same images throughout.
        path: Of the PNG; its folder is made.

    Returns:
        The path.

    Raises:
        ValueError: no snapshots, or snapshots of different images.
        ImportError: matplotlib is not installed.
    """
    snapshots = sorted(snapshots, key=lambda entry: entry[0])
    if not snapshots:
        raise ValueError("snapshots is empty, so there is nothing to draw; record some with snapshot(...)")
    first = snapshots[0][2]
    for step, _, shot in snapshots[1:]:
        if not np.array_equal(shot["image"], first["image"]):
            raise ValueError(f"snapshots: the images of step {step} differ from those of step {snapshots[0][0]}")
    chosen = np.unique(np.linspace(0, len(snapshots) - 1, MAX_POINTS).round().astype(int))
    return _draw_gallery([snapshots[index] for index in chosen], Path(path))


def _draw_gallery(points: list[tuple[int, float, Snapshot]], path: Path) -> Path:
    """Lay out the gallery, in pixels from the top left corner."""
    first = points[0][2]
    num_rows = min(MAX_IMAGES, len(first["image"]))
    margin, gap, group_gap, header = 12, 4, 18, 66
    cell = min(220, (1600 - 2 * margin - len(points) * (group_gap + 2 * gap)) // (1 + 3 * len(points)))
    cell_height = round(cell * first["image"].shape[1] / first["image"].shape[2])
    group_width = 3 * cell + 2 * gap
    width = max(2 * margin + cell + len(points) * (group_gap + group_width), 760)
    letters = int((width - 2 * margin) / 6.7)  # pixels that one takes on average at size 12
    caption = [part for line in _caption(points) for part in textwrap.wrap(line, letters)]
    footer = 16 + 20 * len(caption)
    figure = _new_figure(width, height := header + num_rows * (cell_height + gap) + footer)

    def put(left: float, row: int) -> "Axes":
        top = header + row * (cell_height + gap)
        return figure.add_axes((left / width, 1 - (top + cell_height) / height, cell / width, cell_height / height))

    def write(x: float, y: float, text: str, size: float, **style) -> None:
        figure.text(x / width, 1 - y / height, text, fontsize=size * 72 / DPI, va="center", **style)

    write(margin + cell / 2, header - 10, "image", 11, ha="center", color="0.3")
    for row in range(num_rows):
        _show(put(margin, row), first["image"][row])
    for number, (step, progress, shot) in enumerate(points):
        left = margin + cell + group_gap + number * (group_width + group_gap)
        middle = left + group_width / 2
        write(middle, 16, f"step {step:,} ({progress:.0%})", 15, ha="center", weight="bold")
        write(middle, 36, _mask_title(shot), 13, ha="center")
        for column, title in enumerate(("hierarchy", "masked", "reconstruction")):
            write(left + column * (cell + gap) + cell / 2, header - 10, title, 11, ha="center", color="0.3")
        for row in range(num_rows):
            _show_hierarchy(put(left, row), shot, row)
            _show(put(left + cell + gap, row), _masked_image(shot, row))
            _show(put(left + 2 * (cell + gap), row), shot["reconstruction"][row])
    for number, line in enumerate(caption):
        write(margin, height - footer + 16 + 20 * number, line, 12, color="0.2")
    return _save_small(figure, path)


def _mask_title(shot: Snapshot) -> str:
    if str(shot["mask_policy"]) not in SCHEDULED_POLICIES:
        return f"{str(shot['mask_policy']).replace('_', ' ')} masks"
    num_nodes, num_patches = int(shot["num_nodes"]), shot["labels"].shape[1]
    return f"K = {num_nodes} nodes" + (" (each patch its own)" if num_nodes == num_patches else "")


def _caption(points: list[tuple[int, float, Snapshot]]) -> list[str]:
    coarse = int(points[0][2]["coarse_labels"].max()) + 1
    share = points[0][2]["mask"].mean()
    policy = str(points[0][2]["mask_policy"])
    if policy != "ehm":
        tree = f"hierarchy: the {coarse} nodes of the model's tree in their mean colours; the masks do not use it."
        how = "drawn at random" if policy == "random" else f"chosen by the policy {policy!r}"
        masked = f"masked: {share:.0%} of the patches, {how}, are hidden (grey)."
    else:
        tree = (
            f"hierarchy: which patches the model takes as belonging together. Colours and thick lines: {coarse} nodes;"
            " thin lines: the K nodes that masks are made of."
        )
        if any(shot["num_nodes"] < coarse for _, _, shot in points):
            tree += f" Where K is below {coarse}, its borders are some of the thick ones."
        masked = f"masked: {share:.0%} of the patches are hidden (grey), whole nodes at a time, at most one in part."
        if any(shot["softness"] > 0 for _, _, shot in points):
            masked = f"masked: {share:.0%} of the patches are hidden (grey): nodes, blurred by noise (softness)."
    predicted = "reconstruction: hidden patches as predicted, visible patches from the image."
    if bool(points[0][2]["norm_pix_loss"]):
        predicted += (
            " The model predicts patches of mean 0 and variance 1 (norm_pix_loss);"
            " each is shown with its true patch's mean and variance."
        )
    return [tree, masked, predicted]


def _show(axes: "Axes", image: np.ndarray) -> None:
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0), aspect="auto")
    axes.set_axis_off()


def _show_hierarchy(axes: "Axes", shot: Snapshot, row: int) -> None:
    """The coarse nodes in their mean colours with thick borders, the scheduled nodes within them with thin ones."""
    grid_size = tuple(shot["grid_size"])
    image, coarse, fine = (shot[name][row] for name in ("image", "coarse_labels", "labels"))
    _show(axes, _mean_colours(image, coarse, grid_size))
    thin, thick = [(1.1, (0, 0, 0, 0.2)), (0.5, (1, 1, 1, 0.6))], [(2.8, (0, 0, 0, 0.6)), (1.4, (1, 1, 1, 1))]
    for labels, strokes in ((fine, thin), (coarse, thick)):  # white with a dark seam shows on any colour
        _draw_borders(axes, labels.reshape(grid_size), image.shape[:2], strokes)


def _mean_colours(image: np.ndarray, labels: np.ndarray, grid_size: tuple[int, int]) -> np.ndarray:
    """`(H, W, 3)` uint8: each node in the mean colour of its pixels, with a little of the image left in it."""
    pixels = _per_pixel(labels, image.shape[:2], grid_size)  # (H, W)
    area = np.bincount(pixels.ravel())[:, None]
    colours = np.stack([np.bincount(pixels.ravel(), image[..., c].ravel()) for c in range(3)], -1) / area
    return (0.75 * colours[pixels] + 0.25 * image).round().astype(np.uint8)


def _masked_image(shot: Snapshot, row: int) -> np.ndarray:
    image = shot["image"][row]
    hidden = _per_pixel(shot["mask"][row], image.shape[:2], tuple(shot["grid_size"]))
    return np.where(hidden[..., None], np.uint8(HIDDEN_GREY), image)


def _per_pixel(values: np.ndarray, size: tuple[int, int], grid_size: tuple[int, int]) -> np.ndarray:
    """`(N,)` -> `(H, W)`."""
    (height, width), (rows, columns) = size, grid_size
    return np.kron(values.reshape(rows, columns), np.ones((height // rows, width // columns), values.dtype))


def _draw_borders(axes: "Axes", labels: np.ndarray, size: tuple[int, int], strokes: list[tuple[float, tuple]]) -> None:
    """Lines between side-by-side patches `(rows, columns)` of different nodes; a stroke is a width and a colour."""
    from matplotlib.collections import LineCollection

    patch_height, patch_width = size[0] / labels.shape[0], size[1] / labels.shape[1]
    across = np.argwhere(labels[:, 1:] != labels[:, :-1])
    along = np.argwhere(labels[1:] != labels[:-1])
    lines = [((c + 1, r), (c + 1, r + 1)) for r, c in across] + [((c, r + 1), (c + 1, r + 1)) for r, c in along]
    lines = [[(x * patch_width, y * patch_height) for x, y in line] for line in lines]
    for line_width, colour in strokes:
        axes.add_collection(LineCollection(lines, colors=[colour], linewidths=line_width, capstyle="projecting"))


def _save_small(figure: "Figure", path: Path) -> Path:
    """Write a PNG; one of few colours if it would be larger than `MAX_BYTES`."""
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    colours = 256
    while buffer.tell() > MAX_BYTES and colours >= 16:
        buffer = io.BytesIO()
        picture.quantize(colours).save(buffer, format="PNG", optimize=True)
        colours //= 2
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return path


# The curves

# Series in the order in which they are drawn, with what a reader needs to know of them.
CURVES = {
    "loss": "training loss (rises where masks get harder)",
    "eval_loss": "loss, final masks",
    "eval_knn": "k-NN accuracy",
    "eval_linear": "linear (ridge) accuracy",
    "eval_hierarchy_ari": "hierarchy: adjusted Rand index",
    "num_nodes": "nodes K that masks are made of",
    "mask_compactness": "compactness of the masks",
    "mask_region_size": "mean size of hidden regions (patches)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
}


def render_curves(
    histories: dict[str, list[dict]],
    path: str | Path,
    keys: Sequence[str] | None = None,
    references: dict[str, float] | None = None,
) -> Path:
    """Draw logged series against the step: one small diagram a series, one line a run.

    Args:
        histories: Name of the run -> its log, as in `trainer.state.log_history`: dicts with "step" and other numbers.
        path: Of the PNG; its folder is made.
        keys: Series to draw; those that no run has are left out. None: all of `CURVES`.
        references: Key -> a figure that needs no training (raw pixels, plain blocks); drawn as a dashed line.

    Returns:
        The path.

    Raises:
        ValueError: none of the series is in any of the logs.
        ImportError: matplotlib is not installed.
    """
    keys = list(CURVES) if keys is None else list(keys)
    series = {key: {name: _series(log, key) for name, log in histories.items()} for key in keys}
    series = {key: runs for key, runs in series.items() if any(len(steps) for steps, _ in runs.values())}
    if not series:
        there = sorted({key for log in histories.values() for entry in log for key in entry} - {"step", "epoch"})
        raise ValueError(f"keys={keys}: none of them is in histories, which hold {there}; pass some of these")
    return _draw_curves(series, list(histories), references or {}, Path(path))


def _series(log: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key; of a step logged twice (a resumed run) the later value."""
    points = {entry["step"]: float(entry[key]) for entry in log if "step" in entry and _is_number(entry.get(key))}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _draw_curves(series: dict[str, dict], names: list[str], references: dict[str, float], path: Path) -> Path:
    columns = min(4, len(series))
    rows = math.ceil(len(series) / columns)
    legend = 34 * math.ceil(len(names) / (2 * columns))
    figure = _new_figure(400 * columns, 290 * rows + legend)
    height = 290 * rows + legend
    grid = figure.subplots(rows, columns, squeeze=False)
    handles = {}
    for axes, (key, runs) in zip(grid.flat, series.items(), strict=False):
        marker = "o" if max(len(steps) for steps, _ in runs.values()) <= 25 else None
        for number, name in enumerate(names):
            steps, values = runs[name]
            (line,) = axes.plot(steps, values, color=f"C{number % 10}", marker=marker, markersize=3.5, label=name)
            handles[name] = line
        if key in references:
            label = "reference without training"
            handles[label] = axes.axhline(references[key], color="0.5", linestyle="--", linewidth=1.2)
        axes.set_title(CURVES.get(key, key), fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(series) :]:
        axes.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=2 * columns, fontsize=10, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - legend / height))
    return _save_small(figure, path)


# Segmentation


def render_segmentation(
    examples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    class_names: Sequence[str] | None,
    path: str | Path,
    ignore_index: int = 255,
    titles: tuple[str, str, str] = ("image", "truth", "prediction"),
) -> Path:
    """Draw images beside their true and predicted maps, one row an image, with the colours of the classes below.

    Args:
        examples: Image `(H, W, 3)` uint8, true and predicted map `(H, W)` of integers; sizes may differ between rows.
        class_names: Names of the classes 0, 1, ...; None leaves the legend out.
        path: Of the PNG; its folder is made.
        ignore_index: What the true map has where there is no class; shown white.
        titles: Of the columns.

    Returns:
        The path.

    Raises:
        ValueError: no examples.
        ImportError: matplotlib is not installed.
    """
    if not examples:
        raise ValueError("examples is empty, so there is nothing to draw; pass some images with their maps")
    cell, gap, header, line = 320, 4, 26, 20
    names_a_line = 6
    used = sorted({int(n) for _, *maps in examples for values in maps for n in np.unique(values)} - {ignore_index})
    heights = [round(cell * image.shape[0] / image.shape[1]) for image, _, _ in examples]
    used = used if class_names is not None else []
    footer = 12 + line * math.ceil(len(used) / names_a_line)
    width, height = 3 * cell + 4 * gap, header + sum(heights) + gap * len(heights) + footer
    figure = _new_figure(width, height)
    for column, title in enumerate(titles):
        x = (gap + column * (cell + gap) + cell / 2) / width
        figure.text(x, 1 - header / 2 / height, title, fontsize=9, ha="center", va="center", color="0.3")
    top = header
    for (image, true, predicted), row_height in zip(examples, heights, strict=True):
        for column, shown in enumerate((image, _class_colours(true, ignore_index), _class_colours(predicted))):
            left, bottom = (gap + column * (cell + gap)) / width, 1 - (top + row_height) / height
            _show(figure.add_axes((left, bottom, cell / width, row_height / height)), shown)
        top += row_height + gap
    for number, index in enumerate(used):
        x = (12 + (number % names_a_line) * (width - 12) / names_a_line) / width
        y = 1 - (top + 12 + line * (number // names_a_line)) / height
        colour = _class_colours(np.array([[index]]))[0, 0] / 255
        figure.text(x, y, "\u25a0", fontsize=11, va="center", color=colour)
        figure.text(x + 14 / width, y, class_names[index], fontsize=8, va="center", color="0.2")
    return _save_small(figure, Path(path))


def render_detection(
    examples: Sequence[tuple[np.ndarray, dict, dict]], class_names: Sequence[str], path: str | Path
) -> Path:
    """Draw images with their true boxes on the left and the found ones on the right, one row an image.

    Args:
        examples: Image `(H, W, 3)` uint8; its true objects, `boxes` `(n, 4)` left, top, right, bottom in pixels and
            `labels` `(n,)`; those found, with `scores` `(n,)` too.
        class_names: Names of the classes 0, 1, ...
        path: Of the PNG; its folder is made.

    Returns:
        The path.

    Raises:
        ValueError: no examples.
        ImportError: matplotlib is not installed.
    """
    if not examples:
        raise ValueError("examples is empty, so there is nothing to draw; pass some images with their boxes")
    cell, gap, header = 400, 4, 26
    heights = [round(cell * image.shape[0] / image.shape[1]) for image, _, _ in examples]
    width, height = 2 * cell + 3 * gap, header + sum(heights) + gap * len(heights)
    figure = _new_figure(width, height)
    for column, title in enumerate(("truth", "found")):
        x = (gap + column * (cell + gap) + cell / 2) / width
        figure.text(x, 1 - header / 2 / height, title, fontsize=9, ha="center", va="center", color="0.3")
    top = header
    for (image, *objects), row_height in zip(examples, heights, strict=True):
        for column, shown in enumerate(objects):
            left, bottom = (gap + column * (cell + gap)) / width, 1 - (top + row_height) / height
            axes = figure.add_axes((left, bottom, cell / width, row_height / height))
            _show(axes, image)
            axes.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0), autoscale_on=False)  # boxes may reach out
            for number, (box, label) in enumerate(zip(shown["boxes"], shown["labels"], strict=True)):
                x, y, right, below = (float(side) for side in box)
                colour = _class_colours(np.array([[int(label)]]))[0, 0] / 255
                axes.plot([x, right, right, x, x], [y, y, below, below, y], color=colour, linewidth=1.2)
                score = f" {shown['scores'][number]:.2f}" if "scores" in shown else ""
                axes.text(x + 1, y + 1, class_names[int(label)] + score, fontsize=5, color="white", va="top",
                          bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6})  # fmt: skip
        top += row_height + gap
    return _save_small(figure, Path(path))


def render_answers(examples: Sequence[tuple[Image.Image, str, str, str]], path: str | Path) -> Path:
    """Draw images with what was asked, what was answered, and what would have been right; two columns.

    Args:
        examples: Image; question; answer; reference.
        path: Of the PNG; its folder is made.

    Returns:
        The path.

    Raises:
        ValueError: no examples.
        ImportError: matplotlib is not installed.
    """
    if not examples:
        raise ValueError("examples is empty, so there is nothing to draw; pass some images with questions and answers")
    side, text_width, gap, columns = 128, 330, 10, 2
    rows = math.ceil(len(examples) / columns)
    width, height = columns * (side + text_width + 2 * gap) + gap, rows * (side + gap) + gap
    figure = _new_figure(width, height)
    for number, (image, question, answer, reference) in enumerate(examples):
        left = gap + (number % columns) * (side + text_width + 2 * gap)
        top = gap + (number // columns) * (side + gap)
        scale = side / max(image.size)
        shown = image.width * scale, image.height * scale
        axes = figure.add_axes(
            (left / width, 1 - (top + (side + shown[1]) / 2) / height, shown[0] / width, shown[1] / height)
        )
        _show(axes, np.asarray(image.convert("RGB")))
        lines = [textwrap.shorten(f"asked: {question}", 200), f"said: {answer}", f"truth: {reference}"]
        lines = ["".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines]  # fonts have no others
        text = "\n".join(textwrap.fill(line, 52, subsequent_indent="  ") for line in lines)
        x, y = (left + side + gap) / width, 1 - (top + side / 2) / height
        figure.text(x, y, text, fontsize=7, va="center", color="0.2", parse_math=False)
    return _save_small(figure, Path(path))


def _class_colours(labels: np.ndarray, ignore_index: int | None = None) -> np.ndarray:
    """`(H, W)` -> `(H, W, 3)` uint8: neighbouring numbers far apart on the colour circle; `ignore_index` is white."""
    hue = (labels * 0.618034) % 1  # multiples of the golden ratio spread evenly, however many there are
    brightness = np.where(labels % 2, 0.95, 0.7)
    offset = (hue[..., None] * 6 + np.array([5, 3, 1])) % 6  # HSV to RGB, saturation 0.75
    shade = brightness[..., None] * (1 - 0.75 * np.minimum(offset, 4 - offset).clip(0, 1))
    if ignore_index is not None:
        shade[labels == ignore_index] = 1
    return (255 * shade).round().astype(np.uint8)


__all__ = [
    "load_snapshot",
    "render_curves",
    "render_detection",
    "render_gallery",
    "render_segmentation",
    "require_matplotlib",
    "save_snapshot",
    "snapshot",
]
