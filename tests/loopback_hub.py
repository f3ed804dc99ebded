"""A Hugging Face Hub on 127.0.0.1: pushes and loads are tested over real HTTP, without the network and without mocks.

What it is: enough of the Hub's HTTP interface for `huggingface_hub`, `transformers` and `datasets` to create
repositories, commit, upload LFS files, tag, branch and download by commit. Storage is content-addressed and commits
are atomic, so a test can ask after any fault which bytes the repository holds. LFS bytes travel to and from
`http://localhost:PORT`, another origin than the Hub's `http://127.0.0.1:PORT`: a token sent there shows in `hub.log`.

What it is not: git, Xet (clients need `HF_HUB_DISABLE_XET=1`), pull requests, discussions, gating, card validation,
rate limits, multipart uploads, signed URLs, .gitignore rules, deletion of repositories and references. Files are held
in memory: keep them below 100 MB.

Clients read `HF_ENDPOINT` when imported, so each needs a process of its own:

    with LoopbackHub(tmp_path / "hub", tokens={"hf_a": "alice", "hf_ro": "alice:read"}) as hub:
        subprocess.run([sys.executable, "client.py"], env=hub.env("hf_a", home=tmp_path / "home"), check=True)
        assert hub.read("alice/model", "config.json") == expected
"""

import base64
import hashlib
import json
import os
import re
import socket
import socketserver
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

# The Hub's own first commit is this file; its patterns decide which uploads go through LFS.
GITATTRIBUTES = "".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n"
    for suffix in ("bin", "ckpt", "npy", "npz", "onnx", "parquet", "pkl", "pt", "pth", "safetensors", "tar", "zip")
).encode()
LARGE_FILE = 10 * 2**20  # from this size on, any file is LFS, as on the Hub
CHUNK = 64 * 1024

KINDS = {"model": "", "dataset": "datasets/", "space": "spaces/"}  # repository kind -> prefix of its web address


class User(NamedTuple):
    name: str
    can_write: bool


class LfsRef(NamedTuple):
    """What a commit holds in place of a large file; `hub.read` follows it."""

    sha256: str
    size: int

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    summary: str
    description: str
    author: str
    date: str
    files: dict[str, bytes | LfsRef]  # the whole tree, not the difference to the parent

    @property
    def message(self) -> str:
        return f"{self.summary}\n\n{self.description}".strip()


@dataclass
class Repo:
    kind: str
    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def history(self, revision: str) -> Iterator[Commit]:
        """Newest first."""
        commit = self.at(revision)
        yield commit
        while commit.parent is not None:
            commit = self.commits[commit.parent]
            yield commit


@dataclass
class LogRecord:
    method: str
    path: str  # without the query
    host: str
    authorized: bool  # whether an Authorization header came; its text is never kept
    status: int | None = None  # None while the answer is pending, and when it was never sent


@dataclass
class Fault:
    match: str  # regular expression searched in "METHOD /path"
    times: int = 1  # requests to strike, -1 = all
    skip: int = 0  # matching requests to spare first
    status: int | None = None  # answer so instead of doing the work
    message: str | None = None
    code: str | None = None  # X-Error-Code
    headers: dict[str, str] | None = None  # added to the answer, for example Retry-After
    after: bool = False  # do the work, then lose the answer, or send `status` in its place
    cut_upload: int | None = None  # bytes of body to read before the connection closes
    cut_download: int | None = None  # bytes of body to send before the connection closes
    rst: bool = False  # close with a reset; given alone, before any work
    delay: float | None = None  # seconds to wait before anything else
    rate: float | None = None  # bytes per second, both ways
    hits: int = 0  # requests struck so far


@dataclass
class Request:
    method: str
    path: str  # still quoted: `refs%2Fpr%2F1` is one segment
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    user: User | None

    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("1", "true")


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An error of the Hub; clients choose their exception class by `X-Error-Code` more than by the status."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.reply = json_reply({"error": message}, status)
        self.reply.headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})


class Dropped(Exception):
    """The connection ends here without (the rest of) an answer."""

    def __init__(self, rst: bool = False):
        self.rst = rst


