"""`torchrun ... recorded_run.py FOLDER RECIPE [overrides]`: train_ehm.py that writes down which samples it trains on.

Each process appends to `FOLDER/samples-RANK.jsonl` one line a sample: step, mask seed, hash of the normalised pixels.
"""

import hashlib
import json
import sys
from pathlib import Path

from modeling_ehm.training.tasks import load_recipe, pretrain
from modeling_ehm.training.trainer import EHMTrainer


def run(folder: str | Path, recipe: str | Path, *overrides: str) -> dict[str, float]:
    class RecordingTrainer(EHMTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            with open(Path(folder) / f"samples-{self.args.process_index}.jsonl", "a") as file:
                for pixels, seed in zip(inputs["pixel_values"], inputs["mask_seed"], strict=True):
                    digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
                    file.write(json.dumps([self.state.global_step, int(seed), digest]) + "\n")
            return super().training_step(model, inputs, *args, **kwargs)

    return pretrain.execute(pretrain.prepare(load_recipe(recipe, overrides), RecordingTrainer))


def samples_of(folder: Path) -> list[list]:
    """All processes' samples, sorted within each step."""
    files = sorted(Path(folder).glob("samples-*.jsonl"))
    return sorted(json.loads(line) for file in files for line in file.read_text().splitlines())


if __name__ == "__main__":
    from train_ehm import leave_together

    run(*sys.argv[1:])
    leave_together()
