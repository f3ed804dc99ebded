"""The losses of one process and plain float32, by other means: sharded weights, recomputed activations, bfloat16."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sharded_run import losses_of as sharded_losses
from tiny_recipes import child_environment, losses_of, run_script, write_recipe

from modeling_ehm.training.arguments import EHMTrainingArguments
from modeling_ehm.training.mask_log import read_mask_log
from modeling_ehm.training.tasks import load_recipe, pretrain

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ROOT = Path(__file__).parents[2]


def train(folder: Path, **training) -> Path:
    folder.mkdir()
    recipe = write_recipe(folder / "recipe.yaml", model={"teacher": "ema"}, training={"max_steps": 6} | training)
    pretrain.execute(pretrain.prepare(load_recipe(recipe)))
    return folder / "out"


def test_sharded_weights_train_as_whole_ones(tmp_path):
    """torch's FSDP2 over two CPU processes, the teacher's pass included: losses equal to 1e-5."""
    command = [*TWO, str(Path(__file__).with_name("sharded_run.py")), str(tmp_path / "losses.json")]
    done = subprocess.run(
        command, env=child_environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses == pytest.approx(sharded_losses(1), abs=1e-5) and len(losses) == 10


def test_recomputed_activations_change_nothing(tmp_path):
    """Gradient checkpointing: the same losses and masks, to the last bit."""
    plain, recomputed = train(tmp_path / "a"), train(tmp_path / "b", gradient_checkpointing=True)
    assert losses_of(recomputed) == losses_of(plain) and len(losses_of(plain)) == 6
    assert read_mask_log(recomputed) == read_mask_log(plain)


def test_bfloat16_stays_near_float32(tmp_path):
    """Losses within 1 % over six steps; the same samples, masks of the first step (random ones) included."""
    plain, rounded = losses_of(train(tmp_path / "a")), losses_of(train(tmp_path / "b", bf16=True))
    assert rounded == pytest.approx(plain, rel=0.01) and rounded != plain
    first = [read_mask_log(tmp_path / name / "out")[1] for name in "ab"]
    assert first[0] == first[1]


def test_two_processes_in_bfloat16(tmp_path):
    """Two processes and one: within 1e-2, what bfloat16 resolves."""
    one = losses_of(train(tmp_path / "one", bf16=True))
    (tmp_path / "two").mkdir()
    training = {"max_steps": 6, "bf16": True}
    recipe = write_recipe(tmp_path / "two" / "recipe.yaml", model={"teacher": "ema"}, training=training)
    done = run_script(recipe, launch=TWO[1:])
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "two" / "out") == pytest.approx(one, abs=1e-2)


def test_sharding_on_a_cpu_is_refused_rather_than_left_out(tmp_path):
    with pytest.raises(ValueError, match="training.fsdp=.*weights are sharded on accelerators only"):
        EHMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, fsdp="full_shard")


def test_processes_wait_for_each_other_no_longer_than_asked_for(tmp_path):
    """One of two on CPUs does not come to the sum of gradients: the other ends after ddp_timeout, not 30 minutes."""
    recipe = write_recipe(tmp_path / "recipe.yaml", training={"ddp_timeout": 5})
    (tmp_path / "late.py").write_text(
        "import os, sys, time\n"
        "from modeling_ehm.training.trainer import EHMTrainer\n"
        "training_step = EHMTrainer.training_step\n"
        "def late(self, *arguments, **options):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        time.sleep(600)\n"
        "    return training_step(self, *arguments, **options)\n"
        "EHMTrainer.training_step = late\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_ehm\n"
        "train_ehm.main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [*TWO, str(tmp_path / "late.py"), str(recipe)],
        env=child_environment(tmp_path / "home"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and "Timed out waiting 5000ms" in done.stderr
