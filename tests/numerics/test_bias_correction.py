from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fxq.errors import SpecError
from fxq.numerics.affine import fake_quantize
from fxq.numerics.bias_correction import (
    bias_shift,
    correct_mean,
    correct_mean_and_variance,
    spread_ratio,
)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.1
    return weight, fake_quantize(weight, 0.15, 0, -7, 7)


def test_mean_is_restored(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, quantized = pair
    corrected = correct_mean(weight, quantized)
    torch.testing.assert_close(corrected.mean((1, 2, 3)), weight.mean((1, 2, 3)))
    moved = corrected - quantized
    torch.testing.assert_close(moved, moved[:, :1, :1, :1].expand_as(moved), atol=1e-7, rtol=0)


def test_mean_and_variance_are_restored_and_eq_13_would_not(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    weight, quantized = pair
    corrected = correct_mean_and_variance(weight, quantized)
    torch.testing.assert_close(corrected.mean((1, 2, 3)), weight.mean((1, 2, 3)))
    torch.testing.assert_close(corrected.std((1, 2, 3)), weight.std((1, 2, 3)))
    flat, rounded = weight.flatten(1), quantized.flatten(1)
    ratio = flat.std(1, keepdim=True) / rounded.std(1, keepdim=True)
    printed = ratio * (rounded + (flat.mean(1) - rounded.mean(1)).unsqueeze(1))
    assert float((printed.mean(1) - flat.mean(1)).abs().max()) > 1e-4


def test_constant_and_single_weight_channels() -> None:
    weight = torch.tensor([[0.1, 0.2], [0.3, 0.3]])
    corrected = correct_mean_and_variance(weight, torch.zeros(2, 2))
    torch.testing.assert_close(corrected.mean(1), weight.mean(1))
    single = torch.tensor([[0.3], [0.4]])
    assert torch.equal(correct_mean_and_variance(single, torch.zeros(2, 1)), single)


def test_the_ratio_of_spreads() -> None:
    weight = torch.tensor([[1.0, 3.0], [5.0, 5.0], [0.0, 4.0]])
    quantized = torch.tensor([[0.0, 4.0], [0.0, 1.0], [2.0, 2.0]])
    assert spread_ratio(weight, quantized).tolist() == pytest.approx([0.5, 0.0, 1.0])
    assert spread_ratio(weight[:, :1], quantized[:, :1]).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_shift_restores_the_mean_output_of_a_convolution(groups: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 4 // groups, 3, 3, generator=generator)
    quantized = fake_quantize(weight, 0.6, 0, -3, 3)
    x = torch.rand(5, 4, 9, 9, generator=generator)
    # Circular padding: every tap sees every pixel, so the input mean is exact for each.
    padded = F.pad(x, (1, 1, 1, 1), mode="circular")
    wanted = F.conv2d(padded, weight, groups=groups).mean((0, 2, 3))
    got = F.conv2d(padded, quantized, groups=groups).mean((0, 2, 3))
    shift = bias_shift(weight, quantized, x.mean((0, 2, 3)), groups)
    torch.testing.assert_close(got + shift, wanted, atol=1e-5, rtol=1e-5)


def test_shift_restores_the_mean_output_of_a_linear_layer() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(7, 5, generator=generator)
    quantized = fake_quantize(weight, 0.5, 0, -3, 3)
    x = torch.randn(100, 5, generator=generator) + 2
    shift = bias_shift(weight, quantized, x.mean(0))
    got = (x @ quantized.T).mean(0) + shift
    torch.testing.assert_close(got, (x @ weight.T).mean(0), atol=1e-5, rtol=1e-5)
    everywhere = bias_shift(weight, quantized, 2.0)
    torch.testing.assert_close(everywhere, bias_shift(weight, quantized, torch.full((5,), 2.0)))


def test_misuse() -> None:
    weight = torch.ones(4, 2)
    with pytest.raises(SpecError):
        correct_mean(weight, torch.ones(4, 3))
    with pytest.raises(SpecError):
        correct_mean(weight, torch.full((4, 2), torch.nan))
    with pytest.raises(SpecError):
        bias_shift(weight, weight, torch.ones(3))
    with pytest.raises(SpecError):
        bias_shift(weight, weight, torch.tensor([1.0, torch.inf]))
    with pytest.raises(SpecError):
        bias_shift(weight, weight, 1.0, groups=3)
