"""Semantic segmentation: whole runs of seconds with both heads, crops and ignored pixels by hand, what is refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from safetensors.torch import load_file
from tiny_recipes import (
    ROOT,
    SYNTHETIC,
    child_environment,
    encode,
    log_of,
    losses_of,
    picture,
    run_task,
    write_task_recipe,
)
from transformers import AutoImageProcessor, pipeline
from transformers.trainer_utils import EvalPrediction

from modeling_ehm import EHMModel
from modeling_ehm.modeling_ehm import sincos_positions
from modeling_ehm.training.data import random_resized_crop
from modeling_ehm.training.labelled import resized
from modeling_ehm.training.pictures import render_segmentation
from modeling_ehm.training.pretrained import load_encoder
from modeling_ehm.training.recipes import RecipeError
from modeling_ehm.training.tasks import load_recipe, segment
from modeling_ehm.training.tasks.segment import (
    Augmentation,
    SegmentationData,
    SegmentationFigures,
    SegmentationHead,
    jittered,
    predicted_map,
    put_head,
    resized_labels,
)

pytestmark = pytest.mark.usefixtures("own_cache")

UPERNET = {"kind": "upernet", "feature_scales": [2, 1, 0.5], "hidden_size": 8, "auxiliary_channels": 4}
LINEAR = {"kind": "linear"}
HEADS = pytest.mark.parametrize("head", [UPERNET, LINEAR], ids=["upernet", "linear"])
NAMES = ["sky", "road", "tree"]
SIZES = [(50, 37), (48, 32), (33, 47), (50, 37), (40, 40)]  # (width, height); no two axes are multiples of the patch


def map_of(number: int, width: int, height: int) -> np.ndarray:
    """Three stripes of classes and a border that belongs to none (11)."""
    labels = np.broadcast_to((np.arange(width) * 3 // width + number) % 3, (height, width)).astype(np.uint8)
    labels[0], labels[:, 0] = 11, 11
    return labels


def encode_map(labels: np.ndarray) -> bytes:
    return encode(PILImage.fromarray(labels))


def write_maps(path, images, maps) -> str:
    """One parquet file with the columns `image` and `mask`."""
    columns = {
        "image": [{"bytes": content, "path": None} for content in images],
        "mask": [None if content is None else {"bytes": content, "path": None} for content in maps],
    }
    Dataset.from_dict(columns, features=Features({"image": Image(), "mask": Image()})).to_parquet(str(path))
    return str(path)


def source_of(path, sizes=SIZES, images=None, maps=None, **more) -> dict:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = images or [encode(picture(40 * n, *size)) for n, size in enumerate(sizes)]
    maps = maps or [encode_map(map_of(n, *size)) for n, size in enumerate(sizes)]
    source = {"path": "parquet", "data_files": write_maps(path, images, maps)}
    return source | {"segments_column": "mask", "ignore_index": 11} | more


def recipe_of(folder, pretrained, head=LINEAR, training=None, model=None, **data):
    """Five small images with maps to train and to test on."""
    data = {"class_names": NAMES} | data
    data |= {name: source_of(folder / f"{name}.parquet") for name in ("train", "test") if name not in data}
    model = {"image_size": [32, 48]} | (model or {})
    return write_task_recipe(folder / "recipe.yaml", "segment", pretrained, data, training, head=head, model=model)


def prepared(*args, **kwargs):
    return segment.prepare(load_recipe(recipe_of(*args, **kwargs)))


def with_maps(tmp_path, maps, images=None, **more) -> dict:
    """Data whose training source has these maps, of images of 24x20 pixels."""
    images = images or [encode(picture(n)) for n in range(len(maps))]
    maps = [encode_map(labels) if isinstance(labels, np.ndarray) else labels for labels in maps]
    return {"train": source_of(tmp_path / "bad.parquet", images=images, maps=maps, **more)}


GOOD = map_of(0, 24, 20)


# Whole runs


@HEADS
def test_one_run_leaves_a_model_that_stock_code_uses(tmp_path, pretrained, head):
    """The pipeline's masks have the size of the image, and their IoU with the true maps is what the run said."""
    figures = run_task(recipe_of(tmp_path, pretrained, head))
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert results["figures"] == figures and results["task"] == "segment"
    assert {"mean_iou", "pixel_accuracy", "mean_accuracy", "loss"} <= figures.keys()
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card and str(tmp_path) not in card
    segmenter = pipeline("image-segmentation", model=str(out))
    both, either = np.zeros(3), np.zeros(3)
    for number, size in enumerate(SIZES):
        predicted = np.full(size[::-1], -1)
        for answer in segmenter(picture(40 * number, *size)):
            assert answer["mask"].size == size
            predicted[np.asarray(answer["mask"]) > 0] = NAMES.index(answer["label"])
        true = map_of(number, *size)
        for label in range(3):
            both[label] += ((predicted == label) & (true == label)).sum()
            either[label] += (((predicted == label) | (true == label)) & (true != 11)).sum()
    assert [figures[f"iou_{name}"] for name in NAMES] == pytest.approx(100 * both / either, abs=1e-9)
    assert figures["mean_iou"] == pytest.approx(100 * np.mean(both / either), abs=1e-9)


