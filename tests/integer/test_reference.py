"""The reference interpreter against numbers worked out by hand, and against plain loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxq.integer.arguments import Register
from fxq.integer.program import Grid, Instruction, IntegerProgram
from fxq.integer.reference import Reference, average_multiplier
from fxq.numerics.affine import short_scale

HALF = Grid(0.5, 2, 4)
"""Codes 0 .. 15 for -1.0 .. 6.5."""


def program(steps: list[Instruction], tensors: dict[str, Tensor] | None = None) -> IntegerProgram:
    result = IntegerProgram(("x",), steps, Register(steps[-1].name), tensors or {})
    result.check()
    return result


def quantized(grid: Grid = HALF) -> Instruction:
    return Instruction("q", "quantize", ("x",), grid=grid)


def layer(
    op: str,
    weight: list[Any],
    scale: list[float],
    bias: list[int],
    grid: Grid | None,
    source: Grid = HALF,
    **attributes: Any,
) -> IntegerProgram:
    tensors = {
        "weight": torch.tensor(weight, dtype=torch.int8),
        "scale": torch.tensor(scale),
        "bias": torch.tensor(bias, dtype=torch.int32),
        "bits": torch.full((len(scale),), 8, dtype=torch.uint8),
    }
    attributes.setdefault("relu", False)
    roles = {role: role for role in tensors}
    return program(
        [quantized(source), Instruction("y", op, ("q",), attributes, roles, grid)], tensors
    )


def geometry(dims: int, **changed: Any) -> dict[str, Any]:
    plain = {"stride": (1,) * dims, "padding": (0,) * dims, "dilation": (1,) * dims, "groups": 1}
    return plain | changed


# ---- by hand -----------------------------------------------------------------------------------


def test_quantize() -> None:
    x = torch.tensor([-9.0, -1.0, -0.25, 0.0, 0.24, 0.25, 0.75, 6.5, 99.0])
    # x / 0.5 is -18, -2, -0.5, 0, 0.48, 0.5, 1.5, 13, 198; halves go to the even multiple
    assert Reference(program([quantized()]))(x).tolist() == [0, 0, 2, 2, 2, 2, 4, 15, 15]


def test_dequantize() -> None:
    steps = [quantized(), Instruction("y", "dequantize", ("q",))]
    found = Reference(program(steps))(torch.tensor([-9.0, 0.0, 1.1, 99.0]))
    assert found.dtype is torch.float32
    assert found.tolist() == [-1.0, 0.0, 1.0, 6.5]


def test_requantize() -> None:
    steps = [quantized(), Instruction("y", "requantize", ("q",), grid=Grid(1.0, 1, 2))]
    # rounded to -1, 0, 0, 0, 1, 2, 6, then plus one
    x = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 6.5])
    assert Reference(program(steps))(x).tolist() == [0, 1, 1, 1, 2, 3, 3]


def test_linear() -> None:
    # codes of (1.0, -0.5, 2.0) minus 2 are (2, -1, 4); times the weights: 2*3 - 1*-2 + 4*1 = 12
    run = layer("linear", [[3, -2, 1]], [0.25], [4], Grid(1.0, 10, 8))
    # one accumulator unit is 0.5 * 0.25 = 0.125; (12 + 4) * 0.125 / 1.0 = 2
    assert Reference(run)(torch.tensor([[1.0, -0.5, 2.0]])).tolist() == [[12]]


def test_linear_to_float() -> None:
    run = layer("linear", [[3, -2, 1], [-3, 2, -1]], [0.25, 0.5], [4, 4], None)
    # the second: (-12 + 4) * 0.25
    assert Reference(run)(torch.tensor([[1.0, -0.5, 2.0]])).tolist() == [[2.0, -2.0]]
    run = layer("linear", [[-3, 2, -1]], [0.5], [4], None, relu=True)
    assert Reference(run)(torch.tensor([[1.0, -0.5, 2.0]])).tolist() == [[0.0]]


def test_linear_to_float_rounds_the_sum_and_then_the_product() -> None:
    """Products of more than 24 bits are not rounded before the bias is in."""
    width = 600
    source, scale = Grid(0.5, 0, 8), short_scale(1e-3)
    run = layer("linear", [[127] * (width - 1) + [2]], [scale], [1], None, source=source)
    x = torch.full((1, width), 127.5)
    x[0, -1] = 0.5
    total = 127 * 255 * (width - 1) + 2 + 1
    assert f32(f32(total - 1) + 1) != f32(total) == total > 2**24
    assert Reference(run)(x).tolist() == [[f32(f32(total) * f32(0.5 * scale))]]


def test_convolution_pads_with_zeros() -> None:
    run = layer(
        "conv", [[[1, 2, 4]]], [0.25], [0], Grid(0.125, 100, 8), **geometry(1, padding=(1,))
    )
    # codes minus 2: 1, 2, 3; sums 0+2+8, 1+4+12, 2+6+0; a unit is one code
    x = torch.tensor([[[0.5, 1.0, 1.5]]])
    assert Reference(run)(x).tolist() == [[[110, 117, 108]]]


def test_rounding_is_half_to_even_before_the_zero_point() -> None:
    run = layer("linear", [[1]], [1.0], [0], Grid(1.0, 3, 8), source=Grid(0.5, 0, 8))
    x = torch.tensor([[0.5], [1.5], [2.5], [3.5]])  # 0.5, 1.5, 2.5, 3.5 codes
    assert Reference(run)(x).flatten().tolist() == [3, 5, 5, 7]


def test_relu_clamps_at_the_zero_point() -> None:
    for relu, expected in ((False, [0, 5, 10, 15]), (True, [10, 10, 10, 15])):
        run = layer("linear", [[5]], [1.0], [0], Grid(0.5, 10, 4), relu=relu)
        x = torch.tensor([[-1.0], [-0.5], [0.0], [5.0]])
        assert Reference(run)(x).flatten().tolist() == expected


def test_add() -> None:
    steps = [
        quantized(),
        Instruction("r", "requantize", ("q",), grid=Grid(1.0, 0, 3)),
        Instruction("y", "add", ("q", "r"), {"relu": False}, grid=Grid(0.25, 4, 8)),
    ]
    # 1.5 is 1.5 and (half to even) 2: 3.5 / 0.25 + 4; -1.0 is -1 and 0
    x = torch.tensor([1.5, -1.0])
    assert Reference(program(steps))(x).tolist() == [18, 0]
    relu = Instruction("y", "add", ("q", "r"), {"relu": True}, grid=Grid(0.25, 4, 8))
    assert Reference(program([*steps[:2], relu]))(x).tolist() == [18, 4]


def test_global_average_pool() -> None:
    for keep in (True, False):
        pool = Instruction("y", "global_avg_pool", ("q",), {"keepdim": keep}, grid=Grid(0.25, 1, 8))
        x = torch.tensor([[[[1.0, 2.0], [3.0, 4.5]]]])
        found = Reference(program([quantized(), pool]))(x)
        # 10.5 / 4 = 2.625, that is 10.5 codes
        assert found.flatten().tolist() == [11]
        assert found.dim() == (4 if keep else 2)
    assert float(average_multiplier(HALF, Grid(0.25, 1, 8), 4)) == 0.5


def test_moving_instructions() -> None:
    x = torch.tensor([[[[-1.0, 2.0, 0.5], [3.0, 4.0, 6.0]]]])  # codes 0 6 3 / 8 10 14
    pool = {"kernel_size": (2, 2), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    cases: list[tuple[str, tuple[str, ...], dict[str, Any], Any]] = [
        ("max_pool", ("q",), {**pool, "ceil_mode": False}, [[[[10, 14]]]]),
        ("pad", ("q",), {"pad": (1, 0, 0, 1)}, [[[[2, 0, 6, 3], [2, 8, 10, 14], [2, 2, 2, 2]]]]),
        ("cat", ("q", "q"), {"dim": 2}, [[[[0, 6, 3], [8, 10, 14]] * 2]]),
        ("relu", ("q",), {"top": 9}, [[[[2, 6, 3], [8, 9, 9]]]]),
        (
            "reshape",
            ("q",),
            {"call": "flatten", "arguments": (1,), "keywords": {}},
            [[0, 6, 3, 8, 10, 14]],
        ),
        (
            "reshape",
            ("q",),
            {"call": "getitem", "arguments": ((slice(None), 0, 1),), "keywords": {}},
            [[8, 10, 14]],
        ),
    ]
    for op, inputs, attributes, expected in cases:
        run = program([quantized(), Instruction("y", op, inputs, attributes, grid=HALF)])
        assert Reference(run)(x).tolist() == expected, op


# ---- by loops ----------------------------------------------------------------------------------


def f32(value: float) -> float:
    return float(np.float32(value))


def rescaled(accumulator: int, bias: int, unit: float, grid: Grid, relu: bool) -> int:
    """The formula of the program's docstring, in Python numbers."""
    multiplier = f32(f32(unit) / f32(grid.scale))
    exact = f32(f32(f32(accumulator) + f32(bias)) * multiplier)
    low = grid.zero_point if relu else 0
    return min(max(round(exact) + grid.zero_point, low), grid.top)


