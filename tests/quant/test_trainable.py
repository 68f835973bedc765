"""Trainable stand-ins: where they start, what they freeze to, and gradients by differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxq.numerics.affine import short_scale
from fxq.quant.quantizers import ActivationQuantizer, QuantizedLayer, channel_view, from_rows, rows
from fxq.quant.trainable import TrainableLayer, TrainableQuantizer, code_ends

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "linear of tokens": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 7, 6)),
    "conv without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 7, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), (4, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), (4, 7, 6)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), (4, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (4, 5, 6)),
}


def quantizer(scale: float, zero_point: int = 5, bits: int = 4) -> ActivationQuantizer:
    return ActivationQuantizer(torch.tensor(short_scale(scale)), torch.tensor(zero_point), bits)


def quantized(name: str, bits: int = 4, cover: float = 1.0) -> QuantizedLayer:
    """A layer rounded to the nearest codes, its largest weights ``cover`` times the last code."""
    layer: Any = LAYERS[name][0]()
    layer.requires_grad_(False)
    weight, top = rows(layer, layer.weight), 2 ** (bits - 1) - 1
    scale = short_scale(weight.abs().amax(1) / (top * cover))
    codes = (weight / scale.unsqueeze(1)).round().clamp(-top, top).to(torch.int8)
    each = torch.full((len(scale),), bits)
    made = QuantizedLayer(layer, from_rows(layer, codes, layer.weight.shape), scale, each)
    made.bias_shift.copy_(torch.randn(len(scale)))
    return made


def images(name: str, count: int = 3) -> Tensor:
    return torch.randn(count, *LAYERS[name][1])


# ---- quantizers --------------------------------------------------------------------------------


@given(
    st.floats(1e-6, 100.0),
    st.integers(1, 7).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, 2**b - 1))),
)
def test_a_quantizer_starts_where_it_was(scale: float, grid: tuple[int, int]) -> None:
    bits, zero_point = grid
    one = quantizer(scale, zero_point, bits)
    stand_in = TrainableQuantizer(one)
    x = torch.randn(500) * scale * 2**bits
    assert torch.equal(stand_in(x), one(x))
    frozen = stand_in.frozen()
    assert torch.equal(frozen.scale, one.scale)
    assert torch.equal(frozen.zero_point, one.zero_point)
    assert frozen.bits == bits


def test_what_was_learned_is_frozen_to_a_short_scale() -> None:
    stand_in = TrainableQuantizer(quantizer(0.1))
    with torch.no_grad():
        stand_in.log_scale += 0.3
    scale = stand_in.frozen().scale
    assert torch.equal(scale, short_scale(scale))
    assert float(scale) == pytest.approx(0.1 * 1.3498588, rel=1e-4)
    x = (torch.arange(-8, 14) + 0.2) * 0.135  # no tie, which another scale may round otherwise
    torch.testing.assert_close(stand_in.frozen()(x), stand_in(x).detach(), rtol=1e-4, atol=1e-6)


def lsq_gradient(position: float, low: int, high: int) -> float:
    """LSQ Eq. 3: what a value on the grid gains per unit of the scale."""
    if position <= low:
        return low
    if position >= high:
        return high
    return round(position) - position


@pytest.mark.parametrize("zero_point", [0, 5, 15])
def test_the_scale_has_the_gradient_of_the_paper(zero_point: int) -> None:
    stand_in = TrainableQuantizer(quantizer(0.25, zero_point)).double()
    low, high = -zero_point, 15 - zero_point
    for position in (low - 3.3, low - 0.2, low + 0.3, low + 0.8, 0.1, 4.7, high - 0.4, high + 2.6):
        x = torch.tensor(position * 0.25, dtype=torch.float64)
        stand_in.zero_grad()
        stand_in(x).backward()
        found = float(stand_in.log_scale.grad) / 0.25  # type: ignore[arg-type]
        assert found == pytest.approx(lsq_gradient(position, low, high), abs=1e-9)


def test_gradients_by_finite_differences_of_the_straight_through_surrogate() -> None:
    """With what rounding adds held fixed, a quantizer is smooth between the ends of its range."""
    stand_in = TrainableQuantizer(quantizer(0.25)).double()
    weight = torch.randn(400, dtype=torch.float64)
    x = (torch.randn(400, dtype=torch.float64) * 2).requires_grad_()
    (stand_in(x) * weight).sum().backward()
    rounding = (x.detach() / 0.25).clamp(-5, 10)
    rounding = rounding.round() - rounding

    def surrogate(values: Tensor, log_scale: float) -> Tensor:
        scale = 0.25 * torch.tensor(log_scale, dtype=torch.float64).exp()
        return ((values / scale).clamp(-5, 10) + rounding) * scale * weight

    step, at = 1e-6, x.detach()
    by_value = (surrogate(at + step, 0) - surrogate(at - step, 0)) / (2 * step)
    by_scale = (surrogate(at, step) - surrogate(at, -step)).sum() / (2 * step)
    torch.testing.assert_close(x.grad, by_value, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(stand_in.log_scale.grad, by_scale, atol=1e-6, rtol=1e-6)


def test_a_clip_passes_no_gradient() -> None:
    x = torch.tensor([-1.3, -1.25, 0.0, 1.1, 2.5, 2.6], requires_grad=True)
    TrainableQuantizer(quantizer(0.25))(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


# ---- layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_starts_where_it_was(name: str, bits: int) -> None:
    layer, x = quantized(name, bits, cover=1.2), images(name)
    codes, scale, bias = layer.codes.clone(), layer.scale.clone(), layer.bias.clone()
    expected = layer(x)
    stand_in = TrainableLayer(layer, torch.ones_like(scale))
    assert torch.equal(stand_in(x), expected)
    assert torch.equal(stand_in.codes(), codes)
    frozen = stand_in.frozen()
    assert torch.equal(frozen.codes, codes)
    assert frozen.codes.dtype == torch.int8
    assert torch.equal(frozen.scale, scale)
    assert torch.equal(frozen.bias, bias)
    assert torch.equal(frozen(x), expected)


def test_codes_that_are_neighbours_of_their_weights_are_kept() -> None:
    """AdaRound takes the farther of two codes; that is where training begins."""
    layer = quantized("conv")
    weight: Any = layer.layer.weight
    steps = weight / channel_view(layer.layer, layer.scale)
    farther = torch.where(steps > steps.round(), steps.ceil(), steps.floor()).clamp(-7, 7)
    layer.codes.copy_(farther.to(torch.int8))
    stand_in = TrainableLayer(layer, torch.ones_like(layer.scale))
    assert torch.equal(stand_in.codes(), layer.codes)
    x = images("conv")
    assert torch.equal(stand_in(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_layer_learned_is_frozen(name: str) -> None:
    layer, x = quantized(name), images(name)
    bias, unit = layer.bias.clone(), torch.rand(len(layer.scale)) + 0.5
    stand_in = TrainableLayer(layer, unit)
    with torch.no_grad():
        stand_in.steps += 9 * torch.randn_like(stand_in.steps)
        stand_in.log_scale += 0.2
        stand_in.shift += 2
    expected = stand_in(x).detach()
    frozen = stand_in.frozen()
    torch.testing.assert_close(frozen(x), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(frozen.scale, short_scale(frozen.scale))
    torch.testing.assert_close(frozen.bias, bias + 2 * unit)
    assert int(frozen.codes.min()) == -8  # the lowest code of 4 bits is not left out
    assert int(frozen.codes.max()) == 7


@pytest.mark.parametrize("name", LAYERS)
def test_scales_and_biases_by_finite_differences(name: str) -> None:
    """Codes held, a layer is smooth in both."""
    layer, x = quantized(name), images(name).double()
    stand_in = TrainableLayer(layer, torch.rand(len(layer.scale)) + 0.5).double()
    weight = torch.randn_like(stand_in(x))

    def loss() -> Tensor:
        return (stand_in(x) * weight).sum()

    loss().backward()
    for parameter in (stand_in.log_scale, stand_in.shift):
        assert parameter.grad is not None
        for channel in range(len(parameter)):
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter[channel] += step
                    ends.append(float(loss()))
                    parameter[channel] -= step
            slope = (ends[0] - ends[1]) / 2e-6
            assert float(parameter.grad[channel]) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_weights_have_the_gradient_of_the_rounded_weights() -> None:
    """Straight through: that of a convolution with these codes; none beyond the last code."""
    layer, x = quantized("conv", cover=1.3), images("conv")
    exact = layer.layer.weight / channel_view(layer.layer, layer.scale)  # type: ignore[operator]
    outside = exact.abs() > 7
    assert bool(outside.any())
    stand_in = TrainableLayer(layer, torch.ones_like(layer.scale))
    goal = torch.randn_like(stand_in(x))
    F.mse_loss(stand_in(x), goal).backward()
    leaf = layer.weight().requires_grad_()
    F.mse_loss(F.conv2d(x, leaf, layer.bias, 2, 1), goal).backward()
    assert leaf.grad is not None
    assert stand_in.steps.grad is not None
    expected = leaf.grad * channel_view(layer.layer, layer.scale)
    above = stand_in.steps > 7  # -7 is not the last code below
    torch.testing.assert_close(stand_in.steps.grad, expected * ~above)
    assert bool(above.any())
    assert not bool((above & ~outside).any())


def test_the_float_weights_learn_nothing() -> None:
    layer = quantized("conv")
    layer.layer.requires_grad_(True)
    stand_in = TrainableLayer(layer, torch.ones_like(layer.scale))
    trained = {name for name, one in stand_in.named_parameters() if one.requires_grad}
    assert trained == {"steps", "log_scale", "shift"}


@pytest.mark.parametrize(("bits", "ends"), [(2, (-2, 1)), (3, (-4, 3)), (7, (-64, 63))])
def test_few_bits_have_all_their_codes(bits: int, ends: tuple[int, int]) -> None:
    low, high = code_ends(quantized("conv", bits))
    assert (set(low.tolist()), set(high.tolist())) == ({ends[0]}, {ends[1]})


def test_eight_bits_leave_the_lowest_code_out() -> None:
    low, high = code_ends(quantized("linear", 8))
    assert (set(low.tolist()), set(high.tolist())) == ({-127}, {127})


@pytest.mark.parametrize("name", ["conv", "grouped", "transposed"])
def test_every_channel_has_the_codes_of_its_own_bits(name: str) -> None:
    layer = quantized(name, 2)
    layer.bits.copy_(torch.tensor([2, 3, 4, 5, 7, 8]))
    stand_in = TrainableLayer(layer, torch.ones_like(layer.scale))
    for sign, ends in ((1, [1, 3, 7, 15, 63, 127]), (-1, [-2, -4, -8, -16, -64, -127])):
        with torch.no_grad():
            stand_in.steps.fill_(1000 * sign)
        codes = rows(layer.layer, stand_in.codes())
        assert torch.equal(codes, torch.tensor(ends).unsqueeze(1).expand_as(codes).to(torch.int8))
