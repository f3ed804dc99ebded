"""A labelled image set made by formula: textured objects, built of parts, on textured grounds, with true segment maps.

Every image is a pure function of `(seed, index, image_size)`, so there is nothing to download or store, and every
picture shows the three levels that a hierarchy of cues should find: texture < part < object. The class is given by how
parts are put together, never by colour, texture or place: those are drawn anew for each image, which makes raw pixels a
weak feature (64 pixels: cosine k-NN on 2,000 training images finds 24 %, a small CNN trained on 4,000 finds 92 %).

Coordinates: x to the right, y down. Objects are described in a box [-1, 1] x [-1, 1]; images in half short sides from
their centre, so that one index shows the same scene at every size (only the pixel noise is drawn per size).
"""

import functools
import io
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

if TYPE_CHECKING:
    import datasets


class Part(NamedTuple):
    """One part of an object: the intersection of the shapes given. Parts are painted in the order of their table."""

    name: str
    material: int  # parts of one object with the same number share colour, texture and jitter
    ellipse: tuple[float, ...] | None = None  # centre x, centre y, radius x, radius y[, rotation in degrees]
    polygon: tuple[tuple[float, float], ...] | None = None  # corners, convex, either sense of rotation
    hole: tuple[float, ...] | None = None  # an ellipse that is cut out
    chance: float = 1.0  # probability of being there at all


def _box(left: float, top: float, right: float, bottom: float) -> tuple[tuple[float, float], ...]:
    return ((left, top), (right, top), (right, bottom), (left, bottom))


