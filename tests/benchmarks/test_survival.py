"""The short form of the benchmark that kills runs, and runs of which one process dies."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_recipes import ROOT, child_environment, write_recipe


@pytest.fixture
def survival(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("survival")


def test_a_run_that_was_killed_ends_as_one_that_was_not(survival, tmp_path, monkeypatch):
    """Streamed, two workers, three kills: nothing differs, the record of broken images included."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    row = survival.survive(survival.SETUPS[6], survival.write_images(tmp_path), tmp_path / "runs", kills=3, seed=0)
    assert sum(row["kills"].values()) == 3 and row["starts"] >= 4
    assert row["compared"] == 6 and row["differing"] == []


def test_what_differs_is_found(survival, tmp_path, monkeypatch):
    """Without the moving average's file, which a resumed run needs, it refuses to go on; with another it differs."""
    monkeypatch.setattr(survival, "STEPS", 10)
    setup = survival.SETUPS[0]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files = survival.write_images(tmp_path)
    first, second = (survival.write_recipe(tmp_path / name, setup, files) for name in ("first", "second"))
    second.write_text(second.read_text() + "  seed: 1\n")
    for recipe in (first, second):
        assert survival.start(recipe, setup).wait() == 0, recipe.with_name("log.txt").read_text()
    one, other = (survival.fingerprint(recipe.parent / "out") for recipe in (first, second))
    assert one.keys() == other.keys() and all(one[name] != other[name] for name in one)


# A process that dies alone


def start(recipe: Path, *launch: str) -> subprocess.Popen:
    command = [sys.executable, *launch, str(ROOT / "train_ehm.py"), str(recipe)]
    environment = child_environment(recipe.parent / "home")
    with open(recipe.with_name("log.txt"), "w") as log:
        return subprocess.Popen(command, cwd=recipe.parent, env=environment, stdout=log, stderr=log)


def wait_for_steps(process: subprocess.Popen, out: Path) -> None:
    """Until the first steps are logged."""
    while not list(out.glob("masks-*.jsonl")):
        assert process.poll() is None, out.with_name("log.txt").read_text()
        time.sleep(0.05)


ENDLESS = {"max_steps": 1_000_000, "logging_steps": 1}
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_a_worker_that_dies_ends_the_run_with_its_cause(survival, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", training=ENDLESS | {"dataloader_num_workers": 2})
    process = start(recipe)
    wait_for_steps(process, tmp_path / "out")
    worker = survival.descendants(process.pid)[-1]
    killed = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    assert process.wait(timeout=60) == 1 and time.monotonic() - killed < 60
    log = (tmp_path / "log.txt").read_text()
    last = log.strip().splitlines()[-1]
    assert last.startswith("error: DataLoader worker (pid") and str(worker) in last and "goes on from its" in last


def test_a_rank_that_dies_ends_the_run_with_its_cause(survival, tmp_path):
    """The other waits for it in a sum of gradients, and is ended."""
    recipe = write_recipe(tmp_path / "recipe.yaml", training=ENDLESS)
    process = start(recipe, *TWO)
    wait_for_steps(process, tmp_path / "out")
    ranks = [
        pid for pid in survival.descendants(process.pid) if "train_ehm" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    assert len(ranks) == 2
    killed = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0 and time.monotonic() - killed < 60
    assert "Signal 9 (SIGKILL)" in (tmp_path / "log.txt").read_text()
    assert not any(survival.is_running(pid) for pid in ranks)


def test_an_error_in_one_rank_ends_the_run_with_its_cause(survival, tmp_path):
    """One process meets a weight that is not a number, the other goes on into the sum of gradients."""
    recipe = write_recipe(tmp_path / "recipe.yaml", training=ENDLESS)
    (tmp_path / "poisoned.py").write_text(
        "import os, sys\n"
        "from modeling_ehm.training.trainer import EHMTrainer\n"
        "compute_loss = EHMTrainer.compute_loss\n"
        "def failing(self, *arguments, **options):\n"
        "    if self.state.global_step == 3 and os.environ['RANK'] == '1':\n"
        "        raise RuntimeError('a mistake in rank 1')\n"
        "    return compute_loss(self, *arguments, **options)\n"
        "EHMTrainer.compute_loss = failing\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_ehm\n"
        "train_ehm.main(sys.argv[1:])\n"
    )
    command = [sys.executable, *TWO, str(tmp_path / "poisoned.py"), str(recipe)]
    done = subprocess.run(
        command, cwd=tmp_path, env=child_environment(tmp_path / "home"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and "RuntimeError: a mistake in rank 1" in done.stderr
