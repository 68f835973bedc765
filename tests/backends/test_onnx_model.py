"""Whole networks as ONNX models: exact, dynamic, deterministic, named, described, checked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import fxq
from fxq.backends.onnx import OnnxBackend, OnnxModule, session
from fxq.backends.onnx.file import data_file, read_model, save_model
from fxq.compiler import Result
from fxq.errors import ArtifactError, FxqError, LoweringError, UnknownNameError
from fxq.integer.reference import Reference
from fxq.models_zoo import tiny_conv, tiny_depthwise, tiny_residual

FLAVORS = ("fast", "packed", "compact")
NETWORKS = {"conv": tiny_conv, "residual": tiny_residual, "depthwise": tiny_depthwise}
BACKEND = OnnxBackend()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def compiled(integers: Callable[..., Result], images: torch.Tensor) -> Callable[..., Result]:
    """Call it as ``compiled(network, recipe, settings)``; compiled once each."""
    done: dict[Any, Result] = {}

    def compile_(name: str, recipe: str, settings: tuple[str, ...] = ()) -> Result:
        key = (name, recipe, settings)
        if key not in done:
            torch.manual_seed(0)
            done[key] = integers(NETWORKS[name](), images, recipe, settings)
        return done[key]

    return compile_


def exported(result: Result, **options: Any) -> OnnxModule:
    module = BACKEND.load(result.artifact.integers, **options)
    assert isinstance(module, OnnxModule)
    return module


@pytest.mark.parametrize("flavor", ["fast", "packed"])
@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-4bit", "aciq-8bit"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_register_equals_the_reference(
    name: str, recipe: str, flavor: str, compiled: Callable[..., Result], images: torch.Tensor
) -> None:
    result = compiled(name, recipe)
    module = exported(result, flavor=flavor)
    output, expected = Reference(result.artifact.integers).run(images)
    observed = module.registers(images)
    assert observed.keys() == expected.keys()
    wrong = [k for k, v in observed.items() if not torch.equal(v.double(), expected[k].double())]
    assert wrong == []
    assert torch.equal(module(images), output)
    assert torch.equal(result.module(images), output)


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_flavors_dequantize_weights_to_the_same_floats(
    flavor: str, bits: int, compiled: Callable[..., Result]
) -> None:
    settings = (f"weight_bits={bits}", f"activation_bits={bits}")
    result = compiled("residual", "aciq-4bit", settings)
    program = result.artifact.integers
    for opset in (21, 25):
        model = exported(result, flavor=flavor, opset=opset).model
        layers = [step for step in program if "weight" in step.tensors]
        names = [f"{step.name}.weight.float" for step in layers]
        for step, found in zip(layers, _computed(model, names), strict=True):
            codes, scale = program.tensor(step, "weight"), program.tensor(step, "scale")
            expected = codes.float() * scale.reshape(-1, *[1] * (codes.dim() - 1))
            own = found[:, : codes.shape[1]]  # a fourth channel may be there, of zeros
            assert np.array_equal(own, expected.numpy()), (opset, step.name)
            assert not found[:, codes.shape[1] :].any()


def _computed(model: onnx.ModelProto, names: list[str]) -> list[np.ndarray[Any, Any]]:
    """Tensors that depend on nothing but initializers, by onnx's own evaluator."""
    extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model))
    found = ReferenceEvaluator(extractor.extract_model([], names)).run(None, {})
    return list(found)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_flavors_dequantize_codes_to_the_same_floats(
    flavor: str, compiled: Callable[..., Result]
) -> None:
    result = compiled("residual", "aciq-4bit")
    model = exported(result, flavor=flavor).model
    stored = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    for step in result.artifact.integers:
        if step.grid is not None and f"{step.name}.scale" in stored:
            assert float(stored[f"{step.name}.scale"]) == step.grid.scale
            assert int(stored[f"{step.name}.zero_point"]) == step.grid.zero_point


def test_compact_stores_weights_and_codes_in_four_bits(compiled: Callable[..., Result]) -> None:
    types = _types(exported(compiled("residual", "aciq-4bit"), flavor="compact").model)
    assert types["conv1.weight"] == types["conv2.weight"] == "INT4"
    assert types["stem.weight"] == types["fc.weight"] == "INT8"
    assert types["conv1.zero_point"] == "UINT4"
    two = compiled("residual", "aciq-4bit", ("weight_bits=2", "activation_bits=2"))
    assert _types(exported(two, flavor="compact", opset=25).model)["conv1.weight"] == "INT2"


