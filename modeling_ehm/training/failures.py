"""Errors that end a run and that its user can do something about, in one line; all others keep their traceback."""

import errno
import time

import torch

from modeling_ehm.training.checkpoints import GO_ON, CheckpointError
from modeling_ehm.training.data import UnusableData
from modeling_ehm.training.push import PushError
from modeling_ehm.training.recorded_trainer import NonFiniteError

# What a disk answers that is full or cannot be written to.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def told_in_one_line(error: Exception) -> str | None:
    """What to tell of an error of training; None if it is not known here."""
    if isinstance(error, UnusableData):  # from a worker it comes with that one's traceback before it
        return _joined(str(error).split(f"{type(error).__name__}: ")[-1])
    if isinstance(error, CheckpointError | NonFiniteError | PushError):
        return _joined(str(error))
    if isinstance(error, torch.OutOfMemoryError):
        wanted = ". ".join(_joined(str(error)).split(". ")[:2])
        return (
            f"{wanted}. Start again with training.gradient_accumulation_steps=2 or more, which beside global_batch_size"
            " makes as many images a step, fewer at a time; a run that has checkpoints keeps its settings, so give it"
            " another training.output_dir then"
        )
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"{error}. {GO_ON} from the newest whole checkpoint"
    if (death := _death_of_worker(error)) is not None:
        return (
            f"{death} Started again, the run goes on from its newest checkpoint; if memory ran out, fewer"
            " training.dataloader_num_workers or a smaller data.shuffle_window need less"
        )
    return None


def _death_of_worker(error: Exception) -> str | None:
    """What torch says of a worker that was killed; its handler of SIGCHLD raises that wherever the process is then.

    Often the process is still reading from the worker when the signal comes, and meets a broken connection first.
    """
    if isinstance(error, ConnectionError | EOFError):
        try:
            time.sleep(1)
        except RuntimeError as later:
            error = later
    is_told = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    return _joined(str(error)) if is_told else None


def _joined(text: str) -> str:
    return " ".join(text.split())
