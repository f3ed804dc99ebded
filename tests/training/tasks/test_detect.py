"""Detection: boxes under crops by hand, whole runs of seconds, and every box that is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value
from PIL import Image as PILImage
from safetensors.torch import load_file
from tiny_recipes import encode, losses_of, run_task, write_task_recipe
from transformers import AutoModelForObjectDetection, pipeline

from modeling_ehm import EHMBackbone, EHMModel
from modeling_ehm.training.recipes import RecipeError
from modeling_ehm.training.task_trainer import find_encoder
from modeling_ehm.training.tasks import detect, load_recipe
from modeling_ehm.training.tasks.detect import crop_boxes, parts_of, size_of

pytestmark = pytest.mark.usefixtures("own_cache")

HEAD = {
    "hidden_size": 16,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "num_queries": 6,
    "num_denoising": 4,
}
OBJECTS = [  # of pictures of 40x30 pixels
    {"bbox": [[2.0, 3.0, 10.0, 8.0], [20.0, 10.0, 15.0, 15.0]], "category": [0, 1]},
    {"bbox": [[5.0, 5.0, 20.0, 20.0]], "category": [1]},
    {"bbox": [], "category": []},  # nothing to be seen
    {"bbox": [[0.0, 0.0, 40.0, 30.0]], "category": [0]},
]


def scene(objects):
    """A grey picture with a red (class 0) or blue (class 1) rectangle in each box."""
    image = PILImage.new("RGB", (40, 30), (90, 90, 90))
    for (x, y, w, h), category in zip(objects["bbox"], objects["category"], strict=True):
        image.paste(((220, 30, 30), (30, 30, 220))[category % 2], (int(x), int(y), int(x + w), int(y + h)))
    return encode(image)


def write_scenes(path, all_objects=OBJECTS, encoded=None):
    category = ClassLabel(names=["red", "blue"])
    features = Features(
        {"image": Image(), "objects": {"bbox": Sequence(Sequence(Value("float64"))), "category": Sequence(category)}}
    )
    rows = [{"bytes": content, "path": None} for content in encoded or [scene(o) for o in OBJECTS]]
    Dataset.from_dict({"image": rows, "objects": all_objects}, features=features).to_parquet(str(path))
    return {"path": "parquet", "data_files": str(path), "objects_column": "objects"}


@pytest.fixture
def data(tmp_path):
    return {name: write_scenes(tmp_path / f"{name}.parquet") for name in ("train", "test")}


def recipe_of(folder, pretrained, data, training=None, head=None, **model):
    """32 px pictures in 8 px patches: maps of 4x4, 2x2 and 1x1 cells."""
    return write_task_recipe(
        folder / "recipe.yaml", "detect", pretrained, data, training, head=HEAD | (head or {}), model=model
    )


# Boxes


def test_a_crop_moves_cuts_and_drops_boxes():
    """Crop (10, 0, 30, 20): one box moves, one is cut at the edge, one has its centre outside."""
    boxes = np.array([[12.0, 4, 16, 8], [5, 10, 21, 20], [0, 0, 14, 4]])
    shares, kept = crop_boxes(boxes, (10, 0, 30, 20), flip=False)
    assert kept.tolist() == [True, True, False]
    assert shares[0].tolist() == pytest.approx([0.2, 0.3, 0.2, 0.2])  # 2..6 and 4..8 of 20
    assert shares[1].tolist() == pytest.approx([0.275, 0.75, 0.55, 0.5])  # 0..11 and 10..20 of 20


def test_a_flip_mirrors_boxes():
    shares, _ = crop_boxes(np.array([[0.0, 0, 4, 10]]), (0, 0, 20, 10), flip=True)
    assert shares.tolist() == [pytest.approx([0.9, 0.5, 0.2, 1.0])]


def test_slivers_are_dropped_and_nothing_stays_nothing():
    assert crop_boxes(np.array([[0.0, 0, 0.5, 10]]), (0, 0, 20, 10), False)[1].tolist() == [False]
    shares, kept = crop_boxes(np.zeros((0, 4)), (0, 0, 20, 10), True)
    assert shares.shape == (0, 4) and kept.shape == (0,)


def test_objects_come_as_lists_or_as_a_list():
    parts = {"bbox": [[1, 2, 3, 4]], "category": [5]}
    assert parts_of(parts) == parts_of([{"bbox": [1, 2, 3, 4], "category": 5}]) == ([[1, 2, 3, 4]], [5])


def test_the_size_is_that_of_the_upright_image():
    image = PILImage.new("RGB", (40, 30))
    exif = image.getexif()
    exif[274] = 6  # turned by a quarter
    assert size_of({"bytes": encode(image, "JPEG", exif=exif), "path": None}) == (30, 40)
    assert size_of({"bytes": encode(image), "path": None}) == (40, 30)


def test_training_boxes_lie_on_their_objects(tmp_path, pretrained, data):
    """Whatever the crop, the middle of each box has the colour of its class."""
    trainer = detect.prepare(load_recipe(recipe_of(tmp_path, pretrained, data, {"max_steps": 8}, image_size=[64, 96])))
    mean, std = (
        torch.tensor(getattr(load_recipe(tmp_path / "recipe.yaml").data, f"image_{x}")) for x in ("mean", "std")
    )
    seen = 0
    for position in range(len(trainer.train_dataset)):
        example = trainer.train_dataset[position]
        labels = example["labels"]
        for (x, y, w, h), category in zip(labels["boxes"].tolist(), labels["class_labels"].tolist(), strict=True):
            assert x - w / 2 >= 0 and x + w / 2 <= 1.0001 and y - h / 2 >= 0 and y + h / 2 <= 1.0001
            pixel = example["pixel_values"][:, min(int(y * 64), 63), min(int(x * 96), 95)] * std + mean
            if len(labels["boxes"]) == 1:  # in the first scene the whole picture may be covered twice
                assert pixel[[0, 2][category]] > 0.6, (position, pixel)
                seen += 1
    assert seen > 10


# Runs


def test_one_run_leaves_a_detector_that_stock_code_uses(tmp_path, pretrained, data):
    """Figures of COCO and of each class; the saved directory detects through a pipeline."""
    figures = run_task(recipe_of(tmp_path, pretrained, data))
    assert {"ap", "ap50", "ap75", "ap_red", "ap_blue"} <= figures.keys()
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text())["task"] == "detect"
    assert min(PILImage.open(out / "predictions.png").size) > 100
    assert "pipeline_tag: object-detection" in (out / "README.md").read_text()
    model = AutoModelForObjectDetection.from_pretrained(out)
    assert type(find_encoder(model)[1]) is EHMBackbone and model.config.id2label == {0: "red", 1: "blue"}
    picture = PILImage.new("RGB", (50, 40), (220, 30, 30))
    answers = pipeline("object-detection", model=str(out))(picture, threshold=0.0)
    assert answers and {answer["label"] for answer in answers} <= {"red", "blue"}
    assert all(answer["box"].keys() == {"xmin", "ymin", "xmax", "ymax"} for answer in answers)


def test_grey_images_are_drawn_too(tmp_path, data):
    """The processor takes what the model was made for; the picture is in colours whatever that is."""
    means = {"image_mean": [0.5], "image_std": [0.25]}
    recipe = recipe_of(tmp_path, None, data | means, {"max_steps": 1}, num_channels=1, num_hidden_layers=3)
    assert "ap" in run_task(recipe) and (tmp_path / "out" / "predictions.png").exists()


def test_it_starts_from_the_pretrained_encoder(tmp_path, pretrained, data):
    trainer = detect.prepare(load_recipe(recipe_of(tmp_path, pretrained, data)))
    _, backbone = find_encoder(trainer.model)
    for name, weight in EHMModel.from_pretrained(pretrained).state_dict().items():
        assert torch.equal(weight, backbone.state_dict()[name]), name
    assert trainer.model.config.feat_strides == [8, 16, 32]


def test_boxes_are_scored_in_pixels_of_the_original(tmp_path, pretrained, data):
    """A model that says the truth of the test images, at 32x32, scores 100 % on pictures of 40x30."""
    trainer = detect.prepare(load_recipe(recipe_of(tmp_path, pretrained, data)))
    logits, boxes = np.full((4, 6, 2), -20.0, dtype=np.float32), np.full((4, 6, 4), 0.5, dtype=np.float32)
    for row, objects in enumerate(OBJECTS):
        for n, ((x, y, w, h), category) in enumerate(zip(objects["bbox"], objects["category"], strict=True)):
            logits[row, n, category] = 10.0
            boxes[row, n] = [(x + w / 2) / 40, (y + h / 2) / 30, w / 40, h / 30]
    order = np.array([2, 0, 3, 1])  # as several processes may gather them
    told = type("Prediction", (), {"predictions": (logits[order], boxes[order]), "label_ids": order})
    figures = trainer.compute_metrics(told)
    assert figures["ap"] == figures["ap_red"] == figures["ap_blue"] == pytest.approx(100)


def test_a_resumed_run_equals_an_unbroken_one(tmp_path, pretrained, data):
    """The stock detector's names in memory are those on disk, or resuming would leave weights behind."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "layer_decay": 0.8}
    run_task(recipe_of(tmp_path / "whole", pretrained, data, settings))
    broken = recipe_of(tmp_path / "broken", pretrained, data, settings)
    shutil.copytree(tmp_path / "whole" / "out" / "checkpoint-2", tmp_path / "broken" / "out" / "checkpoint-2")
    run_task(broken)
    one, other = (load_file(tmp_path / folder / "out" / "model.safetensors") for folder in ("whole", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert losses_of(tmp_path / "whole" / "out") == losses_of(tmp_path / "broken" / "out")


def test_a_frozen_encoder_keeps_its_weights(tmp_path, pretrained, data):
    run_task(recipe_of(tmp_path, pretrained, data, {"freeze_encoder": True}))
    _, backbone = find_encoder(AutoModelForObjectDetection.from_pretrained(tmp_path / "out"))
    before = EHMModel.from_pretrained(pretrained).state_dict()
    assert all(torch.equal(before[name], weight) for name, weight in backbone.state_dict().items())


def test_pictures_without_objects_train(tmp_path, pretrained):
    """A batch in which nothing is to be seen has a finite loss."""
    nothing = [{"bbox": [], "category": []}] * 4
    data = {"train": write_scenes(tmp_path / "a.parquet", nothing), "test": write_scenes(tmp_path / "b.parquet")}
    run_task(recipe_of(tmp_path, pretrained, data))
    assert all(np.isfinite(loss) for loss in losses_of(tmp_path / "out").values())


# What is refused


@pytest.mark.parametrize(
    "bbox, category, message",
    [
        ([5.0, 5.0, 0.0, 4.0], 0, r"row 1, object 0, bbox \[5.0, 5.0, 0.0, 4.0\]: width and height must be positive"),
        ([20.0, 5.0, -9.0, 4.0], 0, r"row 1, object 0.*swap inverted ones"),
        ([35.0, 5.0, 10.0, 4.0], 0, r"row 1, object 0.*reaches out of its picture of 40x30 pixels"),
        ([-5.0, 5.0, 10.0, 4.0], 0, r"row 1, object 0.*reaches out"),
        ([float("nan"), 5.0, 10.0, 4.0], 0, r"row 1, object 0.*four finite numbers"),
        ([5.0, 10.0, 4.0], 0, r"row 1, object 0.*four finite numbers"),
    ],
)
def test_boxes_that_cannot_be_are_named(tmp_path, pretrained, data, bbox, category, message):
    objects = [OBJECTS[0], {"bbox": [bbox], "category": [category]}, *OBJECTS[2:]]
    data["test"] = write_scenes(tmp_path / "wrong.parquet", objects)
    with pytest.raises(ValueError, match=message):
        detect.prepare(load_recipe(recipe_of(tmp_path, pretrained, data)))


def test_an_overlap_of_less_than_a_pixel_is_cut(tmp_path, pretrained, data):
    objects = [{"bbox": [[-0.5, 0.0, 41.0, 30.4]], "category": [0]}, *OBJECTS[1:]]
    data["train"] = write_scenes(tmp_path / "slop.parquet", objects)
    trainer = detect.prepare(load_recipe(recipe_of(tmp_path, pretrained, data)))
    assert trainer.train_dataset.make_example.objects[0]["boxes"].tolist() == [[0, 0, 40, 30]]


def test_categories_outside_the_classes_are_named(tmp_path, pretrained, data):
    """A test set whose numbers of classes are not the training set's."""
    features = Features(
        {
            "image": Image(),
            "objects": {"bbox": Sequence(Sequence(Value("float64"))), "category": Sequence(Value("int64"))},
        }
    )
    objects = [OBJECTS[0], {"bbox": [[5.0, 5.0, 9.0, 9.0]], "category": [7]}]
    rows = [{"bytes": scene(OBJECTS[n]), "path": None} for n in range(2)]
    path = tmp_path / "other.parquet"
    Dataset.from_dict({"image": rows, "objects": objects}, features=features).to_parquet(str(path))
    data["test"]["data_files"] = str(path)
    with pytest.raises(ValueError, match=r"row 1, object 0.*category 7 is not a class in \[0, 1\]"):
        detect.prepare(load_recipe(recipe_of(tmp_path, pretrained, data)))


def test_sources_without_boxes_are_refused(tmp_path, pretrained, data):
    with pytest.raises(ValueError, match="name a column of it as objects_column"):
        detect.prepare(load_recipe(recipe_of(tmp_path, pretrained, data), ["data.test.objects_column=null"]))
    with pytest.raises(ValueError, match=r"no column 'boxes' \(objects_column\)"):
        detect.prepare(load_recipe(recipe_of(tmp_path, pretrained, data), ["data.train.objects_column=boxes"]))
    with pytest.raises(ValueError, match="objects_column='image' is the column of the images"):
        detect.prepare(load_recipe(recipe_of(tmp_path, pretrained, data), ["data.train.objects_column=image"]))
    data["train"] = write_scenes(tmp_path / "b.parquet", encoded=[scene(OBJECTS[0]), b"text", *[scene(OBJECTS[2])] * 2])
    with pytest.raises(ValueError, match="row 1 cannot be opened"):
        detect.prepare(load_recipe(recipe_of(tmp_path, pretrained, data)))


@pytest.mark.parametrize(
    "head, message",
    [
        ({"feature_scales": [1, 0.5]}, r"head.feature_scales=\[1, 0.5\] must be three"),
        ({"feature_scales": [1, 1, 1]}, r"head.feature_scales"),
        ({"out_indices": [1]}, r"head.out_indices=\[1\] must name three stages"),
        ({"hidden_size": 15}, r"head.hidden_size=15 is not a multiple"),
        ({"feature_scales": [0.5, 0.25, 0.125]}, r"image_size=32 is not a multiple of 64 pixels"),
        ({"num_queries": 22}, r"head.num_queries=22 exceeds the 21 cells"),
    ],
)
def test_heads_that_cannot_be_are_refused(tmp_path, pretrained, data, head, message):
    with pytest.raises(RecipeError, match=message):
        detect.prepare(load_recipe(recipe_of(tmp_path, pretrained, data, head=head)))


def test_single_images_need_more_than_one_cell(tmp_path, pretrained, data):
    one = {"global_batch_size": 1}
    with pytest.raises(RecipeError, match=r"per_device_train_batch_size=1: the coarsest map at model.image_size=32"):
        detect.prepare(load_recipe(recipe_of(tmp_path, pretrained, data, one)))
    detect.prepare(load_recipe(recipe_of(tmp_path, pretrained, data, one, image_size=[32, 64])))
