"""The faster decoder: the pixels of plain JPEGs, Pillow for all else, and the same refusals."""

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from tiny_recipes import encode, picture, write_parquet

from modeling_ehm.training import decoding
from modeling_ehm.training.data import DataArguments, ImageSource, PretrainingImages, open_samples
from modeling_ehm.training.decoding import decode_image, decode_jpeg, resized_crop, size_of


def smooth(width: int = 60, height: int = 40) -> PILImage.Image:
    """Colours that rise to the right, downwards and to the left."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return PILImage.fromarray((np.stack([x, y, 1 - x], axis=2) * 255).astype(np.uint8))


def row_of(content: bytes) -> dict:
    return {"bytes": content, "path": None}


def turned(image: PILImage.Image) -> bytes:
    exif = PILImage.Exif()
    exif[decoding.ORIENTATION] = 6
    return encode(image, "JPEG", exif=exif)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_plain_jpegs_are_as_pillow_has_them(options):
    """The same image within two levels, as an array."""
    for image in (smooth(), smooth().convert("L"), smooth(61, 37)):
        content = encode(image, "JPEG", **options)
        fast, slow = decode_jpeg(row_of(content), 3, 10_000), np.asarray(decode_image(row_of(content), 3, 10_000))
        assert isinstance(fast, np.ndarray) and fast.shape == slow.shape and size_of(fast) == image.size
        assert np.abs(fast.astype(int) - slow).mean() < 2


@pytest.mark.parametrize(
    ("content", "num_channels"),
    [
        (turned(smooth()), 3),
        (encode(smooth().convert("CMYK"), "JPEG"), 3),
        (encode(smooth(), "PNG"), 3),
        (encode(smooth(), "JPEG"), 1),
        (encode(smooth(), "JPEG"), 4),
    ],
    ids=["turned", "cmyk", "png", "one channel", "four channels"],
)
def test_all_else_is_pillows(content, num_channels):
    fast, slow = (decode(row_of(content), num_channels, 10_000) for decode in (decode_jpeg, decode_image))
    assert isinstance(fast, PILImage.Image) and fast.mode == slow.mode
    assert np.array_equal(np.asarray(fast), np.asarray(slow))


def test_what_has_no_range_is_refused_and_sixteen_bits_are_scaled():
    """Whole numbers of 32 bits may be anything; a grey map of 16 bits, in PNG or PGM, goes from 0 to 65,535."""
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    sixteen = PILImage.fromarray(ramp.astype(np.uint16))
    for content in (encode(sixteen), encode(sixteen, "TIFF"), encode(sixteen, "PPM")):
        found = np.asarray(decode_image(row_of(content), 1, 10_000))
        assert np.array_equal(found, ramp.astype(np.uint16) // 257)
    for kind, told in ((np.int32, "32-bit"), (np.float32, "floating point")):
        with pytest.raises(ValueError, match=f"{told} pixels have no range"):
            decode_image(row_of(encode(PILImage.fromarray(ramp.astype(kind)), "TIFF")), 1, 10_000)


def test_what_is_refused_is_refused_by_both():
    content = encode(picture(0, 64, 64), "JPEG")
    for decode in (decode_image, decode_jpeg):
        with pytest.raises((OSError, ValueError)):
            decode(row_of(content[: len(content) // 2]), 3, 10_000)
        with pytest.raises(ValueError, match="64x64 pixels exceed data.max_pixels=99"):
            decode(row_of(content), 3, 99)
        with pytest.raises(ValueError, match="the row holds no image"):
            decode(None, 3, 10_000)
        with pytest.raises(OSError):
            decode(row_of(b"\xff\xd8 no image"), 3, 10_000)


def test_a_path_is_read(tmp_path):
    smooth().save(tmp_path / "picture.jpg")
    fast = decode_jpeg({"bytes": None, "path": str(tmp_path / "picture.jpg")}, 3, 10_000)
    assert isinstance(fast, np.ndarray) and fast.shape == (40, 60, 3)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [(16, 20), (32, 8), (90, 100)])
def test_crops_lie_where_pillows_lie(size, mirrored):
    """Smooth colours: the same within three levels wherever the box lies, larger or smaller than before."""
    image = smooth()
    for box in ((0, 0, 60, 40), (5, 3, 25, 33), (40, 0, 60, 10)):
        ours = resized_crop(np.asarray(image), box, size, mirrored)
        pillows = resized_crop(image, box, size, mirrored)
        assert ours.dtype == torch.uint8 and ours.shape == pillows.shape == (3, *size)
        assert (ours.int() - pillows.int()).abs().max() <= 3


def test_a_recipe_decides_who_decodes(tmp_path):
    """The same box and seed of the mask; other pixels than Pillow's, but nearly."""
    path = write_parquet(tmp_path / "images.parquet", [encode(smooth(), "JPEG")])
    source, examples = ImageSource("parquet", data_files=path), {}
    for decoder in ("pil", "simplejpeg"):
        samples = open_samples(source, 0, 1, (32, 32))
        images = PretrainingImages(samples, DataArguments(source, decoder=decoder), 0, (32, 32))
        examples[decoder] = images[0]
    slow, fast = examples["pil"], examples["simplejpeg"]
    assert fast["mask_seed"] == slow["mask_seed"]
    difference = (fast["pixel_values"].int() - slow["pixel_values"].int()).abs()
    assert 0 < difference.max() <= 8


def test_settings():
    assert DataArguments(ImageSource("parquet"), decoder="simplejpeg").decoder == "simplejpeg"
    with pytest.raises(ValueError, match="data.decoder='turbo' is not one of pil, simplejpeg"):
        DataArguments(ImageSource("parquet"), decoder="turbo")


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(decoding.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs simplejpeg and cv2: pip install modeling_ehm\[decode\], or take"):
        decoding.check_decoder("simplejpeg")
    decoding.check_decoder("pil")
