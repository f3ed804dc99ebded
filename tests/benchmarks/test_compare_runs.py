"""The table and the curves of finished runs, from files written by hand."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, knn: float) -> str:
    history = [
        {"step": 0, "eval_knn": 10.0, "eval_runtime": 1.0},
        {"step": 5, "loss": 0.5},
        {"step": 10, "eval_knn": 11.0, "eval_runtime": 1.0},
        {"step": 10, "eval_knn": knn, "eval_runtime": 1.0},  # measured again by a resumed run
    ]
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (folder / "results.json").write_text(json.dumps({"references": {"eval_knn": 7.25}}))
    return str(folder)


def test_runs_stand_side_by_side(tmp_path):
    """A column a run, a row an evaluation, the later figure where a step was measured twice."""
    runs = [f"a={write_run(tmp_path / 'a', 30.0)}", f"b={write_run(tmp_path / 'b', 20.5)}"]
    command = [sys.executable, str(ROOT / "benchmarks" / "compare_runs.py"), str(tmp_path / "out" / "table"), *runs]
    subprocess.run(command, check=True, capture_output=True)
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines == [
        "| step | knn, a | knn, b |",
        "| --- | --- | --- |",
        "| reference | 7.250 | 7.250 |",
        "| 0 | 10.000 | 10.000 |",
        "| 10 | 30.000 | 20.500 |",
    ]
    assert (tmp_path / "out" / "table.png").read_bytes().startswith(b"\x89PNG")
