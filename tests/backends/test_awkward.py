"""Convolutions that kernels of torch 2.13 get wrong, and that fxq must not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxq.backends import _kernels as kernels
from fxq.backends.eager import EagerModule
from fxq.integer.arguments import Register
from fxq.integer.layers import accumulator_scale, integer_bias
from fxq.integer.program import Grid, Instruction, IntegerProgram
from fxq.integer.reference import Reference

ENGINES = ("x86", "fbgemm", "onednn")
needs_exact_onednn = pytest.mark.skipif(
    not kernels.is_exact("onednn"), reason="this CPU's onednn saturates in 16 bits"
)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_conv(weight: Tensor, size: tuple[int, ...], **geometry: object) -> tuple:
    dims = weight.dim() - 2
    attributes = {"relu": False, "groups": 1, "stride": (1,) * dims, "padding": (0,) * dims}
    attributes |= {"dilation": (1,) * dims} | geometry
    scale = torch.full((len(weight),), 0.0078125)
    unit = accumulator_scale(0.03125, scale)
    tensors = {
        "weight": weight,
        "scale": scale,
        "bias": integer_bias(torch.linspace(-1, 1, len(weight)), unit),
        "bits": torch.full((len(weight),), 8, dtype=torch.uint8),
    }
    steps = [
        Instruction("q", "quantize", ("x",), grid=Grid(0.03125, 5, 8)),
        Instruction(
            "y", "conv", ("q",), attributes, {role: role for role in tensors}, Grid(1.0, 100, 8)
        ),
    ]
    program = IntegerProgram(("x",), steps, Register("y"), tensors)
    return program, images(2, weight.shape[1] * int(attributes["groups"]), *size) * 4


def codes_of(*shape: int, top: int = 127) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-top, top + 1, shape, generator=generator, dtype=torch.int8)


AWKWARD: dict[str, tuple] = {
    # one column of output from a strided kernel: onednn returns the columns of other images
    "one column": (codes_of(16, 4, 3, 3), (7, 5), {"stride": (1, 3), "groups": 4}),
    "one column, dense": (codes_of(4, 4, 3, 3), (7, 3), {"stride": (2, 2), "padding": (2, 0)}),
    "one column, stride one": (codes_of(4, 4, 3, 3), (7, 3), {}),
    "one column of a signal": (codes_of(8, 4, 5), (5,), {"stride": (3,), "groups": 4}),
    # a dilated kernel of size one: onednn ends the process
    "dilated pointwise": (
        codes_of(8, 3, 2, 1),
        (3, 1),
        {"stride": (1, 3), "padding": (1, 2), "dilation": (2, 2)},
    ),
    # windows that see nothing but padding
    "only padding": (
        codes_of(16, 1, 1, 5),
        (3, 12),
        {"stride": (2, 1), "padding": (2, 0), "groups": 16},
    ),
    "between the pixels": (
        codes_of(12, 3, 3, 2),
        (9, 1),
        {"padding": (1, 1), "dilation": (2, 2), "groups": 1},
    ),
    # volumes one deep
    "flat volume": (
        codes_of(24, 3, 2, 2, 3),
        (1, 3, 1),
        {"stride": (1, 3, 1), "padding": (2, 1, 2), "dilation": (2, 1, 1)},
    ),
    # fbgemm's depthwise kernels saturate in 16 bits
    "worst depthwise": (
        torch.full((16, 1, 3, 3), 127, dtype=torch.int8),
        (9, 9),
        {"padding": (1, 1), "groups": 16},
    ),
    "worst depthwise 5x5": (
        torch.full((16, 1, 5, 5), -127, dtype=torch.int8),
        (9, 9),
        {"padding": (2, 2), "groups": 16},
    ),
}


@needs_exact_onednn
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_convolutions(name: str, engine: str) -> None:
    weight, size, geometry = AWKWARD[name]
    program, x = one_conv(weight, size, **geometry)
    program.check()
    expected = Reference(program).run(x)[1]["y"]
    found = EagerModule(program, engine).registers(x)["y"].int()
    assert int((found - expected).abs().max()) <= (0 if engine == "fbgemm" else 1)
