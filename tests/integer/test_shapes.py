"""Shapes of registers as functions of the batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxq
from fxq.errors import ArtifactError, LoweringError
from fxq.integer.arguments import Register
from fxq.integer.program import Instruction, IntegerProgram
from fxq.integer.reference import Reference
from fxq.integer.shapes import Size, Value, register_values
from fxq.models_zoo import tiny_residual
from fxq.registry import find_backend

pytestmark = pytest.mark.usefixtures("one_thread")


class Shaped(nn.Module):
    """A convolution whose output is reshaped by a computed size."""

    def __init__(self, size: Callable[[torch.Tensor], int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv(x))
        return torch.relu(y.view(self.size(x), -1, 6, 6))


def program_of(module: nn.Module) -> IntegerProgram:
    x = torch.randn(4, 3, 8, 8)
    return fxq.compile(module.eval(), x, "minmax-int8", calibration=[x]).artifact.integers


def test_every_register_of_a_network() -> None:
    values = register_values(program_of(tiny_residual()))
    batch = Size(1, 0)
    assert values["x"].shape == (batch, Size(0, 3), Size(0, 8), Size(0, 8))
    assert values["fc"].shape == (batch, Size(0, 10))
    assert values["fc"].dtype is torch.float32
    static = register_values(program_of(tiny_residual()), dynamic=False)
    assert [size.constant for size in static["x"].shape or ()] == [4, 3, 8, 8]


def test_integers_that_are_multiples_of_the_batch() -> None:
    values = register_values(program_of(Shaped(lambda x: x.size(0) * 2)))
    sizes = [value.size for value in values.values() if value.size is not None]
    assert Size(2, 0) in sizes


def test_of_other_integers_nothing_is_known_but_at_a_static_batch() -> None:
    program = program_of(Shaped(lambda x: x.size(0) // 2))
    values = register_values(program)
    unknown = [name for name, value in values.items() if value == Value()]
    assert {"floordiv", "view"} <= set(unknown)
    static = register_values(program, dynamic=False)
    assert static["floordiv"].size == Size(0, 2)
    backend: Any = find_backend("onnx")
    with pytest.raises(LoweringError, match="no multiple"):
        backend.load(program)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(backend.load(program, dynamic=False)(x), Reference(program)(x))


def test_a_program_without_examples_is_refused() -> None:
    steps = [Instruction("y", "float", ("x",), {"target": "torch.relu"})]
    with pytest.raises(ArtifactError, match="does not know the shapes of its inputs"):
        register_values(IntegerProgram(("x",), steps, Register("y"), {}))
