"""ONNX files and torch.export programs compute what the model computes, at every size they claim to take."""

import importlib.util

import pytest
import torch

from modeling_ehm import EHMBackbone, EHMForImageClassification, EHMForPreTraining, EHMModel
from modeling_ehm.conversion import load_encoder_or_classifier
from modeling_ehm.export import export_onnx, export_program, main

SIZES = [(2, 32, 32), (1, 48, 24), (3, 16, 64)]  # images, height, width; native first


def build(model_class, config, attention: str = "sdpa"):
    torch.manual_seed(0)
    model = model_class(config).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def outputs_of(model, images) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = model(images)
    names = ("logits",) if isinstance(model, EHMForImageClassification) else ("last_hidden_state", "pooler_output")
    return [outputs[name] for name in names]


def assert_same(model, run, sizes, channels: int = 3, atol: float = 1e-4) -> None:
    for number, (batch, height, width) in enumerate(sizes):
        images = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(number))
        for found, expected in zip(run(images), outputs_of(model, images), strict=True):
            torch.testing.assert_close(torch.as_tensor(found), expected, atol=atol, rtol=0)


def session(path):
    """`run(images)`, `inputs` and `outputs` (name -> shape) of an ONNX file in onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    loaded = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    shapes = [{value.name: value.shape for value in values} for values in (loaded.get_inputs(), loaded.get_outputs())]
    return lambda images: loaded.run(None, {"pixel_values": images.numpy()}), *shapes


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnx")


def test_onnx_encoder_at_all_sizes(make_config, tmp_path, onnx):
    model = build(EHMModel, make_config(num_hidden_layers=2))
    export_onnx(model, tmp_path / "encoder.onnx", opset=20)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]
    opsets = onnx.load(tmp_path / "encoder.onnx").opset_import
    assert [opset.version for opset in opsets if not opset.domain] == [20]
    run, inputs, outputs = session(tmp_path / "encoder.onnx")
    assert inputs == {"pixel_values": ["batch", 3, "8*rows", "8*columns"]}
    assert list(outputs) == ["last_hidden_state", "pooler_output"]
    assert_same(model, run, SIZES)


def test_onnx_classifier_with_eager_attention(make_config, tmp_path, onnx):
    model = build(EHMForImageClassification, make_config(num_hidden_layers=1, num_labels=5, pooling="cls"), "eager")
    export_onnx(model, tmp_path / "classifier.onnx")
    run, _, outputs = session(tmp_path / "classifier.onnx")
    assert outputs == {"logits": ["batch", 5]}
    assert_same(model, run, SIZES)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_class", [EHMModel, EHMForImageClassification])
def test_programs_at_all_sizes(make_config, model_class, attention):
    model = build(model_class, make_config(num_hidden_layers=1, num_labels=5), attention)
    assert_same(model, export_program(model).module(), SIZES, atol=1e-5)


def test_program_of_unusual_patches(make_config):
    config = make_config(image_size=[8, 32], patch_size=[8, 16], num_channels=1, mask_ratio=0.5, objective="simmim")
    model = build(EHMModel, config)  # one row of patches at the native size
    assert_same(model, export_program(model).module(), [(1, 16, 32), (2, 24, 64)], channels=1, atol=1e-5)


def test_program_has_no_dropout_and_leaves_the_mode(make_config):
    config = make_config(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, drop_path_rate=0.5)
    model = build(EHMModel, config).train()
    program = export_program(model).module()
    assert all(module.training for module in model.modules())
    assert_same(model.eval(), program, SIZES[:1], atol=1e-5)


def test_learnt_positions_only_at_the_native_size(config):
    """A program for all sizes computes its positions, and a table that is learnt cannot be computed."""
    model = build(EHMModel, config)
    model.embeddings.position_embeddings.normal_(generator=torch.Generator().manual_seed(7))
    with pytest.raises(ValueError, match=r"position table is not sin-cos.*give dynamic=False"):
        export_program(model)
    program = export_program(model, dynamic=False).module()
    assert_same(model, program, [(2, 32, 32), (3, 32, 32)], atol=1e-5)
    with pytest.raises(AssertionError, match="Guard failed"):
        program(torch.zeros(1, 3, 32, 40))


def test_command_writes_what_the_checkpoint_is(make_config, tmp_path, capsys, onnx):
    model = build(EHMForImageClassification, make_config(num_hidden_layers=1, num_labels=5))
    model.save_pretrained(tmp_path / "classifier")
    source, target = str(tmp_path / "classifier"), str(tmp_path / "model.onnx")
    main([source, target, "--static"])
    assert capsys.readouterr().out.splitlines()[-1] == f"{source} -> {target}"
    run, inputs, outputs = session(target)
    assert inputs == {"pixel_values": ["batch", 3, 32, 32]} and list(outputs) == ["logits"]
    assert_same(model, run, [(2, 32, 32), (1, 32, 32)])
    with pytest.raises(SystemExit, match="model.onnx exists; give another name, or --overwrite"):
        main([source, target])
    with pytest.raises(SystemExit, match="error: .*nowhere is neither a directory nor a Hub id"):
        main([str(tmp_path / "nowhere"), str(tmp_path / "other.onnx")])


def test_a_pretraining_checkpoint_is_exported_as_its_encoder(config, tmp_path):
    model = build(EHMForPreTraining, config)
    model.save_pretrained(tmp_path)
    assert type(load_encoder_or_classifier(tmp_path)) is EHMModel
    assert_same(model.ehm, export_program(tmp_path, dynamic=False).module(), SIZES[:1], atol=1e-5)


@pytest.mark.parametrize("model_class", [EHMForPreTraining, EHMBackbone])
def test_other_classes_are_refused(config, model_class):
    with pytest.raises(TypeError, match=f"{model_class.__name__} cannot be exported; EHMModel and"):
        export_program(model_class(config))


def test_missing_packages_are_named(config, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs onnx and onnxscript: pip install 'modeling_ehm\[onnx\]'"):
        export_onnx(EHMModel(config), tmp_path / "encoder.onnx")
