"""ImageNet on paper follows from what was timed."""

import argparse
import importlib
import json
from pathlib import Path

import pytest
from tiny_recipes import ROOT


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("scaling")


@pytest.fixture
def options():
    return argparse.Namespace(epochs=300, batch=4096, gpus=[8], bandwidth=[400.0], price=3.0)


@pytest.fixture
def steps(scaling):
    """256 masks a second of ViT-B with random masks, half as many with all others."""
    figures = {masks.variant: {"milliseconds": 2000.0} for masks in scaling.MASKS.values()}
    return {"results": {"base": {"figures": figures | {"random masks": {"milliseconds": 1000.0}}}}}


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_hours_of_the_timed_model_are_those_of_its_steps(scaling, options, steps):
    """300 · 1,281,167 masks by 8 GPUs of 256 masks a second: 187,671 seconds, 52.1 hours; twice that with EHM."""
    rows = rows_of(scaling.paper_table(options, scaling.speeds(steps), crops_a_second=512))
    assert rows[0][:6] == ["ViT-B/16", "random", "8", "52.1", "417", "1,251"]
    assert rows[0][6:8] == ["2,048", "4"]  # crops a second, and the cores that make them
    assert rows[1][3] == "104.3" and rows[2][1:4] == ["EHM, all layers, R = 4", "8", "104.3"]
    assert rows[2][6:8] == ["256", "0"]  # four masks of each crop: 8 · 128 / 4


def test_the_larger_model_takes_longer_by_its_operations(scaling, options, steps):
    base, large = (scaling.SHAPES[name] for name in ("ViT-B/16", "ViT-L/16"))
    rows = rows_of(scaling.paper_table(options, scaling.speeds(steps), crops_a_second=512))
    hours = {(row[0], row[1]): float(row[3]) for row in rows}
    ratio = hours["ViT-L/16", "random"] / hours["ViT-B/16", "random"]
    assert ratio == pytest.approx(large.flops() / base.flops(), rel=0.01)


def test_what_is_shipped_can_be_read(scaling, options):
    """The report that the command writes follows from the files beside it."""
    results = ROOT / "docs/results"
    options.steps_of, options.data = results / "step_h200.json", results / "data.json"
    text = scaling.report(options, json.loads((results / "scaling.json").read_text()))
    written = (results / "scaling.md").read_text()
    assert rows_of(text[text.index("| model") :])[0] == rows_of(written[written.index("| model") :])[0]


def test_results_name_their_machine_and_options(scaling, tmp_path):
    options = argparse.Namespace(rounds=3, out_stem=Path("somewhere/here"))
    scaling.write_json(tmp_path / "new" / "x.json", {"a": 1}, options)
    written = json.loads((tmp_path / "new" / "x.json").read_text())
    assert written["results"] == {"a": 1} and written["options"] == {"rounds": 3}
    assert "cores of" in written["machine"] and written["date"] and written["threads"] >= 1