OBJECTS: dict[str, tuple[Part, ...]] = {
    "fish": (
        Part("tail", 0, polygon=((-0.35, 0), (-1, -0.55), (-1, 0.55))),
        Part("back fin", 0, polygon=((-0.3, -0.25), (-0.2, -0.75), (0.4, -0.3))),
        Part("body", 1, ellipse=(0.2, 0, 0.78, 0.46)),
        Part("band", 2, ellipse=(0.2, 0, 0.76, 0.44), polygon=_box(-0.2, -0.5, 0.08, 0.5), chance=0.6),
        Part("eye", 3, ellipse=(0.64, -0.1, 0.13, 0.13)),
    ),
    "house": (
        Part("chimney", 0, polygon=_box(0.35, -0.85, 0.6, -0.2), chance=0.5),
        Part("wall", 1, polygon=_box(-0.68, -0.15, 0.68, 0.9)),
        Part("roof", 2, polygon=((-0.95, -0.08), (0, -0.95), (0.95, -0.08))),
        Part("door", 3, polygon=_box(-0.45, 0.25, -0.08, 0.9)),
        Part("window", 4, polygon=_box(0.14, 0.1, 0.48, 0.45), chance=0.8),
    ),
    "tree": (
        Part("trunk", 0, polygon=_box(-0.15, 0.4, 0.15, 1)),
        Part("low branches", 1, polygon=((-0.75, 0.55), (0, -0.2), (0.75, 0.55))),
        Part("middle branches", 2, polygon=((-0.6, 0.12), (0, -0.6), (0.6, 0.12))),
        Part("top branches", 1, polygon=((-0.44, -0.34), (0, -1), (0.44, -0.34))),
    ),
    "car": (
        Part("cabin", 0, polygon=((-0.74, 0.1), (-0.4, -0.52), (0.28, -0.52), (0.66, 0.1))),
        Part("window", 1, polygon=((-0.46, -0.04), (-0.29, -0.4), (0.2, -0.4), (0.4, -0.04))),
        Part("body", 2, polygon=((-0.98, -0.02), (0.75, -0.02), (1, 0.14), (1, 0.42), (-0.98, 0.42))),
        Part("back wheel", 3, ellipse=(-0.55, 0.42, 0.25, 0.25)),
        Part("front wheel", 3, ellipse=(0.55, 0.42, 0.25, 0.25)),
    ),
    "cup": (
        Part("saucer", 0, ellipse=(0, 0.82, 0.9, 0.16), chance=0.5),
        Part("handle", 1, ellipse=(0.58, 0.05, 0.4, 0.42), hole=(0.58, 0.05, 0.2, 0.22)),
        Part("wall", 2, polygon=((-0.66, -0.6), (0.6, -0.6), (0.46, 0.8), (-0.5, 0.8))),
        Part("rim", 3, ellipse=(-0.03, -0.6, 0.63, 0.2)),
    ),
    "mushroom": (
        Part("stem", 0, polygon=((-0.2, -0.1), (0.2, -0.1), (0.3, 0.95), (-0.3, 0.95))),
        Part("cap", 1, ellipse=(0, 0, 0.95, 0.9), polygon=_box(-1, -1, 1, 0.06)),
        Part("left spot", 2, ellipse=(-0.5, -0.25, 0.16, 0.16)),
        Part("middle spot", 2, ellipse=(0.02, -0.55, 0.18, 0.18)),
        Part("right spot", 2, ellipse=(0.48, -0.22, 0.15, 0.15)),
    ),
    "key": (
        Part("shaft", 0, polygon=_box(-0.3, -0.12, 1, 0.12)),
        Part("inner tooth", 1, polygon=_box(0.42, 0.08, 0.6, 0.5)),
        Part("outer tooth", 1, polygon=_box(0.76, 0.08, 0.96, 0.42)),
        Part("bow", 2, ellipse=(-0.56, 0, 0.44, 0.5), hole=(-0.6, 0, 0.2, 0.24)),
    ),
    "face": (
        Part("left ear", 0, ellipse=(-0.74, 0, 0.2, 0.26)),
        Part("right ear", 0, ellipse=(0.74, 0, 0.2, 0.26)),
        Part("head", 1, ellipse=(0, 0.05, 0.74, 0.9)),
        Part("hair", 2, ellipse=(0, 0.03, 0.78, 0.95), polygon=_box(-1, -1, 1, -0.42), chance=0.8),
        Part("left eye", 3, ellipse=(-0.29, -0.1, 0.15, 0.13)),
        Part("right eye", 3, ellipse=(0.29, -0.1, 0.15, 0.13)),
        Part("mouth", 4, ellipse=(0, 0.38, 0.4, 0.3), polygon=_box(-0.5, 0.4, 0.5, 0.8)),
    ),
    "rocket": (
        Part("flame", 0, polygon=((-0.2, 0.5), (0.2, 0.5), (0, 1.05)), chance=0.7),
        Part("left fin", 1, polygon=((-0.2, 0.05), (-0.68, 0.72), (-0.2, 0.58))),
        Part("right fin", 1, polygon=((0.2, 0.05), (0.68, 0.72), (0.2, 0.58))),
        Part("hull", 2, polygon=_box(-0.3, -0.45, 0.3, 0.62)),
        Part("nose", 3, polygon=((-0.31, -0.42), (0, -1), (0.31, -0.42))),
        Part("porthole", 4, ellipse=(0, -0.12, 0.17, 0.17)),
    ),
    "bird": (
        Part("legs", 0, polygon=_box(-0.08, 0.3, 0.06, 0.95)),
        Part("tail", 1, polygon=((-0.35, 0.05), (-1, -0.2), (-1, 0.25))),
        Part("beak", 2, polygon=((0.7, -0.55), (1.05, -0.36), (0.7, -0.2))),
        Part("body", 3, ellipse=(-0.05, 0.15, 0.62, 0.4, -15)),
        Part("head", 4, ellipse=(0.5, -0.38, 0.32, 0.32)),
        Part("wing", 1, ellipse=(-0.16, 0.1, 0.4, 0.2, 25)),
        Part("eye", 0, ellipse=(0.58, -0.43, 0.1, 0.1)),
    ),
}
CLASS_NAMES: tuple[str, ...] = tuple(OBJECTS)
MIN_SIDE = 16  # pixels; below, eyes and wheels are lost


