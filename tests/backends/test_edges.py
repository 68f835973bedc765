"""Where floats become codes and codes floats: fbgemm equals the reference there, in every bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fxq.backends import _kernels as kernels
from fxq.backends.eager import EagerModule
from fxq.errors import FxqError
from fxq.integer.arguments import Register
from fxq.integer.program import Grid, Instruction, IntegerProgram
from fxq.integer.reference import Reference
from fxq.numerics.affine import quantize, short_scale

GRIDS = [Grid(short_scale(0.0187), zero, 8) for zero in (0, 113, 128, 255)] + [Grid(0.1, 3, 4)]


def near_ties(scale: float) -> Tensor:
    """Ties, their neighbours in float32, random values and infinities."""
    ties = (torch.arange(-300, 300) + 0.5) * scale
    around = [torch.nextafter(ties, torch.tensor(end)) for end in (math.inf, -math.inf)]
    extremes = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3e38, -3e38, 1e-45])
    return torch.cat([ties, *around, torch.randn(50_001) * scale * 80, extremes])


# ---- floats to codes ---------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_quantize(grid: Grid, mismatches) -> None:
    steps = [
        Instruction("q", "quantize", ("x",), grid=grid),
        Instruction("y", "dequantize", ("q",)),
    ]
    program = IntegerProgram(("x",), steps, Register("y"), {})
    assert mismatches(program, near_ties(grid.scale)) == {}


@pytest.mark.parametrize("zero", [0, 200])
def test_requantize(zero: int, mismatches) -> None:
    """Every code, onto a grid where half of them are ties."""
    steps = [
        Instruction("q", "quantize", ("x",), grid=Grid(0.25, 7, 8)),
        Instruction("y", "requantize", ("q",), grid=Grid(0.5, zero, 8)),
    ]
    program = IntegerProgram(("x",), steps, Register("y"), {})
    assert mismatches(program, (torch.arange(256.0) - 7) * 0.25) == {}


@pytest.mark.parametrize("zero", [0, 113])
def test_quantize_keeps_the_layout_and_its_input(zero: int) -> None:
    x = torch.randn(2, 3, 9, 7)
    wide = torch.stack([x, x], -1)
    expected = quantize(x, 0.25, zero, 0, 255).to(torch.uint8)
    for same in (x, x.contiguous(memory_format=torch.channels_last), wide[..., 0]):
        kept = same.clone()
        codes = kernels.quantize(same, 0.25, zero)
        assert (codes.q_scale(), codes.q_zero_point()) == (0.25, zero)
        assert torch.equal(kernels.unwrap(codes), expected)
        assert torch.equal(same, kept)
    last = kernels.quantize(x.contiguous(memory_format=torch.channels_last), 0.25, zero)
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8, torch.int64])
def test_only_float32_becomes_codes(dtype: torch.dtype) -> None:
    program = IntegerProgram(
        ("x",), [Instruction("q", "quantize", ("x",), grid=GRIDS[1])], Register("q"), {}
    )
    with pytest.raises(FxqError, match="codes are made of float32, not"):
        EagerModule(program, "fbgemm")(torch.ones(4).to(dtype))


# ---- codes to floats ---------------------------------------------------------------------------


def linear(weight: Tensor, bias: Tensor, zero: int, relu: bool = False) -> IntegerProgram:
    tensors = {
        "weight": weight.to(torch.int8),
        "scale": short_scale(torch.rand(len(weight)) * 0.02 + 1e-4),
        "bias": bias.to(torch.int32),
        "bits": torch.full((len(weight),), 8, dtype=torch.uint8),
    }
    steps = [
        Instruction("q", "quantize", ("x",), grid=Grid(short_scale(0.0187), zero, 8)),
        Instruction("y", "linear", ("q",), {"relu": relu}, {role: role for role in tensors}),
    ]
    program = IntegerProgram(("x",), steps, Register("y"), tensors)
    program.check()
    return program


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("zero", [0, 113, 255])
@pytest.mark.parametrize("width", [1, 64, 513, 515, 2048, 9000])
def test_linear_to_float(width: int, zero: int, relu: bool, mismatches) -> None:
    weight = torch.randint(-127, 128, (33, width))
    program = linear(weight, torch.randint(-(2**23), 2**23, (33,)), zero, relu)
    x = torch.randn(2, 3, width) * 2
    assert mismatches(program, x) == {}
    assert bool((Reference(program)(x) > 0).any())


@pytest.mark.parametrize("width", [514, 518, 4000, 30_000])
def test_sums_that_no_float32_holds(width: int, mismatches) -> None:
    """The largest products there are, of either sign, and sums that need rounding."""
    weight = torch.full((8, width), 127)
    weight[1::2] = -127
    weight[2:, -1] = torch.arange(6)
    program = linear(weight, torch.arange(8) * 1001 - 3000, 0)
    x = torch.full((3, width), 9.0)
    x[1, ::2] = 0.0187
    assert int(Reference(program).run(x)[1]["q"].max()) == 255
    assert mismatches(program, x) == {}


def test_wide_layers_are_packed_in_parts() -> None:
    bias, unit = torch.tensor([5]), torch.ones(1)
    narrow = torch.full((1, 514), 127, dtype=torch.int8)
    assert len(kernels.FloatLinear(narrow, bias, unit, relu=False)._parts) == 1
    wide = torch.full((1, 2000), 127, dtype=torch.int8)
    assert len(kernels.FloatLinear(wide, bias, unit, relu=False)._parts) == 4
    light = torch.ones(1, 2000, dtype=torch.int8)
    assert len(kernels.FloatLinear(light, bias, unit, relu=False)._parts) == 1
    assert len(kernels.FloatLinear(light, bias + 2**24, unit, relu=False)._parts) == 4


@pytest.mark.parametrize("shape", [(4, 6, 1, 1), (4, 1, 5, 3)])
def test_float_layers_see_the_layout_of_the_reference(
    shape: tuple[int, ...], integers, mismatches
) -> None:
    """Images of one pixel or one channel have two layouts at once; kernels write either."""
    channels = shape[1]
    net = nn.Sequential(
        nn.Conv2d(channels, channels, 1), nn.GroupNorm(1, channels), nn.Conv2d(channels, 2, 1)
    )
    x = torch.randn(shape)
    assert mismatches(integers(net, x).artifact.integers, x * 1.5) == {}
