"""What several test files share: a tiny configuration, and fresh interpreters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))):  # no GPU of NVIDIA's or AMD's
    os.environ["TRITON_INTERPRET"] = "1"  # read when torch imports Triton: its kernels run as numpy

if "PYTEST_XDIST_WORKER" in os.environ:  # numba's index of machine code is not for two writers
    os.environ["NUMBA_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / os.environ["PYTEST_XDIST_WORKER"])

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: without a network, the client would try again for most of a minute

import torch
from transformers.utils import logging

from modeling_ehm import EHMConfig, EHMForPreTraining

ROOT = Path(__file__).parents[1]

# Whether or not the package is installed, a program behind these lines cannot import it.
BLOCK_PACKAGE = """
import sys
sys.modules["modeling_ehm"] = None
try:
    import modeling_ehm
except ImportError:
    pass
else:
    raise SystemExit("modeling_ehm can be imported, so this program would prove nothing")
"""

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture
def config() -> EHMConfig:
    return tiny_config()


def tiny_config(**changes) -> EHMConfig:
    """32 px images in 8 px patches (N = 16), encoder 64 wide with 3 layers, decoder 32 wide with one."""
    sizes = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 64,
    }
    return EHMConfig(**(sizes | changes))


@pytest.fixture
def make_config():
    """`make_config(**changes)`: the tiny configuration with some fields changed."""
    return tiny_config


def _environment(home: Path) -> dict[str, str]:
    dropped = ("PYTHON", "HF_", "TRANSFORMERS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run_without_package(tmp_path_factory):
    """`run_without_package(program, *arguments)`: a fresh interpreter, elsewhere, in which our package is missing."""

    def run(program: str, *arguments) -> subprocess.CompletedProcess:
        home = tmp_path_factory.mktemp("elsewhere")
        command = [sys.executable, "-c", BLOCK_PACKAGE + program, *map(str, arguments)]
        return subprocess.run(command, cwd=home, env=_environment(home), capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def run_module(tmp_path_factory):
    """`run_module("modeling_ehm.conversion", *arguments)`: `python -m`, with the package of this tree."""

    def run(module: str, *arguments) -> subprocess.CompletedProcess:
        home = tmp_path_factory.mktemp("home")
        command = [sys.executable, "-m", module, *map(str, arguments)]
        environment = _environment(home) | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory):
    """`datasets` prepares local copies in a folder of this session."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
        yield


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """Directory of a pre-training checkpoint of the tiny configuration, with random weights."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    EHMForPreTraining(tiny_config()).save_pretrained(folder)
    return folder
