"""Fine-tuned classification: whole runs of seconds, mixing by hand, and what is refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_recipes import (
    ROOT,
    SYNTHETIC,
    child_environment,
    encode,
    losses_of,
    picture,
    run_script,
    run_task,
    write_parquet,
    write_task_recipe,
)
from transformers import AutoModelForImageClassification, ViTConfig, ViTModel, pipeline

from modeling_ehm import EHMForImageClassification, EHMForPreTraining, EHMModel
from modeling_ehm.modeling_ehm import sincos_positions
from modeling_ehm.training.augment import mix_pair
from modeling_ehm.training.labelled import KeyedExamples, keyed_uniform
from modeling_ehm.training.pretrained import load_encoder
from modeling_ehm.training.recipes import RecipeError
from modeling_ehm.training.tasks import classify, load_recipe
from modeling_ehm.training.tasks.classify import MIX_STREAM, ClassificationData, MixedPairs, put_classifier

pytestmark = pytest.mark.usefixtures("own_cache")

DATA = {
    "train": SYNTHETIC | {"max_images": 12, "label_column": "label"},
    "test": SYNTHETIC | {"split": "test", "max_images": 6, "label_column": "label"},
}


def recipe_of(folder, pretrained, training=None, **data):
    return write_task_recipe(folder / "recipe.yaml", "classify", pretrained, DATA | data, training)


def test_one_run_leaves_a_model_that_stock_code_uses(tmp_path, pretrained, capsys):
    """Figures on the console and on disk, a card, a pipeline that names classes, and the logits that were judged."""
    figures = run_task(recipe_of(tmp_path, pretrained))
    assert {"top1", "top5", "loss"} <= figures.keys() and 0 <= figures["top1"] <= figures["top5"] <= 100
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert results["figures"] == figures and results["task"] == "classify" and results["steps"] == 2
    assert "top1" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and f"| top1 | {figures['top1']:.4f} |" in card
    assert str(tmp_path) not in card  # no folder of the machine
    answers = pipeline("image-classification", model=str(out))(picture(3, 40, 32), top_k=10)
    assert len(answers) == 10 and sum(answer["score"] for answer in answers) == pytest.approx(1, abs=1e-5)
    assert {answer["label"] for answer in answers} == set(
        EHMForImageClassification.from_pretrained(out).config.label2id
    )


def test_the_result_loads_without_the_package(tmp_path, pretrained, run_without_package):
    """With remote code allowed, the saved directory alone gives the same logits."""
    run_task(recipe_of(tmp_path, pretrained))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    torch.save({"pixels": pixels, "logits": model(pixels).logits.detach()}, tmp_path / "expected.pt")
    program = """
