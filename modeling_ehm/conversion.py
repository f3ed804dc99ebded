"""Weights in from ViTMAE, and out to models of transformers that load without this package and without remote code.

    python -m modeling_ehm.conversion from-vit-mae facebook/vit-mae-base ehm-from-mae
    python -m modeling_ehm.conversion to-vit ehm-checkpoint plain-vit
    python -m modeling_ehm.conversion to-dinov2 ehm-checkpoint dinov2-backbone --out-indices 3 5 7 11

Our parameter names are ViTMAE's with `ehm.` for `vit.`, and the encoder's are ViT's; only the kind of the position
tables differs: parameters there, buffers here. ViT has no backbone class, DINOv2 has one, and with layer scales of 1
it computes the same.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    Dinov2Backbone,
    Dinov2Config,
    PreTrainedConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEForPreTraining,
    ViTModel,
)
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file, logging

from .configuration_ehm import EHMConfig, to_pair
from .modeling_ehm import (
    EHMForImageClassification,
    EHMForPreTraining,
    EHMForSemanticSegmentation,
    EHMModel,
    EHMPreTrainedModel,
    sincos_positions,
)

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


def to_vit(
    model: EHMPreTrainedModel, image_size: int | Sequence[int] | None = None
) -> ViTModel | ViTForImageClassification:
    """The encoder as transformers' `ViTModel` without its pooler, or the classifier as `ViTForImageClassification`.

    Equal features at the native image size. At others ours computes sin-cos positions, while ViT interpolates the
    stored table if asked to (`interpolate_pos_encoding=True`): close, not equal; for equality there, make the export
    for that size. A SimMIM mask token and `drop_path_rate` are left behind.

    Args:
        model: Any model of this package; of all but `EHMForImageClassification`, the encoder.
        image_size: Native size of the export in pixels, one number or (height, width); the model's own if None.

    Returns:
        The model in evaluation mode, a copy, in the dtype and on the device of the given one.

    Raises:
        ValueError: a classifier with `pooling="mean"`, which ViT does not have, or a size that the patch does not
            divide.
    """
    classifies = isinstance(model, EHMForImageClassification)
    if classifies and model.config.pooling != "cls":
        raise ValueError(
            f"pooling={model.config.pooling!r}: ViTForImageClassification reads the class token and has no other"
            " pooling; fine-tune with pooling='cls', or call to_vit(model.ehm) for the encoder alone, or take"
            " modeling_ehm.export, which writes any classifier as ONNX"
        )
    encoder = model.base_model
    fields, weights = _encoder_fields_and_weights(encoder, image_size)
    config = ViTConfig(**fields, encoder_stride=to_pair(encoder.config.patch_size)[0])
    if classifies:
        config.id2label, config.label2id = dict(model.config.id2label), dict(model.config.label2id)
        weights = {f"vit.{name}": weight for name, weight in weights.items()}
        weights |= {f"classifier.{name}": weight for name, weight in model.classifier.state_dict().items()}
        vit = ViTForImageClassification(config)
    else:
        vit = ViTModel(config, add_pooling_layer=False)
    vit.to(encoder.device, encoder.dtype)
    _copy_weights(vit, weights, type(vit).__name__)
    return vit.eval()


def to_dinov2_backbone(
    model: EHMPreTrainedModel,
    out_indices: Sequence[int] | None = None,
    image_size: int | Sequence[int] | None = None,
) -> Dinov2Backbone:
    """The encoder as transformers' `Dinov2Backbone`: what `EHMBackbone` computes, for detection and segmentation heads.

    Equal feature maps at the native image size. At others ours computes sin-cos positions, while DINOv2 interpolates
    the stored table: close, not equal; for equality there, make the export for that size. `apply_layernorm` and
    `reshape_hidden_states` are the model's; a SimMIM mask token and `drop_path_rate` are left behind.

    Args:
        model: Any model of this package; its encoder is taken.
        out_indices: Stages whose maps come out: 0 the patch embeddings, l the l-th layer; those that the model's
            config names if None.
        image_size: Native size of the export in pixels, one number or (height, width); the model's own if None.

    Returns:
        The model in evaluation mode, a copy, in the dtype and on the device of the given one.

    Raises:
        ValueError: what `Dinov2Backbone` cannot be: rescaled feature maps, an MLP whose width is no whole multiple of
            `hidden_size`, a native size that is not square. Or a size that the patch does not divide.
    """
    encoder = model.base_model
    config = encoder.config
    scales = config.feature_scales or []
    if any(scale != 1 for scale in scales):
        raise ValueError(
            f"feature_scales={scales}: Dinov2Backbone gives every map with one cell a patch and cannot rescale it; set"
            " feature_scales to None and rescale behind the backbone"
        )
    if config.intermediate_size % config.hidden_size:
        raise ValueError(
            f"intermediate_size={config.intermediate_size} is not a multiple of hidden_size={config.hidden_size}, and"
            " Dinov2Config knows whole mlp_ratio only; to_vit takes any width"
        )
    fields, weights = _encoder_fields_and_weights(encoder, image_size)
    height, width = to_pair(fields["image_size"])
    if height != width:
        raise ValueError(
            f"image_size={fields['image_size']} is not square, and Dinov2Backbone takes its positions as they are for"
            " square images only; give a square image_size"
        )
    dinov2_config = Dinov2Config(
        mlp_ratio=fields.pop("intermediate_size") // config.hidden_size,
        **fields,
        layerscale_value=1.0,
        use_mask_token=False,
        apply_layernorm=config.apply_layernorm,
        reshape_hidden_states=config.reshape_hidden_states,
        out_indices=list(config.out_indices if out_indices is None else out_indices),
    )
    renamed = {_dinov2_name(name): weight.clone() for name, weight in weights.items()}
    ones = torch.ones(config.hidden_size, dtype=encoder.dtype, device=encoder.device)
    for layer in range(config.num_hidden_layers):
        renamed |= {f"encoder.layer.{layer}.layer_scale{n}.lambda1": ones.clone() for n in (1, 2)}
    with quiet_loading():
        # Not load_state_dict: names in memory differ between versions of transformers, those of checkpoints do not.
        dinov2, report = Dinov2Backbone.from_pretrained(
            None, config=dinov2_config, state_dict=renamed, dtype=encoder.dtype, output_loading_info=True
        )
    check_keys("the weights do not fit Dinov2Backbone", report["missing_keys"], report["unexpected_keys"], [])
    return dinov2.to(encoder.device).eval()


def _encoder_fields_and_weights(encoder: EHMModel, image_size) -> tuple[dict, dict[str, Tensor]]:
    """What ViT's and DINOv2's configs share with ours, and the weights, for a native size of `image_size`."""
    fields = {name: getattr(encoder.config, name) for name in ENCODER_FIELDS}
    weights = encoder.state_dict()
    weights.pop("embeddings.mask_token", None)
    if image_size is not None:
        fields["image_size"] = image_size if isinstance(image_size, int) else list(image_size)
        pairs = to_pair(fields["image_size"]), to_pair(encoder.config.patch_size)
        if any(side < patch or side % patch for side, patch in zip(*pairs, strict=True)):
            raise ValueError(f"image_size={image_size} is not a multiple of patch_size={encoder.config.patch_size}")
        grid_size = tuple(side // patch for side, patch in zip(*pairs, strict=True))
        weights["embeddings.position_embeddings"] = encoder.embeddings.positions(grid_size)
    return fields, weights


def _dinov2_name(name: str) -> str:
    """The name that published DINOv2 checkpoints have for a weight of our encoder."""
    for ours, theirs in (
        ("layers.", "encoder.layer."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
    ):
        name = name.replace(ours, theirs)
    return name


def export_vit(
    source: str | Path | EHMPreTrainedModel,
    destination: str | Path,
    image_size: int | Sequence[int] | None = None,
) -> None:
    """Save a plain ViT directory: `AutoModel.from_pretrained(destination)` needs nothing of ours.

    That call adds a pooler with random weights, which `last_hidden_state` does not depend on;
    `AutoModel.from_pretrained(destination, add_pooling_layer=False)` leaves it out. A checkpoint of
    `EHMForImageClassification` becomes a classifier for `AutoModelForImageClassification`.

    Args:
        source: Model, or directory or Hub id of one; the image processor is taken along from there if there is one.
        destination: Directory, made if need be.
        image_size: As in `to_vit`; the image processor then resizes to it.
    """
    model, processor = _model_and_processor(source, image_size)
    _save(to_vit(model, image_size), processor, destination)


def export_dinov2_backbone(
    source: str | Path | EHMPreTrainedModel,
    destination: str | Path,
    out_indices: Sequence[int] | None = None,
    image_size: int | Sequence[int] | None = None,
) -> None:
    """Save a DINOv2 backbone directory: `Dinov2Backbone.from_pretrained(destination)` needs nothing of ours.

    Args:
        source: Model, or directory or Hub id of one; the image processor is taken along from there if there is one.
        destination: Directory, made if need be.
        out_indices: As in `to_dinov2_backbone`.
        image_size: As in `to_dinov2_backbone`; the image processor then resizes to it.
    """
    model, processor = _model_and_processor(source, image_size)
    _save(to_dinov2_backbone(model, out_indices, image_size), processor, destination)


def _model_and_processor(source: str | Path | EHMPreTrainedModel, image_size):
    if isinstance(source, EHMPreTrainedModel):
        return source, None
    return load_encoder_or_classifier(source), _image_processor_of(source, image_size)


def _save(model: nn.Module, processor, destination: str | Path) -> None:
    with quiet_loading():
        model.save_pretrained(destination)
    if processor is not None:
        processor.save_pretrained(destination)


def load_encoder_or_classifier(path_or_id: str | Path) -> EHMModel | EHMForImageClassification:
    """The image classifier if the checkpoint is one, else its encoder; strictly loaded, in the dtype on disk.

    Args:
        path_or_id: Directory or Hub id of any model of this package.

    Raises:
        ValueError: not a checkpoint of ours, or weights left over, missing or of another shape (all named).
    """
    _check_model_type(path_or_id, "ehm")
    saved_as = PreTrainedConfig.get_config_dict(path_or_id)[0].get("architectures") or []
    heads = {head.__name__: head for head in (EHMForImageClassification, EHMForSemanticSegmentation)}
    model = _load(next((heads[name] for name in saved_as if name in heads), EHMModel), path_or_id, "auto")
    return model if isinstance(model, EHMForImageClassification) else model.base_model


def _check_model_type(path_or_id: str | Path, expected: str) -> None:
    if not Path(path_or_id).is_dir() and (str(path_or_id).count("/") != 1 or str(path_or_id)[0] in "./~"):
        raise ValueError(f"{path_or_id} is neither a directory nor a Hub id (owner/name)")
    found = PreTrainedConfig.get_config_dict(path_or_id)[0].get("model_type")
    if found != expected:
        raise ValueError(f"{path_or_id} has model_type={found!r} in its config.json; {expected!r} is expected")


def _load(model_class: type, path_or_id: str | Path, dtype: torch.dtype | str):
    """`from_pretrained` without its report, and strict: every weight is found, and no other."""
    with quiet_loading():
        model, report = model_class.from_pretrained(
            path_or_id, output_loading_info=True, ignore_mismatched_sizes=True, dtype=dtype
        )
    mismatched = [name for name, *_ in report["mismatched_keys"]]
    problem = f"the weights in {path_or_id} do not fit {model_class.__name__}"
    check_keys(problem, report["missing_keys"], report["unexpected_keys"], mismatched)
    return model


def _copy_weights(model: nn.Module, weights: dict[str, Tensor], target: str) -> None:
    own = model.state_dict()
    mismatched = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    problem = f"the weights do not fit {target}"
    check_keys(problem, own.keys() - weights.keys(), weights.keys() - own.keys(), mismatched)
    model.load_state_dict(weights)


def check_keys(problem: str, missing: Iterable[str], unused: Iterable[str], mismatched: Iterable[str]) -> None:
    """Raise a ValueError that names the weights which did not find their place, if there are any."""
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


def _image_processor_of(path_or_id: str | Path, image_size=None):
    """The image processor of a checkpoint, None if it has none; resizing to `image_size` if that is given."""
    file = cached_file(path_or_id, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    processor = AutoImageProcessor.from_pretrained(path_or_id)
    if image_size is not None:
        size = dict(zip(("height", "width"), to_pair(image_size), strict=True))
        if getattr(processor, "do_center_crop", False):  # the cut keeps its share of the picture
            grown = max(side / processor.crop_size[name] for name, side in size.items())
            processor.size = {side: round(length * grown) for side, length in dict(processor.size).items() if length}
            processor.crop_size = size
        else:
            processor.size = size
    return processor


@contextmanager
def quiet_loading():
    """Without transformers' progress bars and loading report: `check_keys` tells what matters, and as an error."""
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


