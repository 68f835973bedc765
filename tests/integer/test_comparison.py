"""A layer is blamed for what it introduces, exactly, and never for what it inherits."""

from __future__ import annotations

import doctest
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq.backends.eager import EagerModule
from fxq.errors import MismatchError
from fxq.integer import comparison as module
from fxq.integer.arguments import Register
from fxq.integer.comparison import Comparison, agreement
from fxq.integer.differences import Agreement, Kind, Layer, summaries
from fxq.integer.program import Grid, Instruction, IntegerProgram
from fxq.integer.reference import Reference
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual

TINY = {
    "conv": (tiny_conv, (3, 8, 8)),
    "residual": (tiny_residual, (3, 8, 8)),
    "depthwise": (tiny_depthwise, (3, 8, 8)),
    "concat": (tiny_concat, (3, 8, 8)),
    "mlp": (tiny_mlp, (16,)),
}

Registers = dict[str, Any]


def images(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def residual(compiled: Callable[..., Any]) -> IntegerProgram:
    """A network with a convolution, an add, a pool and a linear after its `conv1`."""
    result: IntegerProgram = compiled(tiny_residual(), images(6, 3, 8, 8)).artifact.integers
    return result


def faulty(program: IntegerProgram, layer: str, x: Tensor) -> tuple[Registers, int]:
    """Registers of a runtime whose one layer adds 1 to its codes, and in how many elements."""
    reference, values = Reference(program), {program.inputs[0]: x}
    changed = 0
    for step in program:
        exact = values[step.name] = reference.step(step, values)
        if step.name == layer:
            assert step.grid is not None
            values[layer] = (exact + 1).clamp(max=step.grid.top)
            changed = int((values[layer] != exact).sum())
    return values, changed


def compared(program: IntegerProgram, x: Tensor, registers: Registers) -> Comparison:
    comparison = Comparison(program)
    comparison.add((x,), Reference(program).run(x)[1], registers)
    return comparison


def counts(comparison: Comparison) -> dict[str, tuple[int, int, int]]:
    """What differs, by layer: introduced, inherited, differing."""
    return {
        one.name: (one.introduced, one.inherited, one.differing)
        for one in comparison.layers.values()
        if one.introduced or one.inherited or one.differing
    }


# ---- layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_fbgemm_introduces_nothing(name: str, compiled: Callable[..., Any]) -> None:
    build, shape = TINY[name]
    program = compiled(build(), images(4, *shape), "aciq-4bit").artifact.integers
    x = images(5, *shape) * 1.5
    found = compared(program, x, EagerModule(program, "fbgemm").registers(x))
    assert counts(found) == {}
    assert all(one.seen and one.elements for one in found.layers.values())
    assert list(found.layers) == [step.name for step in program]
    assert (found.output.images, found.output.share, found.output.largest) == (5, 1.0, 0.0)


def test_a_broken_layer_is_blamed_and_those_after_it_inherit(residual: IntegerProgram) -> None:
    x = images(6, 3, 8, 8)
    registers, changed = faulty(residual, "conv1", x)
    found = compared(residual, x, registers)
    assert changed > 100
    assert found.layers["conv1"].introduced == found.layers["conv1"].differing == changed
    assert found.layers["conv1"].inherited == 0
    assert found.layers["conv1"].largest == found.layers["conv1"].largest_introduced == 1.0
    later = {name: found.layers[name] for name in ("conv2", "add", "avgpool", "fc")}
    assert all(one.introduced == 0 for one in later.values())
    assert all(one.inherited == one.differing > 0 for one in later.values())
    assert later["fc"].largest > 0
    assert later["fc"].largest_introduced == 0
    assert "stem" not in counts(found)


def test_what_cancels_is_introduced_all_the_same(residual: IntegerProgram) -> None:
    """A layer that repairs what came before differs from its own inputs' exact result."""
    x = images(6, 3, 8, 8)
    registers, _ = faulty(residual, "conv1", x)
    broken = compared(residual, x, registers).layers["conv2"].differing
    registers |= {"conv2": Reference(residual).run(x)[1]["conv2"]}
    found = compared(residual, x, registers).layers["conv2"]
    assert (found.introduced, found.inherited, found.differing) == (broken, 0, 0)


def test_a_register_that_is_not_shown_is_computed(residual: IntegerProgram) -> None:
    """What a hidden layer does wrong shows in the layer that reads it."""
    x = images(6, 3, 8, 8)
    registers, _ = faulty(residual, "conv2", x)
    del registers["conv2"], registers["flatten"]
    found = compared(residual, x, registers)
    assert not found.layers["conv2"].seen
    assert (found.layers["conv2"].elements, found.layers["conv2"].differing) == (0, 0)
    assert found.layers["add"].introduced == found.layers["add"].differing > 0
    assert found.layers["fc"].introduced == 0
    assert found.layers["fc"].inherited > 0


def test_a_fused_engine_hides_what_it_fuses(residual: IntegerProgram) -> None:
    x = images(6, 3, 8, 8)
    module = EagerModule(residual, "x86")
    found = compared(residual, x, module.registers(x))
    hidden = [one.name for one in found.layers.values() if not one.seen]
    shown = set(module.registers(x))
    assert hidden == [step.name for step in residual if step.name not in shown]
    assert sum(one.introduced for one in found.layers.values() if one.kind is Kind.CONV) == 0


def test_batches_add_up(residual: IntegerProgram) -> None:
    x = images(6, 3, 8, 8)
    registers, _ = faulty(residual, "conv1", x)
    whole = compared(residual, x, registers)
    pieces = Comparison(residual)
    for part in (x[:1], x[1:5], x[5:]):
        own, _ = faulty(residual, "conv1", part)
        pieces.add((part,), Reference(residual).run(part)[1], own)
    assert pieces.layers == whole.layers
    assert pieces.output == whole.output
    assert whole.output.images == 6


def test_sizes_and_tuples_are_followed(compiled: Callable[..., Any]) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(2, 4, 1)
            self.second = nn.Conv2d(2, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.first(x).chunk(2, 1)
            return self.second(one + two).reshape(x.size(0), -1)

    x = images(3, 2, 4, 4)
    program = compiled(Split(), x).artifact.integers
    registers, changed = faulty(program, "first", x)
    plain = {name: one for name, one in registers.items() if isinstance(one, Tensor)}
    assert len(plain) < len(registers)
    for shown in (registers, plain):
        found = compared(program, x, shown)
        assert changed
        assert {name: one[0] for name, one in counts(found).items() if one[0]} == {"first": changed}
        assert set(found.layers) == set(plain) - {"x"}


def test_narrow_codes_do_not_wrap() -> None:
    """Codes below the zero point, in bytes."""
    steps = [
        Instruction("q", "quantize", ("x",), grid=Grid(0.5, 4, 4)),
        Instruction("y", "dequantize", ("q",)),
    ]
    program = IntegerProgram(("x",), steps, Register("y"), {})
    x = torch.tensor([[-1.0, 1.0]])
    found = compared(program, x, {"q": torch.tensor([[1, 6]], dtype=torch.uint8)})
    assert counts(found) == {"q": (1, 0, 1)}
    assert found.output.largest == 0.5  # -1.5 in place of -1.0


def test_floats_are_compared_as_numbers() -> None:
    step = Instruction(
        "y",
        "float",
        ("x",),
        {"target": "torch.log", "arguments": (Register("x"),), "keywords": {}},
    )
    program = IntegerProgram(("x",), [step], Register("y"), {})
    x = torch.tensor([[-1.0, 0.0, 1.0, 4.0, 0.5]])
    nan, inf = torch.nan, torch.inf
    have = {"y": torch.tensor([[nan, -inf, -0.0, 2.0, -0.6931472]])}
    want = torch.log(x)
    found = compared(program, x, have).layers["y"]
    assert (found.differing, found.introduced) == (1, 1)  # log(4) only
    assert found.largest == pytest.approx(2 - float(want[0, 3]))
    assert found.relative == pytest.approx(found.largest / float(want[0, 3]))
    gone = compared(program, x, {"y": torch.zeros(1, 5)}).layers["y"]
    assert gone.largest == inf
    assert gone.to_json()["largest"] is None
    json.dumps(gone.to_json(), allow_nan=False)


def test_another_shape_is_no_comparison(residual: IntegerProgram) -> None:
    x = images(2, 3, 8, 8)
    registers, _ = faulty(residual, "conv1", x)
    registers["add"] = registers["add"][:1]
    with pytest.raises(MismatchError, match=r"%add has the shape \[1, 8, 8, 8\]"):
        compared(residual, x, registers)


# ---- summaries -------------------------------------------------------------------------------


def test_summaries_add_layers_of_a_kind() -> None:
    conv = Layer(
        "a", "conv", Kind.CONV, ("a",), elements=10, introduced=2, differing=3, inherited=1
    )
    other = replace(conv, name="b", seen=False, elements=0, introduced=0, differing=0, inherited=0)
    wrong = Layer("c", "float", Kind.FLOAT, quantized=False, elements=4, largest=1.0, magnitude=8.0)
    first, second = summaries([wrong, replace(conv, largest=2.0), other])
    assert (first.kind, first.layers, first.seen) == (Kind.CONV, 2, 1)
    assert (first.elements, first.introduced, first.inherited, first.differing) == (10, 2, 1, 3)
    assert (first.largest, first.relative) == (2.0, 0.0)
    assert (second.kind, second.largest, second.relative) == (Kind.FLOAT, 0.0, 0.125)


# ---- outputs ---------------------------------------------------------------------------------


def test_agreement_of_maps_counts_pixels() -> None:
    want = torch.zeros(2, 3, 2, 2)
    want[:, 1] = 1.0
    have = want.clone()
    have[0, 2, 0, 0] = 5.0
    found = agreement(want, have)
    assert (found.images, found.decisions, found.agreeing, found.largest) == (2, 8, 7, 5.0)


def test_agreement_takes_the_first_tensor() -> None:
    one, two = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert agreement({"out": one, "aux": one}, {"out": one, "aux": two}).share == 1.0
    assert agreement((None, [two]), (None, [one])).share == 0.0
    assert agreement(None, None) == Agreement()


def test_agreement_without_classes() -> None:
    found = agreement(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.5]]))
    assert (found.images, found.decisions, found.share, found.largest) == (2, 0, None, 0.5)
    assert found.relative == 0.25


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(module) == (0, 3)
