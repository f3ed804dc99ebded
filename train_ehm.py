"""Train with EHM: `accelerate launch train_ehm.py RECIPE.yaml [section.key=value ...]`, or plain `python`."""

import argparse
import errno
import logging
import sys

from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError

from modeling_ehm.training.checkpoints import GO_ON, CheckpointError
from modeling_ehm.training.data import UnusableData
from modeling_ehm.training.push import PushError
from modeling_ehm.training.recorded_trainer import NonFiniteError
from modeling_ehm.training.tasks import TASKS, load_recipe

# What a full disk or one that cannot be written to answers.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="train_ehm.py", description=__doc__)
    parser.add_argument("recipe", help="YAML file with its task and the sections model, head, data and training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="wins over the file")
    parser.add_argument("--require-push", action="store_true", help="as training.require_push=true")
    options = parser.parse_args(arguments)
    overrides = options.overrides + ["training.require_push=true"] * options.require_push
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)

    try:  # what can be wrong with a recipe, its files and its data is one line; later errors keep their traceback
        recipe = load_recipe(options.recipe, overrides)
        task = TASKS[recipe.task]
        prepared = task.prepare(recipe)
    except (StrictDataclassError, ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    try:
        task.execute(prepared)
    except UnusableData as error:  # from a worker it comes with that one's traceback before it
        sys.exit(f"error: {' '.join(str(error).split('UnusableData: ')[-1].split())}")
    except (CheckpointError, NonFiniteError, PushError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        sys.exit(f"error: {error}. {GO_ON} from the newest whole checkpoint")
    leave_together()


def leave_together() -> None:
    """A process that leaves while others still talk to it is aborted."""
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
