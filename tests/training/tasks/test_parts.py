"""Unsupervised parts: a task without training, equal to the pure functions, with a picture."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from tiny_recipes import SYNTHETIC, encode, run_task, write_parquet, write_task_recipe

from modeling_ehm import EHMModel
from modeling_ehm.training.data import IMAGENET_MEAN, IMAGENET_STD, ImageSource, Normalizer, load_labelled
from modeling_ehm.training.metrics import hierarchy_accuracy, patch_segments, reference_partition_accuracy
from modeling_ehm.training.tasks import load_recipe, parts
from modeling_ehm.training.tasks.parts import as_pixels

pytestmark = pytest.mark.usefixtures("own_cache")

DATA = {"images": SYNTHETIC | {"split": "test", "max_images": 6, "segments_column": "segments"}}


def test_a_run_gives_the_figures_of_the_pure_functions(tmp_path, pretrained):
    """Percent of `hierarchy_accuracy` on the encoder's trees, and of square blocks as the reference; a picture."""
    figures = run_task(
        write_task_recipe(tmp_path / "r.yaml", "parts", pretrained, DATA, model={"image_size": [32, 48]})
    )
    source = ImageSource(**DATA["images"])
    loaded = load_labelled(source, (32, 48), 3)
    hierarchy = (
        EHMModel.from_pretrained(pretrained)
        .eval()
        .parse_hierarchy(Normalizer(IMAGENET_MEAN, IMAGENET_STD)(loaded["pixels"]))
    )
    segments = patch_segments(loaded["segments"], (4, 6), None)
    expected = hierarchy_accuracy(hierarchy, segments)
    assert figures == {name: pytest.approx(100 * value) for name, value in expected.items()}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    blocks = reference_partition_accuracy(segments, (4, 6))["blocks"]
    assert results["references"] == {name: pytest.approx(100 * value) for name, value in blocks.items()}
    assert min(Image.open(tmp_path / "out" / "parts.png").size) > 100
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_model_section_chooses_the_trees(tmp_path, pretrained):
    """Other affinities and linkages give other figures."""
    figures = [
        run_task(write_task_recipe(tmp_path / str(n) / "r.yaml", "parts", pretrained, DATA, model=model))
        for n, model in enumerate([{}, {"affinity": "keys", "affinity_layers": [0]}, {"linkage": "single"}])
    ]
    assert figures[0] != figures[1] != figures[2] != figures[0]


def test_labels_of_patches_become_pixels():
    labels = as_pixels(torch.tensor([7, 7, 2, 9]), (2, 2), (4, 6))
    assert labels.tolist() == [[1, 1, 1, 1, 1, 1]] * 2 + [[0, 0, 0, 2, 2, 2]] * 2


def test_ignored_pixels_count_nowhere(tmp_path, pretrained):
    """A map of two halves with an ignored frame: the figures are those of the halves alone."""
    values = np.zeros((32, 32), dtype=np.uint8)
    values[:, 16:] = 1
    values[:8] = 11
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(2)]
    path = write_parquet(tmp_path / "p.parquet", [encode(image) for image in images])

    rows = [{"bytes": encode(image), "path": None} for image in images]
    maps = [{"bytes": encode(Image.fromarray(values)), "path": None}] * 2
    features = Features({"image": ImageFeature(), "mask": ImageFeature()})
    Dataset.from_dict({"image": rows, "mask": maps}, features=features).to_parquet(path)
    source = {"path": "parquet", "data_files": path, "segments_column": "mask", "ignore_index": 11}
    task = parts.prepare(load_recipe(write_task_recipe(tmp_path / "r.yaml", "parts", pretrained, {"images": source})))
    segments = patch_segments(task.evaluator.segments, (4, 4), 11)
    assert segments[0].reshape(4, 4).tolist() == [[-1] * 4] + [[0, 0, 1, 1]] * 3
    assert 0 <= parts.execute(task)["purity"] <= 100


def test_sources_without_maps_are_refused(tmp_path, pretrained):
    for override, message in (
        ("data.images.segments_column=null", "needs segments_column"),
        ("data.images.segments_column=mask", "no column 'mask'"),
    ):
        recipe = load_recipe(write_task_recipe(tmp_path / "r.yaml", "parts", pretrained, DATA), [override])
        with pytest.raises(ValueError, match=message):
            parts.prepare(recipe)