def _warp(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """An irregular field without a grid: waves bent by waves. In [-1, 1]."""
    return (np.sin(0.9 * u + 2 * np.sin(0.53 * v)) + np.sin(0.8 * v + 2 * np.sin(0.47 * u + 1))) / 2


# Pattern of a texture, about [-1, 1], over coordinates u, v (H, W) that advance by 2 pi with each repeat.
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "gradient": lambda u, v: u / 12,
    "stripes": lambda u, v: np.sin(u),
    "checks": lambda u, v: np.sin(u) * np.sin(v) * 1.5,
    "dots": lambda u, v: np.cos(u) + np.cos(v) - 0.6,
    "net": lambda u, v: 0.8 - np.maximum(np.cos(u), np.cos(v)) * 1.6,
    "zigzag": lambda u, v: np.sin(u + np.abs(v % 6 - 3)),
    "rings": lambda u, v: np.sin(np.sqrt(u * u + v * v)),
    "marble": lambda u, v: np.sin(u + 2.5 * _warp(0.6 * u, 0.6 * v)),
    "blobs": lambda u, v: 2 * _warp(u, v),
    "grain": lambda u, v: _warp(2 * u + np.sin(3 * v), 2 * v + np.sin(3 * u)),
}
_TEXTURES = tuple(TEXTURES.values())


def _generator(seed: int, number: int, stream: int) -> np.random.Generator:
    """Independent random numbers for each `(seed, number)`; `stream` keeps draws for labels and pictures apart."""
    key = np.array([seed, number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))


def _label(seed: int, index: int) -> int:
    """Class of an image. Each run of ten indices, from a multiple of ten, holds every class once, in a random order."""
    block, position = divmod(index, len(CLASS_NAMES))
    return int(_generator(seed, block, stream=1).permutation(len(CLASS_NAMES))[position])


def _linear(forms: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values (..., H, W) of a x + b y + c on the pixel grid, for forms (..., 3) of a, b, c."""
    forms = forms.astype(np.float32)[..., None, None, :]
    return forms[..., 0] * x + (forms[..., 1] * y[:, None] + forms[..., 2])


def _pixel_grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres, x (W,) and y (H,), in half short sides from the middle of the image."""
    unit = 2 / min(height, width)
    x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) * unit
    y = (np.arange(height, dtype=np.float32) + 0.5 - height / 2) * unit
    return x, y


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _random_pose(rng: np.random.Generator, half_size: np.ndarray) -> np.ndarray:
    """Affine map (3, 3) from object to image coordinates: mirror, stretch, shear, rotation, scale and place.

    `half_size`: (width, height) in short sides. The object may touch the border but keeps its middle inside.
    """
    scale, stretch, shear, angle, mirror, *place = rng.uniform(-1, 1, 7)
    shape = np.array([[1.0, 0.15 * shear], [0.0, 1.0]]) * [np.exp(0.15 * stretch), np.exp(-0.15 * stretch)]
    shape = shape * [1 if mirror > 0 else -1, 1]
    shape = (0.75 + 0.19 * scale) * _rotation(np.radians(40) * angle) @ shape
    room = np.maximum(half_size - 0.8 * np.abs(shape).sum(1), 0.1)
    pose = np.eye(3)
    pose[:2, :2], pose[:2, 2] = shape, place * room
    return pose


def _random_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Colours (count, 3) in [0, 1], the farthest of twelve from the ground's (row 0) and from the others."""
    candidates = rng.uniform(0.06, 0.94, (count, 12, 3))
    colours = candidates[:, 0].copy()
    for row in range(1, count):
        distance = np.linalg.norm(candidates[row][:, None] - colours[:row], axis=-1)  # (12, row)
        distance[:, 1:] *= 1.5  # the ground counts most: parts may be nearer to each other than to it
        colours[row] = candidates[row][distance.min(1).argmax()]
    return colours


