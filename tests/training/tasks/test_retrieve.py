"""Partial-duplicate retrieval: copies are found, what is ranked again stands first, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_recipes import encode, run_task, write_parquet, write_task_recipe

from modeling_ehm import EHMModel
from modeling_ehm.training.metrics import retrieval_scores
from modeling_ehm.training.recipes import RecipeError
from modeling_ehm.training.tasks import load_recipe, retrieve
from modeling_ehm.training.tasks.retrieve import at_scale, rank, tags_of, thumbnail_features

pytestmark = pytest.mark.usefixtures("own_cache")


def texture(number):
    """A picture of 64x48 of random 4x4 blocks."""
    blocks = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(blocks, np.ones((4, 4, 1), dtype=np.uint8)))


@pytest.fixture
def data(tmp_path):
    """Eight pictures to search, and of four of them the whole and the middle, which keeps its scale."""
    database = [encode(texture(n)) for n in range(8)]
    wholes, crops = [texture(n) for n in range(4)], [texture(n).crop((16, 8, 48, 40)) for n in range(4)]
    path, query = tmp_path / "database.parquet", tmp_path / "query.parquet"
    write_parquet(path, database, group_id=list(range(8)))
    columns = {"kind": ["same"] * 4 + ["crop"] * 4, "strength": [0] * 4 + [67] * 4}
    write_parquet(query, [encode(image) for image in wholes + crops], group_id=[*range(4), *range(4)], **columns)
    source = {"path": "parquet", "group_column": "group_id"}
    return {
        "database": source | {"data_files": str(path)},
        "query": source | {"data_files": str(query), "tag_columns": ["kind", "strength"]},
    }


def recipe_of(folder, pretrained, data, **head):
    return write_task_recipe(folder / "recipe.yaml", "retrieve", pretrained, data, head=head)


@pytest.mark.parametrize("layer", [1, -1])
def test_copies_and_crops_are_found(tmp_path, pretrained, data, layer):
    """Even random weights match random textures: 100 % with patches; the reference on thumbnails fails on crops."""
    figures = run_task(recipe_of(tmp_path, pretrained, data, layer=layer, scales=[1.0]))
    assert figures["map_same"] == figures["map_crop67"] == figures["map"] == figures["recall_at_1"] == 100
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["references"]["map_same"] == 100 and results["references"]["map_crop67"] < 100
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_without_ranking_again_the_descriptor_decides(tmp_path, pretrained, data):
    """Identical pictures have similarity 1; all poolings run."""
    for pooling in ("mean", "gem", "cls"):
        for shrinkage in (None, 0.1):
            path = recipe_of(tmp_path / pooling, pretrained, data, pooling=pooling, rerank=0, shrinkage=shrinkage)
            similarity = rank(retrieve.prepare(load_recipe(path)))
            assert similarity[:4].argmax(1).tolist() == [0, 1, 2, 3]
            assert torch.allclose(similarity[:4].amax(1), torch.ones(4), atol=1e-4)


def test_only_the_best_are_ranked_again(tmp_path, pretrained, data):
    """With rerank=3 three images of each query stand above all others, whose order stays the descriptor's."""
    plain = rank(retrieve.prepare(load_recipe(recipe_of(tmp_path / "a", pretrained, data, rerank=0))))
    again = rank(retrieve.prepare(load_recipe(recipe_of(tmp_path / "b", pretrained, data, rerank=3))))
    assert (again > 1).sum(1).tolist() == [3] * 8
    for row in range(8):
        best = set(plain[row].topk(3).indices.tolist())
        assert set(again[row].topk(3).indices.tolist()) == best
        rest = [n for n in range(8) if n not in best]
        assert torch.allclose(again[row, rest], plain[row, rest], atol=1e-6)


def test_scales_help_what_was_reduced(tmp_path, pretrained):
    """A picture of half the size finds its original at scale 0.5, with similarity 1 both ways."""
    smooth = [texture(n).resize((128, 96), Image.Resampling.BICUBIC) for n in range(4)]
    small = smooth[2].resize((64, 48), Image.Resampling.BICUBIC)
    paths = [tmp_path / name for name in ("d.parquet", "q.parquet")]
    write_parquet(paths[0], [encode(image) for image in smooth], group_id=list(range(4)))
    write_parquet(paths[1], [encode(small)], group_id=[2])
    source = {"path": "parquet", "group_column": "group_id"}
    data = {name: source | {"data_files": str(p)} for name, p in zip(("database", "query"), paths, strict=True)}
    found = {
        scales: rank(retrieve.prepare(load_recipe(recipe_of(tmp_path, pretrained, data, scales=list(scales)))))
        for scales in ((1.0,), (1.0, 0.5))
    }
    assert found[1.0, 0.5][0, 2] == pytest.approx(5, abs=0.02) and found[1.0, 0.5][0].argmax() == 2
    assert found[(1.0,)][0, 2] < 4.9


