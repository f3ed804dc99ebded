"""The log of masks, masks of past steps rebuilt, and runs that meet a loss that is not a number."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded_run import run
from safetensors.torch import load_file
from tiny_recipes import PROBES, encode, picture, run_script, write_recipe, write_shards

from modeling_ehm import EHMForPreTraining
from modeling_ehm.masking_ehm import mask_from_scores, random_scores
from modeling_ehm.training import replay as replay_module
from modeling_ehm.training.mask_log import MaskLog, digest_of, forget_steps_after, read_mask_log
from modeling_ehm.training.recipes import RecipeError
from modeling_ehm.training.recorded_trainer import NonFiniteError, WatchedStep
from modeling_ehm.training.replay import replay
from modeling_ehm.training.tasks import load_recipe, pretrain

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    encoded = [encode(picture(number)) for number in range(27)]
    return write_shards(tmp_path_factory.mktemp("shards"), [encoded[:10], encoded[10:18], encoded[18:]])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shards):
    """Output folder of 6 steps with an evolving tree, a moving average, dropout, probes, saves after 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    model = {"teacher": "ema", "hidden_dropout_prob": 0.2, "softness_end": 0.3, "masks_per_image": 2}
    data = {"train": {"path": "parquet", "data_files": shards, "streaming": True}, "shuffle_window": 6} | PROBES
    training = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    run(folder, write_recipe(folder / "recipe.yaml", model, data, training))
    shutil.rmtree(folder / "out" / "checkpoint-6")
    return folder / "out"


