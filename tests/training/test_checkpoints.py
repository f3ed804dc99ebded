"""Checkpoints are whole or ignored, whenever a run dies and whatever the disk does."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_recipes import ROOT, child_environment, losses_of, run_script, write_recipe

from modeling_ehm.training import checkpoints
from modeling_ehm.training.checkpoints import (
    MARK,
    STAGING,
    CheckpointError,
    fault_of,
    newest_whole,
    remove_old_checkpoints,
    seal_checkpoint,
)
from modeling_ehm.training.hub import sha256_of
from modeling_ehm.training.tasks import load_recipe, pretrain

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


class Killed(BaseException):
    """What no handler of errors sees."""


def write_checkpoint(folder: Path, step: int, content: str = "weights") -> Path:
    """A whole checkpoint of two files, one of them in a folder of its own."""
    aside = folder / STAGING / f"checkpoint-{step}"
    (aside / "inner").mkdir(parents=True)
    (aside / "model").write_text(content)
    (aside / "inner" / "state").write_text(str(step))
    seal_checkpoint(aside, folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{step}"


def train(folder: Path, **training) -> Path:
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder / "recipe.yaml", model={"teacher": "ema"}, training=SAVING | training)
    pretrain.execute(pretrain.prepare(load_recipe(recipe, [])))
    return folder / "out"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Output folder of the run that nothing disturbed."""
    return train(tmp_path_factory.mktemp("unbroken") / "run")


def assert_same_run(out: Path, unbroken: Path) -> None:
    assert losses_of(out) == losses_of(unbroken) and len(losses_of(out)) == 6
    for name in ("model.safetensors", "ema_teacher.safetensors"):
        assert sha256_of(out / name) == sha256_of(unbroken / name)


# Whole or ignored


def test_a_checkpoint_lists_its_files(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 3)
    assert json.loads((checkpoint / MARK).read_text()) == {"inner/state": 1, "model": 7}
    assert fault_of(checkpoint) is None and newest_whole(tmp_path) == checkpoint


@pytest.mark.parametrize("replaces", [False, True])
def test_killed_at_any_call_a_new_checkpoint_is_whole_or_ignored(tmp_path, monkeypatch, replaces):
    """Every call that changes the disk is the last one once; the checkpoint before stays, whatever happens."""
    outcomes = []
    for last in range(100):
        folder = tmp_path / str(last)
        before = write_checkpoint(folder, 2)
        if replaces:
            write_checkpoint(folder, 4, "of an earlier try")
        calls = iter(range(100))

        def dying(function, calls=calls, last=last):
            def call(*arguments, **options):
                if next(calls) == last:
                    raise Killed
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "write_text")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                aside = folder / STAGING / "checkpoint-4"
                (aside / "inner").mkdir(parents=True)
                for name in ("model", "inner/state"):
                    with open(aside / name, "w") as file:
                        file.write("new")
                seal_checkpoint(aside, folder / "checkpoint-4")
                finished = True
            except Killed:
                finished = False
        newest = newest_whole(folder)
        outcomes.append(newest.name)
        assert fault_of(before) is None and (before / "model").read_text() == "weights"
        if newest.name == "checkpoint-4" and (newest / "model").read_text() == "new":
            assert (newest / "inner" / "state").read_text() == "new"
        else:
            assert not finished
        if finished:
            break
    assert last > 8 and outcomes[0] == ("checkpoint-4" if replaces else "checkpoint-2")
    assert outcomes[-1] == "checkpoint-4" and "checkpoint-2" in outcomes


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: (path / MARK).unlink(), "it has no whole.json"),
        (lambda path: (path / MARK).write_text('{"mod'), "whole.json is no JSON"),
        (lambda path: (path / "model").unlink(), "model is missing"),
        (lambda path: (path / "model").write_text("wei"), "model has 3 bytes, not 7"),
    ],
)
def test_what_is_not_whole_is_left_aside_and_named(tmp_path, caplog, harm, reason):
    whole, harmed = write_checkpoint(tmp_path, 9), write_checkpoint(tmp_path, 10)
    harm(harmed)
    with caplog.at_level("WARNING"):
        assert newest_whole(tmp_path) == whole
    assert f"{harmed} is left aside: {reason}" in caplog.text


def test_removal_keeps_the_newest_whole_ones_and_the_best(tmp_path):
    for step in (2, 4, 6, 8, 10, 12):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-12" / "model").unlink()
    (tmp_path / "checkpoint-of-mine").mkdir()
    remove_old_checkpoints(tmp_path, limit=2, best=str(tmp_path / "checkpoint-4"))
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert left == ["checkpoint-10", "checkpoint-4", "checkpoint-8", "checkpoint-of-mine"]
    remove_old_checkpoints(tmp_path, limit=None, best=None)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4


