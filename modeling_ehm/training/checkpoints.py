"""Where a run goes on, and with which weights a task starts."""

import logging
from pathlib import Path

from transformers import AutoConfig

from modeling_ehm.configuration_ehm import EHMConfig
from modeling_ehm.conversion import check_keys, from_vit_mae, quiet_loading
from modeling_ehm.modeling_ehm import EHMModel
from modeling_ehm.training.arguments import ImageTrainingArguments
from modeling_ehm.training.recipes import RecipeError

logger = logging.getLogger(__name__)

HEADS = ("decoder", "classifier", "norm")  # of our pre-training, classification and segmentation checkpoints


def find_checkpoint(args: ImageTrainingArguments) -> str | None:
    """Checkpoint folder to go on from, as `training.resume_from_checkpoint` says."""
    chosen, folder = args.resume_from_checkpoint, Path(args.output_dir)
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    if chosen in ("never", None):
        if found:
            raise RecipeError(
                f"training.output_dir={args.output_dir!r} holds {found[0].name} of an earlier run, and"
                " training.resume_from_checkpoint is 'never' or null; choose another folder, or remove the checkpoints"
            )
        return None
    if chosen == "auto":
        for path in found:
            if is_whole(path):
                return str(path)
            logger.warning("%s is not whole (the run ended while it was written) and is left aside", path)
        return None
    if not is_whole(Path(chosen)):
        raise RecipeError(
            f"training.resume_from_checkpoint={chosen!r} is not auto, never, or a folder that holds trainer_state.json"
        )
    return chosen


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes trainer_state.json last."""
    return (checkpoint / "trainer_state.json").exists()


def load_encoder(pretrained: str | None, attn_implementation: str, **config_overrides) -> EHMModel:
    """The encoder of a checkpoint, or one with random weights.

    Args:
        pretrained: Directory or Hub id of an EHM checkpoint with or without decoder or head, or of a ViTMAE; None
            draws the weights from torch's generator.
        attn_implementation: Attention kernels.
        config_overrides: Fields of `EHMConfig` that differ from the checkpoint's. For another `image_size` or channel
            order nothing is interpolated: the sin-cos positions are made anew for the grid.

    Raises:
        ValueError: another kind of model; weights missing, left over or of another shape (all named).
        OSError: the directory lacks a file; transformers names it.
    """
    if pretrained is None:
        return EHMModel._from_config(EHMConfig(**config_overrides), attn_implementation=attn_implementation)
    try:
        kind = AutoConfig.from_pretrained(pretrained).model_type
    except OSError as error:  # names neither the field nor, for what looks like a Hub id, the missing folder
        raise OSError(
            f"model.pretrained={pretrained!r} is no directory that holds a model, nor could it be read from the Hub:"
            f" {error}"
        ) from None
    if kind == "vit_mae":
        encoder = from_vit_mae(pretrained, **config_overrides).ehm.train()
        encoder.set_attn_implementation(attn_implementation)
        return encoder
    if kind != "ehm":
        raise RecipeError(f"model.pretrained={pretrained!r} is of type {kind!r}; ehm and vit_mae can be used")
    config = EHMConfig.from_pretrained(pretrained, **config_overrides)
    with quiet_loading():
        encoder, report = EHMModel.from_pretrained(
            pretrained,
            config=config,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    if config.grid_size != EHMConfig.from_pretrained(pretrained).grid_size:
        mismatched.discard("embeddings.position_embeddings")  # made anew for this grid
    heads = [key for key in report["unexpected_keys"] if key.split(".")[0] in HEADS]
    unused = set(report["unexpected_keys"]) - set(heads)
    check_keys(f"the weights in {pretrained} do not fit EHMModel", report["missing_keys"], unused, mismatched)
    return encoder.train()