import torch
from transformers import AutoModelForImageClassification
torch.set_num_threads(1)
expected = torch.load(sys.argv[2], weights_only=True)
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert torch.equal(model(expected["pixels"]).logits, expected["logits"])
"""
    done = run_without_package(program, tmp_path / "out", tmp_path / "expected.pt")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, pretrained, workers):
    """Weights, averaged weights and losses are the same bits, whatever the number of workers."""
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "weight_average_decay": 0.9,
        "layer_decay": 0.75,
        "dataloader_num_workers": workers,
    }
    run_task(recipe_of(tmp_path / "whole", pretrained, settings), "model.drop_path_rate=0.2")
    broken = recipe_of(tmp_path / "broken", pretrained, settings)
    shutil.copytree(tmp_path / "whole" / "out" / "checkpoint-2", tmp_path / "broken" / "out" / "checkpoint-2")
    run_task(broken, "model.drop_path_rate=0.2", "training.dataloader_num_workers=0")
    for name in ("model.safetensors", "checkpoint-4/model.safetensors", "checkpoint-4/weight_average.safetensors"):
        one, other = (load_file(tmp_path / folder / "out" / name) for folder in ("whole", "broken"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert losses_of(tmp_path / "whole" / "out") == losses_of(tmp_path / "broken" / "out")
    averaged = load_file(tmp_path / "whole" / "out" / "model.safetensors")["classifier.weight"]
    trained = load_file(tmp_path / "whole" / "out" / "checkpoint-4" / "model.safetensors")["classifier.weight"]
    assert not torch.equal(averaged, trained)  # the averaged weights are what is saved in the end
    with pytest.raises(ValueError, match=r"other settings: data.train.max_images=.*data.train.rows="):
        run_task(broken, "data.train.max_images=16")


def test_two_processes_train_as_one(tmp_path, pretrained):
    """A global batch of 4 in one process, or 2 + 2: losses are equal to 1e-5, mixed pairs included.

    The Trainer's own evaluation loss is left out: it averages over padded batches.
    """
    settings = {"weight_average_decay": 0.9, "max_steps": 3}
    one = recipe_of(tmp_path / "one", pretrained, settings)
    run_task(one)
    two = recipe_of(tmp_path / "two", pretrained, settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "train_ehm.py", two]
    environment = child_environment(tmp_path / "home")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "two" / "out") == pytest.approx(losses_of(tmp_path / "one" / "out"), abs=1e-5)
    figures = [json.loads((tmp_path / name / "out" / "results.json").read_text())["figures"] for name in ("one", "two")]
    assert [figures[0][name] for name in ("top1", "top5")] == [figures[1][name] for name in ("top1", "top5")]


def test_a_frozen_encoder_keeps_its_weights(tmp_path, pretrained):
    run_task(recipe_of(tmp_path, pretrained, {"freeze_encoder": True, "learning_rate": 0.1}))
    before, after = (load_file(folder / "model.safetensors") for folder in (pretrained, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in after if name.startswith("ehm."))
    assert after["classifier.weight"].abs().max() > 0.01


def test_pairs_are_mixed_with_each_other():
    """Example p is what `mix_pair` makes of p and p ^ 1; the target has the same shares, smoothed."""

    def example(columns, uniform):
        return {"pixel_values": torch.full((3, 4, 4), float(columns)), "label": int(columns)}

    examples = KeyedExamples(range(6), example, seed=0, num_positions=7)
    data = ClassificationData(train=None, test=None, label_smoothing=0.1)
    mixed = MixedPairs(examples, data, num_labels=6)
    for position in range(6):
        own, other = (examples[p] for p in (position, position ^ 1))
        uniform = keyed_uniform(0, MIX_STREAM, position // 2, count=5)
        pixels, lam = mix_pair(own["pixel_values"], other["pixel_values"], uniform, 0.8, 1.0, 0.5)
        target = torch.full((6,), 0.1 / 6)
        target[own["label"]] += 0.9 * lam
        target[other["label"]] += 0.9 * (1 - lam)
        got = mixed[position]
        assert torch.equal(got["pixel_values"], pixels) and torch.allclose(got["labels"], target)
    alone = mixed[6]  # the last of an odd number mixes with itself
    assert torch.allclose(alone["pixel_values"], examples[6]["pixel_values"])
    again = MixedPairs(examples, data, num_labels=6)
    assert torch.equal(again[3]["labels"], mixed[3]["labels"])  # whatever was asked for before


def test_without_mixing_targets_are_the_labels():
    data = ClassificationData(train=None, test=None, mixup_alpha=0.0, cutmix_alpha=0.0, label_smoothing=0.0)
    example = {"pixel_values": torch.rand(3, 4, 4), "label": 2}
    got = MixedPairs(KeyedExamples([0], lambda columns, uniform: example, 0, 1), data, 4)[0]
    assert torch.equal(got["pixel_values"], example["pixel_values"])
    assert got["labels"].tolist() == [0, 0, 1, 0]


def test_augmentation_is_a_function_of_its_numbers(tmp_path, pretrained):
    task = classify.prepare(load_recipe(recipe_of(tmp_path, pretrained)))
    make = task.train_dataset.examples.make_example
    columns = {"image": picture(9, 64, 48), "label": 1}
    one, other = np.random.default_rng(0).random((2, 128))
    assert torch.equal(make(columns, one)["pixel_values"], make(columns, one)["pixel_values"])
    assert not torch.equal(make(columns, one)["pixel_values"], make(columns, other)["pixel_values"])


def test_a_damaged_image_is_told_in_one_line(tmp_path, pretrained):
    """Met in the middle of training, also by a worker: its row, and no traceback."""
    images = [encode(picture(number)) for number in range(8)]
    damaged = [*images[:3], images[3][: len(images[3]) // 2], *images[4:]]
    sources = {
        name: {"path": "parquet", "label_column": "label"}
        | {"data_files": write_parquet(tmp_path / f"{name}.parquet", encoded, label=[0, 1] * 4)}
        for name, encoded in (("train", damaged), ("test", images))
    }
    recipe = recipe_of(tmp_path, pretrained, **sources)
    for workers in (0, 1):
        done = run_script(recipe, f"training.dataloader_num_workers={workers}")
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "row 3 cannot be decoded" in last and last.endswith("mend it or leave it out of the data")


# From one checkpoint to another size or head


def test_positions_are_made_anew_for_another_size(pretrained):
    """From 32 px to (48, 64): the table is the sin-cos one of 6x8 patches, every other weight the checkpoint's."""
    encoder = load_encoder(str(pretrained), "sdpa", image_size=[48, 64])
    assert torch.equal(encoder.embeddings.position_embeddings, sincos_positions((6, 8), 64))
    native = EHMModel.from_pretrained(pretrained)
    for name, weight in native.state_dict().items():
        assert name.endswith("position_embeddings") or torch.equal(weight, encoder.state_dict()[name])


def test_a_classification_checkpoint_keeps_its_head(tmp_path, pretrained):
    run_task(recipe_of(tmp_path, pretrained))
    encoder = load_encoder(str(tmp_path / "out"), "sdpa")
    id2label = EHMForImageClassification.from_pretrained(tmp_path / "out").config.id2label
    names = [id2label[number] for number in range(10)]
    kept = put_classifier(encoder, names, str(tmp_path / "out"))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(kept.classifier.weight, saved["classifier.weight"])
    with pytest.raises(RecipeError, match=r"has a head for 10 classes, but the training data have 3; start from"):
        put_classifier(encoder, names[:3], str(tmp_path / "out"))
    with pytest.raises(RecipeError, match=r"has a head for other classes"):
        put_classifier(encoder, names[::-1], str(tmp_path / "out"))


