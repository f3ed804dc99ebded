"""`RecordedTrainer`: transformers' Trainer, whose checkpoints are whole, hold no pickle, and tell of their run."""

import logging
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from modeling_ehm.training import hub

logger = logging.getLogger(__name__)


class RecordedTrainer(Trainer):
    """Base of the trainers of all tasks.

    Args:
        run: What the model card tells of the run; see `hub.RunRecord`. None writes no card.
        args, kwargs: As for `transformers.Trainer`.
    """

    def __init__(self, *args, run: "hub.RunRecord | None" = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.run = run
        self.failed_pushes: list[str] = []
        self.resume_from: str | None = None

    def announce(self) -> None:
        """Write the run's record and log what is about to happen; on the main process."""
        if not self.is_world_process_zero():
            return
        self.run.save()
        if self.resume_from is not None:
            logger.info("resuming from %s", self.resume_from)
        args = self.args
        logger.info(
            "%d images a step, learning rate %.3g, %d steps", args.images_per_step, args.learning_rate, args.max_steps
        )

    @property
    def bare_model(self) -> PreTrainedModel:
        """The model without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        # Stock models save under the names of older versions, which the Trainer cannot resume from (transformers issue
        # 48805): it loads what it finds by name and leaves the rest at random, with no more than a warning.
        model = self.bare_model
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del model.save_pretrained  # the instance's; that of the class stays
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        # The Trainer pickles its arguments; a pickle is nothing to share, and JSON says the same with tokens masked.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        (folder / "training_args.json").write_text(self.args.to_json_string())
        self._write_card(folder)

    def save_final_model(self) -> None:
        """Save the model that was evaluated last into `output_dir`, without the push that `save_model` may make."""
        self.save_model(_internal_call=True)

    def _write_card(self, folder: Path) -> None:
        if self.run is not None:
            (folder / "README.md").write_text(hub.model_card(self.run, self.state, self.bare_model.config, folder))

    def create_model_card(self, *args, **kwargs) -> None:
        """The card written from the run, instead of the Trainer's generic one."""
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push weights, config, code, processor and card from the finished checkpoint folder, and wait for it.

        The Trainer would copy weights and config alone into `output_dir` and push that in the background: a commit
        whose `auto_map` names code that is not there, and whose weights may change while they are read.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        try:
            message = f"Training in progress, step {self.state.global_step}"
            hub.push_folder(checkpoint_folder, self.hub_model_id, message, self.args.hub_revision)
        except Exception as error:  # a Hub that is down must not end a training
            self.failed_pushes.append(f"step {self.state.global_step}: {type(error).__name__}: {error}")
            logger.warning("push to %s failed and will be tried again at the next save: %s", self.hub_model_id, error)

    def push_to_hub(self, commit_message: str = "End of training", **kwargs):
        """Save the final model into `output_dir` and push it; raises if the Hub refuses."""
        self.save_final_model()
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo()
        return hub.push_folder(self.args.output_dir, self.hub_model_id, commit_message, self.args.hub_revision)