def json_reply(content: object, status: int = 200) -> Reply:
    return Reply(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


def file_reply(request: Request, content: bytes, headers: dict[str, str]) -> Reply:
    """The bytes of a file, or those its `Range` header asks for."""
    headers = headers | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", "").strip())
    if asked is None or asked.groups() == ("", ""):
        return Reply(200, content, headers)
    first, last = asked.groups()
    start = int(first) if first else max(0, len(content) - int(last))  # "bytes=-9" means the last nine
    stop = min(len(content), int(last) + 1) if first and last else len(content)
    if start >= stop:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
    return Reply(206, content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe(path: str, content: bytes | LfsRef) -> dict:
    """A file as the `tree` and `paths-info` routes list it."""
    if isinstance(content, bytes):
        return {"type": "file", "path": path, "oid": git_oid(content), "size": len(content)}
    lfs = {"oid": content.sha256, "size": content.size, "pointerSize": len(content.pointer)}
    return {"type": "file", "path": path, "oid": git_oid(content.pointer), "size": content.size, "lfs": lfs}


class LoopbackHub:
    """The server and its state; use as a context manager.

    Args:
        root: Folder for a copy of all that was received: `objects/<sha256>` and `commits/<sha>.json`. A test may search
            it for what must never have been sent.
        tokens: Token to user name, or to `"name:read"` for a token without write permission.
    """

    def __init__(self, root: Path, tokens: dict[str, str]):
        self.root = Path(root)
        self.log: list[LogRecord] = []
        self.stopping = threading.Event()
        self._users = {token: User(who.split(":")[0], not who.endswith(":read")) for token, who in tokens.items()}
        self._repos: dict[tuple[str, str], Repo] = {}
        self._awaited: dict[str, int] = {}  # sha256 -> size of the LFS objects clients were told to upload
        self._faults: list[Fault] = []
        self._lock = threading.RLock()  # one request is worked on at a time: commits are atomic, nothing can interleave
        (self.root / "objects").mkdir(parents=True, exist_ok=True)
        (self.root / "commits").mkdir(exist_ok=True)

    def __enter__(self) -> "LoopbackHub":
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage_url = f"http://localhost:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stopping.set()  # wakes the requests held by `delay` and `rate`
        self._server.shutdown()
        self._server.server_close()

    # What tests call

    def env(self, token: str | None, home: Path) -> dict[str, str]:
        """Environment for a client process. Give each client an empty `home`: an old cache hides failures."""
        # Offline switches block loopback too, and an inherited cache folder or token would take part in the test.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        local = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "HF_HOME": str(home)}
        hub = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return inherited | local | hub | ({"HF_TOKEN": token} if token else {})

    def commits(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> list[Commit]:
        """History of a revision, newest last; the first commit is the Hub's own (.gitattributes)."""
        with self._lock:
            return list(self._repos[repo_type, repo_id].history(revision))[::-1]

    def read(self, repo_id: str, path: str, revision: str = "main", repo_type: str = "model") -> bytes:
        with self._lock:
            content = self._repos[repo_type, repo_id].at(revision).files[path]
            return content if isinstance(content, bytes) else self._object(content.sha256).read_bytes()

    def fault(self, match: str, **how) -> Fault:
        """Make matching requests fail, as the fields of `Fault` say; its `hits` counts the requests it struck.

        A push: "POST /api/repos/create", "POST .*/preupload/", "PUT /upload/" (LFS bytes), "POST .*/commit/".
        A load: "(HEAD|GET) .*/resolve/", "GET /storage/" (LFS bytes).
        """
        fault = Fault(match, **how)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        with self._lock:
            self._faults.clear()

    def leaks(self) -> list[LogRecord]:
        """Requests that took a token to the storage origin, which must never see one."""
        return [record for record in self.log if record.authorized and not self.is_hub(record.host)]

    # Called by the connection handler

    def is_hub(self, host: str) -> bool:
        return f"http://{host}" == self.url

    def next_fault(self, request_line: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times == 0 or not re.search(fault.match, request_line):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1 if fault.times > 0 else 0
                fault.hits += 1
                return fault
        return None

    def user_of(self, authorization: str | None) -> User | None:
        if authorization is None:
            return None
        user = self._users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def answer(self, request: Request, host: str) -> Reply:
        for method, pattern, function, access in self.HUB_ROUTES if self.is_hub(host) else self.STORAGE_ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match is None or request.method.replace("HEAD", "GET") != method:
                continue
            groups = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
            with self._lock:
                if access is not None:
                    kind, repo_id = groups.pop("kind", "model"), groups.pop("repo_id")
                    groups["repo"] = self._accessible_repo(request.user, kind, repo_id, write=access == "write")
                return function(self, request, **groups)
        hint = "; set HF_HUB_DISABLE_XET=1 in the client" if "/xet-" in request.path else ""
        raise HubError(404, f"the loopback hub has no route {request.method} {request.path}{hint}")

    # Permissions

    def _accessible_repo(self, user: User | None, kind: str, repo_id: str, write: bool) -> Repo:
        repo, owner = self._repos.get((kind, repo_id)), repo_id.split("/")[0]
        if repo is None or (repo.private and (user is None or user.name != owner)):
            # The Hub does not tell a stranger whether a private repository exists.
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write:
            self._require_writer(user, owner)
        return repo

    def _require_writer(self, user: User | None, owner: str) -> User:
        if user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if user.name != owner:
            raise HubError(403, f"You don't have the rights to write under the namespace {owner}")
        if not user.can_write:
            raise HubError(403, "You must use a write token to modify a repository")
        return user

    # Accounts and repositories

    def _whoami(self, request: Request) -> Reply:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        name, role = request.user.name, "write" if request.user.can_write else "read"
        auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": role}}
        return json_reply({"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": auth})

    def _validate_yaml(self, request: Request) -> Reply:
        return json_reply({"errors": [], "warnings": []})

    def _create_repo(self, request: Request) -> Reply:
        asked = request.json()
        owner = asked.get("organization") or (request.user.name if request.user else "")
        user = self._require_writer(request.user, owner)
        kind, repo_id = asked.get("type") or "model", f"{owner}/{asked['name']}"
        created = {"id": repo_id, "name": repo_id, "url": f"{self.url}/{KINDS[kind]}{repo_id}"}
        if (kind, repo_id) in self._repos:
            return json_reply(created | {"error": "You already created this repo"}, 409)  # its url is read even so
        repo = Repo(kind, repo_id, private=asked.get("visibility") == "private" or asked.get("private") is True)
        self._repos[kind, repo_id] = repo
        self._append(repo, "main", {".gitattributes": GITATTRIBUTES}, "initial commit", "", user.name)
        return json_reply(created)

    def _repo_info(self, request: Request, repo: Repo, rev: str = "main") -> Reply:
        commit = repo.at(rev)
        facts = {"id": repo.repo_id, "author": repo.repo_id.split("/")[0], "private": repo.private, "sha": commit.sha}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        fixed = {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "spaces": []}
        return json_reply(facts | fixed | {"lastModified": commit.date, "siblings": siblings})

    # Revisions

    def _refs(self, request: Request, repo: Repo) -> Reply:
        def listed(refs: dict[str, str], folder: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": sha} for n, sha in refs.items()]

        known = {"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags")}
        return json_reply(known | {"converts": [], "pullRequests": []})

    def _list_commits(self, request: Request, repo: Repo, rev: str) -> Reply:
        def listed(c: Commit) -> dict:
            who = [{"user": c.author}]
            return {"id": c.sha, "title": c.summary, "message": c.description, "date": c.date, "authors": who}

        return json_reply([listed(commit) for commit in repo.history(rev)])

    def _create_branch(self, request: Request, repo: Repo, name: str) -> Reply:
        return self._create_ref(repo, repo.branches, name, request.json().get("startingPoint", "main"))

    def _create_tag(self, request: Request, repo: Repo, rev: str) -> Reply:
        return self._create_ref(repo, repo.tags, request.json()["tag"], rev)

    def _create_ref(self, repo: Repo, refs: dict[str, str], name: str, start: str) -> Reply:
        if name in refs:
            raise HubError(409, f"Reference {name} already exists")
        refs[name] = repo.at(start).sha
        return json_reply({})

    # Uploads, in the order a client calls them

    def _preupload(self, request: Request, repo: Repo, rev: str) -> Reply:
        """Tell for each file how to send it, and the oid it has now: clients leave out unchanged files by it."""
        head = repo.at(rev).files
        rules = head.get(".gitattributes", b"").decode().splitlines()
        lfs_patterns = [line.split()[0] for line in rules if "filter=lfs" in line]

        def mode(path: str, size: int, sample: bytes) -> str:
            listed = any(PurePosixPath(path).match(pattern) for pattern in lfs_patterns)
            return "lfs" if listed or size >= LARGE_FILE or b"\0" in sample else "regular"

        def oid(path: str) -> str | None:
            content = head.get(path)
            return git_oid(content) if isinstance(content, bytes) else content and content.sha256

        files = [
            {"path": f["path"], "uploadMode": mode(f["path"], f["size"], base64.b64decode(f["sample"]))}
            | {"shouldIgnore": False, "oid": oid(f["path"])}
            for f in request.json()["files"]
        ]
        return json_reply({"files": files})

    def _lfs_batch(self, request: Request, repo: Repo) -> Reply:
        asked = request.json()
        if asked["operation"] != "upload":
            raise HubError(501, "the loopback hub serves LFS downloads through /resolve/ only")
        return json_reply({"objects": [self._upload_plan(repo, o["oid"], o["size"]) for o in asked["objects"]]})

    def _upload_plan(self, repo: Repo, oid: str, size: int) -> dict:
        if self._object(oid).exists():
            return {"oid": oid, "size": size}  # no action: nothing to send
        self._awaited[oid] = size
        upload = {"href": f"{self.storage_url}/upload/{oid}"}
        verify = {"href": f"{self.url}/{KINDS[repo.kind]}{repo.repo_id}.git/info/lfs/objects/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def _put_object(self, request: Request, oid: str) -> Reply:
        if oid not in self._awaited:
            raise HubError(403, "This upload was not asked for")
        if (hashlib.sha256(request.body).hexdigest(), len(request.body)) != (oid, self._awaited[oid]):
            raise HubError(400, "The uploaded bytes are not those that were announced")
        self._object(oid).write_bytes(request.body)
        return Reply()

    def _verify_object(self, request: Request, repo: Repo) -> Reply:
        asked = request.json()
        self._check_stored(LfsRef(asked["oid"], asked["size"]))
        return json_reply({})

    def _object(self, sha256: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise HubError(400, f"{sha256} is not a sha256")
        return self.root / "objects" / sha256

    def _check_stored(self, ref: LfsRef) -> LfsRef:
        path = self._object(ref.sha256)
        if not path.exists() or path.stat().st_size != ref.size:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {ref.sha256}, {ref.size} bytes")
        return ref

    def _commit(self, request: Request, repo: Repo, rev: str) -> Reply:
        """Apply all operations to a copy of the head's tree; any error before `_append` leaves the branch as it was."""
        if rev not in repo.branches:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        if request.flag("create_pr"):
            raise HubError(501, "the loopback hub has no pull requests")
        head, header = repo.at(rev), {}
        files = dict(head.files)
        for operation in map(json.loads, request.body.splitlines()):
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
                if header.get("parentCommit", head.sha) != head.sha:
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                size = value.get("size", self._awaited.get(value["oid"]))  # copies of LFS files come without a size
                files[value["path"]] = self._check_stored(LfsRef(value["oid"], size))
            elif key in ("deletedFile", "deletedFolder"):
                self._delete_path(files, value["path"], folder=key == "deletedFolder")
            else:
                raise HubError(400, f"Unknown operation {key}")
        author = request.user.name
        commit = self._append(repo, rev, files, header["summary"], header.get("description", ""), author)
        url = f"{self.url}/{KINDS[repo.kind]}{repo.repo_id}/commit/{commit.sha}"
        return json_reply({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def _delete_path(self, files: dict[str, bytes | LfsRef], path: str, folder: bool) -> None:
        doomed = [name for name in files if (name.startswith(path.rstrip("/") + "/") if folder else name == path)]
        if not doomed:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in doomed:
            del files[name]

    def _append(self, repo: Repo, branch: str, files: dict, summary: str, description: str, author: str) -> Commit:
        """Add a commit to a branch, and its record and small files to `root`."""
        parent, date = repo.branches.get(branch), time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        listed = {}
        for path, content in files.items():
            listed[path] = content.sha256 if isinstance(content, LfsRef) else hashlib.sha256(content).hexdigest()
            if isinstance(content, bytes):
                self._object(listed[path]).write_bytes(content)
        story = {"repo": f"{KINDS[repo.kind]}{repo.repo_id}", "parent": parent, "summary": summary, "date": date}
        record = json.dumps(story | {"description": description, "author": author, "files": listed}, indent=1)
        sha = hashlib.sha1(record.encode()).hexdigest()
        (self.root / "commits" / f"{sha}.json").write_text(record)
        repo.commits[sha] = Commit(sha, parent, summary, description, author, date, files)
        repo.branches[branch] = sha
        return repo.commits[sha]

    # Downloads

    def _tree(self, request: Request, repo: Repo, rev: str, folder: str = "") -> Reply:
        commit, prefix, recursive = repo.at(rev), folder and folder.rstrip("/") + "/", request.flag("recursive")
        entries = {}
        for path in sorted(name for name in commit.files if name.startswith(prefix)):
            parents = [p for p in map(str, reversed(PurePosixPath(path).parents)) if p != "." and p.startswith(prefix)]
            for parent in parents if recursive else parents[:1]:
                entries[parent] = self._describe_folder(parent)
            if recursive or not parents:
                entries[path] = describe(path, commit.files[path])
        if not entries and folder:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound", {"X-Repo-Commit": commit.sha})
        return json_reply(list(entries.values()))

    def _describe_folder(self, path: str) -> dict:
        return {"type": "directory", "path": path, "oid": git_oid(path.encode()), "size": 0}

    def _paths_info(self, request: Request, repo: Repo, rev: str) -> Reply:
        files, entries = repo.at(rev).files, []
        for path in parse_qs(request.body.decode()).get("paths", []):
            if path in files:
                entries.append(describe(path, files[path]))
            elif any(name.startswith(path.rstrip("/") + "/") for name in files):
                entries.append(self._describe_folder(path))
        return json_reply(entries)

    def _resolve(self, request: Request, repo: Repo, rev: str, path: str) -> Reply:
        commit = repo.at(rev)
        headers, content = {"X-Repo-Commit": commit.sha}, commit.files.get(path)
        if content is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)  # clients cache the absence by commit
        if isinstance(content, bytes):
            return file_reply(request, content, headers | {"ETag": f'"{git_oid(content)}"'})
        headers |= {"X-Linked-Size": str(content.size), "X-Linked-ETag": f'"{content.sha256}"'}
        return Reply(302, b"", headers | {"Location": f"{self.storage_url}/storage/{content.sha256}"})

    def _get_object(self, request: Request, oid: str) -> Reply:
        if not self._object(oid).exists():
            raise HubError(404, "No such object")
        return file_reply(request, self._object(oid).read_bytes(), {"ETag": f'"{oid}"'})

    # Routes: method, path, handler, and the access to {kind} {repo_id} it needs. HEAD goes where GET goes.

    _API = r"/api/(?P<kind>model|dataset|space)s/(?P<repo_id>[^/]+/[^/]+)"
    _WEB = r"/(?:(?P<kind>dataset|space)s/)?(?P<repo_id>[^/]+/[^/]+?)"
    _REV = r"/(?P<rev>[^/]+)"
    HUB_ROUTES: list[tuple[str, str, Callable[..., Reply], str | None]] = [
        ("GET", r"/api/whoami-v2", _whoami, None),
        ("POST", r"/api/validate-yaml", _validate_yaml, None),
        ("POST", r"/api/repos/create", _create_repo, None),
        ("GET", _API + r"(?:/revision" + _REV + ")?", _repo_info, "read"),
        ("GET", _API + r"/refs", _refs, "read"),
        ("GET", _API + r"/commits" + _REV, _list_commits, "read"),
        ("POST", _API + r"/branch/(?P<name>[^/]+)", _create_branch, "write"),
        ("POST", _API + r"/tag" + _REV, _create_tag, "write"),
        ("POST", _API + r"/preupload" + _REV, _preupload, "write"),
        ("POST", _WEB + r"\.git/info/lfs/objects/batch", _lfs_batch, "write"),
        ("POST", _WEB + r"\.git/info/lfs/objects/verify", _verify_object, "write"),
        ("POST", _API + r"/commit" + _REV, _commit, "write"),
        ("GET", _API + r"/tree" + _REV + r"(?:/(?P<folder>.+))?", _tree, "read"),
        ("POST", _API + r"/paths-info" + _REV, _paths_info, "read"),
        ("GET", _WEB + r"/resolve" + _REV + r"/(?P<path>.+)", _resolve, "read"),
    ]
    STORAGE_ROUTES: list[tuple[str, str, Callable[..., Reply], str | None]] = [
        ("PUT", r"/upload/(?P<oid>\w+)", _put_object, None),
        ("GET", r"/storage/(?P<oid>\w+)", _get_object, None),
    ]


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a client that never hangs up must not keep the test run alive
    request_queue_size = 64

    def __init__(self, hub: LoopbackHub):
        self.hub = hub
        self.to_reset: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Connection)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the DNS for its name, seconds when offline
        self.server_name, self.server_port = self.server_address[:2]

    def shutdown_request(self, request: socket.socket) -> None:
        if request not in self.to_reset:
            return super().shutdown_request(request)
        self.to_reset.discard(request)
        request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() now sends RST
        self.close_request(request)

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients are killed in tests, that is no error
            super().handle_error(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    """Reads a request, lets the hub answer it, writes the answer; faults strike in between."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are two writes: Nagle would add 40 ms to each answer

    def _serve(self) -> None:
        hub, address, host = self.server.hub, urlsplit(self.path), self.headers.get("Host", "")
        record = LogRecord(self.command, address.path, host, "Authorization" in self.headers)
        hub.log.append(record)
        fault = hub.next_fault(f"{self.command} {address.path}") or Fault("")
        try:
            self._wait(fault.delay or 0)
            body = self._read_body(fault)
            reply = self._answer(address.path, parse_qs(address.query), host, body, fault)
            record.status = reply.status
            self._send(reply, fault)
        except Dropped as drop:
            self.close_connection = True
            if drop.rst:
                self.server.to_reset.add(self.connection)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, path: str, query: dict[str, list[str]], host: str, body: bytes, fault: Fault) -> Reply:
        injected = fault.status and HubError(fault.status, fault.message or "injected fault", fault.code, fault.headers)
        if injected and not fault.after:
            return injected.reply
        try:
            user = self.server.hub.user_of(self.headers.get("Authorization"))
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = self.server.hub.answer(Request(self.command, path, query, headers, body, user), host)
        except HubError as error:
            reply = error.reply
        except Exception:  # a bug of this file: show it, and let the client fail loudly
            traceback.print_exc()
            reply = HubError(500, "the loopback hub itself failed, see the test's stderr").reply
        if injected:
            return injected.reply
        if fault.after:
            raise Dropped(fault.rst)
        reply.headers |= fault.headers or {}
        return reply

    def _read_body(self, fault: Fault) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.close_connection = True  # like S3: uploads announce their length
            raise Dropped
        announced = int(self.headers.get("Content-Length", 0))
        wanted = announced if fault.cut_upload is None else min(announced, fault.cut_upload)
        body = bytearray()
        while len(body) < wanted:
            chunk = self.rfile.read1(min(CHUNK, wanted - len(body)))
            if not chunk:
                raise Dropped  # the client went away: what it sent is forgotten
            body += chunk
            self._wait(len(chunk) / fault.rate if fault.rate else 0)
        rst_alone = fault.rst and fault.cut_download is None and not fault.after
        if fault.cut_upload is not None or rst_alone:
            raise Dropped(fault.rst)
        return bytes(body)

    def _send(self, reply: Reply, fault: Fault) -> None:
        self.send_response(reply.status)
        for name, value in (reply.headers | {"Content-Length": str(len(reply.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        body = reply.body if self.command != "HEAD" else b""
        stop = len(body) if fault.cut_download is None else min(len(body), fault.cut_download)
        for start in range(0, stop, CHUNK):
            chunk = body[start : min(stop, start + CHUNK)]
            self.wfile.write(chunk)
            self._wait(len(chunk) / fault.rate if fault.rate else 0)
        if fault.cut_download is not None:
            raise Dropped(fault.rst)

    def _wait(self, seconds: float) -> None:
        if seconds and self.server.hub.stopping.wait(seconds):
            raise Dropped

    def log_message(self, *_) -> None:
        """Silence: `hub.log` is the log."""