@HEADS
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, pretrained, head):
    """Two steps, or one and one: weights, batch norms' statistics and losses are the same bits."""
    settings = {"save_strategy": "steps", "save_steps": 1, "layer_decay": 0.75, "weight_average_decay": 0.9}
    source = SYNTHETIC | {"max_images": 6, "segments_column": "segments"}
    data = {"train": source, "test": source | {"split": "test", "max_images": 3}, "class_names": None}
    for name in ("whole", "broken"):
        if name == "broken":
            shutil.copytree(tmp_path / "whole" / "out" / "checkpoint-1", tmp_path / "broken" / "out" / "checkpoint-1")
        run_task(recipe_of(tmp_path / name, pretrained, head, settings, {"drop_path_rate": 0.2}, **data))
    for name in ("model.safetensors", "checkpoint-2/model.safetensors"):
        one, other = (load_file(tmp_path / folder / "out" / name) for folder in ("whole", "broken"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert any(key.endswith("running_var") for key in one)
    assert losses_of(tmp_path / "whole" / "out") == losses_of(tmp_path / "broken" / "out")
    assert len(losses_of(tmp_path / "whole" / "out")) == 2


@HEADS
def test_an_image_without_a_labelled_pixel_teaches_nothing(tmp_path, pretrained, head):
    """A batch of such images has a loss of 0, and not a number divided by none."""
    nothing = np.full((20, 24), 11, dtype=np.uint8)
    data = with_maps(tmp_path, [GOOD, nothing, nothing, nothing])
    auxiliary = {"auxiliary_loss_weight": 0} if head["kind"] == "upernet" else {}  # YAML's 0 is an int
    settings = {"max_steps": 2, "global_batch_size": 2}
    run_task(recipe_of(tmp_path, pretrained, head | auxiliary, settings, **data))
    least, most = sorted(losses_of(tmp_path / "out").values())
    assert least == 0 < most


def test_two_processes_judge_as_one(tmp_path, pretrained):
    """The figures of two processes are those of the saved model in one: 5 images of 4 sizes, each counted once.

    Both processes judge with the batch norm's statistics that process 0 saves, not each with its own.
    """
    noise = np.random.default_rng(0).integers(0, 256, (5, 50, 50, 3), dtype=np.uint8)  # maps that a breath changes
    images = [encode(PILImage.fromarray(noise[n, :height, :width])) for n, (width, height) in enumerate(SIZES)]
    sources = {name: source_of(tmp_path / f"{name}.parquet", images=images) for name in ("train", "test")}
    two = recipe_of(tmp_path / "two", pretrained, **sources)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "train_ehm.py", two, "training.per_device_eval_batch_size=1"]
    environment = child_environment(tmp_path / "home")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    got = json.loads((tmp_path / "two" / "out" / "results.json").read_text())["figures"]
    trainer = prepared(tmp_path / "one", pretrained, **sources)
    trainer.model.load_state_dict(load_file(tmp_path / "two" / "out" / "model.safetensors"))
    expected = trainer.evaluate()
    names = ["mean_iou", "pixel_accuracy", "mean_accuracy", *(f"iou_{name}" for name in NAMES)]
    assert [got[name] for name in names] == [expected[f"eval_{name}"] for name in names]


@HEADS
def test_accumulated_batches_weigh_as_one(tmp_path, pretrained, head):
    """Of equal images, 4 or 2 + 2 have one loss and one gradient; a sum over batches would double both."""
    data = {
        "train": source_of(tmp_path / "train.parquet", SIZES[:1]),
        "test": source_of(tmp_path / "test.parquet", SIZES[:1]),
        "crop_scale": [1.0, 1.0],  # of this area only the whole image fits
        "crop_ratio": [0.5, 2.0],
        "horizontal_flip": False,
    }
    logs = {}
    for steps in (1, 2):
        settings = {"max_steps": 1, "gradient_accumulation_steps": steps}
        run_task(recipe_of(tmp_path / str(steps), pretrained, head, settings, **data))
        logs[steps] = next(row for row in log_of(tmp_path / str(steps) / "out") if "loss" in row)
    assert logs[2]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)
    assert logs[2]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-3)


