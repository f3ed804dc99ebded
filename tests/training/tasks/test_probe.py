"""Probes of frozen encoders, and few labels: features once, answers known by hand, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_recipes import SYNTHETIC, encode, picture, run_task, write_parquet, write_task_recipe
from torch import nn
from transformers import pipeline

from modeling_ehm import EHMForImageClassification, EHMModel
from modeling_ehm.training import features
from modeling_ehm.training.data import ImageSource
from modeling_ehm.training.features import fingerprint, frozen_features
from modeling_ehm.training.labelled import LabelledRows, image_processor
from modeling_ehm.training.recipes import RecipeError
from modeling_ehm.training.tasks import TASKS, load_recipe, low_shot
from modeling_ehm.training.tasks.low_shot import draw_rows, scaled
from modeling_ehm.training.tasks.probe import AttentiveProbe, LinearProbe, ProbeHead, Probes

pytestmark = pytest.mark.usefixtures("own_cache")

MEAN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
DATA = {
    "train": SYNTHETIC | {"max_images": 40, "label_column": "label"},
    "test": SYNTHETIC | {"split": "test", "max_images": 10, "label_column": "label"},
}


def solid_colours(folder, name, count):
    """Images of three plain colours, each a class, with a little noise: any encoder tells them apart."""
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
    noise = np.random.default_rng(len(name)).integers(0, 30, (count, 3))

    pixels = [Image.new("RGB", (32, 32), tuple(int(x) for x in colours[n % 3] + noise[n])) for n in range(count)]
    path = write_parquet(folder / f"{name}.parquet", [encode(p) for p in pixels], label=[n % 3 for n in range(count)])
    return {"path": "parquet", "data_files": path, "label_column": "label"}


@pytest.fixture
def colours(tmp_path):
    return {"train": solid_colours(tmp_path, "train", 60), "test": solid_colours(tmp_path, "test", 12)} | MEAN


# Features


def rows_of(count=5):
    source = ImageSource("synthetic", image_column="image", label_column="label", max_images=count)
    return LabelledRows(source, {"label": "label"}, (32, 32))


def test_features_are_the_encoders(tmp_path, pretrained):
    """Mean, class token and tokens are those of a plain forward on what the processor makes."""
    encoder, rows = EHMModel.from_pretrained(pretrained), rows_of()
    processor = image_processor(encoder.config, [0.5] * 3, [0.5] * 3)
    made = frozen_features(encoder.train(), rows, processor, tmp_path, ("mean", "cls", "tokens"), batch_size=2)
    assert encoder.training
    pixels = processor([rows[n]["image"] for n in range(5)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = encoder.eval()(pixels)
    assert np.allclose(made["mean"], outputs.pooler_output, atol=1e-6)
    assert np.allclose(made["cls"], outputs.last_hidden_state[:, 0], atol=1e-6)
    assert made["tokens"].dtype == np.float16
    assert np.allclose(made["tokens"], outputs.last_hidden_state[:, 1:], atol=1e-2)


def test_features_are_computed_once(tmp_path, pretrained, monkeypatch):
    """The same weights, images and pixels read the files; a changed weight, image set or processor does not."""
    encoder, rows = EHMModel.from_pretrained(pretrained), rows_of()
    processor = image_processor(encoder.config, [0.5] * 3, [0.5] * 3)
    before = np.array(frozen_features(encoder, rows, processor, tmp_path)["mean"])
    with monkeypatch.context() as patch:
        patch.setattr(features, "_compute", lambda *args: pytest.fail("computed again"))
        assert np.array_equal(frozen_features(encoder, rows, processor, tmp_path)["mean"], before)
    name = fingerprint(encoder, rows, processor, torch.float32)
    assert name != fingerprint(encoder, rows.select([0, 1]), processor, torch.float32)
    assert name != fingerprint(encoder, rows, image_processor(encoder.config, [0.4] * 3, [0.5] * 3), torch.float32)
    assert name != fingerprint(encoder, rows, processor, torch.bfloat16)
    encoder.config.hidden_act = "relu"
    assert name != fingerprint(encoder, rows, processor, torch.float32)
    encoder.config.hidden_act = "gelu"
    with torch.no_grad():
        encoder.layernorm.bias += 1
    assert name != fingerprint(encoder, rows, processor, torch.float32)
    assert np.allclose(frozen_features(encoder, rows, processor, tmp_path)["mean"], before + 1, atol=1e-5)


def test_an_interrupted_computation_leaves_no_features(tmp_path, pretrained):
    """A broken image in the second batch: the error names it, and no file bears the name of whole features."""
    path = write_parquet(tmp_path / "b.parquet", [encode(picture(0))] * 3 + [b"text"], label=[0, 1, 2, 0])
    rows = LabelledRows(ImageSource("parquet", data_files=path), {"label": "label"}, (32, 32))
    encoder = EHMModel.from_pretrained(pretrained)
    with pytest.raises(ValueError, match="row 3 cannot be decoded"):
        processor = image_processor(encoder.config, [0.5] * 3, [0.5] * 3)
        frozen_features(encoder, rows, processor, tmp_path / "features", batch_size=2)
    assert list((tmp_path / "features").glob("*.npy")) == []


def test_unknown_features_are_refused(tmp_path, pretrained):
    with pytest.raises(ValueError, match=r"holds \['median'\]; each must be one of mean, cls, tokens"):
        frozen_features(EHMModel.from_pretrained(pretrained), rows_of(), None, tmp_path, ("median",))


# Probes


def test_all_probes_on_images_that_any_encoder_tells_apart(tmp_path, pretrained, colours, capsys):
    """100 % each; the saved classifier answers as the linear probe did."""
    training = {"max_steps": 60, "global_batch_size": 32}
    path = write_task_recipe(tmp_path / "run" / "r.yaml", "probe", pretrained, colours, training, head={"k": 5})
    figures = run_task(path)
    assert figures["knn"] == figures["linear"] == figures["attentive"] == 100
    results = json.loads((tmp_path / "run" / "out" / "results.json").read_text())
    assert results["references"]["knn"] == 100 and results["steps"] == 60
    card = (tmp_path / "run" / "out" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "| knn | 100.0000 |" in card
    classify = pipeline("image-classification", model=str(tmp_path / "run" / "out"))

    answers = [classify(Image.new("RGB", (32, 32), colour))[0]["label"] for colour in ("#d03030", "#30d030", "#3030d0")]
    assert answers == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_the_encoder_is_not_trained(tmp_path, pretrained, colours):
    training = {"max_steps": 3, "global_batch_size": 8}
    run_task(write_task_recipe(tmp_path / "r.yaml", "probe", pretrained, colours, training, head={"kinds": ["linear"]}))
    before = EHMModel.from_pretrained(pretrained).state_dict()
    after = EHMForImageClassification.from_pretrained(tmp_path / "out").ehm.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_folded_probe_gives_the_same_logits():
    torch.manual_seed(0)
    probe = LinearProbe(6, 3)
    for _ in range(5):
        probe(torch.randn(32, 6) * 3 + 1, None)
    probe.eval()
    plain, features = nn.Linear(6, 3), torch.randn(4, 6)
    plain.load_state_dict(probe.folded())
    assert torch.allclose(plain(features), probe(features, None), atol=1e-5)


def test_probes_side_by_side_learn_as_each_alone():
    """The loss is the sum, so the gradient of a probe does not depend on the others."""
    head = ProbeHead(kinds=["linear"], learning_rates=[1e-3, 1e-2])
    torch.manual_seed(0)
    both = Probes(head, 6, 3)
    pooled, labels = torch.randn(8, 6), torch.randint(0, 3, (8,))
    outputs = both(pooled, labels=labels)
    outputs.loss.backward()
    assert outputs.logits.shape == (8, 2, 3)
    alone = LinearProbe(6, 3)
    alone.classifier.load_state_dict(both.probes[1].classifier.state_dict())
    nn.functional.cross_entropy(alone(pooled, None), labels).backward()
    assert torch.allclose(alone.classifier.weight.grad, both.probes[1].classifier.weight.grad, atol=1e-7)


def test_an_attentive_probe_reads_tokens_in_any_order():
    torch.manual_seed(0)
    probe, tokens = AttentiveProbe(8, 2, 3), torch.randn(2, 5, 8)
    assert torch.allclose(probe(None, tokens), probe(None, tokens[:, [3, 1, 4, 0, 2]]), atol=1e-6)


@pytest.mark.parametrize(
    "head, message",
    [
        ({"kinds": ["svm"]}, r"head.kinds=\['svm'\] must name at least one of knn, linear, attentive"),
        ({"learning_rates": [0.0]}, r"head.learning_rates=\[0.0\]"),
        ({"held_out_share": 1.0}, r"head.held_out_share=1.0"),
        ({"kind": ["knn"]}, r"head.kind: unknown key \(did you mean 'kinds'\?\)"),
    ],
)
def test_probe_settings_that_cannot_be_are_refused(tmp_path, pretrained, head, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_task_recipe(tmp_path / "r.yaml", "probe", pretrained, DATA, head=head))


def test_options_that_would_be_ignored_are_refused(tmp_path, pretrained):
    for task, option in (
        ("probe", {"layer_decay": 0.5}),
        ("probe", {"push_to_hub": True}),
        ("low_shot", {"push_to_hub": True}),
        ("parts", {"learning_rate": 0.1}),
    ):
        data = {"images": SYNTHETIC | {"segments_column": "segments"}} if task == "parts" else DATA
        recipe = load_recipe(write_task_recipe(tmp_path / "r.yaml", task, pretrained, data, option))
        with pytest.raises(RecipeError, match=rf"training.{next(iter(option))}=.*: task '{task}' does not know this"):
            TASKS[task].prepare(recipe)


# Few labels


def test_draws_are_keyed_and_nested():
    """Each class has its number of rows; more shots contain fewer; other draws and seeds take others."""
    labels = np.arange(60) % 3
    one, five = (draw_rows(labels, shots, seed=0, draw=0) for shots in (1, 5))
    assert np.bincount(labels[five]).tolist() == [5, 5, 5] and set(one) <= set(five)
    assert np.array_equal(five, draw_rows(labels, 5, seed=0, draw=0))
    assert set(five) != set(draw_rows(labels, 5, seed=0, draw=1)) != set(draw_rows(labels, 5, seed=1, draw=1))
    shuffled = np.random.default_rng(0).permutation(60)
    assert np.bincount(labels[shuffled][draw_rows(labels[shuffled], 4, 0, 0)]).tolist() == [4, 4, 4]


def test_scaled_features_have_one_length():
    made = scaled(np.array([[3.0, 4.0], [0.0, 0.5]]))
    assert np.allclose((made**2).sum(1), 2) and made[0, 1] / made[0, 0] == pytest.approx(4 / 3)


def test_a_low_shot_run(tmp_path, pretrained, colours):
    """Colours are told apart from one image a class; the deviation over draws is there; fine-tuning runs too."""
    head = {"shots": [1, 2], "draws": 3, "fine_tune_draws": 1}
    training = {"max_steps": 2, "weight_average_decay": 0.5}
    figures = run_task(write_task_recipe(tmp_path / "r.yaml", "low_shot", pretrained, colours, training, head=head))
    assert figures["frozen_1_shot"] == figures["frozen_2_shot"] == 100 and figures["frozen_2_shot_sd"] == 0
    assert 0 <= figures["fine_tuned_2_shot"] <= 100
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["figures"] == figures
    assert results["draws"]["frozen_1_shot"] == [100, 100, 100] and len(results["draws"]["fine_tuned_2_shot"]) == 1


def test_fine_tuning_of_a_draw_does_not_touch_the_encoder(tmp_path, pretrained, colours):
    head = {"shots": [1], "draws": 1, "fine_tune_draws": 1}
    recipe = load_recipe(write_task_recipe(tmp_path / "r.yaml", "low_shot", pretrained, colours, head=head))
    task = low_shot.prepare(recipe)
    before = {name: weight.clone() for name, weight in task.encoder.state_dict().items()}
    low_shot.execute(task)
    assert all(torch.equal(before[name], weight) for name, weight in task.encoder.state_dict().items())


@pytest.mark.parametrize(
    "head, training, message",
    [
        ({"shots": []}, {}, r"head.shots=\[\]"),
        ({"draws": 1, "fine_tune_draws": 2}, {}, r"head.fine_tune_draws=2 in \[0, 1\]"),
        ({"regularization": 0.0}, {}, r"head.regularization=0.0"),
        ({"shots": [500]}, {}, r"head.shots=\[500\]: class '.*' has only \d+ training images"),
        ({"fine_tune_draws": 1}, {"max_steps": -1}, r"training.max_steps must be set"),
    ],
)
def test_low_shot_settings_that_cannot_be_are_refused(tmp_path, pretrained, head, training, message):
    with pytest.raises(RecipeError, match=message):
        recipe = write_task_recipe(tmp_path / "r.yaml", "low_shot", pretrained, DATA, training, head=head)
        low_shot.prepare(load_recipe(recipe))
