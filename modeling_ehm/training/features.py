"""Features of frozen encoders: computed once with a progress bar, kept on disk, read back by memory map."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from modeling_ehm.modeling_ehm import EHMModel, evaluation_mode
from modeling_ehm.training.labelled import EvaluationImages, LabelledRows

KINDS = ("mean", "cls", "tokens")


def fingerprint(encoder: EHMModel, rows: LabelledRows, processor: BaseImageProcessor, dtype: torch.dtype) -> str:
    """Name of the features that these weights, images and pixels give: hexadecimal, 16 letters."""
    digest = hashlib.sha256()
    for name, weight in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    named = ("architectures", "id2label", "label2id")  # of heads, which features do not depend on
    config = {name: value for name, value in encoder.config.to_dict().items() if name not in named}
    described = [config, str(dtype), rows.num_channels]
    digest.update(json.dumps([rows.dataset._fingerprint, processor.to_dict(), described], default=str).encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def frozen_features(
    encoder: EHMModel,
    rows: LabelledRows,
    processor: BaseImageProcessor,
    folder: Path,
    kinds: tuple[str, ...] = ("mean",),
    batch_size: int = 128,
    num_workers: int = 0,
    dtype: torch.dtype = torch.float32,
    progress_bar: bool = True,
) -> dict[str, np.ndarray]:
    """Features of all rows, from the files in `folder` if they are there, else computed and written there.

    Args:
        encoder: In any mode; it runs in evaluation mode on its own device.
        rows: Labelled rows.
        processor: Makes pixels of images.
        folder: Where features are kept as `.npy` files, named after weights, images and pixels.
        kinds: Of "mean", the mean of the final-norm patch tokens `(n, D)` float32; "cls", the class token `(n, D)`
            float32; "tokens", all patch tokens `(n, N, D)` float16.
        batch_size: Images at a time.
        num_workers: Processes that decode.
        dtype: float32, or bfloat16 to run the encoder under autocast.
        progress_bar: Whether to draw one.

    Returns:
        Memory-mapped arrays by kind, in the order of the rows.

    Raises:
        ValueError: an unknown kind, or an image that cannot be decoded (its row is named).
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds={kinds} holds {sorted(unknown)}; each must be one of {', '.join(KINDS)}")
    stem = fingerprint(encoder, rows, processor, dtype)
    paths = {kind: folder / f"{stem}-{kind}.npy" for kind in kinds}
    if not all(path.exists() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        _compute(encoder, rows, processor, paths, batch_size, num_workers, dtype, progress_bar)
    return {kind: np.load(path, mmap_mode="r", allow_pickle=False) for kind, path in paths.items()}


def _compute(encoder, rows, processor, paths, batch_size, num_workers, dtype, progress_bar) -> None:
    def example(columns: dict) -> Tensor:
        return processor(columns["image"], return_tensors="pt")["pixel_values"][0]

    loader = DataLoader(EvaluationImages(rows, example), batch_size, num_workers=num_workers)
    writing = {kind: path.with_suffix(".writing") for kind, path in paths.items()}
    arrays: dict[str, np.ndarray] = {}
    place = 0
    with evaluation_mode(encoder), tqdm(total=len(rows), unit=" images", disable=not progress_bar) as bar:
        for pixels in loader:
            with torch.autocast(encoder.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                states = encoder(pixels.to(encoder.device)).last_hidden_state.float()  # (B, 1 + N, D)
            made = {"mean": states[:, 1:].mean(1), "cls": states[:, 0], "tokens": states[:, 1:].half()}
            for kind, path in writing.items():
                batch = made[kind].cpu().numpy()
                if kind not in arrays:
                    shape = (len(rows), *batch.shape[1:])
                    arrays[kind] = np.lib.format.open_memmap(path, mode="w+", dtype=batch.dtype, shape=shape)
                arrays[kind][place : place + len(batch)] = batch
            place += len(pixels)
            bar.update(len(pixels))
    for kind, path in writing.items():  # under its name a file is whole
        arrays[kind].flush()
        path.rename(paths[kind])