def some_masks(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    seeds = torch.arange(count) * 7919
    return seeds, mask_from_scores(random_scores(seeds, 16), 12)


# Digests and logs


def test_a_digest_tells_masks_and_samples_apart_but_not_their_order():
    seeds, mask = some_masks()
    digest = int(digest_of(seeds, mask))
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert int(digest_of(seeds[order], mask[order])) == digest
    parts = sum(int(digest_of(seeds[part], mask[part])) for part in (slice(0, 2), slice(2, 6)))
    assert parts % 2**64 == digest % 2**64
    others = [digest_of(seeds[order], mask), digest_of(seeds + 1, mask), digest_of(seeds, mask.roll(1, dims=1))]
    flipped = mask.clone()
    flipped[3, 5] ^= True
    others.append(digest_of(seeds, flipped))
    assert len({digest, *map(int, others)}) == 5


def test_masks_of_one_image_have_places():
    seeds, mask = some_masks(4)
    two = seeds[::2]
    swapped = mask[[1, 0, 2, 3]]
    assert int(digest_of(two, mask)) != int(digest_of(two, swapped))


def test_a_log_is_cut_back_and_goes_on(tmp_path):
    """Also where a kill cut a line short; logs of several processes add up."""
    seeds, mask = some_masks()
    logs = [MaskLog(tmp_path, process) for process in (0, 1)]
    for step in (1, 2, 3):
        for log, part in zip(logs, (slice(0, 4), slice(4, 6)), strict=True):
            log.add(step, seeds[part] + step, mask[part])
    for log in logs:
        log.write()
    whole = read_mask_log(tmp_path)
    assert list(whole) == [1, 2, 3] and whole[2] == (6, f"{int(digest_of(seeds + 2, mask)) % 2**64:016x}")
    with open(tmp_path / "masks-1.jsonl", "a") as file:
        file.write('{"step": 4, "mas')
    assert read_mask_log(tmp_path) == whole
    forget_steps_after(tmp_path, 2)
    assert read_mask_log(tmp_path) == {step: whole[step] for step in (1, 2)}
    logs[0].add(3, seeds + 3, mask)
    logs[0].write()
    assert read_mask_log(tmp_path) == whole


def test_every_step_of_a_run_is_in_its_log(finished):
    log = read_mask_log(finished)
    assert list(log) == [1, 2, 3, 4, 5, 6] and {count for count, _ in log.values()} == {16}
    assert len({digest for _, digest in log.values()}) == 6


# Rebuilt masks


@pytest.mark.parametrize("step", [1, 4, 6])
def test_masks_of_a_past_step_are_rebuilt(finished, step):
    """From the beginning, from checkpoint-2 and from checkpoint-4; sums and counts as the run's."""
    found = replay(finished, step)
    assert found.digest() == read_mask_log(finished)[step][1]
    assert found.mask.shape == (16, 4, 4) and set(found.mask.sum((1, 2))) == {12}
    assert len(found.sample_id) == len(set(found.sample_id)) == 8 and found.loss.shape == (16,)
    assert np.isfinite(found.loss).all() and set(found.sample_id >> 40) <= {0, 1, 2}


def test_nothing_in_the_runs_folder_is_touched(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    replay(finished, 3)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_the_command_writes_what_it_found(finished, tmp_path, capsys):
    replay_module.main([str(finished), "--step", "5", "--out", str(tmp_path / "masks.npz")])
    digest = read_mask_log(finished)[5][1]
    printed = capsys.readouterr().out
    assert f"step 5: 16 masks of 8 images, digest {digest}" in printed and "equal to the run's log" in printed
    with np.load(tmp_path / "masks.npz") as arrays:
        assert arrays["mask"].shape == (16, 4, 4) and arrays["sample_id"].shape == (8,)


def test_masks_that_differ_from_the_log_are_told(finished, tmp_path, capsys):
    other = tmp_path / "out"
    shutil.copytree(finished, other)
    lines = (other / "masks-0.jsonl").read_text().splitlines()[:2]
    digest = json.loads(lines[1])["digest"]
    lines[1] = lines[1].replace(digest, digest[::-1])
    (other / "masks-0.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(SystemExit, match="some masks are not those of the run"):
        replay_module.main([str(other), "--step", "2"])
    with pytest.raises(SystemExit, match="step=3 was not taken by the run in .*goes from 1 to 2"):
        replay_module.main([str(other), "--step", "3"])
    with pytest.raises(RecipeError, match="has no recipe.yaml; it is not the output folder of a pre-training run"):
        replay(tmp_path, 1)


@pytest.mark.parametrize(
    ("training", "masks_per_image"),
    [({"push_to_hub": False}, 1), ({"global_batch_size": None, "per_device_train_batch_size": 4}, 2)],
)
def test_the_batch_is_the_recipes(tmp_path, shards, training, masks_per_image):
    """Also where a line of the log is missing, as that of a process that died: this is told, the masks are shown."""
    data = {"train": {"path": "parquet", "data_files": shards}}
    model = {"masks_per_image": masks_per_image}
    recipe = write_recipe(tmp_path / "recipe.yaml", model, data, training | {"max_steps": 2})
    pretrain.execute(pretrain.prepare(load_recipe(recipe)))
    found = replay(tmp_path / "out", 2)
    images = training.get("per_device_train_batch_size", 8)
    assert len(found.sample_id) == images and len(found.mask) == images * masks_per_image
    assert found.digest() == read_mask_log(tmp_path / "out")[2][1]
    path = tmp_path / "out" / "masks-0.jsonl"
    path.write_text(path.read_text().replace(f'"masks": {len(found.mask)}', '"masks": 3'))
    with pytest.raises(SystemExit, match="the run's log has 3 of these masks: lines of a process are missing"):
        replay_module.main([str(tmp_path / "out"), "--step", "2"])


# A loss that is not a number


def poisoned(monkeypatch, at: int, what: str) -> None:
    """From step `at` on, the loss, its gradient, or a weight is not finite."""
    forward = EHMForPreTraining.forward

    def bad_forward(self, *arguments, **options):
        due = self.training and self.progress * 6 >= at - 1 - 1e-6
        if due and what == "weight":
            next(self.parameters()).data.fill_(float("nan"))
        outputs = forward(self, *arguments, **options)
        if due:
            if what == "loss":
                outputs.loss = outputs.loss * float("inf")
            elif what == "gradient":
                outputs.loss.register_hook(lambda gradient: gradient * float("nan"))
        return outputs

    monkeypatch.setattr(EHMForPreTraining, "forward", bad_forward)


def recipe_that_saves(tmp_path: Path, shards: list[str]) -> Path:
    """Six steps, saved after 2, 4 and 6."""
    training = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    data = {"train": {"path": "parquet", "data_files": shards}}
    return write_recipe(tmp_path / "recipe.yaml", data=data, training=training)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_stops_before_it_saves_what_is_not_a_number(tmp_path, shards, finished, monkeypatch, what):
    """At step 4, at whose end it would save: told with file and way out; replayed; with the cause gone it goes on."""
    recipe, out = recipe_that_saves(tmp_path, shards), tmp_path / "out"
    with monkeypatch.context() as patch:
        poisoned(patch, 4, what)
        with pytest.raises(NonFiniteError, match=r"step 4: loss .* What it was trained on is in .*nonfinite-step-4-"):
            pretrain.execute(pretrain.prepare(load_recipe(recipe, [])))
        assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
        told = json.loads((out / "nonfinite-step-4-process-0.json").read_text())
        assert told["step"] == 4 and not np.isfinite(told["grad_norm"])
        assert np.isfinite(told["losses"][0]) == (what == "gradient")
        batch = load_file(out / "nonfinite-step-4-process-0.safetensors")
        assert batch["mask"].shape == (8, 16) and batch["sample_id"].shape == (8,)
        found = replay(out, 4)
        assert found.sample_id.tolist() == batch["sample_id"].tolist()
        assert np.array_equal(found.mask.reshape(8, 16), batch["mask"].bool().numpy())
    pretrain.execute(pretrain.prepare(load_recipe(recipe, [])))
    assert list(read_mask_log(out)) == [1, 2, 3, 4, 5, 6] and (out / "checkpoint-6").exists()


def test_of_several_batches_the_loss_that_is_no_number_is_told(tmp_path, shards):
    trainer = pretrain.prepare(load_recipe(recipe_that_saves(tmp_path, shards)))
    trainer.watched[3] = WatchedStep([torch.tensor(0.2), torch.tensor(float("nan")), torch.tensor(0.3)], [], 0.7)
    with pytest.raises(NonFiniteError, match="step 3: loss nan, norm of the gradient 0.7"):
        trainer.check_finite()


def test_a_step_whose_trees_cannot_be_made_has_no_masks_to_replay(tmp_path, shards, monkeypatch):
    """Weights that are not numbers: what step 4 was to be trained on is on record; it comes to the same end again."""
    recipe, out = recipe_that_saves(tmp_path, shards), tmp_path / "out"
    with monkeypatch.context() as patch:
        poisoned(patch, 4, "weight")
        with pytest.raises(NonFiniteError, match="step 4: loss nan"):
            pretrain.execute(pretrain.prepare(load_recipe(recipe)))
        batch = load_file(out / "nonfinite-step-4-process-0.safetensors")
        assert batch.keys() == {"sample_id", "mask_seed"} and len(batch["sample_id"]) == 8
        again = r"step 4 has no masks .*: step 4: loss nan.*nonfinite-step-4-process-0\.\*"
        with pytest.raises(SystemExit, match=again):
            replay_module.main([str(out), "--step", "4"])
    with pytest.raises(SystemExit, match="the run's log does not have this step"):  # with the cause gone
        replay_module.main([str(out), "--step", "4"])
    assert np.isfinite(replay(out, 3).loss).all()
    with pytest.raises(RecipeError, match="step=5 was not taken by the run"):
        replay(out, 5)


def test_infinite_gradients_are_left_to_the_scaler_of_float16(tmp_path, shards, monkeypatch):
    """It meets some on purpose and skips their steps; losses are looked at all the same."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", data={"train": {"path": "parquet", "data_files": shards}}, training={"max_steps": 6}
    )
    poisoned(monkeypatch, 6, "gradient")
    trainer = pretrain.prepare(load_recipe(recipe))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.accelerator.unscale_gradients = lambda *_: None
    trainer.train()
    assert trainer.state.global_step == 6 and not list((tmp_path / "out").glob("nonfinite*"))
    trainer.watched[7] = WatchedStep([torch.tensor(float("inf"))])
    with pytest.raises(NonFiniteError, match="step 7: loss inf, norm of the gradient None"):
        trainer.check_finite()


def test_it_is_one_line_on_the_console(tmp_path):
    """A learning rate that no network survives."""
    training = {"base_learning_rate": 1.0e30, "max_steps": 20, "save_strategy": "steps", "save_steps": 20}
    recipe = write_recipe(tmp_path / "recipe.yaml", training=training)
    done = run_script(recipe)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: step ") and "lower training.base_learning_rate" in last
    assert "Traceback" not in done.stderr and not list(Path(tmp_path / "out").glob("checkpoint-*"))