def _types(model: onnx.ModelProto) -> dict[str, str]:
    return {
        one.name: onnx.TensorProto.DataType.Name(one.data_type) for one in model.graph.initializer
    }


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("opset", [21, 22, 23, 24, 25])
def test_models_pass_the_checker_and_shape_inference(
    flavor: str, opset: int, compiled: Callable[..., Result], images: torch.Tensor
) -> None:
    for name in NETWORKS:
        module = exported(compiled(name, "aciq-4bit"), flavor=flavor, opset=opset)
        onnx.checker.check_model(module.model, full_check=True)
        onnx.shape_inference.infer_shapes(module.model, strict_mode=True, data_prop=True)
        assert {one.domain for one in module.model.opset_import} == {""}
        assert module(images).shape == (16, 10)


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_own_evaluator_agrees(
    name: str, compiled: Callable[..., Result], images: torch.Tensor
) -> None:
    """It computes layers in float64 or float32, so that a code may be one off, seldom."""
    result = compiled(name, "minmax-int8")
    found = ReferenceEvaluator(exported(result).model).run(None, {"x": images.numpy()})[0]
    expected = Reference(result.artifact.integers)(images).numpy()
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()


def test_batches_of_any_size_run(compiled: Callable[..., Result], images: torch.Tensor) -> None:
    result = compiled("depthwise", "aciq-4bit")
    module = exported(result)
    assert [d.dim_param for d in _input_dims(module)][:1] == ["batch"]
    whole = module(images)
    for size in (1, 3):
        assert torch.equal(module(images[:size]), whole[:size])
    fixed = exported(result, dynamic=False)
    assert [dim.dim_value for dim in _input_dims(fixed)] == [16, 3, 8, 8]
    with pytest.raises(FxqError, match="cannot run the model"):
        fixed(images[:3])


def _input_dims(module: OnnxModule) -> list[Any]:
    return list(module.model.graph.input[0].type.tensor_type.shape.dim)


def test_names_are_those_of_the_captured_graph(compiled: Callable[..., Result]) -> None:
    model = exported(compiled("residual", "minmax-int8")).model
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert {"conv1.sum/Conv", "conv1.codes/QuantizeLinear", "add.sum/Add", "fc/Gemm"} <= set(names)
    assert [one.name for one in model.graph.output] == ["fc"]
    weights = {one.name for one in model.graph.initializer}
    assert {"stem.weight", "stem.weight_scale", "stem.bias", "stem.scale"} <= weights


def test_the_same_program_gives_the_same_bytes(
    compiled: Callable[..., Result], tmp_path: Path
) -> None:
    result = compiled("residual", "aciq-4bit")
    first = exported(result).model.SerializeToString(deterministic=True)
    assert exported(result).model.SerializeToString(deterministic=True) == first
    result.artifact.save(tmp_path / "run")
    code = (
        "import fxq, sys\n"
        "from fxq.backends.onnx import OnnxBackend\n"
        f"module = OnnxBackend().load(fxq.load({str(tmp_path / 'run')!r}).integers)\n"
        "sys.stdout.buffer.write(module.model.SerializeToString(deterministic=True))\n"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert other.stdout == first


def test_the_model_describes_itself(images: torch.Tensor, tmp_path: Path) -> None:
    result = fxq.compile(
        tiny_conv().eval(), images[:1], "minmax-int8", calibration=[images], backend="onnx"
    )
    result.artifact.metadata["accuracy"] = {"compiled": {"top1": 0.5}}
    result.artifact.save(tmp_path / "run")
    model = onnx.load(tmp_path / "run" / "model.onnx")
    known = {entry.key: entry.value for entry in model.metadata_props}
    assert known["fxq.recipe"] == "minmax-int8"
    assert known["fxq.version"] == fxq.__version__
    assert json.loads(known["fxq.accuracy"]) == {"compiled": {"top1": 0.5}}
    assert len(known["fxq.weights_sha256"]) == 64
    loaded = fxq.load(tmp_path / "run")
    assert isinstance(loaded.module, OnnxModule)
    assert torch.equal(loaded(images), result.module(images))


def test_cpus_that_saturate_get_exact_products(
    monkeypatch: pytest.MonkeyPatch, compiled: Callable[..., Result], images: torch.Tensor
) -> None:
    """An option is set where a product of the largest bytes comes out wrong; it changes nothing."""
    needed = session.saturates()
    assert isinstance(needed, bool)
    result = compiled("residual", "minmax-int8")
    expected = Reference(result.artifact.integers)(images)
    for answer in (True, needed):
        monkeypatch.setattr(session, "saturates", lambda answer=answer: answer)
        assert torch.equal(exported(result)(images), expected)


def test_a_network_that_computes_nothing(
    integers: Callable[..., Result], images: torch.Tensor
) -> None:
    module = exported(integers(nn.Identity(), images))
    assert torch.equal(module(images), images)
    assert list(module.registers(images)) == ["input_1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset 17 is too old: quantized models need 21"),
        ({"opset": 999}, "opset 999 is newer than"),
    ],
)
def test_impossible_opsets_are_refused(
    options: dict[str, Any], message: str, compiled: Callable[..., Result]
) -> None:
    with pytest.raises(FxqError, match=message):
        exported(compiled("conv", "minmax-int8"), **options)


