"""Weights in from ViTMAE, and out to a plain ViT that loads anywhere without this package and without remote code.

    python -m modeling_ehm.conversion from-vit-mae facebook/vit-mae-base ehm-from-mae
    python -m modeling_ehm.conversion to-vit ehm-checkpoint plain-vit

Our parameter names are ViTMAE's with `ehm.` for `vit.`, and the encoder's are ViT's; only the kind of the position
tables differs: parameters there, buffers here.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, PreTrainedConfig, ViTConfig, ViTMAEForPreTraining, ViTModel
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file, logging

from .configuration_ehm import EHMConfig, to_pair
from .modeling_ehm import EHMForPreTraining, EHMModel, sincos_positions

logger = logging.get_logger(__name__)

ENCODER_FIELDS = (  # of EHMConfig, ViTMAEConfig and ViTConfig alike
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
)
DECODER_FIELDS = (  # of EHMConfig and ViTMAEConfig
    "decoder_num_attention_heads",
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_intermediate_size",
    "mask_ratio",
    "norm_pix_loss",
)


def from_vit_mae(path_or_id: str | Path, **config_overrides) -> EHMForPreTraining:
    """Take over a `ViTMAEForPreTraining` checkpoint: with the same masks, the same loss.

    Our mask ratio is rounded to the nearest patch, ViTMAE's keeps `int(N * (1 - ratio))` patches; the two counts
    are equal for the usual ratios and may differ by one for others.

    Args:
        path_or_id: Directory or Hub id; checkpoints of any transformers version, with encoder and decoder.
        config_overrides: Fields of `EHMConfig`, above all those that ViTMAE lacks: `teacher`, `num_nodes_end`, ...

    Returns:
        The model in float32, in evaluation mode.

    Raises:
        ValueError: not a ViTMAE checkpoint, weights left over, missing or of another shape (all named), or an
            override that `EHMConfig` does not know.
    """
    _check_model_type(path_or_id, "vit_mae")
    known = {field.name for field in dataclasses.fields(EHMConfig)}
    unknown = sorted(set(config_overrides) - known)
    if unknown:
        raise ValueError(f"EHMConfig has no field {', '.join(unknown)}; see its documentation for those it has")
    source = _load(ViTMAEForPreTraining, path_or_id, torch.float32)
    fields = {name: getattr(source.config, name) for name in ENCODER_FIELDS + DECODER_FIELDS}
    model = EHMForPreTraining(EHMConfig(**(fields | config_overrides)))
    renamed = {
        f"ehm.{name.removeprefix('vit.')}" if name.startswith("vit.") else name: weight
        for name, weight in source.state_dict().items()
    }
    _copy_weights(model, renamed, f"EHMForPreTraining(config_overrides={config_overrides})")
    for name in ("ehm.embeddings.position_embeddings", "decoder.decoder_pos_embed"):
        _warn_of_unusual_positions(name, renamed[name], model.config.grid_size)
    return model.eval()


def to_vit(model: EHMModel | EHMForPreTraining) -> ViTModel:
    """The encoder as transformers' `ViTModel`, without its pooler.

    Equal features at the native image size. At others ours computes sin-cos positions, while ViT interpolates the
    stored table if asked to (`interpolate_pos_encoding=True`): close, not equal. A SimMIM mask token is left behind.

    Returns:
        The model in evaluation mode, a copy, in the dtype and on the device of the given one.
    """
    encoder = model.ehm if isinstance(model, EHMForPreTraining) else model
    fields = {name: getattr(encoder.config, name) for name in ENCODER_FIELDS}
    config = ViTConfig(**fields, encoder_stride=to_pair(encoder.config.patch_size)[0])
    vit = ViTModel(config, add_pooling_layer=False).to(encoder.device, encoder.dtype)
    weights = encoder.state_dict()
    weights.pop("embeddings.mask_token", None)
    _copy_weights(vit, weights, "ViTModel")
    return vit.eval()


def export_vit(source: str | Path | EHMModel | EHMForPreTraining, destination: str | Path) -> None:
    """Save the encoder as a plain ViT directory: `AutoModel.from_pretrained(destination)` needs nothing of ours.

    That call adds a pooler with random weights, which `last_hidden_state` does not depend on;
    `AutoModel.from_pretrained(destination, add_pooling_layer=False)` leaves it out.

    Args:
        source: Model, or directory or Hub id of one; the image processor is taken along from there if there is one.
        destination: Directory, made if need be.
    """
    if isinstance(source, EHMModel | EHMForPreTraining):
        processor, model = None, source
    else:
        _check_model_type(source, "ehm")
        processor, model = _image_processor_of(source), _load(EHMModel, source, "auto")
    with _quiet():
        to_vit(model).save_pretrained(destination)
    if processor is not None:
        processor.save_pretrained(destination)


def _check_model_type(path_or_id: str | Path, expected: str) -> None:
    if not Path(path_or_id).is_dir() and (str(path_or_id).count("/") != 1 or str(path_or_id)[0] in "./~"):
        raise ValueError(f"{path_or_id} is neither a directory nor a Hub id (owner/name)")
    found = PreTrainedConfig.get_config_dict(path_or_id)[0].get("model_type")
    if found != expected:
        raise ValueError(f"{path_or_id} has model_type={found!r} in its config.json; {expected!r} is expected")


def _load(model_class: type, path_or_id: str | Path, dtype: torch.dtype | str):
    """`from_pretrained` without its report, and strict: every weight is found, and no other."""
    with _quiet():
        model, report = model_class.from_pretrained(
            path_or_id, output_loading_info=True, ignore_mismatched_sizes=True, dtype=dtype
        )
    mismatched = [name for name, *_ in report["mismatched_keys"]]
    problem = f"the weights in {path_or_id} do not fit {model_class.__name__}"
    _check_keys(problem, report["missing_keys"], report["unexpected_keys"], mismatched)
    return model


def _copy_weights(model: nn.Module, weights: dict[str, Tensor], target: str) -> None:
    own = model.state_dict()
    mismatched = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    problem = f"the weights do not fit {target}"
    _check_keys(problem, own.keys() - weights.keys(), weights.keys() - own.keys(), mismatched)
    model.load_state_dict(weights)


def _check_keys(problem: str, missing: Iterable[str], unused: Iterable[str], mismatched: Iterable[str]) -> None:
    kinds = ("missing", missing), ("unused", unused), ("of another shape", mismatched)
    found = [f"{kind}: {_some_of(sorted(keys))}" for kind, keys in kinds if keys]
    if found:
        raise ValueError(f"{problem}; {'; '.join(found)}")


def _some_of(keys: list[str], limit: int = 8) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def _warn_of_unusual_positions(name: str, table: Tensor, grid_size: tuple[int, int]) -> None:
    if torch.allclose(table.float(), sincos_positions(grid_size, table.shape[-1]), atol=1e-3):
        return
    if not table.any():
        logger.warning(
            f"{name} is all zeros, as transformers 5.23 leaves it in a ViTMAE built from scratch: the model knows no"
            " positions. It is kept, so that features stay equal"
        )
    else:
        logger.warning(f"{name} is not MAE's sin-cos table. It is kept; images of another size will get the latter")


def _image_processor_of(path_or_id: str | Path):
    file = cached_file(path_or_id, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False)
    return None if file is None else AutoImageProcessor.from_pretrained(path_or_id)


@contextmanager
def _quiet():
    """Without transformers' progress bars and loading report: `_check_keys` tells what matters, and as an error."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_destination(source: str, destination: Path, overwrite: bool) -> None:
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is a file; a directory is expected")
    if destination.is_dir() and Path(source).is_dir() and destination.samefile(source):
        raise ValueError(f"{destination} is the source itself; give another directory")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise ValueError(f"{destination} is not empty; give another directory, or --overwrite to write into it")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m modeling_ehm.conversion", description="Convert checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("from-vit-mae", "ViTMAEForPreTraining checkpoint -> EHM checkpoint, ready for further pre-training"),
        ("to-vit", "EHM checkpoint -> plain ViT directory, which loads without this package and without remote code"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("source", metavar="SRC", help="directory or Hub id")
        command.add_argument("destination", metavar="DST", type=Path, help="directory to write")
        command.add_argument("--overwrite", action="store_true", help="write into DST even if it is not empty")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        _check_destination(options.source, options.destination, options.overwrite)
        if options.command == "to-vit":
            export_vit(options.source, options.destination)
        else:
            model = from_vit_mae(options.source)
            processor = _image_processor_of(options.source)
            model.save_pretrained(options.destination)
            if processor is not None:
                processor.save_pretrained(options.destination)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        sys.exit(f"{parser.prog} {options.command}: error: {first_line}")
    print(f"{options.command}: {options.source} -> {options.destination}")


if __name__ == "__main__":
    main()


__all__ = ["export_vit", "from_vit_mae", "to_vit"]
