"""Train with EHM: `accelerate launch train_ehm.py RECIPE.yaml [section.key=value ...]`, or plain `python`."""

import argparse
import logging
import sys

from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError

from modeling_ehm.training.data import UnusableData
from modeling_ehm.training.failures import told_in_one_line
from modeling_ehm.training.recipes import describe_keys
from modeling_ehm.training.tasks import TASKS, load_recipe


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="train_ehm.py", description=__doc__)
    parser.add_argument("recipe", help="YAML file with its task and the sections model, head, data and training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="wins over the file")
    parser.add_argument("--require-push", action="store_true", help="as training.require_push=true")
    parser.add_argument("--keys", action="store_true", help="only tell what a recipe of this task may hold")
    options = parser.parse_args(arguments)
    overrides = options.overrides + ["training.require_push=true"] * options.require_push
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)

    try:  # what can be wrong with a recipe, its files and its data is one line; later errors keep their traceback
        recipe = load_recipe(options.recipe, overrides)
        task = TASKS[recipe.task]
        if options.keys:
            print(describe_keys(task.SCHEMA))
            return
        prepared = task.prepare(recipe)
    except (StrictDataclassError, UnusableData, ValueError, OSError, ImportError) as error:
        if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
            error = error.__cause__  # without the names of the library's validators
        sys.exit(f"error: {' '.join(str(error).split())}")
    try:
        task.execute(prepared)
    except Exception as error:
        if (told := told_in_one_line(error)) is None:
            raise
        sys.exit(f"error: {told}")
    leave_together()


def leave_together() -> None:
    """A process that leaves while others still talk to it is aborted."""
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
