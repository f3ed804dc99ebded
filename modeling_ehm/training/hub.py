"""What a run says of itself: its record, and the model card written from it."""

import hashlib
import importlib.metadata
import json
import logging
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import yaml
from transformers import TrainerState

from modeling_ehm.configuration_ehm import EHMConfig
from modeling_ehm.training.data import read_skipped

logger = logging.getLogger(__name__)

VERSIONED = ("modeling_ehm", "torch", "transformers", "datasets", "accelerate", "huggingface_hub", "safetensors")
LATER_SETTINGS = {"decoder": "pil"}  # what stood for settings that records of earlier versions do not have
ORDER_KEYS = ("seed", "global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
LENGTH_KEYS = ("max_steps", "num_samples", "num_train_epochs")
RESUME_KEYS = ORDER_KEYS + LENGTH_KEYS  # training arguments that a run keeps
RATE_KEYS = ("learning_rate", "base_learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
OWN_RATES = ("reduce_lr_on_plateau", "greedy", "deepspeed")  # what finds or keeps its rates by itself
FOLDER_KEYS = ("resume_from_checkpoint", "deepspeed", "fsdp_config", "accelerator_config")  # may name folders
HEAD_PATHS = ("language_model", "projector", "chat_template")  # fields of heads that may name folders of the machine
TEMPLATE = Path(__file__).with_name("model_card_template.md")
TASK_TEMPLATE = Path(__file__).with_name("task_card_template.md")
PIPELINES = {  # of the Hub, by task
    "classify": "image-classification",
    "probe": "image-classification",
    "segment": "image-segmentation",
    "detect": "object-detection",
    "align": "image-text-to-text",
}


ABOUT_FIGURES = """\
k-NN and linear probe are on mean-pooled frozen features, in percent; the linear probe is ridge regression. `reference`
is the same classifier on 12x12 raw pixels. Hierarchy figures compare each tree, cut at the true number of segments,
with the true segments."""


@dataclass
class RunRecord:
    """What a run says of itself; kept as `run.json` in the output folder, so that it survives interruptions.

    Attributes:
        recipe: File of the recipe.
        data: One line on the training images and their revision.
        model: Fields of the config that the recipe set, and the weights it started from.
        augmentation: Fields of the data section other than the sources.
        training: Training arguments that the recipe set.
        starts: One entry a start of this run: time, step resumed from, processes, versions, training arguments that
            were changed.
        references: Figures that need no training, as k-NN on raw pixels.
        folder: Output folder.
        task: Name of the task.
        source: What decides which training images there are; see `data.identity_of`.
        resolved: Fields of the config whose defaults follow from other fields, as they hold.
    """

    recipe: str
    data: str
    model: dict
    augmentation: dict
    training: dict
    folder: str
    starts: list[dict] = field(default_factory=list)
    references: dict = field(default_factory=dict)
    task: str = "pretrain"
    source: dict = field(default_factory=dict)
    resolved: dict = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return Path(self.folder) / "run.json"

    def settings(self) -> dict:
        """What must not change when a run goes on: model, data, its length, and what decides the order of samples."""
        kept = {key: value for key, value in self.training.items() if key in RESUME_KEYS}
        return {"data": self.data, **self.source, **self.model, **self.resolved, **self.augmentation, **kept}

    def begin(self, resumed_from: str | None, num_processes: int, former: dict | None = None) -> None:
        """Note this start, after those of the run that it resumes, if it does.

        Other training arguments than those that a run keeps, as rates, hold from this start on, and are noted with it.

        Args:
            resumed_from: Checkpoint folder.
            num_processes: Of this start.
            former: What the fields in `resolved` were by default when records did not tell them.

        Raises:
            ValueError: the run that is resumed had other settings; its weights would get a config and a card that lie.
                Or a rate was changed that would not hold.
        """
        changed = {} if resumed_from is None else self._follow(resumed_from, former or {})
        self.starts.append(
            {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "resumed_from": None if resumed_from is None else Path(resumed_from).name,
                "processes": num_processes,
                "python": platform.python_version(),
                "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
                "changed": changed,
            }
        )

    def _follow(self, resumed_from: str, former: dict) -> dict[str, str]:
        """Take over the starts of the run that a checkpoint is of; returns which training arguments have changed."""
        beside = Path(resumed_from).absolute().parent / self.path.name
        path = next((path for path in (beside, self.path) if path.exists()), None)
        if path is None:
            logger.warning("%s has no %s beside it: its run's settings are not known", resumed_from, beside.name)
            return {}
        earlier = RunRecord(**json.loads(path.read_text()))
        self.starts = earlier.starts
        now, before = json.loads(json.dumps(self.settings(), default=str)), earlier.settings()
        before = {key: value for key, value in LATER_SETTINGS.items() if key in now} | before
        if not earlier.source:  # of an earlier version, which did not note it
            before |= {key: now[key] for key in self.source}
        if not earlier.resolved:  # nor these: what its recipe told and is told again holds as it is resolved now
            before |= {key: now[key] for key in self.resolved if earlier.model.get(key) == self.model.get(key)}
            before |= {key: value for key, value in former.items() if earlier.model.get(key) is None}
        if differing := _differences(before, now):
            shown = ", ".join(f"{key}={told}" for key, told in differing.items())
            raise ValueError(
                f"{resumed_from} belongs to a run with other settings: {shown}; give them back their values, or choose"
                " another training.output_dir, and model.pretrained to start a new run from these weights"
            )
        training = json.loads(json.dumps(self.training, default=str))
        changed = _differences(told_arguments(earlier.training), told_arguments(training))
        schedule = "deepspeed" if training.get("deepspeed") else training.get("lr_scheduler_type")
        if schedule in OWN_RATES and (rates := changed.keys() & set(RATE_KEYS)):
            shown = ", ".join(f"{key}={changed[key]}" for key in sorted(rates))
            raise ValueError(
                f"{resumed_from}: {schedule} goes on with the rates of the checkpoint, so that {shown} would not hold;"
                " give them back their values, or choose another training.output_dir, and model.pretrained"
            )
        return changed

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        being_written = self.path.with_suffix(".tmp")  # a kill must not leave half a record, which no start could read
        being_written.write_text(json.dumps(self.__dict__, indent=2, default=str) + "\n")
        being_written.rename(self.path)


def _differences(before: dict, now: dict) -> dict[str, str]:
    """What is not the same in both, by key: `'new value' (was 'old value')`."""
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return {key: f"{now.get(key, 'not set')!r} (was {before.get(key, 'not set')!r})" for key in keys}


def told_arguments(training: dict) -> dict:
    """Training arguments without folders of the machine."""
    return {key: value for key, value in training.items() if not key.endswith("_dir") and key not in FOLDER_KEYS}


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_card(run: RunRecord, state: TrainerState, config: EHMConfig, folder: Path) -> str:
    """Model card as Markdown: recipe, data, figures, masks, lineage, skipped images, versions, hashes of the files."""
    skipped = read_skipped(Path(run.folder) / "skipped_images.jsonl")
    return TEMPLATE.read_text().format(
        name=Path(run.folder).name,
        recipe=Path(run.recipe).name,
        recipe_settings=_describe_settings(run),
        data=run.data,
        image_size=config.image_size,
        patch_size=config.patch_size,
        masks=_describe_masks(config),
        steps=state.global_step,
        max_steps=state.max_steps,
        figures=_figures(run, state),
        starts=_describe_starts(run),
        skipped=_describe_skipped(skipped),
        hashes=_hashes(folder),
    )


def task_card(run: RunRecord, state: TrainerState, folder: Path, usage: str) -> str:
    """Model card of a downstream model as Markdown; `usage` holds Python lines that load and use it."""
    evaluated = [row for row in state.log_history if any(key.startswith("eval_") for key in row)]
    lines = ["| figure | value |", "| --- | --- |"]
    lines += [f"| {k[5:]} | {v:.4f} |" for k, v in (evaluated[-1] if evaluated else {}).items() if is_figure(k)]
    return TASK_TEMPLATE.read_text().format(
        pipeline=PIPELINES.get(run.task, "image-feature-extraction"),
        name=Path(run.folder).name,
        task=run.task,
        pretrained=_name_of_start(run),
        usage=usage.strip(),
        data=run.data,
        steps=state.global_step,
        max_steps=state.max_steps,
        recipe=Path(run.recipe).name,
        recipe_settings=_describe_settings(run),
        starts=_describe_starts(run),
        figures="\n".join(lines) if evaluated else "No evaluation was run.",
        hashes=_hashes(folder),
    )


def is_figure(key: str) -> bool:
    """Whether a key of an evaluation's row is a figure, and not its seconds or speed."""
    return key.startswith("eval_") and not key.endswith(("_runtime", "_per_second", "_preparation_time"))


def _name_of_start(run: RunRecord) -> str:
    """Name of the checkpoint a task started from, without folders of the machine."""
    start = run.model.get("pretrained")
    if start is None:
        return "random weights"
    is_hub_id = start.count("/") == 1 and start[0] not in "./~" and not Path(start).is_dir()
    return f"`{start if is_hub_id else Path(start).name}`"


def _describe_starts(run: RunRecord) -> str:
    return "\n".join(
        f"- {s['time']}: "
        + ("started" if s["resumed_from"] is None else f"resumed from {s['resumed_from']}")
        + f", {s['processes']} process(es), Python {s['python']}, "
        + ", ".join(f"{name} {version}" for name, version in s["versions"].items())
        + "".join(f"; from here on {key}={told}" for key, told in s.get("changed", {}).items())
        for s in run.starts
    )


def _hashes(folder: Path) -> str:
    """Table rows of the SHA-256 of each file that the model needs."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".py") or p.name == "config.json")
    files = [p for p in files if not p.name.startswith(("optimizer", "ema_teacher", "weight_average"))]
    return "\n".join(f"| {p.name} | `{sha256_of(p)}` |" for p in files)


def _describe_settings(run: RunRecord) -> str:
    """The recipe's sections as YAML, without the places of data and folders of the machine."""
    model = {key: value for key, value in run.model.items() if key != "pretrained"}
    sections = {"task": run.task, "model": model}
    if (head := model.pop("head", None)) is not None:  # Hub ids stay, of folders and files the last part does
        names = {key: Path(head[key]) for key in HEAD_PATHS if head.get(key)}
        sections["head"] = head | {key: path.name for key, path in names.items() if path.exists()}
    sections |= {"data": run.augmentation, "training": told_arguments(run.training)}
    return yaml.safe_dump(sections, sort_keys=False).rstrip()


def _describe_skipped(skipped: list[dict]) -> str:
    if not skipped:
        return "No image was skipped."
    count = len({line["sample_id"] for line in skipped})
    return f"{count} undecodable images were skipped; each is listed in skipped_images.jsonl of the run."


def _describe_masks(config: EHMConfig) -> str:
    if config.mask_policy == "random":
        return f"random masks (as MAE), ratio {config.mask_ratio}"
    if config.mask_policy != "ehm":
        return f"masks by the policy {config.mask_policy!r}, ratio {config.mask_ratio}"
    start, end = config.num_nodes_range(config.num_patches)
    since = f" from {config.evolution_start} on" if config.evolution_start else ""
    return (
        f"evolved hierarchical masks, ratio {config.mask_ratio}: {start} to {end} nodes of {config.num_patches} patches"
        f" ({config.num_nodes_curve} in progress{since}), softness {config.softness_start} to {config.softness_end},"
        f" {config.linkage} linkage over {config.affinity} of layers {list(config.resolved_affinity_layers)},"
        f" {config.teacher} teacher"
    )


def _figures(run: RunRecord, state: TrainerState) -> str:
    """Table of first and last evaluation, beside the references."""
    rows = [row for row in state.log_history if any(map(is_figure, row))]
    losses = [row for row in state.log_history if "loss" in row]
    lines = (
        [f"Training loss at the last log (step {losses[-1]['step']}): {losses[-1]['loss']:.4f}.", ""] if losses else []
    )
    if not rows:
        return "\n".join([*lines, "Nothing was measured."])
    lines += ["| figure | reference | first evaluation | last evaluation |", "| --- | --- | --- | --- |"]
    for key in filter(is_figure, rows[-1]):
        reference = run.references.get(key, "")
        first = rows[0].get(key, float("nan"))
        reference = f"{reference:.3f}" if isinstance(reference, float) else reference
        figures = f"{first:.3f} (step {rows[0]['step']}) | {rows[-1][key]:.3f} (step {rows[-1]['step']})"
        lines.append(f"| {key[5:]} | {reference} | {figures} |")
    return "\n".join([*lines, "", ABOUT_FIGURES])
