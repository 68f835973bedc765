from __future__ import annotations

import itertools

import pytest
import torch

from fxq.errors import CalibrationError, SpecError
from fxq.numerics.aciq import laplace_clip, laplace_clip_fused_relu
from fxq.numerics.affine import code_range, fake_quantize, grid_from_range
from fxq.numerics.clipping import mse_clip_from_histogram, mse_weight_scale, percentile_range
from fxq.numerics.histogram import Histogram


def laplace(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    return -scale * u.sign() * torch.log1p(-2 * u.abs() * 0.999999)


def error(x: torch.Tensor, low: float, high: float, bits: int, symmetric: bool = False) -> float:
    scale, zero_point = grid_from_range(low, high, bits, symmetric)
    quantized = fake_quantize(x, scale, zero_point, *code_range(bits, symmetric))
    return float((quantized - x).double().square().mean())


def watched(x: torch.Tensor, channels: int | None = None) -> Histogram:
    histogram = Histogram(channels)
    histogram.update(x)
    return histogram


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["two-sided", "shifted", "symmetric", "fused", "positive"])
def test_found_range_beats_a_brute_force_grid(kind: str, bits: int) -> None:
    x = laplace((20_000,)) + (0.8 if kind == "shifted" else 0.0)
    x = x.abs() if kind == "positive" else x
    symmetric = kind == "symmetric"
    low, high = mse_clip_from_histogram(
        watched(x), bits, symmetric=symmetric, fused_relu=kind == "fused"
    )
    x = x.relu() if kind == "fused" else x
    reached = error(x, float(low), float(high), bits, symmetric)
    shrink = [0.08 * i for i in range(1, 13)]
    lows = [float(x.min()) * s for s in shrink] if float(x.min()) < 0 else [0.0]
    highs = [float(x.max()) * s for s in shrink]
    brute = min(error(x, a, b, bits, symmetric) for a, b in itertools.product(lows, highs))
    assert reached <= brute * 1.01


def test_agrees_with_the_closed_forms_on_laplace_data() -> None:
    x = laplace((400_000,))
    low, high = mse_clip_from_histogram(watched(x), 4, symmetric=True)
    assert float(torch.maximum(-low, high)) == pytest.approx(laplace_clip(1.0, 14), rel=0.08)
    _, high = mse_clip_from_histogram(watched(x), 4, fused_relu=True)
    assert float(high) == pytest.approx(laplace_clip_fused_relu(1.0, 15), rel=0.08)


def test_channels_are_searched_apart() -> None:
    x = laplace((50, 3, 40)) * torch.tensor([1.0, 0.1, 0.0]).view(1, 3, 1)
    low, high = mse_clip_from_histogram(watched(x, channels=3), 4)
    assert low.shape == high.shape == (3,)
    assert float(high[0] / high[1]) == pytest.approx(10, rel=0.8)
    assert float(low[2]) == float(high[2]) == 0.0
    assert bool((low >= x.amin((0, 2))).all() & (high <= x.amax((0, 2))).all())


def test_percentiles() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    low, high = percentile_range(watched(x), 0.99)
    assert float(high) == pytest.approx(2.5758, abs=0.05)
    assert float(low) == pytest.approx(-2.5758, abs=0.05)
    assert [end.item() for end in percentile_range(watched(x), 1.0)] == [x.min(), x.max()]
    low, high = percentile_range(watched(x), 0.99, fused_relu=True)
    assert float(low) == 0
    assert float(high) == pytest.approx(2.3263, abs=0.05)
    assert float(percentile_range(watched(-x.abs()), 0.9, fused_relu=True)[1]) == 0
    for fraction in (0.0, 1.1):
        with pytest.raises(SpecError):
            percentile_range(watched(x), fraction)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_scale_is_near_the_best_of_a_dense_search(bits: int) -> None:
    weight = laplace((4, 8, 3, 3), seed=1)
    weight[2] = 0
    scale = mse_weight_scale(weight, bits)
    qmin, qmax = code_range(bits, symmetric=True)
    assert scale.shape == (4,)
    for channel in (0, 1, 3):
        row = weight[channel].flatten()
        dense = torch.linspace(0.05, 1.0, 1000) * row.abs().max() / qmax
        errors = (fake_quantize(row.expand(1000, -1), dense, 0, qmin, qmax, axis=0) - row).square()
        ours = (fake_quantize(row, float(scale[channel]), 0, qmin, qmax) - row).square().sum()
        # 72 weights at 8 bits: the error is so jagged that half a percent of scale shows.
        assert float(ours) <= float(errors.sum(dim=1).min()) * (1.05 if bits == 8 else 1.01)
    transposed = mse_weight_scale(weight.transpose(0, 1), bits, axis=1)
    assert torch.equal(transposed, scale)


def test_misuse() -> None:
    with pytest.raises(CalibrationError):
        mse_clip_from_histogram(Histogram(), 4)
    with pytest.raises(SpecError):
        mse_clip_from_histogram(watched(torch.ones(3)), 1, symmetric=True)
    with pytest.raises(SpecError):
        mse_weight_scale(torch.full((2, 2), torch.nan), 4)
    with pytest.raises(SpecError):
        mse_weight_scale(torch.zeros(0, 2), 4)
