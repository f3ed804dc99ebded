"""`train_ehm.py` as a user meets it: one command that ends with a table, or one line that says what is wrong."""

import dataclasses
import json
import re
import runpy
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny_recipes import PROBES, ROOT, SEGMENTS, child_environment, write_parquet, write_recipe

import train_ehm
from modeling_ehm.training.data import ImageSource
from modeling_ehm.training.tasks import TASKS, load_recipe

SCRIPT = ROOT / "train_ehm.py"
NOTHING_TO_EVALUATE = ["data.probe_train=null", "data.probe_test=null", "training.num_gallery_images=0"]
FIVE = ["model.num_channels=5", "data.image_mean=[0, 0, 0, 0, 0]", "data.image_std=[1, 1, 1, 1, 1]"]
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}


def run_script(folder, *arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    environment = child_environment(folder / "home")
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def test_one_command_trains_evaluates_and_reports(tmp_path):
    """Exit 0, a table beside the reference, and on disk the model, the pictures and the same figures."""
    training = EVALUATED | {"save_strategy": "steps", "save_steps": 2, "num_gallery_images": 2}
    recipe = write_recipe(tmp_path / "recipe.yaml", data=PROBES | SEGMENTS, training=training)
    done = run_script(tmp_path, recipe, "training.output_dir=elsewhere", "training.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert "8 images a step, learning rate 0.001, 2 steps" in done.stderr
    assert "40 rows of synthetic, split train" in done.stderr
    out = tmp_path / "elsewhere"
    assert not (tmp_path / "out").exists()  # the override won
    assert (out / "checkpoint-2" / "model.safetensors").exists()
    for name in ("gallery.png", "curves.png"):
        assert min(Image.open(out / name).size) > 100
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 2 and [row["step"] for row in results["evaluations"]] == [0, 2]

    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["reference", "step", "0", "step", "2"] in lines
    table = {line[0]: line[1:] for line in lines if len(line) == 4}
    assert {"loss", "knn", "linear", "hierarchy_ari", "hierarchy_purity", "hierarchy_iou"} <= table.keys()
    first, last = results["evaluations"]
    for name, (reference, *figures) in ((name, table[name]) for name in ("knn", "linear", "hierarchy_ari")):
        assert reference == f"{results['references'][f'eval_{name}']:.3f}"
        assert figures == [f"{row[f'eval_{name}']:.3f}" for row in (first, last)]
    assert table["loss"][0] == "-"
    assert "wrote model.safetensors, gallery.png, curves.png, results.json to elsewhere" in done.stdout


def test_an_error_is_one_line_and_a_failing_exit_code(tmp_path):
    """The process ends with 1, prints one line and no traceback."""
    done = run_script(tmp_path, tmp_path / "nowhere.yaml")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: cannot read the recipe") and done.stderr.count("\n") == 1


@pytest.fixture
def error_of(tmp_path, monkeypatch, capsys):
    """`error_of(*overrides)`: the line with which the script ends, run in this process as `__main__`."""

    def run(*overrides, recipe=None):
        recipe = recipe or write_recipe(tmp_path / "recipe.yaml", data=PROBES, training=EVALUATED)
        monkeypatch.setattr(sys, "argv", ["train_ehm.py", str(recipe), *overrides])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        code = ended.value.code  # text: the interpreter prints it and exits with 1
        assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code
        assert "validat" not in code  # what the library calls its checks
        assert not (tmp_path / "out" / "model.safetensors").exists()
        return code

    return run


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["training.max_step=5"], ["training.max_step: unknown key", "did you mean 'max_steps'?"]),
        (["training.learning_rate=1e-4"], ["training.learning_rate='1e-4'", "write numbers as 1.0e-4"]),
        (["task=paint"], ["task='paint' is not one of", "pretrain"]),
        (["task=[pretrain]"], ["task=['pretrain'] is not one of", "pretrain"]),
        (["head.kind=linear"], ["task 'pretrain' has no section 'head'"]),
        (["model.mask_ratio=1.0"], ["mask_ratio=1.0 must lie strictly between 0 and 1"]),
        (["model.mask_ratio=0.01"], ["mask_ratio=0.01 hides 0 of 16 patches", "at least one patch must be hidden"]),
        (["model.mask_policy=spirals"], ["mask_policy='spirals' is not one of ehm, random", "import the module"]),
        (["training.import_modules=[no_such]"], ["training.import_modules names 'no_such'", "PYTHONPATH"]),
        (["model.masks_per_image=0"], ["masks_per_image=0 must be at least 1"]),
        (["model.image_size=36"], ["image_size=36 is not a multiple of patch_size=8", "32 or 40 would be"]),
        (["model.num_channels=1"], ["data.image_mean=[0.485, 0.456, 0.406] has 3 numbers", "model.num_channels=1"]),
        (FIVE, ["model.num_channels=5: image files have 1, 3 or 4 channels"]),
        (NOTHING_TO_EVALUATE, ["training.eval_strategy='steps'", "nothing to evaluate", "num_gallery_images above 0"]),
        (
            [
                "data.probe_train=null",
                "data.probe_test=null",
                "training.num_gallery_images=1",
                "training.lr_scheduler_type=reduce_lr_on_plateau",
            ],
            ["training.metric_for_best_model='loss'", "nothing is measured", "data.segments"],
        ),
        (["data.probe_test=null"], ["data.probe_train and data.probe_test go together"]),
        (["data.probe_train.label_column=null"], ["data.probe_train needs label_column"]),
        (["data.probe_train.label_column=lable"], ["no column 'lable'", "label"]),
        (["data.train={path: parquet, data_files: nothing.parquet}"], ["nothing.parquet"]),
        (["data.train.image_column=null"], ["['image', 'segments']", "image_column"]),
        (
            ["data.train.streaming=true", "training.max_steps=-1"],
            ["training.max_steps or training.num_samples must be set", "stream"],
        ),
        (["training.global_batch_size=9", "training.gradient_accumulation_steps=2"], ["global_batch_size=9", "of 2"]),
        (["training.eval_strategy=no"], ["training.eval_strategy=False", "in quotes"]),
        (["data={probe_train: null}"], ["data.train is missing"]),
        (["training.resume_from_checkpoint=nowhere"], ["resume_from_checkpoint='nowhere'", "has no whole.json"]),
        (["training.hub_token=hf_secret"], ["training.hub_token", "HF_TOKEN"]),
    ],
    ids=lambda value: " ".join(value)[:60] if value and "=" in value[0] else "",
)
def test_mistakes_are_told_in_one_line(error_of, overrides, parts):
    """Field, value and rule are in the line, and no secret."""
    line = error_of(*overrides)
    assert all(part in line for part in parts), line
    assert "hf_secret" not in line


