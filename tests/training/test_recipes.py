"""Recipes: those we ship can be used, and those that cannot say in one line where and why."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from tiny_recipes import ROOT, write_recipe

from modeling_ehm import EHMConfig
from modeling_ehm.training.arguments import EHMTrainingArguments
from modeling_ehm.training.data import ImageSource, find_image_column, open_source
from modeling_ehm.training.recipes import RecipeError
from modeling_ehm.training.tasks import TASKS, load_recipe

RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture
def recipe(tmp_path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml")


def text_recipe(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


# What we ship


def test_there_are_recipes():
    """The next test is about something."""
    assert len(RECIPES) >= 2


@pytest.mark.parametrize("path", RECIPES, ids=[str(path.relative_to(ROOT)) for path in RECIPES])
def test_each_shipped_recipe_builds_its_sections(path, tmp_path):
    """Every value passes every check, and the file opens with the command that runs it."""
    recipe = load_recipe(path, ["training.use_cpu=true", f"training.output_dir={tmp_path}"])
    schema = TASKS[recipe.task].SCHEMA
    assert recipe.task == path.parent.name and recipe.source == str(path)
    known = {} if recipe.pretrained is None else {"patch_size": 8}  # the checkpoint's, of the small recipes
    config, training = EHMConfig(**known | recipe.model), schema.training(**recipe.training)
    assert isinstance(recipe.data, schema.data) and len(recipe.data.image_mean) == config.num_channels
    assert schema.head is None or isinstance(recipe.head, schema.head)
    if "global_batch_size" in recipe.training:
        assert training.images_per_step == recipe.training["global_batch_size"]
    if "base_learning_rate" in recipe.training:
        assert training.learning_rate == recipe.training["base_learning_rate"] * training.images_per_step / 256
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and f"train_ehm.py {path.relative_to(ROOT)}" in first
    for field in dataclasses.fields(recipe.data):
        source = getattr(recipe.data, field.name)
        if isinstance(source, ImageSource) and source.path == "synthetic":  # the others need a download
            source.max_images = 1
            assert find_image_column(open_source(source, (64, 64)), source) == "image"


def test_every_task_has_a_recipe():
    """Each name in TASKS is a folder of recipes, and there is no other folder."""
    assert {path.parent.name for path in RECIPES} == set(TASKS)


# Values


def test_a_recipe_becomes_typed_sections(tmp_path):
    """What the file says arrives, what it leaves out keeps its default, empty sections are allowed."""
    path = text_recipe(
        tmp_path, "model: {patch_size: 8}\ndata: {train: {path: parquet}, crop_scale: [0.5, 1]}\ntraining:\n"
    )
    recipe = load_recipe(path)
    assert (recipe.task, recipe.model, recipe.training) == ("pretrain", {"patch_size": 8}, {})
    assert recipe.data.train == ImageSource(path="parquet") and recipe.data.crop_scale == [0.5, 1]
    assert recipe.data.probe_train is None and recipe.data.crop_ratio == [3 / 4, 4 / 3]


def test_overrides_win_over_the_file_and_create_what_is_missing(recipe):
    """Values are YAML; a dotted key reaches into sections and makes those that the file lacks."""
    loaded = load_recipe(
        recipe,
        [
            "training.max_steps=7",
            "model.image_size=[32, 64]",
            "data.train={path: parquet, data_files: a.parquet}",
            "data.train.streaming=true",
            "data.probe_train.path=json",
            "data.probe_train.label_column=label",
            "data.probe_test.path=parquet",
            "data.horizontal_flip=false",
            "training.run_name=a=b",
        ],
    )
    assert loaded.training["max_steps"] == 7 and loaded.training["run_name"] == "a=b" and loaded.task == "pretrain"
    assert loaded.model["image_size"] == [32, 64] and loaded.data.horizontal_flip is False
    assert loaded.data.train == ImageSource("parquet", data_files="a.parquet", streaming=True)
    assert loaded.data.probe_train == ImageSource("json", label_column="label")
    assert loaded.data.probe_test == ImageSource("parquet")
    assert load_recipe(recipe, ["data.segments.path=parquet", "data.segments=null"]).data.segments is None


def test_the_file_is_not_changed_by_overrides(recipe):
    """Two loads of one file do not see each other's overrides."""
    before = recipe.read_text()
    load_recipe(recipe, ["training.max_steps=7"])
    assert load_recipe(recipe).training["max_steps"] == 4 and recipe.read_text() == before