def test_a_frozen_encoder_keeps_its_weights(tmp_path, pretrained):
    run_task(recipe_of(tmp_path, pretrained, LINEAR, {"freeze_encoder": True, "learning_rate": 0.1}))
    before, after = (load_file(folder / "model.safetensors") for folder in (pretrained, tmp_path / "out"))
    for name in before:
        if name.startswith("ehm.") and not name.endswith("position_embeddings"):  # those are of another grid
            assert torch.equal(before[name], after[name]), name


def test_the_picture_shows_truth_and_prediction(tmp_path, pretrained):
    pytest.importorskip("matplotlib")
    run_task(recipe_of(tmp_path, pretrained))
    with PILImage.open(tmp_path / "out" / "predictions.png") as drawn:
        assert drawn.width > 900
    grey, true = np.full((40, 40, 3), 128, np.uint8), np.full((40, 40), 7)
    path = render_segmentation([(grey, true, np.zeros((40, 40), int))], NAMES, tmp_path / "one.png", ignore_index=7)
    pixels = np.asarray(PILImage.open(path).convert("RGB")).astype(int)
    middle = pixels[26 + 160]
    assert abs(middle[160] - 128).max() <= 2 and middle[480].min() == 255  # image, then truth: all ignored
    assert np.ptp(middle[800]) > 50  # the colour of class 0
    with pytest.raises(ValueError, match="examples is empty"):
        render_segmentation([], NAMES, tmp_path / "none.png")


# From a checkpoint to a head


def test_every_weight_of_the_checkpoint_is_under_the_head(tmp_path, pretrained):
    for head in (UPERNET, LINEAR):
        encoder = load_encoder(str(pretrained), "sdpa", image_size=[32, 48])
        model = put_head(encoder, SegmentationHead(**head), NAMES, 11, str(pretrained))
        inner = model.backbone if head is UPERNET else model.ehm
        native = EHMModel.from_pretrained(pretrained).state_dict()
        assert native.keys() == inner.state_dict().keys()
        for name, weight in native.items():
            assert name.endswith("position_embeddings") or torch.equal(weight, inner.state_dict()[name]), name
        assert model.config.id2label == dict(enumerate(NAMES))
        assert torch.equal(inner.embeddings.position_embeddings, sincos_positions((4, 6), 64))


def test_layers_are_spread_over_the_encoder():
    assert SegmentationHead().layers(12) == [3, 6, 9, 12]
    assert SegmentationHead(feature_scales=[2, 1, 0.5]).layers(3) == [1, 2, 3]
    assert SegmentationHead(out_indices=[4, 6, 8, 12]).layers(12) == [4, 6, 8, 12]


def test_a_linear_checkpoint_keeps_its_head(tmp_path, pretrained):
    run_task(recipe_of(tmp_path, pretrained))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    checkpoint, head = str(tmp_path / "out"), SegmentationHead("linear")
    kept = put_head(load_encoder(checkpoint, "sdpa"), head, NAMES, 11, checkpoint)
    for name in ("classifier.weight", "norm.running_mean"):
        assert torch.equal(kept.state_dict()[name], saved[name])
    with pytest.raises(RecipeError, match=r"has a head for 3 classes, but the data have 2; start from"):
        put_head(load_encoder(checkpoint, "sdpa"), head, NAMES[:2], 11, checkpoint)


# Images with their maps