OWN_POLICY = """
import torch
from modeling_ehm.mask_policies_ehm import register_mask_policy
from modeling_ehm.masking_ehm import keyed_uniform

@register_mask_policy("stripes")
def stripes_scores(request):
    rows, columns = request.grid_size
    row = torch.arange(rows * columns, device=request.mask_seed.device) // columns
    return keyed_uniform(request.mask_seed, rows, stream=16)[:, row]
"""


def test_a_mask_policy_of_ones_own(tmp_path):
    """Nothing of the package is changed; the record of the run and its card name the policy."""
    (tmp_path / "my_masks.py").write_text(OWN_POLICY)
    recipe = write_recipe(tmp_path / "recipe.yaml", model={"mask_policy": "stripes", "masks_per_image": 4})
    environment = child_environment(tmp_path) | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, str(SCRIPT), str(recipe), "training.import_modules=[my_masks]"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    compactness = [row["mask_compactness"] for row in rows if "loss" in row]
    # Of 4 x 4 patches one row is visible: 17 or 13 pairs of neighbours hidden, of 21 with a hidden one (random: 0.6).
    assert compactness and all(13 / 21 <= value <= 17 / 21 for value in compactness)
    assert "masks by the policy 'stripes'" in (tmp_path / "out" / "README.md").read_text()


def test_folders_and_files_without_images_are_told_in_one_line(error_of, tmp_path):
    """An empty folder, and a table without rows."""
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in error_of(f"data.train={{path: imagefolder, data_dir: {tmp_path / 'empty'}}}")
    path = write_parquet(tmp_path / "empty.parquet", [])
    assert "no data" in error_of(f"data.train={{path: parquet, data_files: {path}}}")


def test_an_empty_stream_is_told_in_one_line(error_of, tmp_path):
    """What is wrong with the data is found before training, also where they are read only as they are needed."""
    path = write_parquet(tmp_path / "empty.parquet", [])
    line = error_of(f"data.train={{path: parquet, data_files: {path}, streaming: true}}")
    assert "data.train yields no images" in line


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_images_is_told_in_one_line(error_of, tmp_path, workers):
    """The run stops at the first step and names the record that lists them."""
    data = {"train": {"path": "parquet", "data_files": write_parquet(tmp_path / "broken.parquet", [b"text"] * 3)}}
    recipe = write_recipe(tmp_path / "recipe.yaml", data=data, training={"dataloader_num_workers": workers})
    line = error_of(recipe=recipe)
    assert line.startswith("error: none of the images of data.train") and "skipped_images.jsonl" in line
    assert "Traceback" not in line
    assert len((tmp_path / "out" / "skipped_images.jsonl").read_text().splitlines()) >= 3


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_keys_are_told_of_every_task(recipe, capsys):
    """Every field that the task's own classes have, and of the sources; nothing is prepared for it."""
    train_ehm.main([str(recipe), "--keys"])
    told = capsys.readouterr().out
    schema = TASKS[load_recipe(recipe).task].SCHEMA
    own = [*dataclasses.fields(schema.data), *dataclasses.fields(ImageSource)]
    own += dataclasses.fields(schema.head) if schema.head else []
    for name in ["mask_ratio", "global_batch_size", *(field.name for field in own)]:
        assert re.search(rf"\b{name}\b.*: ", told), name


def test_running_out_of_memory_is_told_in_one_line(error_of, monkeypatch):
    def fail(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(TASKS["pretrain"], "execute", fail)
    line = error_of()
    assert line.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. Start again with training.gradient_")


def test_errors_of_training_keep_their_traceback(tmp_path, monkeypatch):
    def fail(trainer):
        raise RuntimeError("of the library")

    monkeypatch.setattr(TASKS["pretrain"], "execute", fail)
    monkeypatch.setattr(sys, "argv", ["train_ehm.py", str(write_recipe(tmp_path / "recipe.yaml"))])
    with pytest.raises(RuntimeError, match="of the library"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_data_set_that_cannot_be_reached_is_told_in_one_line(error_of):
    """Offline, a data set of the Hub is an error with its name."""
    assert "someone/pictures" in error_of("data.train={path: someone/pictures}")
