"""Recipes: YAML file + `section.key=value` overrides -> typed, checked sections. Unknown keys are errors.

A recipe names its `task` and has the sections `model` (fields of `EHMConfig`, and `pretrained`), `data`, `training`
and, where the task has one, `head`, what stands on the encoder. Which fields the last three have, the task says.
"""

import dataclasses
import difflib
import enum
import inspect
import types
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml

from modeling_ehm.configuration_ehm import EHMConfig

SECTIONS = ("task", "model", "head", "data", "training")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message is one line that says where and why."""


@dataclasses.dataclass(frozen=True)
class Schema:
    """Dataclasses that the sections of a task's recipes must fit; `head` is None for tasks without that section."""

    data: type
    training: type
    head: type | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        task: What to do; one of the names in `training.tasks`.
        model: Keyword arguments of `EHMConfig`.
        pretrained: Directory or Hub id whose weights to start from (`model.pretrained`); None starts at random.
        head: What stands on the encoder, an instance of the task's `SCHEMA.head`.
        data: Sources and augmentation, an instance of the task's `SCHEMA.data`.
        training: Keyword arguments of the task's `SCHEMA.training`.
        source: File it was read from.
    """

    task: str
    model: dict
    pretrained: str | None
    head: typing.Any
    data: typing.Any
    training: dict
    source: str


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML keeps the last: a second section would undo the first."""

    def compose_mapping_node(self, anchor):  # as written, before anything is merged into it
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for number, key in enumerate(keys) if key in keys[:number]]:
            raise yaml.composer.ComposerError(None, None, f"key {twice[0][1]!r} is given twice", node.start_mark)
        return node