def _random_textures(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pattern number (count,), forms of u and v (count, 2, 3), sharpness (count,) and tint (count, 3)."""
    pattern = rng.integers(len(_TEXTURES), size=count)
    frequency, angle, ratio, phase_u, phase_v, sharpness, contrast = rng.uniform(0, 1, (7, count))
    frequency = np.pi * 3 * 3**frequency  # 3 to 9 repeats along the short side
    ratio = 0.7 * 2**ratio
    angle = 2 * np.pi * angle
    u = np.stack([np.cos(angle) * frequency, np.sin(angle) * frequency, 20 * (phase_u - 0.5)], -1)
    v = np.stack([-np.sin(angle) * frequency * ratio, np.cos(angle) * frequency * ratio, 20 * (phase_v - 0.5)], -1)
    tint = 1 + 0.8 * rng.normal(size=(count, 3))  # mostly a change of brightness
    tint *= (0.1 + 0.14 * contrast[:, None]) / np.linalg.norm(tint, axis=-1, keepdims=True)
    return pattern, np.stack([u, v], 1), 1 + 3 * sharpness, tint


@functools.cache
def _half_planes(polygon: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Forms (edges, 3) of the signed distance to each edge, negative inside."""
    corners = np.array(polygon)
    edge = np.roll(corners, -1, axis=0) - corners
    normal = np.stack([edge[:, 1], -edge[:, 0]], -1) / np.linalg.norm(edge, axis=-1, keepdims=True)
    offset = -(normal * corners).sum(-1)
    inward = np.sign(normal @ corners.mean(0) + offset)
    return np.column_stack([normal, offset]) * -inward[:, None]


@functools.cache
def _unit_circle(ellipse: tuple[float, ...]) -> np.ndarray:
    """Forms (2, 3) that map the ellipse to the unit circle."""
    x, y, radius_x, radius_y, *angle = ellipse
    turn = _rotation(-np.radians(sum(angle)))
    return np.column_stack([turn, -turn @ [x, y]]) / np.array([[radius_x], [radius_y]])


def _ellipse_distance(ellipse: tuple[float, ...], to_part: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    u, v = _linear(_unit_circle(ellipse) @ to_part, x, y)
    return (np.sqrt(u * u + v * v) - 1) * np.float32(np.sqrt(ellipse[2] * ellipse[3]))


def _part_distance(part: Part, to_part: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (H, W) to the outline in part coordinates, negative inside; `to_part` (3, 3) maps the image."""
    distances = []
    if part.ellipse:
        distances.append(_ellipse_distance(part.ellipse, to_part, x, y))
    if part.polygon:
        distances.append(_linear(_half_planes(part.polygon) @ to_part, x, y).max(0))
    if part.hole:
        distances.append(-_ellipse_distance(part.hole, to_part, x, y))
    return functools.reduce(np.maximum, distances)


def _part_centre(part: Part) -> np.ndarray:
    return np.mean(part.polygon, axis=0) if part.ellipse is None else np.array(part.ellipse[:2])


def _part_outlines(
    rng: np.random.Generator, parts: tuple[Part, ...], x: np.ndarray, y: np.ndarray
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield `(number, material, distance)` of the parts that are there; distance (H, W) in pixels, negative inside."""
    half_size = np.array([len(x), len(y)]) / min(len(x), len(y))
    pose = _random_pose(rng, half_size)
    to_object = np.linalg.inv(pose)
    pixels = np.sqrt(abs(pose[0, 0] * pose[1, 1] - pose[0, 1] * pose[1, 0])) / (x[1] - x[0])  # in one object unit
    draws = rng.uniform(size=len(parts))
    jitter = rng.uniform(-1, 1, (len(parts), 3))
    for number, (part, draw) in enumerate(zip(parts, draws, strict=True), start=1):
        if draw >= part.chance:
            continue
        scale, shift = 1 + 0.14 * jitter[part.material, 0], 0.04 * jitter[part.material, 1:]
        to_part = to_object.copy()  # object = centre + scale * (part - centre) + shift, solved for part
        to_part[:2] /= scale
        to_part[:2, 2] += _part_centre(part) * (1 - 1 / scale) - shift / scale
        yield number, part.material, _part_distance(part, to_part, x, y) * np.float32(pixels * scale)


def _paint(texture: tuple, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A texture over the whole image, (3, H, W) float32: `colour` +- `tint`."""
    pattern, forms, sharpness, tint, colour = texture
    u, v = _linear(forms, x, y)
    field = np.clip(_TEXTURES[pattern](u, v) * np.float32(sharpness), -1, 1)
    return colour.astype(np.float32)[:, None, None] + tint.astype(np.float32)[:, None, None] * field


def _light_and_noise(rng: np.random.Generator, image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Add a slope of brightness, up to +-30 % at the borders, and noise of 0.5 to 3 %; (3, H, W) -> uint8 (H, W, 3)."""
    angle, strength, sigma = rng.uniform(0, 1, 3)
    slope = 0.3 * strength * np.array([np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)])
    image = image * _linear(np.append(slope, 1.0), x, y)
    image += np.float32(0.005 + 0.025 * sigma) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.ascontiguousarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def _draw(rng: np.random.Generator, parts: tuple[Part, ...], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 (H, W, 3) and segments int64 (H, W)."""
    x, y = _pixel_grid(height, width)
    materials = 1 + max(part.material for part in parts) + 1  # the ground's is number 0
    colours = _random_colours(rng, materials)
    textures = list(zip(*_random_textures(rng, materials), colours, strict=True))
    painted = functools.cache(lambda material: _paint(textures[material], x, y))
    image = painted(0).copy()
    segments = np.zeros((height, width), dtype=np.int64)
    for number, material, distance in _part_outlines(rng, parts, x, y):
        image += np.clip(0.5 - distance, 0, 1) * (painted(1 + material) - image)
        segments[distance < 0] = number
    return _light_and_noise(rng, image, x, y), segments


def _as_count(name: str, value: int, least: int = 0) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not least <= number < 2**64:
        raise ValueError(f"{name}={value!r} is not an integer in [{least}, 2**64); pass a plain non-negative int")
    return number


def _as_height_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(sides) != 2 or not all(isinstance(side, int | np.integer) and side >= MIN_SIDE for side in sides):
        raise ValueError(
            f"image_size={image_size!r} is not an int or a (height, width) pair of ints, each at least {MIN_SIDE}; "
            f"pass for instance 64 or (48, 80)"
        )
    return int(sides[0]), int(sides[1])


def synthetic_example(index: int, image_size: int | tuple[int, int] = 64, seed: int = 0) -> dict:
    """Image number `index` of the set that `seed` names: a pure function of its arguments.

    Bytes repeat exactly on one kind of machine with one numpy; across kinds, rounding may move a pixel value by one.

    Args:
        index: Which image, in [0, 2**64).
        image_size: Side in pixels, or (height, width), each at least 16. One index is one scene, finer at larger sizes.
        seed: Which set, in [0, 2**64).

    Returns:
        `image` uint8 (H, W, 3), RGB; `label` int, into `CLASS_NAMES`; `segments` int64 (H, W), 0 = ground, otherwise
        1 + row of the part in `OBJECTS[class]` (absent or hidden parts leave gaps in the numbers); `object` int64
        (H, W), 0 = ground, 1 = object.

    Raises:
        ValueError: `index`, `image_size` or `seed` is out of range.
    """
    index, seed = _as_count("index", index), _as_count("seed", seed)
    height, width = _as_height_width(image_size)
    label = _label(seed, index)
    parts = OBJECTS[CLASS_NAMES[label]]
    image, segments = _draw(_generator(seed, index, stream=0), parts, height, width)
    return {"image": image, "label": label, "segments": segments, "object": (segments > 0).astype(np.int64)}


def _pil_example(index: int, image_size: int | tuple[int, int], seed: int) -> dict:
    example = synthetic_example(index, image_size, seed)
    return {"image": Image.fromarray(example["image"]), "label": example["label"], "segments": example["segments"]}


class SyntheticImages(Dataset):
    """Images `first_index` to `first_index + num_images - 1` of the set, by number.

    Items are `{"image": PIL.Image RGB, "label": int, "segments": int64 (H, W)}`, see `synthetic_example`. For a test
    split take the indices after the training ones, or another seed.

    Args:
        num_images: How many, at least 1.
        image_size: Side in pixels, or (height, width).
        seed: Which set.
        first_index: Number of the first image.

    Raises:
        ValueError: An argument is out of range.
        IndexError: An item outside [0, num_images) is asked for.
    """

    class_names = CLASS_NAMES

    def __init__(self, num_images: int, image_size: int | tuple[int, int] = 64, seed: int = 0, first_index: int = 0):
        self.num_images = _as_count("num_images", num_images, least=1)
        self.image_size = _as_height_width(image_size)
        self.seed = _as_count("seed", seed)
        self.first_index = _as_count("first_index", first_index)

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.num_images:
            raise IndexError(f"i={i} is not in [0, num_images={self.num_images}); count from 0, or make a larger set")
        return _pil_example(self.first_index + operator.index(i), self.image_size, self.seed)


class SyntheticImageStream(IterableDataset):
    """The images of `SyntheticImages` in order, endlessly if `num_images` is None.

    Each of the W workers of a DataLoader makes every W-th image, so that all together make each image once. Processes
    of a distributed run are not told apart here: the Trainer's DataLoader (Accelerate's) does that by itself.

    Args and errors: as for `SyntheticImages`.
    """

    class_names = CLASS_NAMES

    def __init__(
        self,
        num_images: int | None = None,
        image_size: int | tuple[int, int] = 64,
        seed: int = 0,
        first_index: int = 0,
    ):
        self.num_images = None if num_images is None else _as_count("num_images", num_images, least=1)
        self.image_size = _as_height_width(image_size)
        self.seed = _as_count("seed", seed)
        self.first_index = _as_count("first_index", first_index)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        numbers = itertools.count(start, step) if self.num_images is None else range(start, self.num_images, step)
        for number in numbers:
            yield _pil_example(self.first_index + number, self.image_size, self.seed)


def _png(pixels: np.ndarray) -> dict:
    """`pixels` uint8 (H, W) or (H, W, 3) as a PNG file, in the form in which a `datasets.Image` column stores it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def _encoded_examples(starts: list[int], stops: list[int], image_size: tuple[int, int], seed: int) -> Iterator[dict]:
    """Rows for `datasets`: the indices of each [start, stop) in turn. The two lists are what `datasets` shards by."""
    for start, stop in zip(starts, stops, strict=True):
        for index in range(start, stop):
            example = synthetic_example(index, image_size, seed)
            segments = _png(example["segments"].astype(np.uint8))
            yield {"image": _png(example["image"]), "label": example["label"], "segments": segments}


def _hf_features() -> "datasets.Features":
    import datasets  # here, so that the generator itself needs numpy, PIL and torch only

    label = datasets.ClassLabel(names=list(CLASS_NAMES))
    return datasets.Features({"image": datasets.Image(), "label": label, "segments": datasets.Image()})


def as_hf_dataset(
    num_images: int, image_size: int | tuple[int, int] = 64, seed: int = 0, first_index: int = 0
) -> "datasets.Dataset":
    """The images of `SyntheticImages` as a `datasets.Dataset` in memory (about 10 KB an image at 64 pixels).

    Not in the `datasets` cache on disk: a cached set would outlive a change of this file. For many images take
    `as_hf_iterable`.

    Returns:
        Columns `image` (PNG, RGB), `label` (ClassLabel) and `segments` (PNG of mode L, pixel value = segment number).

    Raises:
        ValueError: An argument is out of range.
    """
    import datasets

    images = SyntheticImages(num_images, image_size, seed, first_index)  # checks the arguments
    stop = images.first_index + images.num_images
    rows = _encoded_examples([images.first_index], [stop], images.image_size, images.seed)
    return datasets.Dataset.from_list(list(rows), features=_hf_features())


def as_hf_iterable(
    num_images: int,
    image_size: int | tuple[int, int] = 64,
    seed: int = 0,
    first_index: int = 0,
    num_shards: int = 16,
) -> "datasets.IterableDataset":
    """The images of `SyntheticImages` as a `datasets.IterableDataset`, made on the fly, in order; see `as_hf_dataset`.

    Args:
        num_images, image_size, seed, first_index: As for `SyntheticImages`.
        num_shards: Runs of consecutive images that workers and processes share out; more workers than that stay idle.

    Raises:
        ValueError: An argument is out of range.
    """
    import datasets

    images = SyntheticImages(num_images, image_size, seed, first_index)  # checks the arguments
    num_shards = min(_as_count("num_shards", num_shards, least=1), images.num_images)
    cuts = [images.first_index + images.num_images * shard // num_shards for shard in range(num_shards + 1)]
    shards = {"starts": cuts[:-1], "stops": cuts[1:], "image_size": images.image_size, "seed": images.seed}
    return datasets.IterableDataset.from_generator(_encoded_examples, features=_hf_features(), gen_kwargs=shards)
