"""Time the way from encoded images to batches, on one core: crops of JPEGs against plain Pillow, and what streams cost.

    OMP_NUM_THREADS=1 python benchmarks/data.py docs/results/data

The images are made here: 500 x 375 pixels of 1/f noise, JPEG quality 90. Every way reads the same ones, takes the same
boxes of them, resizes these to 224 x 224 and hands on what goes to the device: plain Pillow with numpy as normalised
floats, ours as uint8; that the pixels are the same is checked before (not those of simplejpeg). Streams and stored
sets are read without decoding. Ways take turns; medians of process time.
Writes OUT_STEM.json and the tables into OUT_STEM.md, between two marks.
"""

import argparse
import datetime
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image
from downstream import machine, write_json, write_tables
from PIL import Image as PILImage

from modeling_ehm.training.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CropDraw,
    DataArguments,
    ImageSource,
    Normalizer,
    PretrainingImages,
    open_samples,
    stack_examples,
)

SIDE, BATCH = 224, 32


def make_jpeg(rng: np.random.Generator, width: int = 500, height: int = 375) -> bytes:
    """A picture whose amplitudes fall as those of photographs do."""
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width)))
    y, x = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
    frequency = np.hypot(x, y)
    frequency[0, 0] = 1
    values = np.fft.irfft2(spectrum / frequency, s=(height, width))
    values = (values - values.mean()) / values.std() * 50 + 128
    file = io.BytesIO()
    PILImage.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG", quality=90)
    return file.getvalue()


def plain_pillow(contents: list[bytes], draws: list[CropDraw]) -> list[torch.Tensor]:
    """What a transform of a few lines does: decode, crop, resize, mirror, normalise; batches."""
    batches, batch = [], []
    mean, std = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)
    for content, draw in zip(contents, draws, strict=True):
        image = PILImage.open(io.BytesIO(content)).convert("RGB")
        crop = image.crop(draw.box).resize((SIDE, SIDE), PILImage.Resampling.BICUBIC)
        if draw.mirrored:
            crop = crop.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
        values = (np.asarray(crop, dtype=np.float32) / 255 - mean) / std
        batch.append(torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1))))
        if len(batch) == BATCH:
            batches.append(torch.stack(batch))
            batch = []
    return batches


def images_of(path: Path, streaming: bool, decoder: str) -> PretrainingImages:
    source = ImageSource("parquet", data_files=str(path), streaming=streaming)
    data = DataArguments(source, decoder=decoder, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    samples = open_samples(source, 0, data.shuffle_window, (SIDE, SIDE))
    return PretrainingImages(samples, data, 0, (SIDE, SIDE), num_positions=2**20)


def read_batches(images: PretrainingImages, count: int) -> list[torch.Tensor]:
    starts = range(0, count, BATCH)
    return [
        stack_examples([images[position] for position in range(start, start + BATCH)])["pixel_values"]
        for start in starts
    ]


def check_same_pixels(ours: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    normalize = Normalizer(IMAGENET_MEAN, IMAGENET_STD)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(normalize(a), b, rtol=0, atol=1e-5)


def read_rows(images: PretrainingImages, positions: Iterator[int], count: int) -> None:
    """Encoded rows alone, at ever further positions: a stream that is asked to go back starts again."""
    for position in itertools.islice(positions, count):
        next(images.samples.candidates(position))


def medians(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            way()
            if number:
                seconds[name].append(time.process_time() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_stem", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=128, help="a multiple of 32")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    contents = [make_jpeg(rng) for _ in range(options.images)]
    count = options.images
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.parquet"
        rows = {"image": [{"bytes": content, "path": None} for content in contents]}
        Dataset.from_dict(rows, features=Features({"image": Image()})).to_parquet(str(path))
        stored, fast = (images_of(path, streaming=False, decoder=name) for name in ("pil", "simplejpeg"))
        streamed = images_of(path, streaming=True, decoder="pil")
        samples = [next(stored.samples.candidates(position)) for position in range(count)]
        in_order = [sample.columns["image"]["bytes"] for sample in samples]
        draws = [stored.draw_crop((500, 375), sample) for sample in samples]
        check_same_pixels(read_batches(stored, count), plain_pillow(in_order, draws))
        crops = {
            "plain Pillow": lambda: plain_pillow(in_order, draws),
            "ours": lambda: read_batches(stored, count),
            "ours, simplejpeg": lambda: read_batches(fast, count),
        }
        rows_only = {
            "stored set, encoded rows": partial(read_rows, stored, itertools.count(), count),
            "stream, encoded rows": partial(read_rows, streamed, itertools.count(), count),
        }
        seconds = medians(crops | rows_only, options.rounds)
        streamed.close()
    reference = seconds["plain Pillow"]
    results = {}
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(reference, own, strict=True))
        results[name] = {"microseconds": 1e6 * statistics.median(own) / count, "times_plain_pillow": ratio}
    lines = ["| way | microseconds an image | images a second and core | times plain Pillow |"]
    lines.append("| --- | --- | --- | --- |")
    for name, one in results.items():
        micro = one["microseconds"]
        lines.append(f"| {name} | {micro:.0f} | {1e6 / micro:.0f} | {one['times_plain_pillow']:.2f} |")
    write_json(options.out_stem.with_suffix(".json"), results, options)
    size = statistics.mean(map(len, contents)) / 1000
    text = f"{datetime.date.today()}; {machine()}; {count} images of {size:.0f} kB; {options.rounds} rounds.\n\n"
    text += "\n".join(lines) + "\n"
    write_tables(options.out_stem.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