def numbered(width, height) -> tuple[PILImage.Image, np.ndarray]:
    """An image whose red is the number of the pixel, and a map with the same numbers."""
    numbers = np.arange(width * height).reshape(height, width)
    return PILImage.fromarray(np.stack([numbers, numbers, numbers], 2).astype(np.uint8)), numbers


def augmented(size, uniform, image, labels, **data) -> tuple[np.ndarray, np.ndarray]:
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    data = SegmentationData(train=None, test=None, **plain, **data)
    example = Augmentation(data, size)({"image": image, "labels": labels}, uniform)
    return (example["pixel_values"][0] * 255).round().numpy(), example["labels"].numpy()


def test_crops_and_flips_keep_image_and_map_together():
    """A quarter of the area as a square is half of each side: the number in the image stays that of the map."""
    image, labels = numbered(16, 16)
    quarter = {"crop_scale": [0.25, 0.25], "crop_ratio": [1.0, 1.0]}
    boxes = set()
    for seed in range(8):
        uniform = np.random.default_rng(seed).random(128)
        left, top, right, bottom = random_resized_crop((16, 16), [0.25, 0.25], [1.0, 1.0], uniform[:22])
        expected = labels[top:bottom, left:right]
        expected = expected[:, ::-1] if uniform[22] < 0.5 else expected
        red, cut = augmented((8, 8), uniform, image, labels, **quarter)
        assert np.array_equal(cut, expected) and np.array_equal(red, expected)
        _, larger = augmented((16, 16), uniform, image, labels, **quarter)
        assert np.array_equal(larger, np.kron(expected, np.ones((2, 2), int)))
        boxes.add((left, top, uniform[22] < 0.5))
    assert len(boxes) == 8 and len({flipped for *_, flipped in boxes}) == 2


def test_flips_can_be_switched_off_and_colours_change_the_image_only():
    image, labels = numbered(16, 16)
    whole = {"crop_scale": [1.0, 1.0], "horizontal_flip": False}
    uniform = np.zeros(128)
    red, cut = augmented((16, 16), uniform, image, labels, **whole)
    assert np.array_equal(red, labels) and np.array_equal(cut, labels)
    red, cut = augmented((16, 16), uniform, image, labels, color_jitter=0.5, **whole)
    assert not np.array_equal(red, labels) and np.array_equal(cut, labels)
    assert jittered(image, 0.5, np.full(3, 0.5)).tobytes() == image.tobytes()  # factors of 1
    darker = jittered(PILImage.new("RGB", (2, 2), (100, 100, 100)), 0.5, np.array([0.0, 0.5, 0.5]))
    assert darker.getpixel((0, 0)) == (50, 50, 50)


def test_maps_are_resized_to_the_nearest_value():
    assert resized_labels(np.array([[0, 300], [2, 3]]), (4, 2)).tolist() == [[0, 300], [0, 300], [2, 3], [2, 3]]
    assert resized_labels(np.arange(9).reshape(3, 3), (1, 1)).tolist() == [[4]]


def test_test_images_are_seen_as_in_training(tmp_path, pretrained):
    """The saved processor resizes and normalises as the training does without a crop."""
    trainer = prepared(tmp_path, pretrained)
    trainer.processing_class.save_pretrained(tmp_path / "processor")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "processor")
    rows = trainer.eval_dataset.rows
    for row, size in enumerate(SIZES):
        example = trainer.eval_dataset[row]
        image = rows[row]["image"]
        pixels = torch.from_numpy(np.array(resized(image, (32, 48)))).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (rows.data.image_mean, rows.data.image_std))
        assert torch.allclose(example["pixel_values"], (pixels - mean) / std, atol=1e-5)
        assert torch.equal(processor(image, return_tensors="pt")["pixel_values"][0], example["pixel_values"])
        assert example["true_map"].tolist() == map_of(row, *size).tolist()
        assert example["labels"].shape == (32, 48)


# What does not count