def test_removal_leaves_all_if_none_is_whole(tmp_path):
    (write_checkpoint(tmp_path, 2) / MARK).unlink()
    remove_old_checkpoints(tmp_path, limit=1, best=None)
    assert (tmp_path / "checkpoint-2" / "model").exists()


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    for step in (2, 4):
        write_checkpoint(tmp_path, step)

    def cut_short(path):
        raise Killed

    monkeypatch.setattr(checkpoints.shutil, "rmtree", cut_short)
    with pytest.raises(Killed):
        remove_old_checkpoints(tmp_path, limit=1, best=None)
    assert fault_of(tmp_path / "checkpoint-2") is not None and fault_of(tmp_path / "checkpoint-4") is None


# A disk that is full, within a run


WRITES = {  # what a checkpoint is written by: owner, name, and which call of the second checkpoint fails
    "weights": ("transformers.modeling_utils.safe_save_file", 1),
    "moving average": ("modeling_ehm.training.callbacks.save_file", 1),
    "optimiser": ("torch.save", 0),
    "scheduler": ("torch.save", 1),
    "generators": ("torch.save", 2),
    "flush": ("os.fsync", 3),
    "rename": ("pathlib.Path.rename", 0),
    "mark": ("pathlib.Path.rename", 1),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk_is_told_and_the_last_checkpoint_stays(tmp_path, unbroken, monkeypatch, write):
    """The write fails while checkpoint-4 is written; started again with room, the run is the unbroken one."""
    target, number = WRITES[write]
    owner, _, name = target.rpartition(".")
    saving, count = [], []

    def full(*arguments, **options):
        if saving:
            count.append(target)
            if len(count) == number + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        module = sys.modules.get(owner) or {"pathlib.Path": Path}[owner]
        original = getattr(module, name)
        number = 0 if write in ("weights", "moving average") else number
        save = pretrain.EHMTrainer._save_checkpoint

        def save_checkpoint(self, *arguments):
            saving[:] = [1] if self.state.global_step == 4 else []
            save(self, *arguments)

        patch.setattr(pretrain.EHMTrainer, "_save_checkpoint", save_checkpoint)
        patch.setattr(module, name, full)
        message = r"checkpoint-4 could not be written to .*No space left on device; checkpoint-2 is whole\. Make room"
        with pytest.raises(CheckpointError, match=message):
            train(tmp_path / "run")
    out = tmp_path / "run" / "out"
    assert newest_whole(out).name == "checkpoint-2" and not (out / STAGING).exists()
    assert_same_run(train(tmp_path / "run"), unbroken)


@pytest.mark.parametrize("limit", [20_000, 120_000])
def test_files_that_the_system_cuts_short(tmp_path, limit):
    """A limit on the size of files meets weights or optimiser: one line, no half checkpoint, exit code 1."""
    recipe = write_recipe(tmp_path / "recipe.yaml", training=SAVING)
    done = run_script(recipe, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: checkpoint-2 could not be written to training.output_dir=")
    assert "there is no earlier one. Make room" in last and "Traceback" not in done.stderr
    assert list((tmp_path / "out").glob("checkpoint-*")) == []


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path):
    """A file stands where the output folder should be."""
    (tmp_path / "out").write_text("")
    recipe = write_recipe(tmp_path / "recipe.yaml", training=SAVING)
    done = run_script(recipe)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert str(tmp_path / "out") in done.stderr.strip().splitlines()[-1]


def test_other_errors_of_saving_keep_their_traceback(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a mistake in the code")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="^a mistake in the code$"):
        train(tmp_path / "run")


# Where a run goes on


def test_a_folder_that_is_named_must_be_whole(tmp_path, unbroken):
    shutil.copytree(unbroken / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint='.*checkpoint-4' is not .*: optimizer.pt is missing"):
        train(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_run_that_replaces_a_later_checkpoint(tmp_path, unbroken):
    """Sent back to checkpoint-2 by name, with checkpoint-4 and -6 in its folder."""
    out = tmp_path / "run" / "out"
    shutil.copytree(unbroken, out)
    assert_same_run(train(tmp_path / "run", resume_from_checkpoint=str(out / "checkpoint-2")), unbroken)
    assert [path.name for path in sorted(out.glob("*checkpoint*"))] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not (out / STAGING).exists()


def test_a_run_sent_back_is_not_taken_for_the_one_it_left(tmp_path, unbroken, monkeypatch):
    """Sent back to checkpoint-2 with one checkpoint kept, killed after checkpoint-4: "auto" goes on from that one."""
    out = tmp_path / "run" / "out"
    shutil.copytree(unbroken, out)
    on_save = pretrain.EHMTrainer._save_checkpoint

    def killed_after_saving(self, *arguments):
        on_save(self, *arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.EHMTrainer, "_save_checkpoint", killed_after_saving)
        with pytest.raises(Killed):
            train(tmp_path / "run", resume_from_checkpoint=str(out / "checkpoint-2"), save_total_limit=1)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]
    assert fault_of(out / "checkpoint-4") is None and newest_whole(out).name == "checkpoint-4"
    assert sorted(path.name for path in out.glob("abandoned-*")) == ["abandoned-step-4", "abandoned-step-6"]
    assert_same_run(train(tmp_path / "run"), unbroken)


def test_a_run_sent_back_twice_keeps_what_it_left_first(tmp_path, unbroken):
    out = tmp_path / "run" / "out"
    shutil.copytree(unbroken, out)
    left = sha256_of(out / "checkpoint-4" / "optimizer.pt")
    for _ in range(2):
        train(tmp_path / "run", resume_from_checkpoint=str(out / "checkpoint-2"))
    names = [f"abandoned-step-{step}{again}" for step in (4, 6) for again in ("", "-2")]
    assert sorted(path.name for path in out.glob("abandoned-*")) == names
    assert sha256_of(out / "abandoned-step-4" / "optimizer.pt") == left
    with pytest.raises(ValueError, match="seed=7"):  # sent back to another lineage, it stops before its first step
        train(tmp_path / "run", resume_from_checkpoint=str(out / "abandoned-step-4"), seed=7)
    assert newest_whole(out).name == "checkpoint-2"
    assert_same_run(train(tmp_path / "run", resume_from_checkpoint=str(out / "abandoned-step-4")), unbroken)


def test_a_copied_checkpoint_belongs_to_the_run_of_the_folder(tmp_path, unbroken):
    """Kept elsewhere, without `run.json` beside it: that of the output folder still says what must not change."""
    out = tmp_path / "run" / "out"
    shutil.copytree(unbroken, out)
    shutil.copytree(out / "checkpoint-2", tmp_path / "backup" / "checkpoint-2")
    named = str(tmp_path / "backup" / "checkpoint-2")
    with pytest.raises(ValueError, match="seed=7"):
        train(tmp_path / "run", resume_from_checkpoint=named, seed=7)
    train(tmp_path / "run", resume_from_checkpoint=named)
    assert len(json.loads((out / "run.json").read_text())["starts"]) == 2


def test_a_run_none_of_whose_checkpoints_is_whole_starts_afresh_and_removes_none(tmp_path, unbroken, caplog):
    """As with those of an earlier version; they are renamed, and it is told."""
    out = tmp_path / "run" / "out"
    shutil.copytree(unbroken, out)
    for mark in out.glob(f"checkpoint-*/{MARK}"):
        mark.unlink()
    with caplog.at_level("WARNING"):
        assert_same_run(train(tmp_path / "run"), unbroken)
    assert "checkpoint-6 is now abandoned-step-6: the run starts afresh, since none of its" in caplog.text
    assert len(list(out.glob("abandoned-step-*/model.safetensors"))) == 3 and newest_whole(out).name == "checkpoint-6"


def test_a_folder_in_use_is_refused(tmp_path):
    """A second run in the folder of one that goes on; once that is killed, it starts."""
    recipe = write_recipe(tmp_path / "recipe.yaml", training=SAVING | {"max_steps": 1_000_000, "save_steps": 500_000})
    command = [sys.executable, str(ROOT / "train_ehm.py"), str(recipe)]
    settings = {"env": child_environment(tmp_path / "home"), "cwd": tmp_path}
    first = subprocess.Popen(command, **settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "out" / "masks-0.jsonl").exists() and first.poll() is None:
            time.sleep(0.1)
        second = run_script(recipe)
    finally:
        first.kill()
        first.wait()
    last = second.stderr.strip().splitlines()[-1]
    assert second.returncode == 1 and "is in use by a run that has not ended" in last
    assert f"(process {first.pid} on " in last and "Traceback" not in second.stderr
    third = run_script(recipe, "training.max_steps=2")
    assert third.returncode == 0, third.stderr


def test_one_process_may_use_a_folder_again(tmp_path):
    checkpoints.claim_folder(tmp_path)
    checkpoints.claim_folder(tmp_path)
    assert (tmp_path / checkpoints.LOCK).read_text() == f"process {os.getpid()} on {os.uname().nodename}"
