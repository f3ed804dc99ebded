"""Push a model directory to the Hub, in a process of its own that can be ended when the Hub does not answer.

    python -m modeling_ehm.training.push FOLDER REPO [--message TEXT] [--revision BRANCH] [--private]

The client waits for ever for an upload that hangs, and does not try a refused commit again. So `push_folder` runs this
file beside the training, with a time limit, and here a commit is tried several times: what is stored already is not
sent again, and a commit that has come through although its answer was lost is not made a second time. Standard library
and huggingface_hub only, so that it starts at once. The token is the client's own (`hf auth login`, HF_TOKEN); it is in
no argument.
"""

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

# What a model directory is: weights, config, code, processor, card. Not optimiser states, logs or other checkpoints;
# nor training arguments, which tell the folders of the machine: the card tells the recipe.
PUSHED_FILES = [
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "*_ehm.py",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "tokenizer*.json",
    "chat_template.jinja",
    "README.md",
    "gallery.png",
    "curves.png",
]
PAUSES = (1, 4, 10)  # seconds before a refused commit is tried again
TRANSIENT = (408, 409, 412, 429, 500, 502, 503, 504)  # answers that may be others the next time
QUERY = re.compile(r"\?[^\s'\"]+")  # of a signed address


class PushError(RuntimeError):
    """The Hub did not take a push; the message is one line."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    message: str,
    revision: str | None = None,
    private: bool | None = None,
    seconds: float = 600,
) -> tuple[str, str]:
    """Upload a model directory in one commit; the code travels in the same commit as the config that names it.

    If this process dies meanwhile, so does the push: the run started again would meet what it is doing.

    Args:
        folder: Must not change meanwhile.
        repo_id: Created if there is none.
        message: Of the commit.
        revision: Branch.
        private: Whether a repository that is created is private; None as the account has it.
        seconds: Time after which the push is ended.

    Returns:
        Full id of the repository, and the commit.

    Raises:
        PushError: the Hub refused, could not be reached, or took too long.
    """
    command = [sys.executable, "-P", __file__, str(folder), repo_id, "--message", message, "--end-with-stdin"]
    command += ["--pauses", *map(str, PAUSES)]
    command += ["--revision", revision] if revision else []
    command += ["--private"] if private else []
    watched, held = os.pipe()  # nothing is written; it ends with the process that holds its other end
    try:
        ended = subprocess.run(command, capture_output=True, text=True, stdin=watched, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise PushError(f"the push was not finished after {seconds:g} seconds and was ended") from None
    finally:
        os.close(watched)
        os.close(held)
    if ended.returncode != 0:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        raise PushError(lines[-1] if lines else f"the push ended with exit code {ended.returncode}")
    repo_id, commit = ended.stdout.split()[-2:]
    return repo_id, commit


def upload(
    folder: Path, repo_id: str, message: str, revision: str | None, private: bool | None, pauses: Sequence[float]
) -> tuple[str, str]:
    """As `push_folder`, in this process and without an end; `pauses` in seconds, one before each further try."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    for pause in (*pauses, None):
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=message,
                revision=revision,
                allow_patterns=PUSHED_FILES,
                ignore_patterns=["*/*"],
            )
            return repo_id, commit.oid
        except Exception as error:
            refused = isinstance(error, HfHubHTTPError) and error.response is not None
            cut = type(error).__module__.startswith("httpx")  # no answer at all
            if pause is None or not (cut or refused and error.response.status_code in TRANSIENT):
                raise
            print(f"{describe(error)}; trying again in {pause:g} s", file=sys.stderr)
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def end_with_stdin() -> None:
    """Have this process end, without ado, when its standard input does."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def describe(error: Exception) -> str:
    """One line, without what signs an address."""
    return f"{type(error).__name__}: " + QUERY.sub("?...", " ".join(str(error).split()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m modeling_ehm.training.push", description="Push a model directory.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("repo_id")
    parser.add_argument("--message", default="Upload model")
    parser.add_argument("--revision")
    parser.add_argument("--private", action="store_const", const=True)
    parser.add_argument("--pauses", nargs="*", type=float, default=PAUSES, help="seconds before each further try")
    parser.add_argument("--end-with-stdin", action="store_true", help=argparse.SUPPRESS)  # for push_folder
    options = vars(parser.parse_args())
    if options.pop("end_with_stdin"):
        end_with_stdin()
    try:
        print(*upload(**options))
    except Exception as error:  # whatever the client raises, the training is told in one line
        sys.exit(describe(error))


if __name__ == "__main__":
    main()