def test_without_a_checkpoint_the_weights_are_random(tmp_path):
    path = write_task_recipe(tmp_path / "recipe.yaml", "classify", None, DATA)
    assert run_task(path)["top1"] >= 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["pretrained"] is None


# What is refused


def test_weights_that_do_not_fit_are_refused(tmp_path, pretrained):
    with pytest.raises(ValueError, match=r"do not fit EHMModel; .*of another shape: .*layers.0.mlp.fc1"):
        load_encoder(str(pretrained), "sdpa", intermediate_size=64)
    with pytest.raises(ValueError, match=r"do not fit EHMModel; missing: layers.3.attention"):
        load_encoder(str(pretrained), "sdpa", num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"unused: .*layers.2"):
        load_encoder(str(pretrained), "sdpa", num_hidden_layers=2)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    with pytest.raises(RecipeError, match=r"is of type 'vit'; ehm and vit_mae can be used"):
        load_encoder(str(tmp_path / "vit"), "sdpa")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_checkpoint_that_lacks_a_file_is_named(tmp_path, pretrained, missing):
    shutil.copytree(pretrained, tmp_path / "partial")
    (tmp_path / "partial" / missing).unlink()
    with pytest.raises((OSError, ValueError), match=missing):
        load_encoder(str(tmp_path / "partial"), "sdpa")


def test_a_checkpoint_that_is_nowhere_is_named():
    """A mistyped folder looks like a Hub id; the line says which field to look at."""
    with pytest.raises(OSError, match="model.pretrained='outputs/nowhere' is no directory that holds a model"):
        load_encoder("outputs/nowhere", "sdpa")


@pytest.mark.parametrize(
    "field, value",
    [
        ("crop_scale", [0.5]),
        ("random_erasing", 2.0),
        ("label_smoothing", -0.1),
        ("crop_pct", 0.0),
        ("rand_augment_magnitude", 11.0),
        ("rand_augment_ops", 21),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, pretrained, field, value):
    with pytest.raises(RecipeError, match=rf"data\.{field}="):
        load_recipe(recipe_of(tmp_path, pretrained, **{field: value}))


def test_labels_outside_the_training_classes_are_refused(tmp_path, pretrained):
    encoded = [encode(picture(n)) for n in range(4)]
    sources = {
        name: {"path": "parquet", "data_files": write_parquet(tmp_path / f"{name}.parquet", encoded, label=labels)}
        | {"label_column": "label"}
        for name, labels in (("train", [0, 1, 0, 1]), ("test", [0, 1, 2, 0]))
    }
    with pytest.raises(ValueError, match=r"test.*row 2 has label 2, not a class in \[0, 1\]|row 2 has label 2"):
        classify.prepare(load_recipe(write_task_recipe(tmp_path / "recipe.yaml", "classify", pretrained, sources)))


def test_classes_of_other_names_are_refused(tmp_path, pretrained):
    """A test folder that lacks a class has every later number shifted: in range, and wrong."""
    sources = {}
    for name, classes in (("train", ["cat", "cow", "dog"]), ("test", ["cat", "dog"])):
        for number, kind in enumerate(classes):
            (tmp_path / name / kind).mkdir(parents=True)
            picture(number).save(tmp_path / name / kind / "0.png")
        sources[name] = {"path": "imagefolder", "data_dir": str(tmp_path / name), "label_column": "label"}
    with pytest.raises(ValueError, match="class 1 of the test set is 'dog', that of the training set 'cow'"):
        classify.prepare(load_recipe(write_task_recipe(tmp_path / "r.yaml", "classify", pretrained, sources)))


def test_averaged_weights_refuse_what_would_undo_them(tmp_path, pretrained):
    average = {"weight_average_decay": 0.9}
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    for more, message in (
        (best, "training.load_best_model_at_end=True"),
        ({"push_to_hub": True, "hub_strategy": "every_save"}, "training.hub_strategy='every_save'"),
    ):
        with pytest.raises(ValueError, match=message):
            classify.prepare(load_recipe(recipe_of(tmp_path, pretrained, average | more)))


def test_a_mask_token_is_left_out_of_training(tmp_path, make_config):
    """SimMIM's: nothing is masked in a task, and several processes would wait for its gradient in vain."""
    EHMForPreTraining(make_config(objective="simmim")).save_pretrained(tmp_path / "simmim")
    trainer = classify.prepare(load_recipe(recipe_of(tmp_path, tmp_path / "simmim")))
    frozen = [name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["ehm.embeddings.mask_token"]


def test_the_model_of_the_recipe_is_checked(tmp_path):
    path = write_task_recipe(tmp_path / "r.yaml", "classify", None, DATA, model={"num_channels": 1})
    with pytest.raises(RecipeError, match="model.num_channels=1"):
        classify.prepare(load_recipe(path))
