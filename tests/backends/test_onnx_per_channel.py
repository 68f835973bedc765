"""Activations quantized per channel as ONNX: axis 1 around float operators, in every flavour.

Scales are powers of two wherever a test wants equality: every sum is then exact in float32, and no
order of summation changes anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.backends.onnx import OnnxBackend, OnnxModule
from fxq.backends.onnx.session import Session
from fxq.compiler import Result
from fxq.errors import LoweringError
from fxq.integer.arguments import Register
from fxq.integer.program import Example, Grid, Instruction, IntegerProgram
from fxq.integer.reference import Reference
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_residual
from fxq.numerics.affine import quantize

FLAVORS = ("fast", "packed", "compact")
PER_CHANNEL = ("insert-observers.per_channel=true",)
BACKEND = OnnxBackend()

pytestmark = pytest.mark.usefixtures("one_thread")

Made = tuple[Instruction, dict[str, Tensor]]


def rounded(name: str, source: str, bits: int, zero_points: list[int], scale: float = 0.25) -> Made:
    """A quantizer whose channels have the scales ``scale``, ``2 * scale``, ``scale``, …"""
    count = len(zero_points)
    tensors = {
        f"{name}.scale": scale * (1.0 + torch.arange(count) % 2),
        f"{name}.zero_point": torch.tensor(zero_points, dtype=torch.uint8),
    }
    roles = {role: f"{name}.{role}" for role in ("scale", "zero_point")}
    attributes = {"bits": bits, "axis": 1}
    return Instruction(name, "fake_quantize", (source,), attributes, roles), tensors


def layer(name: str, op: str, source: str, shape: tuple[int, ...], **attributes: Any) -> Made:
    roles = {
        "weight": torch.randint(-7, 8, shape, dtype=torch.int8),
        "scale": 2.0 ** -(torch.arange(shape[0]) % 3 + 3.0),
        "bias": torch.randint(-50, 50, shape[:1]) / 16.0,
        "bits": torch.full(shape[:1], 4, dtype=torch.uint8),
    }
    if op == "conv":
        ones = (1,) * (len(shape) - 2)
        plain = {"stride": ones, "padding": ones, "dilation": ones, "groups": 1}
        attributes = plain | attributes
    tensors = {f"{name}.{role}": value for role, value in roles.items()}
    names = {role: f"{name}.{role}" for role in roles}
    return Instruction(name, op, (source,), attributes, names), tensors


def called(name: str, target: str, *arguments: Any) -> Made:
    flat = [one for item in arguments for one in (item if isinstance(item, tuple) else (item,))]
    inputs = tuple(one.name for one in flat if isinstance(one, Register))
    attributes = {"target": target, "arguments": arguments, "keywords": {}}
    return Instruction(name, "float", inputs, attributes), {}


def assembled(made: list[Made], x: Tensor) -> IntegerProgram:
    tensors = {name: value for _, own in made for name, value in own.items()}
    steps = [step for step, _ in made]
    examples = (Example(tuple(x.shape)),)
    program = IntegerProgram(("x",), steps, Register(steps[-1].name), tensors, {}, examples)
    program.check()
    return program


def check(made: list[Made], x: Tensor) -> dict[str, OnnxModule]:
    """Output and registers equal the reference's in every flavour; the modules.

    Flavours differ in how they store weights; where there are none, one of them will do.
    """
    program = assembled(made, x)
    expected, registers = Reference(program).run(x)
    modules = {}
    has_weights = any("weight" in step.tensors for step in program)
    for flavor in FLAVORS if has_weights else FLAVORS[:1]:
        module: Any = BACKEND.load(program, flavor=flavor)
        onnx.checker.check_model(module.model, full_check=True)
        assert torch.equal(module(x), expected), flavor
        observed = module.registers(x)
        assert observed.keys() == registers.keys()
        wrong = [
            name for name, one in observed.items() if not one.float().equal(registers[name].float())
        ]
        assert wrong == [], flavor
        modules[flavor] = module
    return modules


ZERO_POINTS = {"zero at 0": [0, 0, 0, 0], "zeros anywhere": [3, 0, 7, 15], "one channel": [5]}


@pytest.mark.parametrize("bits", [1, 4, 7, 8])
@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 5), (2, 4, 5, 6), (2, 4, 2, 3, 3)], ids=len)
def test_quantizers(shape: tuple[int, ...], bits: int) -> None:
    zero_points = [min(zero, 2**bits - 1) for zero in ZERO_POINTS["zeros anywhere"]]
    scale = 0.0500030517578125
    check([rounded("q", "x", bits, zero_points, scale)], torch.randn(shape) * 99 * scale)


def test_codes_are_bytes_that_end_where_the_grid_does() -> None:
    x = torch.linspace(-9, 9, 2 * 4 * 600).reshape(2, 4, 600)
    step, tensors = rounded("q", "x", 4, ZERO_POINTS["zeros anywhere"])
    module = check([(step, tensors)], x)["fast"]
    named = {node.op_type: node for node in module.model.graph.node}
    assert {"QuantizeLinear", "Clip", "DequantizeLinear"} == set(named)
    for op in ("QuantizeLinear", "DequantizeLinear"):
        assert {one.name: one.i for one in named[op].attribute}["axis"] == 1
    module.model.graph.output[0].name = "q.codes"
    module.model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    found = Session(module.model).run([x])["q.codes"]
    want = quantize(x, tensors["q.scale"], tensors["q.zero_point"], 0, 15, axis=1)
    assert found.dtype == torch.uint8
    assert torch.equal(found.int(), want)


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 5), (2, 4, 5, 6)], ids=len)
@pytest.mark.parametrize("bits", [4, 8])
def test_channels_with_bits_of_their_own(shape: tuple[int, ...], bits: int) -> None:
    step, tensors = rounded("q", "x", bits, [0, 1, 1, 3])
    tensors["q.top"] = torch.tensor([2**bits - 1, 1, 0, 3], dtype=torch.uint8)
    step = replace(step, tensors=step.tensors | {"top": "q.top"})
    codes = (Instruction("codes", "quantize", ("q",), grid=Grid(0.5, 100, 8)), {})
    check(
        [(step, tensors), codes, (Instruction("y", "dequantize", ("codes",)), {})],
        torch.randn(shape) * 9,
    )


X = Register("q")
BETWEEN: dict[str, Callable[[], list[Made]]] = {
    "nothing": lambda: [],
    "add": lambda: [rounded("p", "x", 8, [9] * 4), called("y", "torch.add", X, Register("p"))],
    "add itself": lambda: [called("y", "torch.add", X, X)],
    "mul": lambda: [called("y", "torch.mul", X, X)],
    "relu": lambda: [called("y", "torch.relu", X)],
    "add, relu": lambda: [called("a", "torch.add", X, X), called("y", "torch.relu", Register("a"))],
    "max pool": lambda: [called("y", "functional.max_pool2d", X, 2)],
    "avg pool": lambda: [called("y", "functional.avg_pool2d", X, 2)],
    "mean": lambda: [called("y", "functional.adaptive_avg_pool2d", X, 1)],
    "pad": lambda: [called("y", "functional.pad", X, (1, 0, 0, 1))],
    "transpose": lambda: [called("y", "torch.transpose", X, 2, 3)],
    "reshape": lambda: [called("y", "torch.reshape", X, (-1, 4, 8, 2))],
    "conv": lambda: [layer("y", "conv", "q", (4, 4, 3, 3), relu=False)],
    "conv, relu": lambda: [layer("y", "conv", "q", (4, 4, 3, 3), relu=True)],
    "depthwise": lambda: [layer("y", "conv", "q", (4, 1, 3, 3), relu=True, groups=4)],
    "stride": lambda: [layer("y", "conv", "q", (4, 4, 3, 3), relu=False, stride=(2, 1))],
    "linear": lambda: [layer("y", "linear", "q", (6, 4), relu=False)],
    "linear, relu": lambda: [layer("y", "linear", "q", (6, 4), relu=True)],
}


@pytest.mark.parametrize(("zeros", "bits"), [("zero at 0", 4), ("zeros anywhere", 8)])
@pytest.mark.parametrize("name", BETWEEN)
def test_operators_between_two_quantizers(name: str, zeros: str, bits: int) -> None:
    """ONNX Runtime knows most of these patterns with one scale, and fuses them to kernels."""
    torch.manual_seed(1)
    between = BETWEEN[name]()
    last = between[-1][0].name if between else "q"
    points = ZERO_POINTS[zeros]
    made = [rounded("q", "x", bits, points), *between, rounded("z", last, bits, points, 0.5)]
    check(made, torch.randn(2, 4, 4, 4) * 4)


ONE_SCALE = Grid(0.5, 100, 8)


@pytest.mark.parametrize("name", ["nothing", "add itself", "avg pool", "conv"])
def test_from_many_scales_to_one(name: str) -> None:
    between = BETWEEN[name]()
    last = between[-1][0].name if between else "q"
    codes = (Instruction("codes", "quantize", (last,), grid=ONE_SCALE), {})
    end = (Instruction("out", "dequantize", ("codes",)), {})
    check([rounded("q", "x", 8, [3, 0, 7, 15]), *between, codes, end], torch.randn(2, 4, 4, 4) * 4)


@pytest.mark.parametrize("name", ["nothing", "add itself", "avg pool", "conv"])
def test_from_one_scale_to_many(name: str) -> None:
    between = BETWEEN[name]()
    last = between[-1][0].name if between else "q"
    codes = (Instruction("codes", "quantize", ("x",), grid=ONE_SCALE), {})
    start = (Instruction("q", "dequantize", ("codes",)), {})
    check([codes, start, *between, rounded("z", last, 8, [3, 0, 7, 15])], torch.randn(2, 4, 4, 4))


def test_a_padding_is_not_folded_into_a_convolution_of_one_scale() -> None:
    codes = (Instruction("codes", "quantize", ("x",), grid=ONE_SCALE), {})
    start = (Instruction("value", "dequantize", ("codes",)), {})
    padded = called("q", "functional.pad", Register("value"), (0, 1, 0, 1))
    end = rounded("z", "y", 8, [3, 0, 7, 15])
    check([codes, start, padded, *BETWEEN["conv"](), end], torch.randn(2, 4, 4, 4))


@pytest.mark.parametrize("name", ["relu", "max pool", "add itself"])
def test_a_single_channel(name: str) -> None:
    made = [rounded("q", "x", 8, [5]), *BETWEEN[name](), rounded("z", "y", 8, [7], 0.5)]
    check(made, torch.randn(2, 1, 4, 4) * 4)


@pytest.mark.parametrize("points", [[7], [3, 0, 7, 15]], ids=len)
def test_convolutions_of_a_single_channel_stay_in_float(points: list[int]) -> None:
    """One scale is what ONNX Runtime has integer kernels for; they would round the bias."""
    step, tensors = layer("y", "conv", "q", (len(points), 1, 3, 3), relu=False)
    tensors["y.bias"] += 2.0**-12
    made = [rounded("q", "x", 8, [5]), (step, tensors), rounded("z", "y", 8, points, 2.0**-11)]
    check(made, torch.randn(2, 1, 4, 4))


def test_concatenations_of_two_grids() -> None:
    made = [
        rounded("q", "x", 8, [0, 3, 5, 7]),
        rounded("p", "x", 8, [9, 9, 9, 9], 0.125),
        called("y", "torch.cat", (X, Register("p")), 1),
        rounded("z", "y", 8, [1, 2, 3, 4, 5, 6, 7, 8], 0.5),
    ]
    check(made, torch.randn(2, 4, 4, 4) * 4)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 6), (3, 4, 2, 6)], ids=len)
@pytest.mark.parametrize("relu", [False, True])
def test_linears(shape: tuple[int, ...], relu: bool) -> None:
    made = [
        rounded("q", "x", 4, [3, 0, 7, 15]),
        layer("y", "linear", "q", (5, shape[-1]), relu=relu),
    ]
    check(made, torch.randn(shape) * 3)


@pytest.mark.parametrize("shape", [(4, 4, 3), (4, 4, 3, 3), (4, 4, 3, 3, 3)], ids=len)
@pytest.mark.parametrize("relu", [False, True])
def test_convolutions(shape: tuple[int, ...], relu: bool) -> None:
    made = [rounded("q", "x", 4, [3, 0, 7, 15]), layer("y", "conv", "q", shape, relu=relu)]
    check(made, torch.randn(2, 4, *[5] * (len(shape) - 2)) * 3)


def test_weights_of_four_bits_are_packed() -> None:
    made = [rounded("q", "x", 8, [3, 0, 7, 15]), layer("y", "conv", "q", (4, 4, 3, 3), relu=False)]
    modules = check(made, torch.randn(2, 4, 5, 5) * 3)
    stored = {}
    for flavor, module in modules.items():
        types = {one.name: one.data_type for one in module.model.graph.initializer}
        stored[flavor] = onnx.TensorProto.DataType.Name(types["y.weight"])
        assert types["q.zero_point"] == onnx.TensorProto.UINT8
        assert types["y.bias"] == onnx.TensorProto.FLOAT
    assert stored == {"fast": "INT8", "packed": "INT4", "compact": "INT4"}


def test_integers_around_it_are_left_alone() -> None:
    """A convolution on integers before and after what is quantized per channel stays exact."""
    grid = Grid(0.25, 100, 8)
    first, tensors = layer("first", "conv", "codes", (4, 4, 3, 3), relu=True)
    tensors["first.bias"] = tensors["first.bias"].int()
    made = [
        (Instruction("codes", "quantize", ("x",), grid=grid), {}),
        (Instruction("first", "conv", ("codes",), first.attributes, first.tensors, grid), tensors),
        (Instruction("value", "dequantize", ("first",)), {}),
        rounded("q", "value", 8, [3, 0, 7, 15]),
        layer("second", "conv", "q", (4, 4, 3, 3), relu=False),
        (Instruction("again", "quantize", ("second",), grid=grid), {}),
        (Instruction("out", "dequantize", ("again",)), {}),
    ]
    program = assembled(made, torch.empty(2, 4, 6, 6))
    x = torch.randn(2, 4, 6, 6) * 4
    expected, registers = Reference(program).run(x)
    for flavor in ("fast", "packed"):
        module: Any = BACKEND.load(program, flavor=flavor)
        assert torch.equal(module(x), expected)
        assert torch.equal(module.registers(x)["first"].int(), registers["first"])


# ---- whole networks ----------------------------------------------------------------------------

NETWORKS = {
    "conv": tiny_conv,
    "residual": tiny_residual,
    "depthwise": tiny_depthwise,
    "concat": tiny_concat,
}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module, recipe: str, images: Tensor, backend: str = "onnx") -> Result:
    return fxq.compile(
        model.eval(),
        images,
        recipe,
        backend=backend,
        calibration=[images],
        settings=PER_CHANNEL,
        check=False,
    )


@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-4bit", "aciq-8bit"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_what_the_simulation_computes(
    name: str, recipe: str, images: Tensor
) -> None:
    result = compiled(NETWORKS[name](), recipe, images)
    program = result.artifact.integers
    simulated = result.program.run(images)
    expected, registers = Reference(program).run(images)
    assert torch.equal(expected, simulated)
    for flavor in ("fast", "compact"):
        module: Any = BACKEND.load(program, flavor=flavor)
        observed = module.registers(images)
        assert torch.equal(observed["x_quantizer"], registers["x_quantizer"])
        # A sum that is rounded otherwise may cross a tie: few codes, one apart, in a small network.
        apart = (module(images) - simulated).abs().max() / simulated.abs().max()
        assert apart < 0.02, flavor


def test_a_run_is_stored_and_loaded(images: Tensor, tmp_path: Path) -> None:
    result = compiled(tiny_residual(), "aciq-4bit", images)
    result.artifact.save(tmp_path / "run")
    loaded = fxq.load(tmp_path / "run")
    assert loaded.integers.instructions == result.artifact.integers.instructions
    assert torch.equal(loaded.module(images), result.module(images))
    warnings = loaded.warnings
    assert warnings[0].startswith("0 of 4 convolutions and linears run on integers")
    assert "quantized per channel, which no integer kernel multiplies" in warnings[1]


def test_eager_runs_what_it_does_not_compile(images: Tensor, mismatches: Any) -> None:
    result = compiled(tiny_residual(), "aciq-4bit", images)
    assert mismatches(result.artifact.integers, images) == {}
    with pytest.raises(LoweringError, match="cannot run") as caught:
        compiled(tiny_residual(), "aciq-4bit", images, "eager")
    assert "x_quantizer" in str(caught.value)
    assert BACKEND.obstacles(result.program) == []
