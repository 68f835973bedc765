"""Activations quantized per channel: rounded to codes, computed with in float, and told so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq.backends.eager import EagerModule
from fxq.errors import ArtifactError
from fxq.graph.capture import capture
from fxq.graph.program import LayerOverride, Program
from fxq.integer.arguments import Register
from fxq.integer.comparison import Comparison
from fxq.integer.differences import Kind
from fxq.integer.ledger import Ledger
from fxq.integer.lowering import lower_to_integers
from fxq.integer.obstacles import obstacles
from fxq.integer.program import Example, Grid, Instruction, IntegerProgram
from fxq.integer.reference import Reference
from fxq.integer.shapes import Size, register_values
from fxq.models_zoo import tiny_residual
from fxq.passes import (
    Calibrate,
    FoldBatchNorm,
    InsertObservers,
    MarkRelu,
    QuantizeMinmax,
)
from fxq.pipeline import Pipeline
from fxq.quant.quantizers import ActivationQuantizer

READS = "its input is quantized per channel, which no integer kernel multiplies"
WRITES = "its output is quantized per channel, which no integer kernel rounds to"


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def quantized(model: nn.Module, x: Tensor, **overrides: dict[str, Any]) -> Program:
    program = capture(model.eval(), x)
    program.calibration = [x]
    program.overrides = tuple(LayerOverride(*item) for item in overrides.items())
    observers = InsertObservers(per_channel=True)
    Pipeline(FoldBatchNorm(), MarkRelu(), observers, Calibrate(), QuantizeMinmax()).run(program)
    return program


def lowered(model: nn.Module, x: Tensor, **overrides: Any) -> tuple[IntegerProgram, Ledger]:
    """Its integers, which compute what the simulation does, in the reference and in eager."""
    program = quantized(model, x, **overrides)
    result, ledger = lower_to_integers(program)
    result.check()
    with torch.no_grad():
        simulated = program.module(x)
    expected = Reference(result)(x)
    if (
        "quantize" in ops(result).split()
    ):  # integer biases are rounded, in the simulation they are not
        torch.testing.assert_close(expected, simulated, rtol=0, atol=0.01)
    else:
        assert torch.equal(expected, simulated)
    assert torch.equal(EagerModule(result, "fbgemm")(x), expected)
    return result, ledger


def ops(program: IntegerProgram) -> str:
    return " ".join(step.op for step in program)


# ---- by hand -----------------------------------------------------------------------------------


def channels(bits: int = 2) -> tuple[Instruction, dict[str, Tensor]]:
    """A quantizer of two channels: codes for 0 .. 1.5, and for -2 .. 1."""
    tensors = {
        "scale": torch.tensor([0.5, 1.0]),
        "zero_point": torch.tensor([0, 2], dtype=torch.uint8),
    }
    attributes = {"bits": bits, "axis": 1}
    return Instruction("q", "fake_quantize", ("x",), attributes, {one: one for one in tensors}), (
        tensors
    )


def with_layer(
    op: str, weight: list[Any], bias: list[float], **attributes: Any
) -> tuple[IntegerProgram, Instruction]:
    step, tensors = channels()
    tensors |= {
        "y.weight": torch.tensor(weight, dtype=torch.int8),
        "y.scale": torch.tensor([0.5] * len(weight)),
        "y.bias": torch.tensor(bias),
        "y.bits": torch.full((len(weight),), 8, dtype=torch.uint8),
    }
    roles = {role: f"y.{role}" for role in ("weight", "scale", "bias", "bits")}
    layer = Instruction("y", op, ("q",), {"relu": False} | attributes, roles)
    return IntegerProgram(("x",), [step, layer], Register("y"), tensors), layer


def test_each_channel_is_rounded_on_its_own_grid() -> None:
    step, tensors = channels()
    program = IntegerProgram(("x",), [step], Register("q"), tensors)
    program.check()
    x = torch.tensor([[0.7, 0.7], [0.75, 0.5], [-1.0, -9.0], [9.0, 9.0]])
    # halves go to the even multiple of the scale: 0.75 / 0.5 to 2, 0.5 / 1 to 0
    want = [[0.5, 1.0], [1.0, 0.0], [0.0, -2.0], [1.5, 1.0]]
    assert Reference(program)(x).tolist() == want
    assert EagerModule(program, "fbgemm")(x).tolist() == want


def test_a_linear_multiplies_dequantized_weights() -> None:
    program, _ = with_layer("linear", [[2, 3], [-4, 0]], [0.25, -0.125])
    program.check()
    assert Reference(program)(torch.tensor([[1.6, -0.9]])).tolist() == [
        [1.5 * 1.0 - 1.0 * 1.5 + 0.25, 1.5 * -2.0 - 0.125]
    ]


def test_a_relu_comes_after_the_bias() -> None:
    geometry = {"stride": (1,), "padding": (1,), "dilation": (1,), "groups": 2}
    program, _ = with_layer("conv", [[[2]], [[2]]], [-0.25, 0.5], relu=True, **geometry)
    program.check()
    x = torch.tensor([[[1.0], [-2.0]]])  # padded with zeros on both sides
    assert Reference(program)(x).tolist() == [[[0.0, 0.75, 0.0], [0.5, 0.0, 0.5]]]


def test_shapes_are_known_without_values() -> None:
    program, _ = with_layer("linear", [[2, 3], [-4, 0]], [0.25, -0.125])
    program.examples = (Example((1, 2)),)
    found = register_values(program)
    assert found["q"].shape == found["y"].shape == (Size(1, 0), Size(0, 2))


# ---- lowering ----------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers and a function over them."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.a = nn.Conv2d(3, 8, 3, padding=1)
            self.even = nn.Conv2d(8, 8, 2, padding="same")
            self.bare = nn.Conv2d(8, 8, 3, bias=False)
            self.spread = nn.ConvTranspose2d(8, 8, 2)
            self.fc = nn.Linear(8, 5)
            self.first = nn.Linear(8, 48)
            self.drop = nn.Dropout()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


NETWORKS: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "relu": (
        lambda m, x: m.even(torch.relu(m.a(x))),
        "fake_quantize conv fake_quantize float conv fake_quantize",
    ),
    "relu6": (
        lambda m, x: m.bare(F.relu6(m.a(x))),
        "fake_quantize conv float fake_quantize conv fake_quantize",
    ),
    "pool and dropout": (
        lambda m, x: m.bare(m.drop(F.max_pool2d(m.a(x), 2, 1))),
        "fake_quantize conv fake_quantize float conv fake_quantize",
    ),
    "zeros around it": (
        lambda m, x: m.bare(F.pad(m.a(x), (1, 0, 1, 0))),
        "fake_quantize conv fake_quantize float conv fake_quantize",
    ),
    "a linear of pixels": (
        lambda m, x: m.fc(m.a(x).permute(0, 2, 3, 1)),
        "fake_quantize conv fake_quantize float linear",
    ),
    "a concatenation": (
        lambda m, x: m.bare(torch.cat([m.a(x), m.a(x)], 2)),
        "fake_quantize conv fake_quantize conv fake_quantize float conv fake_quantize",
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_computes_what_the_simulation_computes(name: str) -> None:
    function, expected = NETWORKS[name]
    program, ledger = lowered(Net(function), images(2, 3, 6, 6))
    assert ops(program) == expected
    layers = [entry for entry in ledger.entries if entry.layer]
    assert {(entry.where, entry.why) for entry in layers} == {("float", READS)}
    assert ledger.coverage() == 0.0


def test_integers_go_on_until_a_channel_has_its_own_scale() -> None:
    """What has no channels has one scale: a linear runs on integers before and after."""
    net = Net(lambda m, x: m.fc(m.bare(m.a(m.first(x).view(-1, 3, 4, 4))).mean((2, 3))))
    program, ledger = lowered(net, images(2, 8))
    where = {entry.node: (entry.where, entry.why) for entry in ledger.entries if entry.layer}
    assert where == {
        "first": ("int8", ""),
        "a": ("float", WRITES),
        "bare": ("float", READS),
        "fc": ("int8", ""),
    }
    assert ops(program) == (
        "quantize linear reshape dequantize conv fake_quantize conv fake_quantize float quantize "
        "linear"
    )


def test_a_layer_that_is_skipped_is_the_one_of_the_model() -> None:
    net = Net(lambda m, x: m.bare(m.a(x)))
    program, ledger = lowered(net, images(2, 3, 6, 6), bare={"skip": True})
    assert ops(program) == "fake_quantize conv fake_quantize module"
    assert next(e for e in ledger.entries if e.node == "bare").why == "the recipe skips it"


def test_coverage_says_what_is_left() -> None:
    _, ledger = lowered(tiny_residual(), images(2, 3, 8, 8))
    first, *rest = ledger.warnings(1.0)
    assert first.startswith("0 of 4 convolutions and linears run on integers")
    assert rest == [f"{path} stays in float: {READS}" for path in ("stem", "conv1", "conv2", "fc")]
    add = next(entry for entry in ledger.entries if entry.op == "add")
    assert (add.where, add.why) == ("float", "an addend or the sum has no single scale")


def test_only_integer_kernels_mind() -> None:
    program = quantized(tiny_residual(), images(2, 3, 8, 8))
    quantizers = [
        node.name
        for node in program.nodes()
        if isinstance(program.submodule(node), ActivationQuantizer)
    ]
    assert len(quantizers) == 6
    assert [one.node for one in obstacles(program)] == quantizers
    assert obstacles(program, per_channel=True) == []


def test_floats_are_compared_as_floats() -> None:
    x = images(2, 3, 8, 8)
    program, _ = lowered(tiny_residual(), x)
    comparison = Comparison(program)
    _, expected = Reference(program).run(x)
    comparison.add((x,), expected, expected)
    kinds = {name: layer.kind for name, layer in comparison.layers.items()}
    assert {kinds[name] for name in ("stem", "conv1", "conv2", "fc")} == {Kind.FLOAT}
    assert kinds["x_quantizer"] is Kind.QUANTIZE
    assert all(layer.introduced == 0 for layer in comparison.layers.values())


def test_programs_survive_json() -> None:
    x = images(2, 3, 8, 8)
    program, _ = lowered(tiny_residual(), x)
    again = IntegerProgram.from_json(program.to_json(), program.tensors)
    assert again == program
    assert torch.equal(Reference(again)(x), Reference(program)(x))


# ---- damage ------------------------------------------------------------------------------------

Parts = tuple[list[dict[str, Any]], dict[str, Tensor]]


def _grid(step: dict[str, Any]) -> None:
    step["grid"] = [1.0, 0, 8]


DAMAGE: dict[str, Callable[[dict[str, Any], dict[str, Any], dict[str, Tensor]], Any]] = {
    "a quantizer with a grid": lambda q, y, t: _grid(q),
    "a layer with a grid": lambda q, y, t: _grid(y),
    "no bits": lambda q, y, t: q["attributes"].pop("bits"),
    "nine bits": lambda q, y, t: q["attributes"].update(bits=9),
    "half a bit": lambda q, y, t: q["attributes"].update(bits=1.5),
    "a flag of bits": lambda q, y, t: q["attributes"].update(bits=True),
    "another axis": lambda q, y, t: q["attributes"].update(axis=0),
    "no scale": lambda q, y, t: q["tensors"].pop("scale"),
    "one scale": lambda q, y, t: t.update(scale=t["scale"][0]),
    "no channels": lambda q, y, t: t.update(scale=t["scale"][:0], zero_point=t["zero_point"][:0]),
    "fewer scales": lambda q, y, t: t.update(scale=t["scale"][:1]),
    "a scale of zero": lambda q, y, t: t.update(scale=t["scale"] * 0),
    "a scale that is no number": lambda q, y, t: t.update(scale=t["scale"] * float("nan")),
    "double scales": lambda q, y, t: t.update(scale=t["scale"].double()),
    "wide zero points": lambda q, y, t: t.update(zero_point=t["zero_point"].int()),
    "a zero point outside": lambda q, y, t: t.update(zero_point=t["zero_point"] + 2),
    "two inputs": lambda q, y, t: q["inputs"].append("x"),
    "an integer bias": lambda q, y, t: t.update({"y.bias": t["y.bias"].int()}),
    "an infinite bias": lambda q, y, t: t.update({"y.bias": t["y.bias"] / 0}),
    "a short bias": lambda q, y, t: t.update({"y.bias": t["y.bias"][:1]}),
    "a bias that is not there": lambda q, y, t: y["tensors"].pop("bias"),
}


def stored() -> tuple[dict[str, Any], dict[str, Tensor]]:
    program, _ = with_layer("linear", [[2, 3], [-4, 0]], [0.25, -0.125])
    return copy.deepcopy(program.to_json()), dict(program.tensors)


def test_what_is_damaged_below_is_sound() -> None:
    IntegerProgram.from_json(*stored())


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_instructions_are_refused(name: str) -> None:
    data, tensors = stored()
    DAMAGE[name](*data["instructions"], tensors)
    with pytest.raises(ArtifactError):
        IntegerProgram.from_json(data, tensors)


def test_codes_are_not_rounded_per_channel() -> None:
    step, tensors = channels()
    codes = Instruction("x", "quantize", ("input",), grid=Grid(1.0, 0, 8))
    with pytest.raises(ArtifactError, match="reads a float, or should"):
        IntegerProgram(("input",), [codes, step], Register("q"), tensors).check()


def test_a_float_bias_is_refused_where_the_input_has_codes() -> None:
    program, layer = with_layer("linear", [[2, 3], [-4, 0]], [0.25, -0.125])
    codes = Instruction("q", "quantize", ("x",), grid=Grid(1.0, 0, 8))
    with pytest.raises(ArtifactError, match="its bias is"):
        IntegerProgram(("x",), [codes, layer], Register("y"), program.tensors).check()
