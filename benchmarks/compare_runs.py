"""Hold runs against each other: `python benchmarks/compare_runs.py OUT_STEM NAME=OUTPUT_DIR [NAME=OUTPUT_DIR ...]`.

Reads `results.json` and `trainer_state.json` of finished runs; writes OUT_STEM.png (curves, one line a run) and
OUT_STEM.md (one row an evaluation). Nothing is recomputed.
"""

import argparse
import json
from pathlib import Path

from modeling_ehm.training.pictures import render_curves


def read_run(folder: Path) -> tuple[list[dict], dict]:
    """Log history and summary of a finished run."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return state["log_history"], json.loads((folder / "results.json").read_text())


def evaluation_rows(history: list[dict]) -> dict[int, dict]:
    """Evaluations by step; where a run was resumed, the later one of a step."""
    return {row["step"]: row for row in history if "eval_runtime" in row}


def as_markdown(histories: dict[str, list[dict]], references: dict) -> str:
    """Table of all evaluations, a column a run and figure, the references first."""
    tables = {name: evaluation_rows(history) for name, history in histories.items()}
    every_row = [row for table in tables.values() for row in table.values()]
    keys = [k for k in every_row[0] if k.startswith("eval_") and k != "eval_runtime"]
    lines = ["| step | " + " | ".join(f"{key[5:]}, {name}" for key in keys for name in tables) + " |"]
    lines.append("| --- |" + " --- |" * (len(keys) * len(tables)))
    given = [f"{references[k]:.3f}" if k in references else "" for k in keys for _ in tables]
    lines.append("| reference | " + " | ".join(given) + " |")
    for step in sorted({row["step"] for row in every_row}):
        cells = [f"{tables[name][step][k]:.3f}" if step in tables[name] else "" for k in keys for name in tables]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_stem", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=OUTPUT_DIR")
    options = parser.parse_args()
    runs = {name: read_run(Path(folder)) for name, _, folder in (run.partition("=") for run in options.runs)}
    histories = {name: history for name, (history, _) in runs.items()}
    references = next(iter(runs.values()))[1]["references"]
    options.out_stem.parent.mkdir(parents=True, exist_ok=True)
    options.out_stem.with_suffix(".md").write_text(as_markdown(histories, references))
    render_curves(histories, options.out_stem.with_suffix(".png"), references=references)
    print(f"wrote {options.out_stem}.md and {options.out_stem}.png")


if __name__ == "__main__":
    main()
