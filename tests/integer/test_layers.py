"""Integer layers: biases that kernels express exactly, and channels that need another scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxq.integer.layers import (
    BIAS_LIMIT,
    accumulator_scale,
    average_layer,
    conv_geometry,
    could_overflow,
    float_bias,
    integer_bias,
    integer_layer,
)
from fxq.integer.program import Grid
from fxq.numerics.affine import short_scale
from fxq.quant.quantizers import QuantizedLayer


@given(
    st.floats(2.0**-30, 2.0**4),
    st.floats(2.0**-30, 2.0**4),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8),
)
def test_integer_biases_are_quotients_of_floats(
    source: float, weight: float, biases: list[float]
) -> None:
    """What kernels compute from the float bias is the integer, to the last bit."""
    scales = torch.full((len(biases),), short_scale(weight))
    unit = accumulator_scale(short_scale(source), scales)
    wanted = torch.tensor(biases)
    found = integer_bias(wanted, unit)
    assert found.dtype is torch.int32
    value, exact = float_bias(found, unit)
    assert bool(exact.all())
    assert torch.equal(value / unit, found.float())
    nearest = torch.round(wanted.double() / unit.double()).clamp(-BIAS_LIMIT, BIAS_LIMIT)
    assert float((found - nearest).abs().max()) <= 4


def test_no_bias_is_zero() -> None:
    assert integer_bias(torch.zeros(3), torch.tensor([0.1, 0.2, 0.3])).tolist() == [0, 0, 0]


def quantized(layer: nn.Module, codes: torch.Tensor, scale: float) -> QuantizedLayer:
    out = codes.shape[0]
    return QuantizedLayer(layer, codes, torch.full((out,), scale), torch.full((out,), 8))


def test_huge_biases_get_a_wider_scale() -> None:
    """A bias of a million times the weights still fits the accumulator, to seven digits."""
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.0, 1e6, -1e9]))
    module = quantized(layer, torch.full((3, 4), 100, dtype=torch.int8), 2.0**-12)
    found = integer_layer(module, Grid(2.0**-8, 0, 8))
    unit = accumulator_scale(2.0**-8, found.scale)
    assert int(found.bias.abs().max()) <= BIAS_LIMIT
    assert torch.allclose(found.bias.double() * unit.double(), layer.bias.double(), rtol=2e-6)
    assert found.weight[0].tolist() == [100] * 4
    assert float(found.scale[1]) > 2.0**-12
    values = found.weight.float() * found.scale.unsqueeze(1)
    assert float((values - 100 * 2.0**-12).abs().max()) <= float(found.scale.max()) / 2


def test_dead_channels_keep_their_bias() -> None:
    """A channel of zero weights has the smallest scale there is, which would leave no bias."""
    layer = nn.Conv2d(2, 2, 3)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([0.75, -3.0]))
    module = quantized(layer, torch.zeros(2, 2, 3, 3, dtype=torch.int8), 2.0**-40)
    found = integer_layer(module, Grid(0.01, 0, 8))
    unit = accumulator_scale(0.01, found.scale)
    assert torch.allclose(found.bias * unit, layer.bias.detach(), rtol=1e-5)
    assert not found.weight.any()


def test_overflow_is_foreseen() -> None:
    wide = nn.Linear(66312, 1)
    worst = quantized(wide, torch.full((1, 66312), 127, dtype=torch.int8), 0.5)
    assert could_overflow(worst, Grid(1.0, 0, 8), None)
    narrow = quantized(nn.Linear(60000, 1), torch.full((1, 60000), 127, dtype=torch.int8), 0.5)
    assert not could_overflow(narrow, Grid(1.0, 0, 8), None)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, False), (2.0**-8, True)])
def test_codes_beyond_32_bits_are_foreseen(scale: float, expected: bool) -> None:
    """Sums of up to 2**23 and a bias as large, in steps that are a part of their unit."""
    module = quantized(nn.Linear(260, 1), torch.full((1, 260), 127, dtype=torch.int8), 1.0)
    assert could_overflow(module, Grid(1.0, 0, 8), Grid(scale, 0, 8)) is expected


@pytest.mark.parametrize(
    ("layer", "padding", "before"),
    [
        (nn.Conv2d(1, 1, 3, padding="valid"), (0, 0), ()),
        (nn.Conv2d(1, 1, (3, 5), padding="same"), (1, 2), ()),
        (nn.Conv2d(1, 1, (4, 3), padding="same"), (1, 1), (0, 0, 0, 1)),
        (nn.Conv1d(1, 1, 2, padding="same", dilation=3), (1,), (0, 1)),
        (nn.Conv3d(1, 1, (2, 1, 4), padding="same"), (0, 0, 1), (0, 1, 0, 0, 0, 1)),
        (nn.Conv2d(1, 1, 3, 2, (1, 2)), (1, 2), ()),
    ],
)
def test_geometry(layer: nn.Module, padding: tuple[int, ...], before: tuple[int, ...]) -> None:
    found = conv_geometry(layer)
    assert (found["padding"], found["pad_before"]) == (padding, before)


def test_average_pools_are_convolutions_of_ones() -> None:
    pool = {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1)}
    layer, attributes = average_layer(4, pool)
    assert layer.weight.shape == (4, 1, 2, 3)
    assert float(layer.scale[0]) == pytest.approx(1 / 6)
    assert attributes["groups"] == 4
    assert attributes["stride"] == (1, 2)