@HEADS
def test_ignored_pixels_have_no_part_in_the_loss(tmp_path, pretrained, head):
    """Both heads: the loss is the mean over the other pixels, and the same whatever the head says of the ignored."""
    trainer = prepared(tmp_path, pretrained, head)
    model = trainer.model.eval()
    example = trainer.eval_dataset[0]
    pixels, labels = example["pixel_values"][None], example["labels"][None]
    assert (labels == 11).any()
    with torch.no_grad():
        output = model(pixel_values=pixels, labels=labels)
        known = labels != 11
        by_hand = F.cross_entropy(output.logits.permute(0, 2, 3, 1)[known], labels[known])
        if head is UPERNET:  # whose auxiliary head adds its own
            assert model.config.loss_ignore_index == 11
            model.auxiliary_head = None
            output = model(pixel_values=pixels, labels=labels)
        assert output.loss == pytest.approx(by_hand.item(), rel=1e-5)


def test_ignored_pixels_have_no_part_in_the_figures(tmp_path, pretrained):
    """Each source may have its own value for them; one stands for both."""
    test = {"test": source_of(tmp_path / "own.parquet", [(24, 20)], maps=[encode_map(np.where(GOOD == 11, 200, GOOD))])}
    test["test"]["ignore_index"] = 200
    trainer = prepared(tmp_path, pretrained, **test)
    labels = trainer.eval_dataset.rows[0]["labels"]
    assert np.array_equal(labels == 11, GOOD == 11) and trainer.model.config.semantic_loss_ignore_index == 11
    for parameter in trainer.model.classifier.parameters():
        parameter.data.zero_()
    trainer.model.classifier.bias.data[2] = 1  # every pixel is a tree, by the head
    figures = trainer.evaluate()
    share = (GOOD == 2).sum() / (GOOD != 11).sum()
    assert figures["eval_pixel_accuracy"] == pytest.approx(100 * share)
    assert figures["eval_iou_tree"] == pytest.approx(100 * share) and figures["eval_iou_sky"] == 0
    assert figures["eval_mean_accuracy"] == pytest.approx(100 / 3)


def test_figures_by_hand():
    """Two batches of counts; the third class occurs nowhere and has no figure."""
    figures = SegmentationFigures(NAMES)
    first = torch.tensor([[[3, 1, 0], [0, 2, 0], [0, 0, 0]]])
    assert figures(EvalPrediction(first, None), compute_result=False) == {}
    second = torch.tensor([[[0, 0, 0], [2, 0, 0], [0, 0, 0]]])
    got = figures(EvalPrediction(second, None), compute_result=True)
    expected = {"iou_sky": 100 * 3 / 6, "iou_road": 100 * 2 / 5, "pixel_accuracy": 100 * 5 / 8}
    expected |= {"mean_iou": 45.0, "mean_accuracy": 100 * (3 / 4 + 2 / 4) / 2}
    assert got == pytest.approx(expected)
    assert figures(EvalPrediction(first, None), compute_result=True)["pixel_accuracy"] == pytest.approx(100 * 5 / 6)


def test_predictions_are_judged_at_the_size_of_the_map():
    """Two patches side by side, enlarged to a map of 2x6: the border lies in its middle."""
    logits = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # (2 classes, 1, 2)
    assert predicted_map(logits, (2, 6)).tolist() == [[0, 0, 0, 1, 1, 1]] * 2


def test_reduced_labels_are_those_of_ade20k(tmp_path, pretrained):
    """0 has no class, 1 is the first class."""
    stored = np.where(GOOD == 11, 0, GOOD + 1).astype(np.uint8)
    sources = {
        name: source_of(tmp_path / f"{name}.parquet", [(24, 20)], maps=[encode_map(stored)], ignore_index=None)
        for name in ("train", "test")
    }
    trainer = prepared(tmp_path, pretrained, reduce_labels=True, **sources)
    labels = trainer.eval_dataset.rows[0]["labels"]
    assert np.array_equal(labels, np.where(stored == 0, 255, stored - 1))
    assert trainer.model.config.semantic_loss_ignore_index == 255 and trainer.processing_class.do_reduce_labels


def test_classes_without_names_are_counted(tmp_path, pretrained):
    model = prepared(tmp_path, pretrained, class_names=None).model
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


# What is refused


