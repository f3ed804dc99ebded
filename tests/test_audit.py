"""What the project must never do, looked for in its text: unpickle, evaluate what it reads, trust code unpinned."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = sorted([ROOT / "train_ehm.py", *(ROOT / "modeling_ehm").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
TEXTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "model_cards").glob("*.md"), *CODE])
TEXTS += sorted((ROOT / "modeling_ehm").rglob("*.md"))

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NEEDED = {  # of a call, what it must say
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
FORBIDDEN = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "pd.read_pickle"}
TRUSTED = re.compile(r"trust_remote_code\s*=\s*True")


def dangers_in(source: str) -> list[str]:
    """Lines that unpickle, or run what they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            found += [f"{node.lineno}: import {name}" for name in modules if name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.Call):
            name, said = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
            if name in FORBIDDEN:
                found.append(f"{node.lineno}: {name}")
            if name in NEEDED:
                word, value = NEEDED[name]
                if not (word in said and isinstance(said[word], ast.Constant) and said[word].value is value):
                    found.append(f"{node.lineno}: {name} without {word}={value}")
    return found


def unpinned_in(text: str) -> list[str]:
    """Places that trust a repository's code, without a revision in the same call or the words for it on the line."""
    found = []
    for match in TRUSTED.finditer(text):
        line = text[text.rfind("\n", 0, match.start()) + 1 : (text.find("\n", match.end()) + 1) or None]
        call = text[text.rfind("(", 0, match.start()) : (text.find(")", match.end()) + 1) or None]
        if "revision=" not in call and "pinned revision" not in line:
            found.append(line.strip())
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path):
    assert dangers_in(path.read_text()) == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_of_a_repository_is_trusted_at_a_pinned_revision_alone(path):
    assert unpinned_in(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "np.load(path, mmap_mode='r')",
        "yaml.load(text)",
        "eval(text)",
    ],
)
def test_dangers_are_found(source):
    assert len(dangers_in(source)) == 1


def test_what_is_safe_is_not_a_danger():
    safe = "import json\ntorch.load(path, weights_only=True)\nmodel.eval()\nyaml.safe_load(text)\n"
    assert dangers_in(safe + "np.load(path, allow_pickle=False)\nload_file(path)") == []


def test_trust_without_a_revision_is_found():
    text = "AutoModel.from_pretrained(\n    repo, revision=sha, trust_remote_code=True)\n"
    assert unpinned_in(text) == []
    assert unpinned_in(text.replace("revision=sha, ", "")) == ["repo, trust_remote_code=True)"]
    assert unpinned_in(text.replace("sha", "") + "f(x, trust_remote_code = True)") == ["f(x, trust_remote_code = True)"]
    assert unpinned_in("# with trust_remote_code=True and a pinned revision") == []


def test_there_is_something_to_look_at():
    assert len(CODE) > 50 and any(TRUSTED.search(path.read_text()) for path in TEXTS)
