"""Whole runs on the CPU: interrupted or not, split over processes or not, they train the same weights."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recorded_run import run, samples_of
from safetensors.torch import load_file
from tiny_recipes import (
    MODEL,
    PROBES,
    ROOT,
    SEGMENTS,
    child_environment,
    encode,
    log_of,
    losses_of,
    picture,
    write_recipe,
    write_shards,
)
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining, Trainer, set_seed

from modeling_ehm import EHMConfig, EHMForPreTraining, EHMModel
from modeling_ehm.training import ProgressCallback
from modeling_ehm.training.arguments import EHMTrainingArguments
from modeling_ehm.training.data import (
    DataArguments,
    ImageSource,
    NormalizingCollator,
    PretrainingImages,
    identity_of,
    open_samples,
)
from modeling_ehm.training.mask_log import read_mask_log
from modeling_ehm.training.tasks import load_recipe, pretrain
from modeling_ehm.training.trainer import EHMTrainer

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """27 pictures in 3 files: a run of 8 steps of 8 passes over them more than twice."""
    encoded = [encode(picture(number)) for number in range(27)]
    return write_shards(tmp_path_factory.mktemp("shards"), [encoded[:10], encoded[10:18], encoded[18:]])


def train(folder: Path, model=None, data=None, training=None) -> Path:
    """Run a tiny recipe in this process; returns its output folder."""
    folder.mkdir(exist_ok=True)
    run(folder, write_recipe(folder / "recipe.yaml", model, data, training))
    return folder / "out"


def launched(folder: Path, *command) -> subprocess.CompletedProcess:
    environment = child_environment(folder / "home")
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def evaluations_of(folder: Path) -> list[dict]:
    """Evaluated rows without their seconds."""
    rows = [row for row in log_of(folder) if "eval_runtime" in row]
    return [{name: value for name, value in row.items() if name != "eval_runtime"} for row in rows]


def assert_same_tensors(a: Path, b: Path) -> None:
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Interruptions


@pytest.mark.parametrize(
    "teacher, mask_policy, workers, streaming",
    [
        ("online", "ehm", 0, False),
        ("ema", "ehm", 2, True),
        ("ema", "ehm", 0, False),
        ("online", "random", 2, False),
        ("online", "random", 0, True),
        ("ema", "random", 0, True),
    ],
)
def test_a_resumed_run_is_the_unbroken_run(tmp_path, shards, teacher, mask_policy, workers, streaming):
    """8 steps in one go or 4 + 4 in fresh objects, with dropout: samples, losses, weights and moments equal bitwise."""
    settings = {
        "model": {"teacher": teacher, "mask_policy": mask_policy, "softness_end": 0.3, "hidden_dropout_prob": 0.1},
        "data": {"train": {"path": "parquet", "data_files": shards, "streaming": streaming}, "shuffle_window": 6},
        "training": {
            "max_steps": 8,
            "save_strategy": "steps",
            "save_steps": 4,
            "dataloader_num_workers": workers,
            "warmup_steps": 2,
        },
    }
    unbroken = train(tmp_path / "unbroken", **settings)
    broken = tmp_path / "broken" / "out"
    shutil.copytree(unbroken / "checkpoint-4", broken / "checkpoint-4")
    shutil.copy(unbroken / "run.json", broken)
    train(tmp_path / "broken", **settings)

    starts = json.loads((broken / "run.json").read_text())["starts"]
    assert [start["resumed_from"] for start in starts] == [None, "checkpoint-4"]
    assert losses_of(broken) == losses_of(unbroken) and sorted(losses_of(unbroken)) == list(range(1, 9))
    rest = [sample for sample in samples_of(tmp_path / "unbroken") if sample[0] >= 4]
    assert samples_of(tmp_path / "broken") == rest and len(rest) == 32
    masks = read_mask_log(unbroken)
    assert read_mask_log(broken) == {step: masks[step] for step in (5, 6, 7, 8)} and len(masks) == 8
    assert_same_tensors(unbroken / "model.safetensors", broken / "model.safetensors")
    if teacher == "ema":
        assert_same_tensors(*(folder / "checkpoint-8" / "ema_teacher.safetensors" for folder in (unbroken, broken)))
        average = load_file(unbroken / "checkpoint-8" / "ema_teacher.safetensors")
        weights = load_file(unbroken / "model.safetensors")
        assert any(not torch.equal(average[name], weights[f"ehm.{name}"]) for name in average)
    states = [torch.load(folder / "checkpoint-8" / "optimizer.pt")["state"] for folder in (unbroken, broken)]
    for index, moments in states[0].items():
        assert all(torch.equal(moments[name], states[1][index][name]) for name in moments)


def test_a_run_that_an_earlier_version_began_goes_on(tmp_path, shards):
    """Its record lacks a setting that came later; what stood for it then is what it is compared with."""
    settings = {"data": {"train": {"path": "parquet", "data_files": shards}}, "training": {"save_strategy": "steps"}}
    settings["training"]["save_steps"] = 2
    out = train(tmp_path / "run", **settings)
    record = json.loads((out / "run.json").read_text())
    del record["augmentation"]["decoder"]
    (out / "run.json").write_text(json.dumps(record))
    shutil.rmtree(out / "checkpoint-4")
    train(tmp_path / "run", **settings)
    (out / "run.json").write_text(json.dumps(record))
    shutil.rmtree(out / "checkpoint-4")
    settings["data"]["decoder"] = "simplejpeg"
    with pytest.raises(ValueError, match=r"decoder='simplejpeg' \(was 'pil'\)"):
        train(tmp_path / "run", **settings)


def test_a_run_begun_when_all_layers_were_the_default_keeps_its_teacher(tmp_path, shards):
    """Its record does not tell its layers: to go on it has to be told them, and ends as it would have."""
    settings = {
        "data": {"train": {"path": "parquet", "data_files": shards}},
        "training": {"save_strategy": "steps", "save_steps": 2},
    }
    two_layers = {"num_hidden_layers": 2}
    whole = train(tmp_path / "whole", model=two_layers | {"affinity_layers": "all"}, **settings)
    out = shutil.copytree(whole, tmp_path / "run" / "out", ignore=shutil.ignore_patterns("checkpoint-4"))
    record = json.loads((out / "run.json").read_text())
    assert record.pop("resolved") == {"affinity_layers": [0, 1]}
    del record["model"]["affinity_layers"]
    (out / "run.json").write_text(json.dumps(record))
    for layers in ({}, {"affinity_layers": [0]}):
        with pytest.raises(ValueError, match=r"other settings: affinity_layers=\[[01]\] \(was \[0, 1\]\)"):
            train(tmp_path / "run", model=two_layers | layers, **settings)
    train(tmp_path / "run", model=two_layers | {"affinity_layers": "all"}, **settings)
    assert_same_tensors(whole / "model.safetensors", out / "model.safetensors")
    shutil.rmtree(out / "checkpoint-4")
    with pytest.raises(ValueError, match=r"affinity_layers=\[1\] \(was \[0, 1\]\)"):
        train(tmp_path / "run", model=two_layers, **settings)


def test_a_run_goes_on_from_its_newest_checkpoint_without_decoding_what_it_skips(tmp_path, shards, monkeypatch):
    """Resumed at step 3 of 4, 8 of 32 positions are asked for; a fifth run of a finished one asks for none."""
    asked = []
    getitem = pretrain.PretrainingImages.__getitem__
    monkeypatch.setattr(pretrain.PretrainingImages, "__getitem__", lambda self, p: asked.append(p) or getitem(self, p))
    settings = {
        "data": {"train": {"path": "parquet", "data_files": shards}},
        "training": {"save_strategy": "steps", "save_steps": 1},
    }
    out = train(tmp_path / "run", **settings)
    assert asked == list(range(32))
    shutil.rmtree(out / "checkpoint-4")
    asked.clear()
    train(tmp_path / "run", **settings)
    assert asked == list(range(24, 32))


def test_never_resuming_does_not_mix_two_runs_in_one_folder(tmp_path, shards):
    """A fresh run beside checkpoints of another is refused: "auto" would later go on from the wrong ones."""
    settings = {"data": {"train": {"path": "parquet", "data_files": shards}}}
    saving = {"save_strategy": "steps", "save_steps": 2}
    out = train(tmp_path / "run", **settings, training=saving)
    fresh = {"resume_from_checkpoint": "never"}
    refusal = "holds checkpoint-4 of an earlier run, and .*'never' or null; choose another folder"
    with pytest.raises(ValueError, match=refusal):
        train(tmp_path / "run", **settings, training=saving | fresh)
    for number in (2, 4):
        shutil.rmtree(out / f"checkpoint-{number}")
    train(tmp_path / "run", **settings, training=saving | fresh)
    assert [start["resumed_from"] for start in json.loads((out / "run.json").read_text())["starts"]] == [None]
    assert len(samples_of(tmp_path / "run")) == 2 * 32


def test_null_is_no_way_to_crash(tmp_path, shards):
    """`resume_from_checkpoint: null`, the Trainer's own default, trains all steps or is refused as a setting."""
    settings = {"data": {"train": {"path": "parquet", "data_files": shards}}}
    try:
        train(tmp_path / "run", **settings, training={"resume_from_checkpoint": None})
    except ValueError as error:
        assert "resume_from_checkpoint" in str(error)
    else:
        assert len(samples_of(tmp_path / "run")) == 32


