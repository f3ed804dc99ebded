"""Checkpoints: whole or ignored; where a run goes on.

A checkpoint is written aside, flushed to the disk, renamed, and last of all marked with a list of its files. Whenever
the machine dies, a folder `checkpoint-N` with its mark and all that this lists is whole, and any other is left aside.
"""

import errno
import fcntl
import itertools
import json
import logging
import os
import platform
import shutil
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers.trainer import TRAINER_STATE_NAME

from modeling_ehm.training.arguments import ImageTrainingArguments
from modeling_ehm.training.recipes import RecipeError

logger = logging.getLogger(__name__)

STAGING = ".unfinished"  # folder in the output folder in which a checkpoint is written
MARK = "whole.json"  # sizes of all files of a checkpoint in bytes, by name
LOCK = ".lock"
_CLAIMED: dict[Path, int] = {}  # open files of locked folders; a lock ends with its file or its process
GO_ON = "Make room, or set training.output_dir to another folder, and start again to go on"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those before it are as they were."""


def seal_checkpoint(aside: Path, checkpoint: Path) -> None:
    """Move a finished folder to its place, so that it is whole there or not there at all.

    A folder that is there already, as when a run goes on from an earlier step than its last, is replaced.
    """
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(aside)): path.stat().st_size for path in files}
    for path in files:
        flush(path)
    for folder in {path.parent for path in files} | {aside}:
        flush(folder)
    if checkpoint.exists():
        replaced = aside.with_name(f"replaced-{checkpoint.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        checkpoint.rename(replaced)
    aside.rename(checkpoint)
    flush(checkpoint.parent)
    mark = checkpoint / MARK
    being_written = mark.with_suffix(".tmp")
    being_written.write_text(json.dumps(sizes, indent=1) + "\n")
    flush(being_written)
    being_written.rename(mark)
    flush(checkpoint)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names a folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fault_of(checkpoint: Path) -> str | None:
    """What a checkpoint lacks to be whole; None if it lacks nothing."""
    mark = checkpoint / MARK
    if not mark.exists():
        return f"it has no {MARK}: the run ended while it was written or removed"
    try:
        sizes = json.loads(mark.read_text())
    except ValueError:
        return f"{MARK} is no JSON"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint folders, whole or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; says which it leaves aside."""
    for path in checkpoints_in(folder):
        if (fault := fault_of(path)) is None:
            return path
        logger.warning("%s is left aside: %s", path, fault)
    return None


def remove_old_checkpoints(folder: Path, limit: int | None, best: str | None) -> None:
    """Keep the `limit` newest whole checkpoints and the best one; remove the others, and what is not whole.

    The mark goes first, so that a removal that is cut short leaves nothing that looks whole.
    """
    if not limit or limit < 0:
        return
    whole = [path for path in checkpoints_in(folder) if fault_of(path) is None]
    kept = {path.name for path in whole[:limit]} | ({Path(best).name} if best else set())
    for path in checkpoints_in(folder) if whole else []:
        if path.name not in kept:
            (path / MARK).unlink(missing_ok=True)
            shutil.rmtree(path)


def claim_folder(folder: Path) -> None:
    """Keep other runs out of an output folder for as long as this process lives, however it ends.

    Raises:
        RecipeError: a run that has not ended uses the folder, as when a kill has left one of its processes.
    """
    path = folder / LOCK
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _CLAIMED.get(path.resolve())
    if descriptor is None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s cannot be locked (%s): do not start two runs in one folder", path, error)
            return
        holder = os.read(descriptor, 200).decode()
        os.close(descriptor)
        raise RecipeError(
            f"training.output_dir={str(folder)!r} is in use by a run that has not ended ({holder}); end it, or choose"
            " another folder"
        ) from None
    _CLAIMED[path.resolve()] = descriptor
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)


def find_checkpoint(args: ImageTrainingArguments) -> str | None:
    """Checkpoint folder to go on from, as `training.resume_from_checkpoint` says; the same one in all processes.

    Raises:
        RecipeError: another run uses the output folder; "never", but there is a checkpoint; a folder that is none, or
            is not whole; or one that another process does not see.
    """
    chosen = None
    if args.process_index == 0:
        claim_folder(Path(args.output_dir))
        chosen = _choose_checkpoint(args)
    if args.world_size == 1:
        return chosen
    chosen = broadcast_object_list([chosen])[0]  # a process that looks for itself may see another one
    if chosen is not None and (fault := fault_of(Path(chosen))) is not None and args.process_index > 0:
        raise RecipeError(
            f"process {args.process_index} does not find {chosen} whole, from which process 0 goes on: {fault};"
            " training.output_dir must be a folder that all hosts share, or hold the same checkpoints on each"
        )
    return chosen


def _choose_checkpoint(args: ImageTrainingArguments) -> str | None:
    chosen, folder = args.resume_from_checkpoint, Path(args.output_dir)
    if chosen in ("never", None):
        if found := checkpoints_in(folder):
            raise RecipeError(
                f"training.output_dir={args.output_dir!r} holds {found[0].name} of an earlier run, and"
                " training.resume_from_checkpoint is 'never' or null; choose another folder, or remove the checkpoints"
            )
        return None
    if chosen == "auto":
        if (newest := newest_whole(folder)) is not None:
            return str(newest)
        set_aside(checkpoints_in(folder), "the run starts afresh, since none of its checkpoints is whole")
        return None
    if (fault := fault_of(Path(chosen))) is not None:
        raise RecipeError(
            f"training.resume_from_checkpoint={chosen!r} is not auto, never, or the folder of a whole checkpoint:"
            f" {fault}"
        )
    if Path(chosen).resolve().parent == folder.resolve():
        # They would count as newer than those of the run that goes on from here, and be gone back to.
        step = json.loads((Path(chosen) / TRAINER_STATE_NAME).read_text())["global_step"]  # its name may be another
        later = [path for path in checkpoints_in(folder) if step_of(path) >= step and path.name != Path(chosen).name]
        set_aside(later, f"the run goes on from {Path(chosen).name}")
    return chosen


def set_aside(checkpoints: list[Path], reason: str) -> None:
    """Rename checkpoints to `abandoned-step-N`, then `abandoned-step-N-2`, so that none is taken for one of the run.

    Nor is any removed, however often a run is sent back.
    """
    for path in checkpoints:
        names = (f"abandoned-step-{step_of(path)}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
        aside = next(free for name in names if not (free := path.with_name(name)).exists())
        path.rename(aside)
        logger.warning("%s is now %s: %s", path, aside.name, reason)