def test_images_keep_their_shape(pretrained):

    encoder = EHMModel.from_pretrained(pretrained)
    assert at_scale(Image.new("RGB", (100, 50)), 1.0, 256, encoder).size == (96, 48)
    assert at_scale(Image.new("RGB", (100, 50)), 0.5, 50, encoder).size == (24, 16)


def test_resolution_reduces_query_and_database_alike(tmp_path, pretrained, data):
    """At half the resolution a picture still finds itself with similarity 1 both ways."""
    similarity = rank(retrieve.prepare(load_recipe(recipe_of(tmp_path, pretrained, data, resolution=0.5))))
    assert torch.allclose(similarity[:4].diagonal(), torch.full((4,), 5.0), atol=0.01)


def test_the_reference_is_the_cosine_of_thumbnails(tmp_path, pretrained, data):
    """Bilinear 16x16 thumbnails in colour, each image's own mean taken off."""
    rows = retrieve.prepare(load_recipe(recipe_of(tmp_path, pretrained, data))).rows["database"]
    small = [np.asarray(texture(n).resize((16, 16), Image.Resampling.BILINEAR), dtype=float).ravel() for n in (0, 3)]
    features = thumbnail_features(rows)
    assert features.shape == (8, 3 * 256)
    assert features[0] @ features[3] == pytest.approx(np.corrcoef(*small)[0, 1], abs=1e-5)


def test_tags_join_values(tmp_path, pretrained, data):
    task = retrieve.prepare(load_recipe(recipe_of(tmp_path, pretrained, data)))
    assert tags_of(task.rows["query"]) == ["same"] * 4 + ["crop67"] * 4
    assert tags_of(task.rows["query"], 1) == ["same"] * 4 + ["crop"] * 4
    assert tags_of(task.rows["database"]) is None


def test_the_figures_are_those_of_the_pure_function(tmp_path, pretrained, data):
    path = recipe_of(tmp_path, pretrained, data, rerank=2, pooling="cls", shrinkage=None)
    figures = run_task(path)
    task = retrieve.prepare(load_recipe(path))
    scores = retrieval_scores(rank(task), [*range(4), *range(4)], list(range(8)), tags_of(task.rows["query"]))
    assert figures.pop("map_crop") == figures["map_crop67"]
    assert figures == {name: pytest.approx(100 * value) for name, value in scores.items()}


# What is refused


def test_a_query_without_an_answer_is_named(tmp_path, pretrained, data):
    path = tmp_path / "orphan.parquet"
    write_parquet(path, [encode(texture(1)), encode(texture(9))], group_id=[1, 99])
    data["query"] = {"path": "parquet", "data_files": str(path), "group_column": "group_id"}
    with pytest.raises(RecipeError, match="row 1, a query of group 99, has no match in data.database"):
        retrieve.prepare(load_recipe(recipe_of(tmp_path, pretrained, data)))


def test_groups_that_are_no_numbers_are_named(tmp_path, pretrained, data):
    recipe = load_recipe(recipe_of(tmp_path, pretrained, data), ["data.query.tag_columns=null"])
    recipe.data.query.group_column = "kind"
    with pytest.raises(RecipeError, match="row 0 of data.query has 'same' in group_column='kind'"):
        retrieve.prepare(recipe)


def test_broken_images_are_named(tmp_path, pretrained, data):
    path = tmp_path / "broken.parquet"
    write_parquet(path, [encode(texture(1)), b"text"], group_id=[1, 2])
    data["query"] = {"path": "parquet", "data_files": str(path), "group_column": "group_id"}
    with pytest.raises(ValueError, match="row 1 cannot be decoded"):
        run_task(recipe_of(tmp_path, pretrained, data))


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.database.group_column=null", "name a column of it as group_column"),
        ("data.query.group_column=group", r"no column 'group' \(group_column\)"),
        ("data.query.tag_columns=[kind, what]", r"no column 'what'"),
        ("data.query.streaming=true", "streaming: false"),
        ("head.pooling=max", "head.pooling='max' is not one of mean, gem, cls"),
        ("head.gem_p=0.0", "head.gem_p=0.0 must be positive"),
        ("head.shrinkage=2.0", r"head.shrinkage=2.0 must lie in \[0, 1\]"),
        ("head.scales=[0.5]", r"head.scales=\[0.5\] must be different positive numbers, and 1 the first"),
        ("head.scales=[1.0, 1.0]", r"head.scales=\[1.0, 1.0\] must be different"),
        ("head.resolution=0.0", "head.resolution=0.0 must be positive"),
        ("data.query.group_column=kind", r"a column is named for two purposes"),
        ("head.rerank=-1", "head.rerank=-1 must be at least 0"),
        ("head.layer=7", r"head.layer=7 is not in \[0, 3\]"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, pretrained, data, override, message):
    with pytest.raises(ValueError, match=message):
        retrieve.prepare(load_recipe(recipe_of(tmp_path, pretrained, data), [override]))