@pytest.mark.parametrize(
    "maps, message",
    [
        ([GOOD, map_of(0, 20, 24)], r"row 1: the map has 20x24 pixels, its image 24x20"),
        ([GOOD, GOOD, np.where(GOOD == 2, 7, GOOD)], r"row 2 holds the value 7, which is no class, \[0, 2\], nor"),
        ([GOOD, None], r"row 1 has no map in segments_column='mask'"),
        ([GOOD, np.zeros((20, 24, 3), np.uint8)], r"row 1 has a map of shape \(20, 24, 3\) and type uint8; one whole"),
        ([GOOD, np.zeros((20, 24), np.float32)], r"row 1 has a map of shape \(20, 24\) and type float32"),
        ([GOOD, b"text"], r"row 1 has a map that cannot be decoded"),
        ([np.full((20, 24), 11, np.uint8)], r"every pixel is ignore_index=11"),
    ],
    ids=["size", "value", "missing", "colours", "floats", "broken", "empty"],
)
def test_bad_maps_are_named_by_their_row(tmp_path, pretrained, maps, message):
    maps = [
        encode(PILImage.fromarray(labels), "TIFF") if getattr(labels, "dtype", None) == np.float32 else labels
        for labels in maps
    ]
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, pretrained, **with_maps(tmp_path, maps))


def test_a_bad_map_of_the_test_set_is_named_too(tmp_path, pretrained):
    maps = [GOOD, np.where(GOOD == 1, 3, GOOD)]
    test = with_maps(tmp_path, maps)["train"]
    with pytest.raises(ValueError, match=r"row 1 holds the value 3, which is no class, \[0, 2\], nor ignore_index=11"):
        prepared(tmp_path, pretrained, class_names=None, test=test)


def test_values_that_reduced_labels_cannot_have(tmp_path, pretrained):
    maps = [np.where(GOOD == 11, 0, GOOD + 2).astype(np.uint8)]
    with pytest.raises(ValueError, match=r"row 0 holds the value 4, which is no class, \[1, 3\], nor"):
        prepared(tmp_path, pretrained, reduce_labels=True, **with_maps(tmp_path, maps, ignore_index=None))


def test_a_class_cannot_be_ignored(tmp_path, pretrained):
    """Its pixels would be a class in one source and nothing in the other."""
    with pytest.raises(RecipeError, match="ignore_index=1 would stand for the class 'road' too"):
        prepared(tmp_path, pretrained, **with_maps(tmp_path, [np.where(GOOD == 11, 1, GOOD)], ignore_index=1))


def test_a_source_without_maps_is_refused(tmp_path, pretrained):
    with pytest.raises(ValueError, match="name the column of the segment maps as segments_column"):
        prepared(tmp_path, pretrained, **with_maps(tmp_path, [GOOD], segments_column=None))
    with pytest.raises(ValueError, match=r"no column 'masks' \(segments_column\)"):
        prepared(tmp_path, pretrained, **with_maps(tmp_path, [GOOD], segments_column="masks"))


@pytest.mark.parametrize(
    "section, field, value",
    [
        ("head", "kind", "mask2former"),
        ("head", "hidden_size", 0),
        ("head", "auxiliary_loss_weight", -1.0),
        ("head", "feature_scales", [1.0, 2.0]),
        ("data", "crop_scale", [0.5]),
        ("data", "color_jitter", 1.5),
        ("data", "class_names", ["sky", "sky"]),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, pretrained, section, field, value):
    head, data = (UPERNET | {field: value}, {}) if section == "head" else (UPERNET, {field: value})
    with pytest.raises(RecipeError, match=rf"{section}\.{field}="):
        load_recipe(recipe_of(tmp_path, pretrained, head, **data))


def test_heads_that_do_not_fit_are_refused(tmp_path, pretrained):
    for layers in ([1, 2, 4], [0, 1, 2], [2, 1, 3], [1, 1, 2]):
        with pytest.raises(RecipeError, match=r"must be ascending numbers in \[1, 3\]"):
            prepared(tmp_path, pretrained, UPERNET | {"out_indices": layers})
    with pytest.raises(RecipeError, match="must be of one length"):
        prepared(tmp_path, pretrained, UPERNET | {"out_indices": [1, 3]})
    with pytest.raises(RecipeError, match=r"per_device_train_batch_size=1: the batch norm of head.kind=upernet"):
        prepared(tmp_path, pretrained, UPERNET, {"global_batch_size": 1})
    with pytest.raises(RecipeError, match=r"hold one class, \['sky'\]"):
        maps = [np.where(GOOD == 11, 11, 0).astype(np.uint8)]
        prepared(tmp_path, pretrained, class_names=["sky"], **with_maps(tmp_path, maps))