@pytest.mark.parametrize(
    "section, key, value, before",
    [
        ("training", "seed", 3, "'not set'"),
        ("training", "global_batch_size", 4, "8"),
        ("model", "mask_ratio", 0.5, "'not set'"),
        ("data", "horizontal_flip", False, "True"),
        ("training", "max_steps", 8, "4"),
        ("training", "num_samples", 80, "'not set'"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(tmp_path, shards, section, key, value, before):
    """What decides samples and masks is named with both values, instead of a run that is neither one nor the other."""
    data = {"train": {"path": "parquet", "data_files": shards}}
    saving = {"save_strategy": "steps", "save_steps": 2}
    out = train(tmp_path / "run", data=data, training=saving | {"max_steps": 4})
    shutil.rmtree(out / "checkpoint-4")
    changed = {"data": data, "training": saving | {"max_steps": 4}}
    changed[section] = changed.get(section, {}) | {key: value}
    if key == "num_samples":
        changed["training"]["max_steps"] = -1
    with pytest.raises(
        ValueError, match=rf"other settings: .*{key}={value} \(was {before}\).*model.pretrained to start"
    ):
        train(tmp_path / "run", **changed)
    elsewhere = changed["training"] | {"resume_from_checkpoint": str(out / "checkpoint-2")}
    with pytest.raises(ValueError, match=rf"other settings: .*{key}={value} \(was {before}\)"):
        train(tmp_path / "other", **changed | {"training": elsewhere})


def test_nor_with_other_images(tmp_path, shards):
    """Files, how many of them are read, and how many there are; where they lie may change."""
    saving = {"save_strategy": "steps", "save_steps": 2}

    def resume(run: Path, files: list, **source):
        data = {"train": {"path": "parquet", "data_files": [str(file) for file in files]} | source}
        return train(run, data=data, training=saving)

    out = resume(tmp_path / "run", shards)
    shutil.rmtree(out / "checkpoint-4")
    with pytest.raises(ValueError, match=r"data.train.max_images=20 \(was 'not set'\), data.train.rows=20 \(was 27\)"):
        resume(tmp_path / "run", shards, max_images=20)
    with pytest.raises(ValueError, match=r"data.train.data_files=.*data.train.rows="):
        resume(tmp_path / "run", shards[:1])
    moved = tmp_path / "elsewhere" / Path(shards[0]).parent.name
    shutil.copytree(Path(shards[0]).parent, moved)
    resume(tmp_path / "run", [moved / Path(shard).name for shard in shards])


def test_nor_with_another_share_of_a_stream(tmp_path, shards):
    """How many files a stream has is known, and which; not how many images."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    source = {"path": "parquet", "data_files": shards, "streaming": True}
    out = train(tmp_path / "run", data={"train": source}, training=saving)
    shutil.rmtree(out / "checkpoint-4")
    with pytest.raises(ValueError, match=r"data.train.data_files=.*data.train.shards=2 \(was 3\)"):
        train(tmp_path / "run", data={"train": source | {"data_files": shards[:2]}}, training=saving)


@pytest.mark.parametrize(
    "one, other, alike",
    [
        ("/a/cats/train.parquet", "/b/data/cats/train.parquet", True),
        ("/a/cats/train.parquet", "/a/dogs/train.parquet", False),
        ("/data/cats/**/*.jpg", "/mnt/data/cats/**/*.jpg", True),
        ("/data/cats/**/*.jpg", "/data/dogs/**/*.jpg", False),
        ("hf://datasets/a/one/data/train.parquet", "hf://datasets/b/two/data/train.parquet", False),
        (["/x/y/1.tar", "/x/y/2.tar"], ["/z/x/y/1.tar", "/z/x/y/2.tar"], True),
        ({"train": "/x/y/1.tar"}, {"train": "/x/y/3.tar"}, False),
    ],
)
def test_files_are_known_by_the_end_of_their_path(one, other, alike):
    first, second = (identity_of(ImageSource("webdataset", data_files=files), {"rows": 3}) for files in (one, other))
    assert (first == second) == alike and first["data.train.rows"] == 3


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_with_rates_of_its_own_takes_no_other(tmp_path, shards, schedule):
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": schedule}
    data = {"train": {"path": "parquet", "data_files": shards}, **PROBES}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "linear_probe": False}
    out = train(tmp_path / "run", data=data, training=settings)
    shutil.rmtree(out / "checkpoint-4")
    refusal = rf"{schedule} goes on with the rates .* base_learning_rate=0.016 \(was 0.032\)"
    with pytest.raises(ValueError, match=refusal):
        train(tmp_path / "run", data=data, training=settings | {"base_learning_rate": 0.016})
    train(tmp_path / "run", data=data, training=settings)


def test_what_an_optimiser_keeps_beside_its_rates_is_the_checkpoints(tmp_path, shards, monkeypatch):
    """As schedule-free optimisers do, which count their steps in their groups."""

    class Counting(torch.optim.SGD):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            for group in self.param_groups:
                group["k"] = 0

        def step(self, closure=None):
            for group in self.param_groups:
                group["k"] += 1
            return super().step(closure)

    monkeypatch.setattr(EHMTrainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *_: (Counting, {"lr": 1e-3})))
    data, saving = {"train": {"path": "parquet", "data_files": shards}}, {"save_strategy": "steps", "save_steps": 2}
    out = train(tmp_path / "run", data=data, training=saving)
    shutil.rmtree(out / "checkpoint-4")
    trainer = pretrain.prepare(load_recipe(tmp_path / "run" / "recipe.yaml"))
    pretrain.execute(trainer)
    assert {group["k"] for group in trainer.optimizer.param_groups} == {4}


def test_a_changed_rate_holds_from_the_next_start_on_and_is_told(tmp_path, shards):
    """What the message of a diverged run asks for: rates and betas of the recipe win over the checkpoint's."""
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear", "weight_decay": 0.1}
    data = {"train": {"path": "parquet", "data_files": shards}}
    out = train(tmp_path / "run", data=data, training=saving)
    shutil.rmtree(out / "checkpoint-4")
    changed = {"base_learning_rate": 0.016, "adam_beta2": 0.5, "weight_decay": 0.0}
    recipe = write_recipe(tmp_path / "run" / "recipe.yaml", data=data, training=saving | changed)
    trainer = pretrain.prepare(load_recipe(recipe))
    pretrain.execute(trainer)
    rates = {row["step"]: row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row}
    assert rates == pytest.approx({1: 1e-3, 2: 0.75e-3, 3: 0.25e-3, 4: 0.125e-3})  # half of what it would be
    assert {(group["betas"], group["weight_decay"]) for group in trainer.optimizer.param_groups} == {((0.9, 0.5), 0.0)}
    assert "resumed from checkpoint-2" in (card := (out / "README.md").read_text())
    assert "; from here on adam_beta2=0.5 (was 'not set'); from here on base_learning_rate=0.016 (was 0.032)" in card


def test_a_checkpoint_cut_short_by_a_kill_is_not_resumed_from(tmp_path, shards):
    """Killed while writing checkpoint-4, a run goes on from checkpoint-3, which is whole."""
    settings = {
        "data": {"train": {"path": "parquet", "data_files": shards}},
        "training": {"save_strategy": "steps", "save_steps": 1},
    }
    out = train(tmp_path / "run", **settings)
    shutil.copy(out / "model.safetensors", tmp_path / "unbroken.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json"):  # written after the weights, in this order
        (out / "checkpoint-4" / name).unlink()
    train(tmp_path / "run", **settings)
    starts = json.loads((out / "run.json").read_text())["starts"]
    assert [start["resumed_from"] for start in starts] == [None, "checkpoint-3"]
    assert_same_tensors(out / "model.safetensors", tmp_path / "unbroken.safetensors")


# The same run by other means


def test_the_plain_trainer_trains_the_same_weights(tmp_path, shards):
    """transformers' own Trainer with ProgressCallback: equal losses and weights, bit by bit."""
    recipe = load_recipe(
        write_recipe(tmp_path / "recipe.yaml", data={"train": {"path": "parquet", "data_files": shards}})
    )
    config = EHMConfig(**recipe.model)

    def train_with(cls, folder, **more):
        args = EHMTrainingArguments(**(recipe.training | {"output_dir": str(tmp_path / folder)}))
        set_seed(args.seed)
        model = EHMForPreTraining(config)
        images = pretrain.training_images(recipe.data, args, config)
        collator = NormalizingCollator(recipe.data.image_mean, recipe.data.image_std)
        trainer = cls(model=model, args=args, train_dataset=images, data_collator=collator, **more)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return losses, model.state_dict()

    ours, weights = train_with(EHMTrainer, "ours")
    theirs, plain_weights = train_with(Trainer, "theirs", callbacks=[ProgressCallback()])
    assert len(ours) == 4 and ours == theirs
    assert all(torch.equal(weights[name], plain_weights[name]) for name in weights)


def test_without_progress_the_plain_trainer_is_told_what_is_missing(tmp_path, shards):
    """Evolved masks without a notion of progress are an error, not random masks."""
    recipe = load_recipe(
        write_recipe(tmp_path / "recipe.yaml", data={"train": {"path": "parquet", "data_files": shards}})
    )
    args, config = EHMTrainingArguments(**recipe.training), EHMConfig(**recipe.model)
    images = pretrain.training_images(recipe.data, args, config)
    collator = NormalizingCollator(recipe.data.image_mean, recipe.data.image_std)
    trainer = Trainer(model=EHMForPreTraining(config), args=args, train_dataset=images, data_collator=collator)
    with pytest.raises(ValueError, match="progress is not known.*ProgressCallback"):
        trainer.train()


def test_accumulated_batches_are_one_batch(tmp_path, shards):
    """2 x 4 images a step and 8 at once: the same samples, losses equal to 1e-5."""
    data = {"train": {"path": "parquet", "data_files": shards}}
    whole = train(tmp_path / "whole", data=data)
    halves = train(tmp_path / "halves", data=data, training={"gradient_accumulation_steps": 2})
    assert samples_of(tmp_path / "halves") == samples_of(tmp_path / "whole")
    assert losses_of(halves) == pytest.approx(losses_of(whole), abs=1e-5) and len(losses_of(whole)) == 4


@pytest.fixture(scope="module", params=[False, True], ids=["indexed", "streamed"])
def one_and_two(request, tmp_path_factory, shards):
    """Folders of the same run by one process, and by two under torchrun."""
    folder = tmp_path_factory.mktemp("processes")
    source = {"path": "parquet", "data_files": shards, "streaming": request.param}
    settings = {
        "model": {"teacher": "ema"},
        "data": {"train": source, "shuffle_window": 6} | PROBES,
        "training": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    }
    train(folder / "one", **settings)
    (folder / "two").mkdir()
    recipe = write_recipe(folder / "two" / "recipe.yaml", **settings)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = launched(folder, *launch, Path(__file__).with_name("recorded_run.py"), folder / "two", recipe)
    assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two"


def test_two_processes_train_as_one(one_and_two):
    """A global batch of 8 in one process, or 4 + 4: the same samples in each step, losses and probes equal to 1e-5."""
    one, two = one_and_two
    assert samples_of(two) == samples_of(one) and len(samples_of(one)) == 32
    assert len((two / "samples-1.jsonl").read_text().splitlines()) == 16
    assert read_mask_log(two / "out") == read_mask_log(one / "out") and len(read_mask_log(one / "out")) == 4
    assert (
        losses_of(two / "out") == pytest.approx(losses_of(one / "out"), abs=1e-5) and len(losses_of(one / "out")) == 4
    )
    assert json.loads((two / "out" / "run.json").read_text())["starts"][0]["processes"] == 2
    for theirs, ours in zip(evaluations_of(two / "out"), evaluations_of(one / "out"), strict=True):
        names = ("step", "eval_knn", "eval_linear")
        assert [theirs[name] for name in names] == [ours[name] for name in names]


def test_four_processes_with_workers_see_what_one_sees(tmp_path, shards):
    """8 images a step by one process, or by four with two workers each: the same samples, crops, seeds and masks."""
    data = {"train": {"path": "parquet", "data_files": shards, "streaming": True}, "shuffle_window": 6}
    one = train(tmp_path / "one", data=data)
    (tmp_path / "four").mkdir()
    recipe = write_recipe(tmp_path / "four" / "recipe.yaml", data=data, training={"dataloader_num_workers": 2})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    done = launched(tmp_path, *launch, Path(__file__).with_name("recorded_run.py"), tmp_path / "four", recipe)
    assert done.returncode == 0, done.stderr
    assert samples_of(tmp_path / "four") == samples_of(tmp_path / "one")
    assert read_mask_log(tmp_path / "four" / "out") == read_mask_log(one) and len(read_mask_log(one)) == 4
    assert len(list((tmp_path / "four" / "out").glob("masks-*.jsonl"))) == 4


@pytest.mark.parametrize("first", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, shards, first):
    """4 steps by one process and 4 by two, or the other way round: samples and masks of the run by one alone."""
    settings = {
        "data": {"train": {"path": "parquet", "data_files": shards, "streaming": True}, "shuffle_window": 6},
        "training": {"max_steps": 8, "save_strategy": "steps", "save_steps": 4},
    }
    whole = train(tmp_path / "whole", **settings)
    (tmp_path / "parts").mkdir()
    recipe = write_recipe(tmp_path / "parts" / "recipe.yaml", **settings)
    script, out = Path(__file__).with_name("recorded_run.py"), tmp_path / "parts" / "out"
    for processes in (first, 3 - first):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
        done = launched(tmp_path, sys.executable, *launch, script, tmp_path / "parts", recipe)
        assert done.returncode == 0, done.stderr
        if (out / "checkpoint-8").exists() and processes == first:
            shutil.rmtree(out / "checkpoint-8")
    starts = json.loads((out / "run.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [first, 3 - first]
    assert starts[1]["resumed_from"] == "checkpoint-4"
    assert read_mask_log(out) == read_mask_log(whole) and len(read_mask_log(whole)) == 8
    assert losses_of(out) == pytest.approx(losses_of(whole), abs=1e-5)


def test_the_evaluation_loss_does_not_depend_on_the_number_of_processes(one_and_two):
    """10 held-out images are no multiple of what two processes take at a time; each counts once all the same."""
    one, two = ([row["eval_loss"] for row in evaluations_of(folder / "out")] for folder in one_and_two)
    assert two == pytest.approx(one, abs=1e-5) and len(one) == 2


def test_accelerate_launch_runs_the_script(tmp_path, shards):
    """`accelerate launch train_ehm.py` with one process trains as `run` in this process does."""
    data = {"train": {"path": "parquet", "data_files": shards}}
    here = train(tmp_path / "here", data=data)
    (tmp_path / "there").mkdir()
    recipe = write_recipe(tmp_path / "there" / "recipe.yaml", data=data)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    plainly = ["--cpu", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = launched(tmp_path, *launch, *plainly, ROOT / "train_ehm.py", recipe)
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "there" / "out") == pytest.approx(losses_of(here), abs=1e-6)


# What a run leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Output folder of a run with probes, segments, gallery, checkpoints and TensorBoard."""
    folder = tmp_path_factory.mktemp("finished")
    training = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "num_gallery_images": 2,
        "report_to": "tensorboard",
    }
    return train(folder, {"teacher": "ema"}, PROBES | SEGMENTS, training)


def test_each_log_explains_itself(finished):
    """Loss, progress, nodes (16 to 2 in 4 steps), mask shape and where the time went, in each row."""
    rows = [row for row in log_of(finished) if "loss" in row]
    assert [row["progress"] for row in rows] == [0, 0.25, 0.5, 0.75]  # of the masks of the step that is logged
    assert [row["num_nodes"] for row in rows] == [16, 12, 9, 6]  # 16 - 14 p: 16, 12.5, 9, 5.5; round half to even
    for row in rows:
        assert {"learning_rate", "grad_norm", "mask_region_size", "mask_largest_region_share"} <= row.keys()
        assert 0 < row["mask_compactness"] <= 1 and row["images_per_second"] > 0
        shares = [row[f"{part}_share"] for part in ("data_wait", "teacher", "mask")]
        assert all(0 <= share <= 1 for share in shares) and 0 < sum(shares) <= 1
        assert row["teacher_share"] > 0 and row["mask_share"] > 0


def test_random_masks_have_no_teacher_and_no_nodes(tmp_path):
    """The log of MAE's policy claims neither."""
    rows = [row for row in log_of(train(tmp_path / "run", {"mask_policy": "random"})) if "loss" in row]
    assert all("num_nodes" not in row and row["teacher_share"] == 0 for row in rows)


def test_curves_reach_tensorboard(finished):
    """An event file lies in the output folder and holds the figures of the log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = finished.rglob("events.out.tfevents.*")
    curves = EventAccumulator(str(events))
    curves.Reload()
    logged = {row["step"]: row["loss"] for row in log_of(finished) if "loss" in row}
    assert {e.step: e.value for e in curves.Scalars("train/loss")} == pytest.approx(logged, rel=1e-6)
    assert {"train/progress", "train/num_nodes", "train/images_per_second"} <= set(curves.Tags()["scalars"])
    assert {"eval/loss", "eval/knn", "eval/hierarchy_ari"} <= set(curves.Tags()["scalars"])


def test_each_evaluation_is_one_row(finished):
    """Before the first step, and after steps 2 and 4: loss under the final masks, probes, hierarchy."""
    rows = [row for row in log_of(finished) if "eval_runtime" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row in rows:
        assert {"eval_loss", "eval_knn", "eval_linear", "eval_hierarchy_ari"} <= row.keys()
        assert 0 <= row["eval_knn"] <= 100 and 0 <= row["eval_linear"] <= 100
    results = json.loads((finished / "results.json").read_text())
    assert results["steps"] == 4 and results["evaluations"] == rows
    assert {"eval_knn", "eval_linear", "eval_hierarchy_ari"} <= results["references"].keys()


def test_the_evaluation_loss_belongs_to_the_weights_not_to_the_moment(finished, tmp_path):
    """The last loss is that of the saved model and saved average on the held-out images with seeds 0, 1, 2, ..."""
    recipe = load_recipe(finished.parent / "recipe.yaml")
    args, config = EHMTrainingArguments(**recipe.training), EHMConfig(**recipe.model)
    _, held_out, _ = pretrain.build_evaluators(recipe.data, args, config, EHMForPreTraining(config), images=None)
    batch = NormalizingCollator(recipe.data.image_mean, recipe.data.image_std)(list(held_out))
    model, teacher = EHMForPreTraining.from_pretrained(finished).eval(), EHMModel(config).eval()
    teacher.load_state_dict(load_file(finished / "ema_teacher.safetensors"))
    model.attach_teacher(teacher)
    with torch.no_grad():
        loss = float(model(**batch).loss)
    assert evaluations_of(finished)[-1]["eval_loss"] == pytest.approx(loss, abs=1e-5)


def test_a_checkpoint_holds_what_is_promised_and_no_pickled_arguments(finished):
    """Weights, config, code, processor, card, average, state; hashes in the card are those of the files."""
    for folder in (finished, finished / "checkpoint-2", finished / "checkpoint-4"):
        names = {path.name for path in folder.iterdir()}
        code = {"configuration_ehm.py", "hierarchy_ehm.py", "masking_ehm.py", "mask_policies_ehm.py", "modeling_ehm.py"}
        assert {"model.safetensors", "config.json", "README.md", "preprocessor_config.json"} | code <= names
        assert {"training_args.json", "ema_teacher.safetensors"} <= names
        assert not list(folder.glob("*.bin")) and not list(folder.glob("*args*.p*"))
        assert json.loads((folder / "training_args.json").read_text())["max_steps"] == 4
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"} <= {
        path.name for path in (finished / "checkpoint-4").iterdir()
    }


def test_a_checkpoint_is_a_model(finished):
    """AutoModel and AutoModelForPreTraining load it, and the processor beside it fits the encoder."""
    for folder in (finished / "checkpoint-4", finished):
        encoder, whole = AutoModel.from_pretrained(folder).eval(), AutoModelForPreTraining.from_pretrained(folder)
        assert type(encoder) is EHMModel and type(whole) is EHMForPreTraining
        saved = load_file(folder / "model.safetensors")
        assert all(torch.equal(tensor, saved[f"ehm.{name}"]) for name, tensor in encoder.state_dict().items())
        assert all(torch.equal(tensor, saved[name]) for name, tensor in whole.state_dict().items())
        pixels = AutoImageProcessor.from_pretrained(folder)(picture(3, 50, 40), return_tensors="pt").pixel_values
        assert encoder(pixels).pooler_output.shape == (1, MODEL["hidden_size"])


def test_the_processor_normalises_as_training_does(finished):
    """A picture of the native size becomes what the collator makes of its pixels."""
    image = picture(3, 32, 32)
    pixels = AutoImageProcessor.from_pretrained(finished)(image, return_tensors="pt").pixel_values
    data = load_recipe(finished.parent / "recipe.yaml").data
    raw = torch.tensor(list(image.tobytes()), dtype=torch.uint8).reshape(32, 32, 3).permute(2, 0, 1)
    ours = NormalizingCollator(data.image_mean, data.image_std)([{"pixel_values": raw, "mask_seed": 0}])
    torch.testing.assert_close(pixels, ours["pixel_values"], rtol=1e-5, atol=1e-5)


def test_pictures_are_drawn(finished):
    """Gallery and curves are images, and each evaluation added a row to the gallery."""
    from PIL import Image

    for name in ("gallery.png", "curves.png"):
        assert min(Image.open(finished / name).size) > 100
    assert len(list((finished / "gallery").glob("*.npz"))) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_images_alone_give_pictures_and_no_figures(tmp_path, streaming):
    """Without other images the gallery shows those that are trained on, as wholes; the weights are the same."""
    from PIL import Image

    rows = [b"text" if number % 4 == 0 else encode(picture(number)) for number in range(12)]
    source = {"path": "parquet", "data_files": write_shards(tmp_path, [rows]), "streaming": streaming}
    data = {"train": source, "max_skipped_share": 1.0}
    drawn = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "num_gallery_images": 3}
    out = train(tmp_path / "run", data=data, training=drawn)
    assert min(Image.open(out / "gallery.png").size) > 100
    assert len(list((out / "gallery").glob("*.npz"))) == 3
    card = (out / "README.md").read_text()
    assert "Nothing was measured." in card and "k-NN" not in card
    assert [list(row) for row in evaluations_of(out)] == [["epoch", "step"]] * 3
    bare = train(tmp_path / "bare", data=data, training={"num_gallery_images": 0})
    assert_same_tensors(out / "model.safetensors", bare / "model.safetensors")
    assert (out / "skipped_images.jsonl").read_text() == (bare / "skipped_images.jsonl").read_text()


def test_a_run_goes_on_with_other_images_in_its_gallery(tmp_path, caplog):
    """Its pictures begin anew, those of before are left out with a warning, and the run ends."""
    training = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    out = train(tmp_path / "run", data=PROBES, training=training | {"num_gallery_images": 2})
    shutil.rmtree(out / "checkpoint-4")
    (out / "gallery.png").unlink()
    run(tmp_path / "run", tmp_path / "run" / "recipe.yaml", "data.probe_train=null", "data.probe_test=null")
    assert "gallery: 1 earlier snapshots show other images" in caplog.text  # that of step 2
    assert (out / "gallery.png").exists() and (out / "checkpoint-4").exists()


def test_a_run_shorter_than_its_first_log_draws_no_curves(tmp_path):
    out = train(tmp_path / "run", training={"max_steps": 1, "logging_steps": 10, "num_gallery_images": 2})
    assert (out / "gallery.png").exists() and not (out / "curves.png").exists()


def test_a_gallery_takes_as_many_images_as_there_are(tmp_path):
    """Two sound images of three, asked for four; none where all are broken."""
    rows = [encode(picture(0)), b"text", encode(picture(1))]
    source = ImageSource("parquet", data_files=write_shards(tmp_path, [rows]))
    data = DataArguments(source)
    images = PretrainingImages(open_samples(source, 0, 8, (32, 32)), data, 0, (32, 32), num_positions=4)
    shown = images.some_whole(4)
    assert shown.shape == (2, 3, 32, 32) and shown.dtype == torch.uint8 and not torch.equal(shown[0], shown[1])
    (tmp_path / "broken").mkdir()
    source = ImageSource("parquet", data_files=write_shards(tmp_path / "broken", [[b"text"] * 3]))
    images = PretrainingImages(open_samples(source, 0, 8, (32, 32)), data, 0, (32, 32), num_positions=4)
    assert len(images.some_whole(4)) == 0


def test_the_card_counts_broken_images_not_visits(tmp_path):
    """3 of 12 pictures are broken and met again in each of three passes: the card says 3."""
    rows = [b"text" if number % 4 == 0 else encode(picture(number)) for number in range(12)]
    data = {"train": {"path": "parquet", "data_files": write_shards(tmp_path, [rows])}, "max_skipped_share": 1.0}
    out = train(tmp_path / "run", data=data)
    assert " 3 undecodable images were skipped; " in (out / "README.md").read_text()


# Length of a run


def test_epochs_are_counted_over_images(tmp_path, shards):
    """27 images, 2 epochs, 8 a step: 54 // 8 = 6 steps; a stream, whose length is not known, asks for max_steps."""
    recipe = load_recipe(
        write_recipe(
            tmp_path / "recipe.yaml",
            data={"train": {"path": "parquet", "data_files": shards}},
            training={"max_steps": -1, "num_train_epochs": 2},
        )
    )
    args, config = EHMTrainingArguments(**recipe.training), EHMConfig(**recipe.model)
    images = pretrain.training_images(recipe.data, args, config)
    assert args.max_steps == 6 and len(images) == 48
    streamed = dataclasses.replace(recipe.data, train=dataclasses.replace(recipe.data.train, streaming=True))
    args = EHMTrainingArguments(**recipe.training)
    with pytest.raises(
        ValueError, match="training.max_steps or training.num_samples must be set: a stream has no length"
    ):
        pretrain.training_images(streamed, args, config)
