"""Runs of the ledger are probed again with more images: whose weights are there, once, and beside the reference."""

import importlib
import json
import re

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_config
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from tiny_recipes import ROOT

from modeling_ehm import EHMForPreTraining


@pytest.fixture
def probes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("ledger_probes")


def test_every_image_is_tested_once_by_the_other_half(probes, monkeypatch):
    tested = []

    def probe(train, test, linear):
        assert not set(train[1].tolist()) & set(test[1].tolist())
        tested.extend(test[1].tolist())
        return {"knn": float(len(tested)), "linear": 1.0}

    monkeypatch.setattr(probes, "probe", probe)
    figures = probes.both_ways(torch.zeros(10, 3), torch.arange(10))
    assert sorted(tested) == list(range(10)) and figures == {"knn": 7.5, "linear": 1.0}


def test_differences_are_of_the_same_seed(probes):
    own = {0: {"knn": 10.0, "linear": 1.0}, 2: {"knn": 11.0, "linear": 3.0}, 3: {"knn": 50.0, "linear": 50.0}}
    whole = {0: {"knn": 11.0, "linear": 1.0}, 1: {"knn": 90.0, "linear": 90.0}, 2: {"knn": 11.5, "linear": 2.0}}
    assert probes.difference_cells(own, whole) == ["-1.0, -0.5; -0.8", "0.0, +1.0; +0.5"]
    assert probes.difference_cells(own, {}) == ["", ""]


@pytest.fixture
def work(probes, tmp_path):
    """A plan, and a work folder: random masks finished with two seeds, EHM with one, and once without weights."""
    ledger = importlib.import_module("masking_ledger")
    content = {
        "recipe": "pretrain/tin64_vit_tiny",
        "reference": "random",
        "seeds": [0, 1],
        "set": ["training.max_steps=10"],
        "downstream": {},
        "settings": {"random": ["model.mask_policy=random"], "ehm": []},
    }
    path, costs = tmp_path / "plan.yaml", {"random": 1.0, "ehm": 1.25}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    plan = ledger.read_plan(path)
    record = ledger.Record()
    for setting, overrides in plan.settings.items():
        key = ledger.key_of(plan.recipe, *[plan.common, plan.settings["random"]], overrides)
        record.costs[key] = {"setting": setting, "ratio": costs[setting], "machine": "one"}
    record.write(tmp_path / "ledger.json")
    for (setting, budget, seed), run in ledger.runs_of(plan, costs, tmp_path / "work").items():
        if setting == "ehm" and budget == ledger.TIME:
            continue
        folder = run.folder / "pretrain"
        torch.manual_seed(seed)
        EHMForPreTraining(tiny_config(image_size=64, patch_size=16)).save_pretrained(folder)
        recipe, _, _, _, own = run.arguments(plan)
        key = importlib.import_module("downstream").key_of(recipe, None, seed, own)
        (folder / "done.json").write_text(json.dumps({"key": key, "results": {}}))
        if setting == "ehm" and seed == 1:
            (folder / "model.safetensors").unlink()
    return tmp_path


def test_runs_whose_weights_are_there_are_probed_once(probes, work, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    shades = [rng.integers(100 * (row % 2), 100 * (row % 2) + 90, (8, 8, 3), dtype=np.uint8) for row in range(40)]
    rows = {"image": [PILImage.fromarray(shade) for shade in shades], "label": [row % 2 for row in range(40)]}
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "light"])})
    images = work / "shades" / "train.parquet"
    images.parent.mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(images)
    given = [str(work / "out"), "--images", str(images), "--plan", str(work / "plan.yaml")]
    given += ["--ledger", str(work / "ledger.json"), "--work", str(work / "work")]
    monkeypatch.setattr("sys.argv", ["ledger_probes.py", *given, "--only", "random"])
    probes.main()
    monkeypatch.setattr("sys.argv", ["ledger_probes.py", *given])
    probes.main()
    assert capsys.readouterr().out.count("random, 10 steps") == 2  # not measured again
    record = json.loads((work / "out.json").read_text())
    told = [(one["setting"], one["steps"], one["seed"], one["images"]) for one in record["results"].values()]
    assert told == [(s, 10, seed, "shades/train.parquet") for s, seed in (("random", 0), ("random", 1), ("ehm", 0))]
    assert all(one["figures"] == {"knn": 100.0, "linear": 100.0} for one in record["results"].values())
    text = (work / "out.md").read_text()
    assert "\nshades/train.parquet, 40 images; of raw pixels k-NN " in text
    assert "| random | 10 | 0, 1 | 100.00 ± 0.00 | 100.00 ± 0.00 |  |  |" in text
    assert "| ehm | 10 | 0 | 100.00 | 100.00 | 0.0; 0.0 | 0.0; 0.0 |" in text
    record["results"]["key shades/train.parquet"] = {"setting": "gone", "steps": 10, "seed": 0} | {
        name: record["results"][next(iter(record["results"]))][name] for name in ("images", "figures", "machine")
    }
    (work / "out.json").write_text(json.dumps(record))  # of another plan
    probes.main()
    assert (work / "out.md").read_text() == text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--only", "emh"], r"--only \['emh'\] is not in .*plan.yaml, whose settings are \['random', 'ehm'\]"),
        (
            ["--ledger", "nowhere.json"],
            r"nowhere.json: the costs of \['random', 'ehm'\] are not on .*masking_ledger.py",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(probes, work, monkeypatch, capsys, changed, message):
    given = ["--images", "images.parquet", "--plan", str(work / "plan.yaml"), "--ledger", str(work / "ledger.json")]
    monkeypatch.setattr("sys.argv", ["ledger_probes.py", str(work / "out"), *given, *changed])
    with pytest.raises(SystemExit):
        probes.main()
    assert re.search(message, capsys.readouterr().err) and not (work / "out.json").exists()
