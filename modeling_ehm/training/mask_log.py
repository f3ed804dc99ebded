"""What was masked at each step, in a line: two runs whose logs are equal trained on the same samples and masks."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from modeling_ehm.masking_ehm import hash_int64


def digest_of(mask_seed: Tensor, mask: Tensor) -> Tensor:
    """One number for the masks of a batch, whatever the order of its images.

    Args:
        mask_seed: `(B,)` int64; it follows from seed, pass and sample, and so stands for the sample.
        mask: `(B * R, N)` bool, the masks of one image in sequence.

    Returns:
        int64 scalar on the same device: a sum, modulo 2⁶⁴, so that those of parts of a batch add up to that of all.
    """
    times = len(mask) // len(mask_seed)
    which = torch.arange(times, device=mask.device).repeat(len(mask_seed))
    patch = hash_int64(torch.arange(mask.shape[1], device=mask.device))
    content = (mask * patch).sum(1)  # int64, wraps
    return hash_int64(hash_int64(mask_seed.repeat_interleave(times) + which) ^ content).sum()


class MaskLog:
    """Collects a process's masks step by step and writes them when told to, so that no step waits for a GPU.

    Args:
        folder: Of the run; the lines go to `masks-PROCESS.jsonl`.
        process_index: Number of this process.
    """

    def __init__(self, folder: str | Path, process_index: int):
        self.path = Path(folder) / f"masks-{process_index}.jsonl"
        self._pending: dict[int, list[tuple[int, Tensor]]] = {}

    def add(self, step: int, mask_seed: Tensor, mask: Tensor) -> None:
        """Note the masks of a batch, or of a part of it, in the step of this number, counted from 1."""
        self._pending.setdefault(step, []).append((len(mask), digest_of(mask_seed, mask)))

    def write(self) -> None:
        """Append what was noted since the last call."""
        lines = []
        for step, parts in self._pending.items():
            digest = sum(int(part) for _, part in parts) % 2**64
            lines.append(json.dumps({"step": step, "masks": sum(n for n, _ in parts), "digest": f"{digest:016x}"}))
        self._pending.clear()
        if lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write("\n".join(lines) + "\n")


def forget_steps_after(folder: str | Path, step: int) -> None:
    """Cut the logs of all processes back to a step, from which the run goes on."""
    for path in Path(folder).glob("masks-*.jsonl"):
        kept = "".join(json.dumps(line) + "\n" for line in _lines_of(path) if line["step"] <= step)
        if kept != path.read_text():
            being_written = path.with_suffix(".tmp")
            being_written.write_text(kept)
            being_written.rename(path)


def _lines_of(path: Path) -> Iterator[dict]:
    for text in path.read_text().splitlines():
        try:
            yield json.loads(text)
        except ValueError:  # the last one, cut short by a kill or still being written
            continue


def read_mask_log(folder: str | Path) -> dict[int, tuple[int, str]]:
    """Number of masks and digest of each step, over all processes."""
    steps: dict[int, tuple[int, int]] = {}
    for path in sorted(Path(folder).glob("masks-*.jsonl")):
        for line in _lines_of(path):
            count, digest = steps.get(line["step"], (0, 0))
            steps[line["step"]] = count + line["masks"], (digest + int(line["digest"], 16)) % 2**64
    return {step: (count, f"{digest:016x}") for step, (count, digest) in sorted(steps.items())}
