"""Sums of two quantized tensors: the definition, other forms, and scales at which they agree."""

from __future__ import annotations

import platform
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxq.integer.arguments import Register
from fxq.integer.program import Grid, Instruction, IntegerProgram
from fxq.integer.reference import Reference
from fxq.numerics import residual
from fxq.numerics.affine import dequantize, short_scale
from fxq.numerics.residual import Codes, agreeing_scale, disputed, sum_codes


@pytest.fixture(scope="module", autouse=True)
def small_tensors(one_thread: None) -> None:
    """Every test here runs on one thread."""


@st.composite
def addends(draw: Any, top_bits: int = 8) -> Codes:
    bits = draw(st.integers(1, top_bits))
    scale = short_scale(draw(st.floats(1e-3, 0.5)))
    return Codes(scale, draw(st.integers(0, 2**bits - 1)), bits)


@st.composite
def totals(draw: Any, top_bits: int = 8) -> Codes:
    one = draw(addends(top_bits))
    return replace(one, relu=draw(st.booleans()))


def typical(seed: int) -> tuple[Codes, Codes, Codes]:
    """Two addends of 8 bits and a sum of about their range."""
    rng = np.random.default_rng(seed)
    left, right = (
        Codes(short_scale(float(rng.uniform(0.005, 0.05))), int(rng.integers(256)), 8)
        for _ in range(2)
    )
    scale = short_scale(float(rng.uniform(0.4, 1.0)) * (left.scale + right.scale))
    return left, right, Codes(scale, int(rng.integers(256)), 8)


# ---- the forms ---------------------------------------------------------------------------------


def nearest_float32(value: Fraction) -> float:
    """Rounded once, by comparing exactly with the neighbours."""
    guess = np.float32(float(value))
    around = [np.nextafter(guess, np.float32(end)) for end in (-np.inf, np.inf)]
    candidates = [float(one) for one in (guess, *around)]
    return min(candidates, key=lambda one: (abs(Fraction(one) - value), _is_odd(one)))


def _is_odd(value: float) -> int:
    return int(np.float32(value).view(np.uint32)) & 1


WIDE = st.floats(2.0**-60, 2.0**60, width=32) | st.floats(-(2.0**60), -(2.0**-60), width=32)


