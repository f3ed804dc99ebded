"""The encoder or a classifier as ONNX file or `torch.export` program, for images of any size that the patch divides.

    python -m modeling_ehm.export ehm-checkpoint encoder.onnx

An ONNX file has the input `pixel_values` `(B, C, H, W)`, normalised as the image processor does, and the outputs
`last_hidden_state` `(B, 1 + N, D)` and `pooler_output` `(B, D)` of an encoder, or `logits` `(B, num_labels)` of a
classifier. It is written by torch's exporter and needs the packages of the extra `onnx`; the program needs torch alone.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .configuration_ehm import to_pair
from .conversion import load_encoder_or_classifier
from .modeling_ehm import EHMBackbone, EHMForImageClassification, EHMModel, evaluation_mode, sincos_positions

SINGLE_FILE_BYTES = 2**31 - 2**24  # a protobuf message ends at 2 GiB; some of it is for the graph


class _Tensors(nn.Module):
    """A model whose forward takes one tensor and returns a tuple of them, as exporters want it."""

    def __init__(self, model: EHMModel | EHMForImageClassification):
        super().__init__()
        self.model = model
        classifies = isinstance(model, EHMForImageClassification)
        self.output_names = ("logits",) if classifies else ("last_hidden_state", "pooler_output")

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values, return_dict=True)
        return tuple(outputs[name] for name in self.output_names)


def export_program(
    model_or_path: EHMModel | EHMForImageClassification | str | Path, *, dynamic: bool = True
) -> ExportedProgram:
    """Trace the model in evaluation mode with `torch.export`.

    Args:
        model_or_path: Model, in its dtype and on its device, or directory or Hub id of one.
        dynamic: Whether height and width are free, at least two patches each. False fixes them at the native size.
            The number of images is free in both cases.

    Returns:
        Program of `(pixel_values,)` -> `(last_hidden_state, pooler_output)`, or `(logits,)` of a classifier.

    Raises:
        TypeError: a model of another class.
        ValueError: `dynamic` with a stored position table that is not sin-cos; a path that holds no model of ours.
    """
    wrapper = _tensors_of(model_or_path)
    if dynamic:
        _check_positions(wrapper.model.base_model)
    pixel_values, shapes = _example(wrapper.model, dynamic)
    with evaluation_mode(wrapper), torch.no_grad():
        return torch.export.export(wrapper, (pixel_values,), dynamic_shapes={"pixel_values": shapes})


def export_onnx(
    model_or_path: EHMModel | EHMForImageClassification | str | Path,
    path: str | Path,
    *,
    opset: int | None = None,
    dynamic: bool = True,
) -> None:
    """Write the model as ONNX; weights above 2 GiB go into a second file beside it, `path` with `.data` added.

    Args:
        model_or_path: As in `export_program`.
        path: File to write.
        opset: Version of the ONNX operators; what torch's exporter prefers if None.
        dynamic: As in `export_program`.

    Raises:
        ImportError: `onnx` or `onnxscript` is not installed.
        TypeError, ValueError: as `export_program`.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"writing ONNX needs {' and '.join(missing)}: pip install 'modeling_ehm[onnx]'; export_program needs"
            " neither"
        )
    wrapper = _tensors_of(model_or_path)
    program = export_program(wrapper.model, dynamic=dynamic)
    num_bytes = sum(weight.numel() * weight.element_size() for weight in program.state_dict.values())
    torch.onnx.export(
        program,
        dynamo=True,
        f=path,
        input_names=["pixel_values"],
        output_names=list(wrapper.output_names),
        dynamic_shapes={"pixel_values": _example(wrapper.model, dynamic)[1]},  # names the free sizes
        opset_version=opset,
        external_data=num_bytes > SINGLE_FILE_BYTES,
        verbose=False,
    )


def _tensors_of(model_or_path) -> _Tensors:
    model = model_or_path
    if isinstance(model, str | Path):
        model = load_encoder_or_classifier(model)
    if isinstance(model, EHMBackbone) or not isinstance(model, EHMModel | EHMForImageClassification):
        raise TypeError(
            f"{type(model).__name__} cannot be exported; EHMModel and EHMForImageClassification can: give the encoder"
            " alone, as model.ehm or EHMModel.from_pretrained"
        )
    return _Tensors(model)


def _example(model: EHMModel | EHMForImageClassification, dynamic: bool) -> tuple[Tensor, dict[int, Dim]]:
    """Images to trace with, and which of their sizes are free."""
    config = model.config
    (height, width), (patch_height, patch_width) = to_pair(config.image_size), to_pair(config.patch_size)
    shapes = {0: Dim("batch")}
    if dynamic:
        # torch.export takes a size of 1 for a constant, so an example must have two patches a side.
        height, width = max(height, 2 * patch_height), max(width, 2 * patch_width)
        shapes |= {2: patch_height * Dim("rows", min=2), 3: patch_width * Dim("columns", min=2)}
    pixel_values = torch.zeros(2, config.num_channels, height, width, dtype=model.dtype, device=model.device)
    return pixel_values, shapes


def _check_positions(encoder: EHMModel) -> None:
    table = encoder.embeddings.position_embeddings
    computed = sincos_positions(encoder.config.grid_size, table.shape[-1]).to(table)
    if not torch.allclose(table, computed, atol=1e-5):
        raise ValueError(
            "the stored position table is not sin-cos, as in some imported weights, so a program for all sizes, which"
            " computes positions, would differ at the native size; give dynamic=False (--static)"
        )


def main(arguments: list[str] | None = None) -> None:
    text = "Write the encoder, or the classifier if the checkpoint is one, as ONNX."
    parser = argparse.ArgumentParser(prog="python -m modeling_ehm.export", description=text)
    parser.add_argument("source", metavar="SRC", help="directory or Hub id of any model of this package")
    parser.add_argument("destination", metavar="DST", type=Path, help="file to write, as encoder.onnx")
    parser.add_argument("--opset", type=int, help="version of the ONNX operators; torch's choice by default")
    parser.add_argument("--static", action="store_true", help="fix height and width at the native size")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    options = parser.parse_args(arguments)
    try:
        if options.destination.exists() and not options.overwrite:
            raise ValueError(f"{options.destination} exists; give another name, or --overwrite")
        export_onnx(options.source, options.destination, opset=options.opset, dynamic=not options.static)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: error: {str(error).strip().splitlines()[0]}")
    print(f"{options.source} -> {options.destination}")


if __name__ == "__main__":
    main()


__all__ = ["export_onnx", "export_program"]