def looped(run: IntegerProgram, codes: np.ndarray, source: Grid) -> np.ndarray:
    """A convolution of any number of dimensions, one product at a time."""
    step = run.instructions[-1]
    assert step.grid is not None
    weight = run.tensor(step, "weight").numpy().astype(int)
    stride, padding = step.attributes["stride"], step.attributes["padding"]
    dilation, groups = step.attributes["dilation"], step.attributes["groups"]
    kernel = weight.shape[2:]
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(codes.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    out = np.zeros((len(codes), len(weight), *sizes), dtype=int)
    per_group = len(weight) // groups
    for index in np.ndindex(*out.shape):
        image, channel, *place = index
        total = 0
        for inside, *tap in itertools.product(range(weight.shape[1]), *(range(k) for k in kernel)):
            at = [o * s - p + t * d for o, s, p, t, d in zip(place, stride, padding, tap, dilation)]  # noqa: B905
            if all(0 <= a < n for a, n in zip(at, codes.shape[2:], strict=True)):
                plane = channel // per_group * weight.shape[1] + inside
                value = int(codes[(image, plane, *at)]) - source.zero_point
                total += value * int(weight[(channel, inside, *tap)])
        unit = f32(f32(source.scale) * float(run.tensor(step, "scale")[channel]))
        bias = int(run.tensor(step, "bias")[channel])
        out[index] = rescaled(total, bias, unit, step.grid, step.attributes["relu"])
    return out


CONVOLUTIONS = {
    "1d": ((4, 3, 3), (3, 7), geometry(1, stride=(2,), padding=(1,))),
    "2d": ((3, 2, 3, 2), (2, 6, 5), geometry(2, padding=(1, 0))),
    "2d-strided-dilated": (
        (3, 2, 2, 3),
        (2, 7, 8),
        geometry(2, stride=(2, 3), padding=(1, 2), dilation=(2, 1)),
    ),
    "2d-grouped": ((6, 2, 3, 3), (4, 5, 5), geometry(2, groups=2, padding=(1, 1))),
    "2d-depthwise": ((4, 1, 3, 3), (4, 5, 5), geometry(2, groups=4, padding=(1, 1))),
    "3d": ((2, 2, 2, 2, 2), (2, 3, 4, 3), geometry(3, padding=(1, 0, 1))),
}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, relu: bool) -> None:
    shape, size, attributes = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(11)
    weight = torch.randint(-127, 128, shape, generator=generator)
    scale = (torch.rand(shape[0], generator=generator) * 0.02).tolist()
    bias = torch.randint(-900, 900, (shape[0],), generator=generator)
    source = Grid(0.0625, 77, 8)
    run = layer(
        "conv",
        weight.tolist(),
        scale,
        bias.tolist(),
        Grid(0.5, 50, 7),
        source,
        relu=relu,
        **attributes,
    )
    x = torch.randn(2, *size, generator=generator) * 4
    output, values = Reference(run).run(x)
    assert np.array_equal(output.numpy(), looped(run, values["q"].numpy(), source))