@given(st.integers(-255, 255), WIDE, WIDE)
def test_fma_rounds_once(a: int, b: float, c: float) -> None:
    tensors = (torch.tensor(float(one)) for one in (a, b, c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assert float(residual._fma(*tensors)) == nearest_float32(exact)


def test_fma_breaks_ties_by_what_float64_cannot_hold() -> None:
    """``4097**2`` is halfway between two float32 numbers; what is added to it decides."""
    a = torch.tensor(4097.0)
    found = [float(residual._fma(a, a, torch.tensor(tiny))) for tiny in (2.0**-60, -(2.0**-60))]
    assert found == [4097**2 + 1, 4097**2 - 1]
    assert float(residual._fma(-a, a, torch.tensor(2.0**-60))) == -(4097**2) + 1


@settings(max_examples=60)
@given(addends(), addends(), totals())
def test_sums_are_those_of_the_reference(left: Codes, right: Codes, total: Codes) -> None:
    found, expected = sum_codes(left, right, total), through_the_reference(left, right, total)
    assert torch.equal(found, expected)


def through_the_reference(left: Codes, right: Codes, total: Codes) -> Tensor:
    """All pairs of codes, added by the reference interpreter."""
    one, other, grid = (Grid(c.scale, c.zero_point, c.bits) for c in (left, right, total))
    steps = [
        Instruction("a", "quantize", ("x",), grid=one),
        Instruction("b", "quantize", ("z",), grid=other),
        Instruction("y", "add", ("a", "b"), {"relu": total.relu}, grid=grid),
    ]
    qa, qb = torch.cartesian_prod(left.all(), right.all()).unbind(1)
    x, z = (dequantize(q, c.scale, c.zero_point) for q, c in ((qa, left), (qb, right)))
    output, values = Reference(IntegerProgram(("x", "z"), steps, Register("y"), {})).run(x, z)
    assert torch.equal(values["a"], qa.int())
    assert torch.equal(values["b"], qb.int())
    return output.reshape(left.top + 1, right.top + 1)


def all_forms(left: Codes, right: Codes, total: Codes) -> Tensor:
    """``[forms, pairs]``: every form on every pair, near a tie or not."""
    qa, qb = torch.cartesian_prod(left.all(), right.all()).unbind(1)
    return torch.cat(list(residual._folded(qa, qb, left, right, total)))


@settings(max_examples=100)
@given(addends(), addends(), totals())
def test_no_dispute_is_overlooked(left: Codes, right: Codes, total: Codes) -> None:
    """Only pairs near a tie are looked at; here all are."""
    differs = (all_forms(left, right, total) != sum_codes(left, right, total).flatten()).any(0)
    pairs = differs.reshape(left.top + 1, right.top + 1).nonzero()
    assert torch.equal(disputed(left, right, total), pairs)


@settings(max_examples=100)
@given(addends(6), addends(6), totals(6))
def test_forms_are_near_exact_arithmetic(left: Codes, right: Codes, total: Codes) -> None:
    """In rational numbers: away from ties, every form rounds the exact sum."""
    qa, qb = torch.cartesian_prod(left.all(), right.all()).unbind(1)
    forms = all_forms(left, right, total)
    near = {tuple(pair) for pair in residual._near_ties(left, right, total).tolist()}
    for column, (a, b) in enumerate(zip(qa.int().tolist(), qb.int().tolist(), strict=True)):
        if (a, b) in near:
            continue
        exact = Fraction(left.scale) * (a - left.zero_point)
        exact += Fraction(right.scale) * (b - right.zero_point)
        code = round(exact / Fraction(total.scale)) + total.zero_point
        assert set(forms[:, column].int().tolist()) == {min(max(code, total.low), total.top)}


# ---- scales ------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(addends(), addends(), totals())
def test_settled_sums_have_no_disputes(left: Codes, right: Codes, total: Codes) -> None:
    scale = agreeing_scale(left, right, total)
    assert scale is not None
    assert total.scale <= scale == short_scale(scale) <= total.scale * (1 + 2**-9)
    agreed = replace(total, scale=scale)
    assert bool((all_forms(left, right, agreed) == sum_codes(left, right, agreed).flatten()).all())
    if scale > total.scale:
        assert len(disputed(left, right, total))


def test_the_nearest_scale_is_taken() -> None:
    moved = 0
    for seed in range(60):
        left, right, total = typical(seed)
        scale = agreeing_scale(left, right, total)
        assert scale is not None
        while total.scale < scale:
            assert len(disputed(left, right, total))
            total = replace(total, scale=short_scale(total.scale * (1 + 2**-30)))
            moved += 1
        assert total.scale == scale
    assert moved > 5


def test_exact_ties_are_moved_away_from() -> None:
    """Sums of half a code, everywhere: the rules break them differently where zero is odd."""
    half = Codes(0.25, 3, 8)
    total = Codes(0.5, 7, 8)
    assert len(disputed(half, half, total)) > 10000
    scale = agreeing_scale(half, half, total)
    assert scale is not None
    assert not len(disputed(half, half, replace(total, scale=scale)))


def test_none_where_no_scale_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    half = Codes(0.25, 3, 8)
    monkeypatch.setattr(residual, "STEPS", 1)
    assert agreeing_scale(half, half, Codes(0.5, 7, 8)) is None


# ---- ONNX Runtime ------------------------------------------------------------------------------

needs_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere it adds in fixed point"
)


def onnx_sums(left: Codes, right: Codes, total: Codes) -> Tensor:
    """``[256, 256]``: every pair of codes of 8 bits, added by ONNX Runtime's integer kernel."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    numbers, names = [], []
    for name, codes in (("a", left), ("b", right), ("y", total)):
        numbers.append(helper.make_tensor(f"{name}_scale", kinds.FLOAT, [], [codes.scale]))
        numbers.append(helper.make_tensor(f"{name}_zero", kinds.UINT8, [], [codes.zero_point]))
        names.append([f"{name}_scale", f"{name}_zero"])
    nodes = [
        helper.make_node("DequantizeLinear", ["a", *names[0]], ["af"]),
        helper.make_node("DequantizeLinear", ["b", *names[1]], ["bf"]),
        helper.make_node("Add", ["af", "bf"], ["yf"]),
        helper.make_node("QuantizeLinear", ["yf", *names[2]], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, kinds.UINT8, ["n"]) for name in "aby"]
    graph = helper.make_graph(nodes, "sum", values[:2], values[2:], numbers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    a, b = torch.cartesian_prod(left.all(), right.all()).to(torch.uint8).unbind(1)
    (codes,) = session.run(None, {"a": a.contiguous().numpy(), "b": b.contiguous().numpy()})
    return torch.from_numpy(codes).int().reshape(256, 256)


@needs_x86
def test_settled_sums_are_onnx_runtimes() -> None:
    for seed in range(60):
        left, right, total = typical(seed)
        scale = agreeing_scale(left, right, total)
        assert scale is not None
        agreed = replace(total, scale=scale)
        assert torch.equal(
            onnx_sums(left, right, agreed), through_the_reference(left, right, agreed)
        )


@needs_x86
def test_unsettled_sums_differ_from_onnx_runtimes_where_disputed() -> None:
    """So the scales are settled for a reason, and every difference is foreseen."""
    grids_that_differ = 0
    for seed in range(60):
        left, right, total = typical(seed)
        differs = (onnx_sums(left, right, total) != sum_codes(left, right, total)).nonzero()
        foreseen = {tuple(pair) for pair in disputed(left, right, total).tolist()}
        assert {tuple(pair) for pair in differs.tolist()} <= foreseen
        grids_that_differ += bool(len(differs))
    assert grids_that_differ > 2