# Errors


@pytest.mark.parametrize(
    "override, message",
    [
        ("modle.patch_size=8", r"unknown section 'modle' \(did you mean 'model'\?\); one of"),
        ("training.max_step=5", r"training.max_step: unknown key \(did you mean 'max_steps'\?\)"),
        ("model.mask_ration=0.5", r"model.mask_ration: unknown key \(did you mean 'mask_ratio'\?\)"),
        ("data.train.pth=parquet", r"data.train.pth: unknown key \(did you mean 'path'\?\)"),
        (
            "data.probe_train={path: parquet, label_col: x}",
            r"data.probe_train.label_col: unknown key \(did you mean 'label_column'\?\)",
        ),
        ("data.qqqqqq=1", r"data.qqqqqq: unknown key$"),
        ("data.probe_train.streaming=true", "data.probe_train.path is missing, and has no default"),
    ],
)
def test_unknown_keys_are_errors_with_a_suggestion(recipe, override, message):
    """Section, key and the nearest known name, none if nothing is near."""
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, [override])


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.mask_ratio=high", "model.mask_ratio='high' has type str; float is expected$"),
        ("model.mask_ratio='0.5'", "model.mask_ratio='0.5' has type str; float is expected: write numbers as 1.0e-4"),
        ("model.patch_size=8.5", r"model.patch_size=8.5 has type float; int \| list\[int\]"),
        ("model.image_size=[32, a]", r"model.image_size=\[32, 'a'\] has type list; int \| list\[int\]"),
        ("model.num_channels=true", "model.num_channels=True has type bool; int is expected"),
        ("model.norm_pix_loss=1", "model.norm_pix_loss=1 has type int; bool is expected"),
        ("data.crop_scale=0.2", r"data.crop_scale=0.2 has type float; list\[float\] is expected"),
        (
            "data.train.max_images='5'",
            r"data.train.max_images='5' has type str; int \| None is expected: write numbers",
        ),
        ("data.train=null", "data.train=None has type NoneType; ImageSource is expected"),
        ("data.train=parquet", "data.train must hold keys and values, not 'parquet'"),
        ("training.max_steps=ten", "training.max_steps='ten' has type str; int is expected"),
        ("training=[1]", r"section 'training' must hold keys and values, not \[1\]"),
        ("data=[1]", r"section 'data' must hold keys and values, not \[1\]"),
        ("data.crop_scale=[0.9, 0.1]", r"data.crop_scale=\[0.9, 0.1\] must be two rising numbers"),
    ],
)
def test_wrong_types_and_values_name_the_key_the_value_and_the_rule(recipe, override, message):
    """The message stands for itself: nobody has to open the code to mend the recipe."""
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, [override])


@pytest.mark.parametrize("key", ["training.learning_rate", "training.base_learning_rate"])
@pytest.mark.parametrize("in_file", [False, True])
def test_a_number_that_yaml_reads_as_text_gets_the_hint(tmp_path, recipe, key, in_file):
    """`1e-4` is a string in YAML 1.1, in a file as on the command line; the error shows how to write it."""
    text = f"data: {{train: {{path: synthetic}}}}\ntraining: {{{key.split('.')[1]}: 1e-4}}"
    path = text_recipe(tmp_path, text) if in_file else recipe
    with pytest.raises(
        RecipeError, match=f"{key}='1e-4' has type str; float.* is expected: write numbers as 1.0e-4, not 1e-4"
    ):
        load_recipe(path, [] if in_file else [f"{key}=1e-4"])
    assert load_recipe(recipe, [f"{key}=1.0e-4"]).training[key.split(".")[1]] == 1e-4


