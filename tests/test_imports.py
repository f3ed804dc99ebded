"""Imports point one way, and the model side fits the Hub's flat set of files."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modeling_ehm"
MODULES = sorted(PACKAGE.rglob("*.py"))
HUB_FILES = sorted(PACKAGE.glob("*_ehm.py"))

# A file may import from files of a smaller step; within training/, from one another too.
STEPS = {
    "version": 0,
    "configuration_ehm": 0,
    "hierarchy_ehm": 1,
    "compiled_merging": 2,
    "triton_merging": 2,
    "fast_merging": 3,
    "masking_ehm": 2,
    "mask_policies_ehm": 3,
    "modeling_ehm": 4,
    "checks": 5,
    "parsing": 5,
    "conversion": 5,
    "export": 6,
    "__init__": 6,
    "training": 7,
    "train_ehm": 8,
}


def name_of(path: Path) -> str:
    """Dotted name inside the package: `hierarchy_ehm`, `training.data`, `__init__`."""
    return ".".join(path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT).with_suffix("").parts)


def step_of(name: str) -> int:
    top = name.split(".")[0]
    assert top in STEPS, f"{name} has no place in the order of imports yet: give it one in STEPS"
    return STEPS[top]


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Every import anywhere in a file as (dots, module)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def own_imports_of(path: Path) -> list[str]:
    """Names inside the package of the modules that a file imports from it."""
    package = [] if path.parent == ROOT else list(path.parent.relative_to(PACKAGE).parts)
    own = []
    for dots, module in imports_of(path):
        if dots:
            base = package[: len(package) - dots + 1]
            own.append(".".join([*base, *filter(None, [module])]) or "__init__")
        elif module == "modeling_ehm" or module.startswith("modeling_ehm."):
            own.append(module.removeprefix("modeling_ehm").lstrip(".") or "__init__")
    return own


def test_the_files_are_found():
    names = {"configuration_ehm", "hierarchy_ehm", "masking_ehm", "mask_policies_ehm", "modeling_ehm"}
    assert {path.stem for path in HUB_FILES} == names
    assert "modeling_ehm" in {name for path in MODULES for name in own_imports_of(path)}


@pytest.mark.parametrize("path", [*MODULES, ROOT / "train_ehm.py"], ids=name_of)
def test_imports_point_one_way(path):
    name = name_of(path)
    for imported in own_imports_of(path):
        backwards = step_of(imported) >= step_of(name)
        if backwards and step_of(imported) == step_of(name) == STEPS["training"]:
            continue
        assert not backwards, f"{name} imports {imported}, which comes later or beside it"


@pytest.mark.parametrize("path", HUB_FILES, ids=name_of)
def test_hub_files_import_only_what_every_reader_has(path):
    """transformers copies `from .x import y` flat beside the weights and demands every other import from the reader."""
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    hub_names = {file.stem for file in HUB_FILES}
    for dots, module in imports_of(path):
        if dots:
            assert dots == 1 and module in hub_names, f"{path.name} imports {'.' * dots}{module}: not a file beside it"
        else:
            assert module.split(".")[0] in allowed, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", HUB_FILES, ids=name_of)
def test_no_text_looks_like_a_relative_import(path):
    """transformers finds imports by these patterns, in docstrings too, and then looks for the files."""
    patterns = r"^\s*import\s+\.(\S+)\s*$", r"^\s*from\s+\.(\S+)\s+import"
    seen = {name for pattern in patterns for name in re.findall(pattern, path.read_text(), flags=re.MULTILINE)}
    assert seen == {module for dots, module in imports_of(path) if dots}


def test_no_file_name_starts_with_an_underscore():
    """The Hub's upload leaves such files out."""
    assert [path.name for path in MODULES if path.name.startswith("_") and path.name != "__init__.py"] == []


def test_the_package_imports_without_its_training_side():
    """Who only loads a checkpoint needs neither datasets nor the Trainer's extras."""
    assert not [name for name in own_imports_of(PACKAGE / "__init__.py") if name.startswith("training")]