def read_recipe(path: str | Path, overrides: Sequence[str], schemas: dict[str, Schema]) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides, whose values are YAML.

    Args:
        path: YAML file.
        overrides: Each wins over the file.
        schemas: What the sections of each task must fit.

    Raises:
        RecipeError: unreadable file, wrong YAML, unknown section or key, or a value of the wrong type.
    """
    sections = _read_yaml(Path(path))
    for override in overrides:
        _override(sections, override)
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise RecipeError(f"{path}: unknown section {unknown[0]!r}{_suggest(unknown[0], SECTIONS)}; one of {SECTIONS}")
    task = sections.get("task", "pretrain")
    if task not in list(schemas):
        raise RecipeError(f"task={task!r} is not one of {', '.join(schemas)}")
    schema = schemas[task]
    for name in ("model", "head", "data", "training"):
        if not isinstance(sections.setdefault(name, {}) or {}, dict):
            raise RecipeError(f"{path}: section {name!r} must hold keys and values, not {sections[name]!r}")
        sections[name] = sections[name] or {}
    pretrained = sections["model"].pop("pretrained", None)
    if not isinstance(pretrained, str | None):
        raise RecipeError(f"model.pretrained={pretrained!r} must be a directory or a Hub id")
    if schema.head is None and sections["head"]:
        raise RecipeError(f"{path}: task {task!r} has no section 'head'")
    _check_fields(sections["model"], EHMConfig, "model")
    _check_fields(sections["training"], schema.training, "training")
    head = None if schema.head is None else _build(schema.head, sections["head"], "head")
    data = _build(schema.data, sections["data"], "data")
    return Recipe(task, sections["model"], pretrained, head, data, sections["training"], str(path))


def describe_keys(schema: Schema) -> str:
    """The sections of a task's recipes, with the fields of each and their meaning, as our classes tell them."""
    sections = {"model": EHMConfig, "head": schema.head, "data": schema.data, "training": schema.training}
    told = {}
    for name, section in sections.items():
        inner = [] if section is None else map(_dataclass_in, _field_types(section).values())
        for cls in [*getattr(section, "__mro__", ()), *filter(None, inner)]:
            if cls.__module__.startswith("modeling_ehm") and cls not in told:
                told[cls] = f"{name if cls is section else cls.__name__}: {inspect.getdoc(cls)}"
    first = "task: what to do. model.pretrained: directory or Hub id whose weights to start from."
    last = "In the section training also what transformers.TrainingArguments takes, as max_steps or save_steps."
    return "\n\n".join([first, *told.values(), last])


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe as it is after all overrides; read again, it is the same."""
    model = recipe.model | ({} if recipe.pretrained is None else {"pretrained": recipe.pretrained})
    sections = {"task": recipe.task, "model": model, "data": dataclasses.asdict(recipe.data)}
    if recipe.head is not None:
        sections["head"] = dataclasses.asdict(recipe.head)
    sections["training"] = recipe.training
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    being_written = path.with_suffix(".tmp")
    being_written.write_text(
        f"# Written by the run, from {recipe.source}.\n" + yaml.safe_dump(sections, sort_keys=False)
    )
    being_written.rename(path)


def _read_yaml(path: Path) -> dict:
    try:
        sections = UniqueKeyLoader(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(sections, dict):
        raise RecipeError(f"{path} must hold the sections {', '.join(SECTIONS)}; found {type(sections).__name__}")
    return sections


def _override(sections: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not key or not all(parents) or not last:
        raise RecipeError(f"override {override!r} must look like section.key=value, as in training.max_steps=10")
    try:
        value = UniqueKeyLoader(text).get_single_data()
    except yaml.YAMLError as error:
        raise RecipeError(
            f"override {override!r}: the value is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    for parent in parents:
        if not isinstance(sections.get(parent), dict):
            sections[parent] = {}
        sections = sections[parent]
    sections[last] = value


def _suggest(key: str, known) -> str:
    close = difflib.get_close_matches(str(key), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check_fields(values: dict, cls: type, where: str) -> None:
    """Keys must be init fields of the dataclass, values of their annotated types."""
    known = _field_types(cls)
    for key, value in values.items():
        if key not in known:
            raise RecipeError(f"{where}.{key}: unknown key{_suggest(key, known)}")
        if not _fits(value, known[key]):
            raise RecipeError(
                f"{where}.{key}={value!r} has type {type(value).__name__}; {_name(known[key])} is expected"
                + _yaml_hint(value)
            )


def _yaml_hint(value) -> str:
    """What YAML may have made of what was written."""
    if isinstance(value, bool):
        return f': write "{"yes" if value else "no"}" in quotes, since YAML reads a bare yes or no as true or false'
    return ": write numbers as 1.0e-4, not 1e-4" if _looks_like_number(value) else ""


def _build(cls: type, values: dict, where: str):
    """Build a dataclass whose fields may be dataclasses themselves."""
    if not isinstance(values, dict):
        raise RecipeError(f"{where} must hold keys and values, not {values!r}")
    nested = {name: inner for name, hint in _field_types(cls).items() if (inner := _dataclass_in(hint)) is not None}
    built = dict(values)
    for name, inner in nested.items():
        if built.get(name) is not None:
            built[name] = _build(inner, built[name], f"{where}.{name}")
    _check_fields(built, cls, where)
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in built]:
        raise RecipeError(f"{where}.{missing[0]} is missing, and has no default")
    try:
        return cls(**built)
    except ValueError as error:
        raise RecipeError(str(error)) from None


def _field_types(cls: type) -> dict[str, typing.Any]:
    """Annotation of each init field; `Any` where a library's annotation cannot be resolved from outside."""
    return {f.name: typing.Any if isinstance(f.type, str) else f.type for f in dataclasses.fields(cls) if f.init}


def _dataclass_in(hint) -> type | None:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _fits(value, hint) -> bool:
    """Whether a YAML value may stand for an annotation; annotations beyond plain types and containers pass."""
    if hint is typing.Any or value is None and hint is type(None):
        return True
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, option) for option in typing.get_args(hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(v, arguments[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, list, dict, type(None)) or dataclasses.is_dataclass(hint):
        return isinstance(value, hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, str)
    return True


def _looks_like_number(value) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)


def _name(hint) -> str:
    return getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