def test_a_bare_no_is_refused(recipe):
    """YAML 1.1 reads `no` as False: the error says what was read and how to write what was meant."""
    message = 'training.eval_strategy=False has type bool; .* is expected: write "no" in quotes'
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, ["training.eval_strategy=no"])
    quoted = load_recipe(recipe, ['training.eval_strategy="no"'])
    assert EHMTrainingArguments(**quoted.training).eval_strategy == "no"


@pytest.mark.parametrize(
    "override", ["training.max_steps", "=5", "training..max_steps=5", ".max_steps=5", "training.=5", ""]
)
def test_malformed_overrides_are_quoted(recipe, override):
    """What was typed, and what it should look like."""
    with pytest.raises(RecipeError, match="must look like section.key=value, as in training.max_steps=10") as error:
        load_recipe(recipe, [override])
    assert repr(override) in str(error.value)


def test_an_override_whose_value_is_no_yaml_is_quoted(recipe):
    """One line, although YAML's own message takes several."""
    with pytest.raises(RecipeError, match=r"override 'training.max_steps=\[1': the value is not valid YAML") as error:
        load_recipe(recipe, ["training.max_steps=[1"])
    assert "\n" not in str(error.value)


def test_what_is_merged_in_is_no_key_given_twice(tmp_path):
    """`<<` takes a mapping over, whose keys may be given again; also where the mapping is made later."""
    (tmp_path / "merged.yaml").write_text(
        "data:\n  train: &train {path: synthetic, max_images: 40}\n"
        "  probe_test: &test {<<: *train, split: test, max_images: 10, label_column: label}\n"
        "  probe_train: {<<: *test, split: train}\n"
        "training: {output_dir: out}\n"
    )
    data = load_recipe(tmp_path / "merged.yaml").data
    assert (data.train.max_images, data.probe_test.split) == (40, "test")
    assert (data.probe_train.max_images, data.probe_train.split) == (10, "train")


def test_files_that_are_no_recipe_are_named(tmp_path):
    """Missing, a folder, not text, not YAML, not sections: the path and the reason, in one line."""
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.yaml").write_text("model: {patch_size: 8\ntraining: [")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "twice.yaml").write_text("training: {seed: 1}\nmodel: {}\ntraining: {max_steps: 4}\n")
    (tmp_path / "inner.yaml").write_text("training:\n  max_steps: 4\n  seed: 1\n  max_steps: 999\n")
    for name, message in {
        "missing.yaml": "cannot read the recipe .*missing.yaml: .*No such file",
        ".": "cannot read the recipe .*: .*[Ii]s a directory",
        "binary.yaml": "cannot read the recipe .*binary.yaml: .*codec can't decode",
        "broken.yaml": r"broken.yaml is not valid YAML: .* line \d",
        "list.yaml": "list.yaml must hold the sections task, model, head, data, training; found list",
        "twice.yaml": "twice.yaml is not valid YAML: key 'training' is given twice",
        "inner.yaml": "inner.yaml is not valid YAML: key 'max_steps' is given twice",
        "empty.yaml": "empty.yaml must hold the sections .*; found NoneType",
    }.items():
        with pytest.raises(RecipeError, match=message) as error:
            load_recipe(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_recipe_runs_no_code(tmp_path):
    """YAML tags that build Python objects are errors."""
    path = text_recipe(tmp_path, "model: !!python/object/apply:os.system ['true']")
    with pytest.raises(RecipeError, match="not valid YAML: .*python/object"):
        load_recipe(path)


def test_settings_survive_a_round_trip_through_yaml(recipe):
    """The model card prints model and training settings as YAML; they read back as they were."""
    loaded = load_recipe(recipe)
    printed = yaml.safe_dump({"model": loaded.model, "training": loaded.training})
    assert yaml.safe_load(printed) == {"model": loaded.model, "training": loaded.training}