def test_unknown_flavors_and_options_are_refused(compiled: Callable[..., Result]) -> None:
    result = compiled("conv", "minmax-int8")
    with pytest.raises(UnknownNameError, match="no flavor named 'fat'") as caught:
        exported(result, flavor="fat")
    assert "fast" in str(caught.value)
    with pytest.raises(UnknownNameError, match="no option of the onnx backend named 'flavour'"):
        exported(result, flavour="fast")


def test_weights_beyond_a_limit_go_to_a_file_of_their_own(
    compiled: Callable[..., Result], images: torch.Tensor, tmp_path: Path
) -> None:
    module = exported(compiled("residual", "minmax-int8"))
    path = tmp_path / "large.onnx"
    save_model(module.model, path, limit=100)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    onnx.checker.check_model(path, full_check=True)
    again = OnnxModule(module.program, read_model(path))
    assert torch.equal(again(images), module(images))
    first = path.read_bytes(), data_file(path).read_bytes()
    save_model(module.model, path, limit=100, force=True)
    assert (path.read_bytes(), data_file(path).read_bytes()) == first


def test_existing_files_and_folders_are_kept(
    compiled: Callable[..., Result], tmp_path: Path
) -> None:
    artifact, path = compiled("conv", "minmax-int8").artifact, tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(ArtifactError, match="the output file exists"):
        BACKEND.export(artifact, path)
    assert path.read_text() == "mine"
    with pytest.raises(ArtifactError, match="the output is a folder"):
        BACKEND.export(artifact, tmp_path, force=True)
    with pytest.raises(ArtifactError, match="parent is a file"):
        BACKEND.export(artifact, path / "inside.onnx")
    BACKEND.export(artifact, path, force=True)
    assert [one.name for one in tmp_path.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(path, full_check=True)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "of another network"])
def test_a_damaged_model_file_is_refused(damage: str, images: torch.Tensor, tmp_path: Path) -> None:
    def run(network: nn.Module, name: str) -> Path:
        result = fxq.compile(
            network.eval(), images[:1], "minmax-int8", calibration=[images], backend="onnx"
        )
        return result.artifact.save(tmp_path / name)

    path = run(tiny_conv(), "run") / "model.onnx"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:700])
    elif damage == "foreign":
        path.write_text("not a model")
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes((run(tiny_residual(), "other") / "model.onnx").read_bytes())
    with pytest.raises(ArtifactError, match="model") as caught:
        fxq.load(path.parent)
    assert str(path) in str(caught.value)


class Mixed(nn.Module):
    """Two convolutions, of which one may be skipped, and a tuple that is read as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(self.first(x)))
        whole = torch.stack(y.chunk(2, 1), 1).flatten(1, 2)
        return self.last(whole.mean((2, 3)))


@pytest.mark.parametrize("flavor", FLAVORS)
def test_skipped_layers_and_tuples_read_as_a_whole(
    flavor: str, integers: Callable[..., Result], images: torch.Tensor
) -> None:
    layers = {"second": {"skip": True}}
    program = integers(Mixed(), images, layers=layers).artifact.integers
    module = BACKEND.load(program, flavor=flavor)
    assert isinstance(module, OnnxModule)
    output = Reference(program)(images)
    assert (module(images) - output).abs().max() <= 1e-5 * output.abs().max()


class Halved(nn.Module):
    """An output whose first dimension is half of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.conv(x)).reshape(x.size(0) // 2, -1)


def test_an_output_of_unknown_shape_is_an_obstacle(
    integers: Callable[..., Result], images: torch.Tensor
) -> None:
    program = integers(Halved(), images).artifact.integers
    with pytest.raises(LoweringError, match="cannot express"):
        BACKEND.load(program)
    assert torch.isfinite(BACKEND.load(program, dynamic=False)(images)).all()
