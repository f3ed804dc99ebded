"""The loopback Hub by itself: what the tests of pushes and loads lean on, seen through the real client."""

import os
import re
import subprocess
import sys
import time
from urllib.error import HTTPError
from urllib.request import Request as UrlRequest
from urllib.request import urlopen

import pytest
from loopback_hub import LoopbackHub

TOKENS = {"hf_alicesecret": "alice", "hf_readsecret": "alice:read", "hf_bobsecret": "bob"}
WEIGHTS = os.urandom(2 * 2**20)  # 2 MiB, of a type that goes through LFS
README = b"---\nlicense: mit\n---\n# tiny\n"

# Each client program runs in a process of its own: HF_ENDPOINT and HF_HOME are read when huggingface_hub is imported.
PRELUDE = """
import sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi, errors, snapshot_download
api, folder, repo_id = HfApi(), Path(sys.argv[1]), "alice/tiny"
def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)
def push(**kwargs):
    return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs).oid
"""


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub(tmp_path / "hub", TOKENS) as hub:
        yield hub
        assert hub.leaks() == []


@pytest.fixture
def client(hub, tmp_path):
    """Run a program against the hub with an empty HF_HOME; returns what it printed."""
    folder = tmp_path / "push"
    folder.mkdir()
    (folder / "README.md").write_bytes(README)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    homes = iter(tmp_path / f"home{n}" for n in range(10))

    def run(program: str, token: str | None = "hf_alicesecret") -> str:
        arguments = [sys.executable, "-c", PRELUDE + program, str(folder)]
        done = subprocess.run(
            arguments, env=hub.env(token, next(homes)), capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


CREATE_AND_PUSH = "api.create_repo(repo_id, private=True); print(push())"


def test_a_snapshot_by_commit_holds_the_pushed_bytes(hub, client):
    sha = client(CREATE_AND_PUSH)
    assert [commit.sha for commit in hub.commits("alice/tiny")][1:] == [sha]
    assert hub.read("alice/tiny", "model.safetensors") == WEIGHTS
    files = hub.commits("alice/tiny")[-1].files
    assert files["README.md"] == README and files["model.safetensors"].size == len(WEIGHTS)  # small as is, large by LFS

    loaded = client(f"""
api.create_commit(repo_id, [CommitOperationAdd("README.md", b"changed")], commit_message="change")
path = Path(snapshot_download(repo_id, revision={sha!r}))
assert sorted(p.name for p in path.iterdir()) == [".gitattributes", "README.md", "model.safetensors"]
assert all((path / p.name).read_bytes() == p.read_bytes() for p in folder.iterdir())
print([commit.commit_id for commit in api.list_repo_commits(repo_id)][1:])""")
    assert loaded == str([sha, hub.commits("alice/tiny")[0].sha])


def test_tokens_open_what_they_should_and_stay_on_the_hub(hub, client):
    client(CREATE_AND_PUSH)
    read = "print(error_of(snapshot_download, repo_id))"
    assert client(read, token=None) == "('RepositoryNotFoundError', 401)"
    assert client(read, token="hf_bobsecret") == "('RepositoryNotFoundError', 404)"
    assert client(read, token="hf_wrong") == "('HfHubHTTPError', 401)"
    # The read token loads, and is refused at each way to write.
    program = """
print(error_of(snapshot_download, repo_id), api.whoami()["name"])
(folder / "README.md").write_text("changed")
print(error_of(push), error_of(api.create_repo, "alice/other"), error_of(api.create_tag, repo_id, tag="v1"))"""
    refused = "('HfHubHTTPError', 403)"
    assert client(program, token="hf_readsecret") == f"None alice\n{refused} {refused} {refused}"
    assert len(hub.commits("alice/tiny")) == 2

    storage = [record for record in hub.log if not hub.is_hub(record.host)]
    assert {(r.method, r.status) for r in storage} == {("PUT", 200), ("GET", 200)} and hub.leaks() == []
    kept = repr(hub.log).encode() + b"".join(p.read_bytes() for p in hub.root.rglob("*") if p.is_file())
    assert WEIGHTS in kept and not re.search("|".join(TOKENS).encode(), kept)


def test_the_same_folder_twice_is_one_commit(hub, client):
    first, second = client(CREATE_AND_PUSH + "; print(push())").split()
    assert first == second and len(hub.commits("alice/tiny")) == 2
    assert sum(record.method == "PUT" for record in hub.log) == 1


def test_a_refused_commit_leaves_the_head_where_it_was(hub, client):
    refused = hub.fault("POST .*/commit/", status=503)
    lost = hub.fault("POST .*/commit/", after=True)
    unknown = "0" * 40
    printed = client(f"""
api.create_repo(repo_id)
head = api.model_info(repo_id).sha
print(error_of(push), api.model_info(repo_id).sha == head)
print(error_of(push), api.model_info(repo_id).sha == head)  # this one landed, only its answer was lost
(folder / "README.md").write_text("changed")
print(error_of(push, parent_commit={unknown!r}), error_of(push, revision="nowhere"))""")
    assert printed.splitlines() == [
        "('HfHubHTTPError', 503) True",
        "('RemoteProtocolError', None) False",
        "('HfHubHTTPError', 412) ('RevisionNotFoundError', 404)",
    ]
    assert (refused.hits, lost.hits) == (1, 1) and len(hub.commits("alice/tiny")) == 2
    assert sum(record.method == "PUT" for record in hub.log) == 1  # the second push found the object stored


def test_a_pointer_needs_its_object(hub, client):
    printed = client("""
api.create_repo(repo_id)
from huggingface_hub.utils import get_session
line = '{"key":"lfsFile","value":{"path":"w.bin","algo":"sha256","oid":"%s","size":3}}' % ("0" * 64)
url = f"{api.endpoint}/api/models/{repo_id}/commit/main"
body = '{"key":"header","value":{"summary":"bad"}}' + chr(10) + line
print(get_session().post(url, headers=api._build_hf_headers(), content=body).status_code)""")
    assert printed == "400" and len(hub.commits("alice/tiny")) == 1


@pytest.mark.parametrize("rst", [False, True])
def test_a_cut_upload_is_sent_again(hub, client, rst):
    cut = hub.fault("PUT /upload/", times=2, cut_upload=100_000, rst=rst)
    client(CREATE_AND_PUSH)
    assert cut.hits == 2 and [r.status for r in hub.log if r.method == "PUT"] == [None, None, 200]
    assert hub.read("alice/tiny", "model.safetensors") == WEIGHTS and len(hub.commits("alice/tiny")) == 2


def test_downloads_by_range_and_through_faults(hub, client):
    client(CREATE_AND_PUSH)
    hub.fault("GET /storage/", skip=1, cut_download=1_000_000)
    slow = hub.fault("GET .*/resolve/main/README.md", delay=0.2, rate=1000)
    printed = client("""
from huggingface_hub import HfFileSystem
with HfFileSystem().open(f"{repo_id}/model.safetensors", block_size=1000) as file:
    file.seek(5000)
    assert file.read(10) == (folder / "model.safetensors").read_bytes()[5000:5010]
api.create_tag(repo_id, tag="v1")
api.create_branch(repo_id, branch="dev")
print([r.name for r in api.list_repo_refs(repo_id).branches], api.model_info(repo_id, revision="v1").sha)
path = Path(api.hf_hub_download(repo_id, "model.safetensors", revision="v1"))
assert path.read_bytes() == (folder / "model.safetensors").read_bytes()
api.hf_hub_download(repo_id, "README.md")
print(error_of(api.hf_hub_download, repo_id, "absent.txt"), error_of(api.model_info, repo_id, revision="nowhere"))""")
    sha = hub.commits("alice/tiny", revision="v1")[-1].sha
    assert printed.splitlines() == [
        f"['main', 'dev'] {sha}",
        "('RemoteEntryNotFoundError', 404) ('RevisionNotFoundError', 404)",
    ]
    assert slow.hits == 1 and [r.status for r in hub.log if r.path.startswith("/storage/")] == [206, 200, 200]


def test_a_token_sent_to_the_storage_origin_shows(tmp_path):
    with LoopbackHub(tmp_path, TOKENS) as hub, pytest.raises(HTTPError, match="404"):
        urlopen(UrlRequest(f"{hub.storage_url}/storage/{'0' * 64}", headers={"Authorization": "Bearer hf_bobsecret"}))
    assert [(record.path, record.status) for record in hub.leaks()] == [(f"/storage/{'0' * 64}", 404)]


def test_a_delayed_client_does_not_hold_up_the_exit(tmp_path):
    with LoopbackHub(tmp_path, {}) as hub:
        hub.fault(".", delay=3600)
        program = f"from urllib.request import urlopen; urlopen('{hub.url}/api/whoami-v2')"
        arguments = [sys.executable, "-c", program]
        waiting = subprocess.Popen(arguments, env=hub.env(None, tmp_path), stderr=subprocess.DEVNULL)
        while not hub.log:
            assert waiting.poll() is None
            time.sleep(0.01)
    assert waiting.wait(timeout=10) == 1