def test_sums_beyond_float32_are_exact() -> None:
    """Accumulators above 2**24 are rounded once, when they become float32."""
    width = 4000
    run = layer(
        "linear", [[127] * width], [0.5], [3], Grid(1024.0, 0, 8), source=Grid(0.001953125, 0, 8)
    )
    x = torch.full((1, width), 255 * 0.001953125)
    x[0, 0] = 0.0
    accumulator = 127 * 255 * (width - 1)
    assert accumulator > 2**24
    unit = 0.5 * 0.001953125
    expected = rescaled(accumulator, 3, unit, Grid(1024.0, 0, 8), False)
    assert Reference(run)(x).tolist() == [[expected]]
    assert expected == round(math.floor(accumulator * unit / 1024.0 + 0.5))


def test_several_outputs_and_float_operators() -> None:
    steps = [
        quantized(),
        Instruction("f", "dequantize", ("q",)),
        Instruction(
            "y",
            "float",
            ("f",),
            {"target": "torch.mul", "arguments": (Register("f"), 2.0), "keywords": {}},
        ),
    ]
    run = IntegerProgram(("x",), steps, (Register("q"), {"twice": Register("y")}), {})
    run.check()
    codes, named = Reference(run)(torch.tensor([1.0]))
    assert codes.tolist() == [4]
    assert named["twice"].tolist() == [2.0]
