"""Broken image files, thousands of them: an image comes out, or an error; nothing crashes, hangs or grows."""

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from tiny_recipes import encode, picture

from modeling_ehm.training.decoding import DECODERS, FORMATS, MODES, decode_image, size_of

MAX_PIXELS = 40_000
FUZZED = settings(
    max_examples=2500, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
SMALL = picture(90, 40, 30)
SEEDS = [
    encode(SMALL.convert(mode), name, **options)
    for name, mode, options in (
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("GIF", "P", {"save_all": True, "append_images": [SMALL.convert("P")]}),
        ("WEBP", "RGB", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "L", {"compression": "tiff_lzw"}),
        ("PPM", "RGB", {}),
        ("JPEG2000", "RGB", {}),
    )
]


@st.composite
def broken_files(draw):
    """A sound file with bytes changed, left out, doubled or cut off, mostly near its beginning."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        near = draw(st.booleans())
        place = draw(st.integers(0, min(len(content), 64 if near else len(content)) - 1))
        kind = draw(st.sampled_from(["change", "number", "remove", "repeat", "cut"]))
        if kind == "change":
            content[place] = draw(st.integers(0, 255))
        elif kind == "number":  # sizes of images, tables and strips
            content[place : place + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"]))
        elif kind == "remove":
            del content[place : place + draw(st.integers(1, 8))]
        elif kind == "repeat":
            content[place:place] = content[place : place + draw(st.integers(1, 64))]
        else:
            del content[max(1, place) :]
        if not content:
            content = bytearray(b"\0")
    return bytes(content)


def peak_memory() -> float:
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("decoder", DECODERS)
def test_broken_files_give_an_image_or_an_error(decoder):
    outcomes = {"image": 0, "error": 0}
    before = peak_memory()

    @FUZZED
    @given(broken_files(), st.sampled_from(list(MODES)))
    def decode(content, num_channels):
        try:
            image = DECODERS[decoder]({"bytes": content, "path": None}, num_channels, MAX_PIXELS)
        except Exception as error:
            outcomes["error"] += 1
            assert str(error) or type(error).__name__
            return
        outcomes["image"] += 1
        width, height = size_of(image)
        assert 0 < width * height <= MAX_PIXELS
        assert isinstance(image, np.ndarray) or image.mode == MODES[num_channels]

    decode()
    assert sum(outcomes.values()) >= 2000 and min(outcomes.values()) > 200, outcomes
    assert peak_memory() - before < 400


def test_a_bomb_is_refused_by_its_header():
    """PNGs that claim billions of pixels, which Pillow refuses, and as many as Pillow would take; data without end."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def png(width, height, data):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    before = peak_memory()
    for side, error, message in (
        (40_000, PILImage.DecompressionBombError, "could be decompression bomb"),
        (12_000, ValueError, "12000x12000 pixels exceed data.max_pixels=40000"),
    ):
        with pytest.raises(error, match=message):
            decode_image({"bytes": png(side, side, zlib.compress(bytes(10**7))), "path": None}, 3, MAX_PIXELS)
    small = png(100, 100, zlib.compress(bytes(200_000_000), 9))  # more data than its size needs
    decode_image({"bytes": small, "path": None}, 3, MAX_PIXELS)
    assert peak_memory() - before < 400


def test_other_formats_are_not_opened():
    """Pillow can write more formats than are read here; none of the others is."""
    refused = 0
    for name in sorted(PILImage.SAVE):
        if name in FORMATS or name == "MPO":
            continue
        file = io.BytesIO()
        try:
            SMALL.save(file, name)
            read_as = PILImage.open(io.BytesIO(file.getvalue())).format
        except Exception:  # some take no RGB, need a program, or can only be written
            continue
        if read_as in FORMATS:
            continue
        with pytest.raises(PILImage.UnidentifiedImageError):
            decode_image({"bytes": file.getvalue(), "path": None}, 3, MAX_PIXELS)
        refused += 1
    assert refused >= 5
