"""Random small instructions: fbgemm equals the reference exactly, others within one code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxq.backends import _kernels as kernels
from fxq.backends.eager import EagerModule
from fxq.integer.arguments import Register
from fxq.integer.layers import accumulator_scale, integer_bias
from fxq.integer.program import Grid, Instruction, IntegerProgram
from fxq.integer.reference import Reference
from fxq.numerics.affine import short_scale
from fxq.numerics.saturation import largest_pair_sum, pair_limit


@st.composite
def grids(draw: Callable[..., Any], low: float = 1e-3, high: float = 0.5) -> Grid:
    bits = draw(st.integers(1, 8))
    return Grid(short_scale(draw(st.floats(low, high))), draw(st.integers(0, 2**bits - 1)), bits)


@st.composite
def layers(draw: Callable[..., Any]) -> tuple[IntegerProgram, Tensor]:
    """A quantize and a convolution, and its input."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    inside, outside = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kernel = [draw(st.integers(1, 4 - dims // 2)) for _ in range(dims)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    top = 2 ** (draw(st.integers(2, 8)) - 1) - 1
    shape = (groups * outside, inside, *kernel)
    weight = torch.randint(-top, top + 1, shape, generator=generator, dtype=torch.int8)
    scale = short_scale(torch.rand(len(weight), generator=generator) * 0.02 + 1e-4)
    source, target = draw(grids()), draw(grids(0.01, 5.0))
    bias = torch.randn(len(weight), generator=generator) * draw(st.sampled_from([0.0, 1.0, 1e4]))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    attributes = {
        "relu": draw(st.booleans()),
        "stride": tuple(draw(st.integers(1, 3)) for _ in range(dims)),
        "padding": tuple(draw(st.integers(0, 2)) for _ in range(dims)),
        "dilation": dilation,
        "groups": groups,
    }
    sizes = [
        d * (k - 1) + 1 + draw(st.integers(0, 4)) for d, k in zip(dilation, kernel, strict=True)
    ]
    x = torch.randn(draw(st.integers(1, 2)), groups * inside, *sizes, generator=generator)
    x *= source.scale * source.top
    return _program("conv", attributes, weight, scale, bias, source, target), x


@st.composite
def matrices(draw: Callable[..., Any]) -> tuple[IntegerProgram, Tensor]:
    """A quantize and a linear, and its input."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 70)))
    weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    scale = short_scale(torch.rand(len(weight), generator=generator) * 0.02 + 1e-4)
    source, target = draw(grids()), draw(grids(0.01, 5.0))
    bias = torch.randn(len(weight), generator=generator)
    batch = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))]
    x = torch.randn(*batch, shape[1], generator=generator) * source.scale * source.top
    relu = {"relu": draw(st.booleans())}
    grid = draw(st.sampled_from([target, None]))
    return _program("linear", relu, weight, scale, bias, source, grid), x


def _program(
    op: str,
    attributes: dict[str, Any],
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    source: Grid,
    target: Grid | None,
) -> IntegerProgram:
    tensors = {
        "weight": weight,
        "scale": scale,
        "bias": integer_bias(bias, accumulator_scale(source.scale, scale)),
        "bits": torch.full_like(scale, 8, dtype=torch.uint8),
    }
    steps = [
        Instruction("q", "quantize", ("x",), grid=source),
        Instruction("y", op, ("q",), attributes, {role: role for role in tensors}, target),
    ]
    program = IntegerProgram(("x",), steps, Register("y"), tensors)
    program.check()
    return program


def outputs(program: IntegerProgram, engine: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    found, expected = (
        EagerModule(program, engine).registers(*inputs),
        Reference(program).run(*inputs),
    )
    return found["y"].to(torch.float64), expected[1]["y"].to(torch.float64)


def saturating(program: IntegerProgram) -> bool:
    """Whether the reference's layer is a depthwise one that fbgemm would get wrong."""
    step = program.instructions[1]
    weight = program.tensor(step, "weight")
    depthwise = step.op == "conv" and step.attributes["groups"] == weight.shape[0] > 1
    return depthwise and int(largest_pair_sum(weight.flatten(1)).max()) > pair_limit(255)


@settings(max_examples=150)
@given(layers())
def test_convolutions_are_exact(case: tuple[IntegerProgram, Tensor]) -> None:
    program, x = case
    found, expected = outputs(program, "fbgemm", x)
    assert int((found - expected).abs().max()) <= (1 if saturating(program) else 0)


@settings(max_examples=100)
@given(matrices())
def test_linears_are_exact(case: tuple[IntegerProgram, Tensor]) -> None:
    program, x = case
    found, expected = outputs(program, "fbgemm", x)
    assert torch.equal(found, expected)


@settings(max_examples=100)
@given(st.one_of(layers(), matrices()), st.sampled_from(["x86", "onednn"]))
def test_other_engines_are_within_one_code(
    case: tuple[IntegerProgram, Tensor], engine: str
) -> None:
    program, x = case
    if not kernels.is_exact(engine):
        pytest.skip("this CPU's onednn saturates")
    found, expected = outputs(program, engine, x)
    if program.instructions[1].grid is not None:
        assert int((found - expected).abs().max()) <= 1


@settings(max_examples=100)
@given(grids(), grids(), grids(), st.booleans(), st.integers(0, 2**32))
def test_adds_are_exact(left: Grid, right: Grid, target: Grid, relu: bool, seed: int) -> None:
    steps = [
        Instruction("a", "quantize", ("x",), grid=left),
        Instruction("b", "quantize", ("z",), grid=right),
        Instruction("y", "add", ("a", "b"), {"relu": relu}, grid=target),
    ]
    program = IntegerProgram(("x", "z"), steps, Register("y"), {})
    program.check()
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(2, 5, 3, 7, generator=generator) * g.scale * g.top for g in (left, right)]
    found, expected = outputs(program, "fbgemm", *inputs)
    assert torch.equal(found, expected)


_MOVES: list[tuple[str, dict[str, Any]]] = [
    ("requantize", {}),
    ("global_avg_pool", {"keepdim": True}),
    ("global_avg_pool", {"keepdim": False}),
]


@settings(max_examples=100)
@given(grids(), grids(), st.sampled_from(_MOVES), st.integers(0, 2**32))
def test_rescaling_is_exact(
    source: Grid, target: Grid, move: tuple[str, dict[str, Any]], seed: int
) -> None:
    op, attributes = move
    steps = [
        Instruction("q", "quantize", ("x",), grid=source),
        Instruction("y", op, ("q",), attributes, grid=target),
    ]
    program = IntegerProgram(("x",), steps, Register("y"), {})
    program.check()
    x = torch.randn(2, 5, 3, 7, generator=torch.Generator().manual_seed(seed))
    found, expected = outputs(program, "fbgemm", x * source.scale * source.top)
    assert torch.equal(found, expected)
