"""Encoded images -> pixels, by Pillow or, for plain JPEGs, by faster libraries."""

import contextlib
import importlib.util
import io
import time
import traceback
import warnings

import fsspec
import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")  # multi-picture JPEGs open as JPEG
READ_PAUSES = (1, 5, 30)  # seconds before what the network has broken off is read again
ORIENTATION = 0x0112  # of EXIF; 1 is upright
Pixels = PILImage.Image | np.ndarray  # an array is (H, W, 3) uint8


def decode_image(encoded: dict, num_channels: int, max_pixels: int) -> PILImage.Image:
    """Decode `{"bytes", "path"}` into an upright PIL image with 1 (L), 3 (RGB) or 4 (RGBA) channels.

    Sixteen-bit images are scaled to eight bits (transformers' image processors clip them instead), EXIF orientation is
    applied, of animations the first frame is taken.

    Raises:
        ValueError: more than `max_pixels` pixels, or a number of channels that image files do not have.
        OSError, SyntaxError, ...: whatever Pillow raises on broken files.
    """
    if num_channels not in MODES:
        raise ValueError(f"num_channels={num_channels}: image files have 1, 3 or 4; for others write a torch dataset")
    image = open_image(content_of(encoded), max_pixels)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)  # otherwise an upright image is copied
    if image.mode == "F" or image.mode == "I" and image.format != "PPM":  # whose own range Pillow scales to 16 bits
        kind = "floating point" if image.mode == "F" else "32-bit"
        raise ValueError(f"{kind} pixels have no range that would say what is black and what is white")
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
        image = PILImage.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image if image.mode == MODES[num_channels] else image.convert(MODES[num_channels])


def content_of(encoded: dict | None) -> bytes:
    """The bytes of `{"bytes", "path"}`; what has none is read from its path.

    Raises:
        ValueError: there is no image.
    """
    if encoded is None:
        raise ValueError("the row holds no image")
    if encoded["bytes"] is not None:
        return encoded["bytes"]
    return read_path(encoded["path"])


def read_path(path: str) -> bytes:
    """Content of a file, also inside archives and behind URLs, where a read that fails is tried again."""
    for pause in (*READ_PAUSES, None):
        try:
            with fsspec.open(path, "rb") as file:
                return file.read()
        except Exception as error:
            may_pass = "://" in path and is_of_network(error) and not isinstance(error, FileNotFoundError)
            if pause is None or not may_pass:
                raise
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def is_of_network(error: Exception) -> bool:
    """Whether an error may be gone when the same is read again, unlike one of a file's content."""
    from_client = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "aiohttp", "requests")
    # pyarrow calls what it cannot parse an OSError too; one of reading passes through it from the file's own frames.
    frames = traceback.extract_tb(error.__traceback__)
    unparsed = type(error) is OSError and error.errno is None and bool(frames) and "pyarrow" in frames[-1].filename
    return from_client or isinstance(error, OSError) and not unparsed


def open_image(content: bytes, max_pixels: int) -> PILImage.Image:
    """An image whose header alone is read.

    Raises:
        ValueError: more than `max_pixels` pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)  # max_pixels decides
        image = PILImage.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width}x{image.height} pixels exceed data.max_pixels={max_pixels}")
    return image


def decode_jpeg(encoded: dict, num_channels: int, max_pixels: int) -> Pixels:
    """Sound, upright grey or colour JPEGs as an array, by simplejpeg, for 3 channels; anything else as `decode_image`.

    So what is refused, and why, is what Pillow refuses.
    """
    content = content_of(encoded)
    if num_channels == 3 and content.startswith(b"\xff\xd8"):
        image = open_image(content, max_pixels)
        if image.format == "JPEG" and image.mode in ("L", "RGB") and image.getexif().get(ORIENTATION, 1) == 1:
            import simplejpeg

            with contextlib.suppress(ValueError):  # of small faults too, such as stray bytes
                return simplejpeg.decode_jpeg(content, colorspace="RGB")
    return decode_image({"bytes": content, "path": None}, num_channels, max_pixels)


DECODERS = {"pil": decode_image, "simplejpeg": decode_jpeg}


def check_decoder(name: str) -> None:
    """Raise a ValueError unless the decoder is known and what it needs is installed."""
    if name not in DECODERS:
        raise ValueError(f"data.decoder={name!r} is not one of {', '.join(DECODERS)}")
    missing = [module for module in ("simplejpeg", "cv2") if importlib.util.find_spec(module) is None]
    if name == "simplejpeg" and missing:
        raise ValueError(
            f"data.decoder={name!r} needs {' and '.join(missing)}: pip install modeling_ehm[decode], or take 'pil'"
        )


def size_of(image: Pixels) -> tuple[int, int]:
    """(width, height) in pixels."""
    return image.shape[1::-1] if isinstance(image, np.ndarray) else image.size


def resized_crop(image: Pixels, box: tuple[int, int, int, int], size: tuple[int, int], mirrored: bool) -> Tensor:
    """A box of an image at another size, mirrored or not: `(C, H, W)` uint8.

    Pillow's bicubic looks at all pixels that fall into one; OpenCV's, of an array, at 4 x 4 of them, so that fine
    patterns of crops that shrink much may alias.

    Args:
        image: Of Pillow, or `(H, W, 3)` uint8.
        box: (left, top, right, bottom) in pixels.
        size: (height, width) of the result.
        mirrored: Left and right change places.
    """
    if isinstance(image, np.ndarray):
        import cv2

        left, top, right, bottom = box
        crop = cv2.resize(image[top:bottom, left:right], size[::-1], interpolation=cv2.INTER_CUBIC)
        crop = crop[:, ::-1] if mirrored else crop
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))
    crop = image.crop(box).resize(size[::-1], PILImage.Resampling.BICUBIC)
    return to_uint8_tensor(crop.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT) if mirrored else crop)


def to_uint8_tensor(image: PILImage.Image) -> Tensor:
    """`(C, H, W)` uint8."""
    array = np.asarray(image)
    return torch.from_numpy(np.array(array[None] if array.ndim == 2 else array.transpose(2, 0, 1), order="C"))