def _size_option(sides: list[int] | None) -> int | list[int] | None:
    if sides is not None and len(sides) > 2:
        raise ValueError(f"--image-size {' '.join(map(str, sides))}: one number, or height and width")
    return sides[0] if sides is not None and len(sides) == 1 else sides


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m modeling_ehm.conversion", description="Convert checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("from-vit-mae", "ViTMAEForPreTraining checkpoint -> EHM checkpoint, ready for further pre-training"),
        ("to-vit", "EHM checkpoint -> plain ViT directory, which loads without this package and without remote code"),
        ("to-dinov2", "EHM checkpoint -> DINOv2 backbone directory, for dense heads where this package is missing"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("source", metavar="SRC", help="directory or Hub id")
        command.add_argument("destination", metavar="DST", type=Path, help="directory to write")
        command.add_argument("--overwrite", action="store_true", help="write into DST even if it is not empty")
        if name != "from-vit-mae":
            text = "native size of the export in pixels, one number or height and width; the checkpoint's by default"
            command.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS", help=text)
        if name == "to-dinov2":
            text = "stages whose feature maps come out, 0 the patch embeddings; the last by default"
            command.add_argument("--out-indices", type=int, nargs="+", metavar="STAGE", help=text)
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        _check_destination(options.source, options.destination, options.overwrite)
        if options.command == "to-vit":
            export_vit(options.source, options.destination, _size_option(options.image_size))
        elif options.command == "to-dinov2":
            image_size = _size_option(options.image_size)
            export_dinov2_backbone(options.source, options.destination, options.out_indices, image_size)
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


__all__ = [
    "export_dinov2_backbone",
    "export_vit",
    "from_vit_mae",
    "load_encoder_or_classifier",
    "to_dinov2_backbone",
    "to_vit",
]
