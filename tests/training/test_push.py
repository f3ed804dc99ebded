"""Pushes and what a Hub can do to them, over real HTTP on loopback, each from a process of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from loopback_hub import LoopbackHub

from modeling_ehm.training import push
from modeling_ehm.training.push import PushError, push_folder

REPO, WEIGHTS = "alice/tiny", os.urandom(300_000)
TOKENS = {"hf_alicesecret": "alice", "hf_readsecret": "alice:read", "hf_bobsecret": "bob"}


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub(tmp_path / "hub", TOKENS) as hub:
        yield hub
        assert hub.leaks() == []
        assert not any(secret.encode() in path.read_bytes() for secret in TOKENS for path in files_of(hub.root))


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def folder(tmp_path):
    """A model directory with files beside it that are none of the model's."""
    folder = tmp_path / "checkpoint-2"
    (folder / "runs").mkdir(parents=True)
    for name in (
        "config.json",
        "modeling_ehm.py",
        "README.md",
        "optimizer.pt",
        "trainer_state.json",
        "runs/config.json",
    ):
        (folder / name).write_text(f"content of {name}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(push, "PAUSES", (0.1, 0.2, 0.3))


@pytest.fixture
def pushing(hub, folder, tmp_path, monkeypatch):
    """Push the folder as alice; other tokens and options on request."""

    def run(token="hf_alicesecret", **options):
        environment = hub.env(token, tmp_path / "home")
        for name in list(os.environ):
            if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return push_folder(folder, REPO, "step 2", **options)

    return run


def test_a_push_is_one_commit_of_what_belongs_to_a_model(hub, pushing, folder):
    repo, commit = pushing(private=True)
    newest = hub.commits(REPO)[-1]
    assert (repo, commit) == (REPO, newest.sha) and newest.summary == "step 2"
    assert set(newest.files) - {".gitattributes"} == {
        "config.json",
        "modeling_ehm.py",
        "README.md",
        "model.safetensors",
    }
    assert hub.read(REPO, "model.safetensors") == WEIGHTS
    assert pushing()[1] == commit and len(hub.commits(REPO)) == 2  # nothing has changed, so nothing is committed
    (folder / "config.json").write_text("other")
    assert pushing(revision="later")[1] == hub.commits(REPO, revision="later")[-1].sha
    assert hub.read(REPO, "config.json") == b"content of config.json"


PASSING = {  # what a push gets over
    "the repository is made late": ("POST /api/repos/create", {"status": 503, "times": 2}),
    "503 for two commits": ("POST .*/commit/", {"status": 503, "times": 2}),
    "another commit came first": ("POST .*/commit/", {"status": 412, "times": 1}),
    "the commit's answer is lost": ("POST .*/commit/", {"status": 502, "after": True, "times": 1}),
    "an upload is cut": ("PUT /upload/", {"cut_upload": 100_000, "times": 1}),
    "an upload is reset": ("PUT /upload/", {"cut_upload": 100_000, "rst": True, "times": 1}),
}
FINAL = {  # what it does not, and a word of the message
    "500 for every commit": ("POST .*/commit/", {"status": 500, "times": -1}, "500"),
    "quota": ("POST .*/commit/", {"status": 507, "times": -1, "message": "quota exceeded"}, "507"),
    "no right to commit": ("POST .*/commit/", {"status": 403, "times": -1}, "403"),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_does_not_stop_a_push(hub, pushing, fault):
    match, how = PASSING[fault]
    struck = hub.fault(match, **how)
    _, commit = pushing()
    assert struck.hits == how["times"]
    commits = hub.commits(REPO)
    assert commits[-1].sha == commit and len(commits) == 2 and hub.read(REPO, "model.safetensors") == WEIGHTS


@pytest.mark.parametrize("fault", FINAL)
def test_what_stays_is_told_in_one_line(hub, pushing, fault):
    match, how, word = FINAL[fault]
    hub.fault(match, **how)
    with pytest.raises(PushError) as told:
        pushing()
    assert word in str(told.value) and "\n" not in str(told.value)
    assert all("config.json" not in commit.files for commit in hub.commits(REPO))


@pytest.mark.parametrize("token", [None, "hf_wrongsecret", "hf_readsecret", "hf_bobsecret"])
def test_who_may_not_push_is_told_so(hub, pushing, token):
    with pytest.raises(PushError, match="40[13]|Token|token|login") as told:
        pushing(token=token)
    assert token is None or token not in str(told.value)


def test_an_upload_that_hangs_is_ended(hub, pushing):
    hub.fault("PUT /upload/", delay=60, times=-1)
    started = time.monotonic()
    with pytest.raises(PushError, match="the push was not finished after 5 seconds and was ended"):
        pushing(seconds=5)
    assert time.monotonic() - started < 15
    hub.clear_faults()
    assert pushing()[0] == REPO


def test_a_push_ends_with_the_run_that_began_it(hub, folder, tmp_path):
    """The run is killed while an upload hangs: what it began must not commit beside the run that is started again."""
    hanging = hub.fault("PUT /upload/", delay=30)
    program = "import sys; from modeling_ehm.training.push import push_folder; push_folder(*sys.argv[1:], 'step 2')"
    environment = hub.env("hf_alicesecret", tmp_path / "home") | {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = psutil.Popen([sys.executable, "-c", program, str(folder), REPO], env=environment)
    while not hanging.hits:
        assert run.poll() is None
        time.sleep(0.05)
    pushes = run.children()
    assert len(pushes) == 1
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(pushes, timeout=5)
    for push_left_over in alive:
        push_left_over.kill()
    assert alive == []


def test_a_hub_that_is_not_there(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PushError, match="Connect"):
        push_folder(folder, REPO, "step 2", seconds=60)


def test_by_hand(hub, folder, tmp_path):
    """The command that a run names when its final push has failed."""
    command = [sys.executable, "-m", "modeling_ehm.training.push", folder, REPO, "--message", "by hand", "--private"]
    environment = hub.env("hf_alicesecret", tmp_path / "home") | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [REPO, hub.commits(REPO)[-1].sha] and hub.commits(REPO)[-1].summary == "by hand"


def test_signed_addresses_are_not_repeated():
    error = RuntimeError("403 for https://cdn/upload?X-Signature=abc&x=1\nwhile sending")
    assert push.describe(error) == "RuntimeError: 403 for https://cdn/upload?... while sending"
