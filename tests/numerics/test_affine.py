from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxq.errors import SpecError
from fxq.numerics.affine import (
    MIN_SCALE,
    code_range,
    dequantize,
    fake_quantize,
    grid_from_range,
    quantize,
    short_scale,
)

positive = st.floats(1e-11, 1e30)


@given(positive)
def test_short_scale_has_16_bits_and_is_just_above(scale: float) -> None:
    short = short_scale(scale)
    assert scale <= short <= scale * (1 + 2**-15)
    mantissa, _ = math.frexp(short)
    assert (mantissa * 2**16).is_integer()
    assert short_scale(short) == short


@given(positive, st.integers(-255, 255))
def test_products_with_codes_are_exact_in_float32(scale: float, steps: int) -> None:
    short = torch.tensor(short_scale(scale), dtype=torch.float32)
    product = float(short * steps)
    assert Fraction(product) == Fraction(short_scale(scale)) * steps


def test_short_scale_floors_and_rejects() -> None:
    assert short_scale(torch.tensor([0.0, 1e-30])).tolist() == [MIN_SCALE, MIN_SCALE]
    assert short_scale(torch.tensor([0.1])).dtype == torch.float32
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(SpecError):
            short_scale(bad)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(1, 8))
def test_asymmetric_grid_holds_zero_and_reaches_the_ends(
    low: float, width: float, bits: int
) -> None:
    high = low + width
    scale, zero_point = grid_from_range(low, high, bits)
    steps = 2**bits - 1
    assert 0 <= zero_point <= steps
    slack = scale * (0.5 + 1e-6)
    assert scale * (0 - zero_point) <= min(low, 0) + slack
    assert scale * (steps - zero_point) >= max(high, 0) - slack
    reached = (max(high, 0) - min(low, 0)) or 1.0
    assert scale <= max(reached / steps * (1 + 2**-15), MIN_SCALE)


def test_grid_per_channel_equals_each_channel_alone() -> None:
    low = torch.tensor([-1.0, 0.5, -3.0, 0.0])
    high = torch.tensor([2.0, 4.0, -1.0, 0.0])
    for symmetric in (False, True):
        scale, zero_point = grid_from_range(low, high, 4, symmetric)
        assert zero_point.dtype == torch.int64
        alone = [grid_from_range(a, b, 4, symmetric) for a, b in zip(low, high, strict=True)]
        assert scale.tolist() == [float(one) for one, _ in alone]
        assert zero_point.tolist() == [int(one) for _, one in alone]
        floats = [
            grid_from_range(float(a), float(b), 4, symmetric)
            for a, b in zip(low, high, strict=True)
        ]
        assert list(zip(scale.tolist(), zero_point.tolist(), strict=True)) == floats


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(2, 8))
def test_symmetric_grid_covers_both_ends(low: float, width: float, bits: int) -> None:
    scale, zero_point = grid_from_range(low, low + width, bits, symmetric=True)
    assert zero_point == 0
    assert scale * (2 ** (bits - 1) - 1) >= max(abs(low), abs(low + width))


def test_impossible_grids() -> None:
    for bits in (0, 9, 2.0, True):
        with pytest.raises(SpecError):
            code_range(bits)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="single level") as caught:
        code_range(1, symmetric=True)
    assert "ternary" in str(caught.value)
    for low, high in ((math.nan, 1.0), (0.0, math.inf), (1.0, 0.0)):
        with pytest.raises(SpecError):
            grid_from_range(low, high, 8)
    with pytest.raises(SpecError):
        grid_from_range(torch.zeros(2), torch.ones(3), 8)


def tie_data(scale: float) -> torch.Tensor:
    """Exact ties, their float32 neighbours, random and extreme values; odd length on purpose."""
    ties = (torch.arange(-600, 600) + 0.5) * scale
    near = [torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)]
    noise = torch.randn(3001, generator=torch.Generator().manual_seed(0)) * scale * 100
    return torch.cat([ties, *near, noise, torch.tensor([0.0, 3e5 * scale, -3e5 * scale])])


pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")

SCALES = (0.5, 0.1, 1 / 3, 1.7e-4, 23.7, 2.0**-10)


@pytest.mark.parametrize("raw", SCALES)
@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
def test_quantize_is_division_in_float32(raw: float, zero_point: int) -> None:
    scale = short_scale(raw)
    x = torch.cat([tie_data(scale), torch.randn(200_001) * scale * 100])
    codes = quantize(x, scale, zero_point, 0, 255)
    assert codes.dtype == torch.int32
    rounded = np.rint(x.numpy() / np.float32(scale)) + np.float32(zero_point)
    assert np.array_equal(codes.numpy(), np.clip(rounded, 0, 255))
    simulated = fake_quantize(x, scale, zero_point, 0, 255)
    assert torch.equal(simulated, dequantize(codes, scale, zero_point))


@pytest.mark.parametrize("raw", SCALES)
@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
def test_quantize_is_onnx_runtimes(raw: float, zero_point: int) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    scale = short_scale(raw)
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])],
        "quantize",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", kinds.UINT8, ["n"])],
        [
            helper.make_tensor("scale", kinds.FLOAT, [], [scale]),
            helper.make_tensor("zero", kinds.UINT8, [], [zero_point]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = runtime.InferenceSession(model.SerializeToString())
    beyond = torch.tensor([math.inf, -math.inf, 3e38, -3e38])
    x = torch.cat([tie_data(scale), torch.randn(200_001) * scale * 100, beyond])
    (codes,) = session.run(None, {"x": x.numpy()})
    assert np.array_equal(quantize(x, scale, zero_point, 0, 255).numpy(), codes)


@pytest.mark.parametrize("raw", SCALES)
@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
def test_torch_quantizes_the_same_away_from_ties(raw: float, zero_point: int) -> None:
    scale = short_scale(raw)
    x = tie_data(scale)
    ours = quantize(x, scale, zero_point, 0, 255)
    theirs = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8).int_repr().int()
    simulated = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)
    away = ((x / scale).abs().frac() - 0.5).abs() > 1e-4
    assert torch.equal(ours[away], theirs[away])
    assert int((ours - theirs).abs().max()) <= 1
    assert torch.equal(dequantize(ours, scale, zero_point)[away], simulated[away])


def test_quantize_per_channel_is_that_of_each_channel() -> None:
    scale = short_scale(torch.tensor([0.1, 0.037, 2.5]))
    zero = torch.tensor([3.0, 0.0, 200.0])
    x = torch.stack([tie_data(float(one)) for one in scale])
    alone = [quantize(x[i], float(scale[i]), int(zero[i]), 0, 255) for i in range(3)]
    assert torch.equal(quantize(x, scale, zero, 0, 255, axis=0), torch.stack(alone))
    simulated = fake_quantize(x.T, scale, zero, 0, 255, axis=1).T
    assert torch.equal(simulated, dequantize(torch.stack(alone), scale, zero, axis=0))


def test_quantize_leaves_its_input_alone_and_saturates_infinity() -> None:
    x = torch.tensor([math.inf, -math.inf, 0.3])
    kept = x.clone()
    assert quantize(x, 0.1, 3, 0, 15).tolist() == [15, 0, 6]
    fake_quantize(x, 0.1, 3, 0, 15)
    assert torch.equal(x, kept)


def test_parameters_must_fit_the_axis() -> None:
    for axis in (None, 0):
        with pytest.raises(SpecError):
            quantize(torch.zeros(2, 3), torch.ones(3), torch.zeros(3), 0, 1, axis=axis)


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(0, 2**31))
def test_rounding_error_is_at_most_half_a_step_inside_the_grid(bits: int, seed: int) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(seed))
    scale, zero_point = grid_from_range(float(x.min()), float(x.max()), bits)
    top = 2**bits - 1
    inside = (x >= -zero_point * scale) & (x <= (top - zero_point) * scale)
    error = (fake_quantize(x, scale, zero_point, 0, top) - x).abs()
    assert bool((error[inside] <= scale * 0.500001).all())
