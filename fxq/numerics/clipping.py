"""Clipping ranges found by search: over a histogram, or over a weight.

Slower than the closed forms of `fxq.numerics.aciq`, and free of any assumption about the shape.

Papers:
    Migacz, "8-bit Inference with TensorRT", GTC 2017 (searching a histogram for the threshold;
        here the criterion is the mean squared error instead of the divergence).
    Banner et al., "Post training 4-bit quantization of convolutional networks for
        rapid-deployment", NeurIPS 2019, arXiv:1810.05723 (Eq. 3, the error that is minimised).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxq.errors import SpecError
from fxq.numerics.affine import code_range, fake_quantize, grid_from_range, short_scale
from fxq.numerics.histogram import Histogram

Cost = Callable[[Tensor, Tensor], Tensor]

_FRACTIONS = 64  # candidates per sweep over one end of the range
_SWEEPS = 3
_COARSE = tuple(0.05 ** (i / 59) for i in range(60))  # 5 % apart
_FINE = tuple(0.95 + 0.005 * i for i in range(21))
_SMALLEST = 0.02  # a clip below 2 % of the observed end has never been optimal at 2 bits or more


def mse_clip_from_histogram(
    histogram: Histogram, bits: int, *, symmetric: bool = False, fused_relu: bool = False
) -> tuple[Tensor, Tensor]:
    """The range whose grid has the smallest mean squared error over the histogram.

    Each bin stands for its middle; the search is that of `search_range`.

    Args:
        histogram: Of the values to quantize (before the ReLU when that is fused).
        bits: 1 to 8 (2 to 8 when symmetric); the grid is that of `grid_from_range`.
        symmetric: Whether the grid mirrors around 0.
        fused_relu: Whether negative values become 0, so the range is [0, clip].

    Returns:
        low, high: [C] or [] float32, inside the observed range (extended to 0).

    Raises:
        SpecError: Impossible bits.
        CalibrationError: The histogram is empty.

    Example:
        >>> histogram = Histogram()
        >>> histogram.update(torch.cat([torch.linspace(-1, 1, 10_000), torch.tensor([9.0])]))
        >>> low, high = mse_clip_from_histogram(histogram, bits=4)
        >>> bool(1 < high < 3)
        True
    """
    code_range(bits, symmetric)
    seen = histogram.range()
    lows, highs = (end.reshape(-1).to(torch.float64) for end in seen)
    edges = histogram.edges()
    found = []
    for row, counts in enumerate(histogram.counts):
        held = counts.nonzero().squeeze(1)
        middle = (edges[row, held] + edges[row, held + 1]) / 2
        middle = middle.clamp(lows[row], highs[row])
        low, high = lows[row].clamp(max=0), highs[row].clamp(min=0)
        if fused_relu:
            middle, low = middle.clamp(min=0), torch.zeros_like(low)
        cost = _squared_error(middle, counts[held].to(torch.float64), bits, symmetric)
        found.append(search_range(cost, low, high, symmetric=symmetric))
    ends = torch.stack(found).to(torch.float32).unbind(dim=1)
    return ends[0].view_as(seen[0]), ends[1].view_as(seen[1])


def least_error_range(
    histogram: Histogram, lows: Tensor, highs: Tensor, bits: int, *, fused_relu: bool = False
) -> tuple[Tensor, Tensor]:
    """The candidate range whose grid has the smallest mean squared error over the histogram.

    Args:
        histogram: Of the values to quantize, per tensor (before the ReLU when that is fused).
        lows: [candidates] float64.
        highs: [candidates] float64.
        bits: 1 to 8; the grid is that of `grid_from_range`.
        fused_relu: Whether negative values become 0.

    Returns:
        low, high: [] float64.

    Raises:
        SpecError: Impossible bits.
        CalibrationError: The histogram is empty.

    Example:
        >>> histogram = Histogram()
        >>> histogram.update(torch.cat([torch.linspace(-1, 1, 10_000), torch.tensor([9.0])]))
        >>> lows, highs = torch.tensor([-1.0, -1.0]).double(), torch.tensor([1.0, 9.0]).double()
        >>> [end.item() for end in least_error_range(histogram, lows, highs, 4)]
        [-1.0, 1.0]
    """
    low, high = (end.reshape(-1)[0].to(torch.float64) for end in histogram.range())
    edges, counts = histogram.edges()[0], histogram.counts[0]
    held = counts.nonzero().squeeze(1)
    middle = ((edges[held] + edges[held + 1]) / 2).clamp(low, high)
    if fused_relu:
        middle = middle.clamp(min=0)
    best = _best(_squared_error(middle, counts[held].to(torch.float64), bits, False), lows, highs)
    return best[0], best[1]


def percentile_range(
    histogram: Histogram, fraction: float, *, fused_relu: bool = False
) -> tuple[Tensor, Tensor]:
    """The range that keeps this fraction of the values, cutting equally many at both ends.

    Args:
        histogram: Of the values to quantize (before the ReLU when that is fused).
        fraction: Kept share, in (0, 1]; 1 is the whole range.
        fused_relu: Whether negative values become 0, so that all are cut at the upper end.

    Returns:
        low, high: [C] or [] float32; low is 0 with a fused ReLU.

    Raises:
        SpecError: The fraction is outside (0, 1].
        CalibrationError: The histogram is empty.

    Example:
        >>> histogram = Histogram()
        >>> histogram.update(torch.linspace(0, 1, 100_001))
        >>> [round(end.item(), 2) for end in percentile_range(histogram, 0.9)]
        [0.05, 0.95]
    """
    if not 0 < fraction <= 1:
        raise SpecError(f"cannot keep a fraction of {fraction}", hint="use 0.999, say")
    if fused_relu:
        high = histogram.quantile(fraction).to(torch.float32).clamp(min=0)
        return torch.zeros_like(high), high
    cut = (1 - fraction) / 2
    return (
        histogram.quantile(cut).to(torch.float32),
        histogram.quantile(1 - cut).to(torch.float32),
    )


def mse_weight_scale(weight: Tensor, bits: int, axis: int = 0) -> Tensor:
    """The symmetric scale per channel with the smallest mean squared error among shrunk ranges.

    The full range is shrunk geometrically down to a 20th, then finely around the best; memory
    stays at a few copies of the weight.

    Args:
        weight: [out, in/groups, kh, kw] or any shape with channels on `axis`.
        bits: 2 to 8.
        axis: The dimension of the channels.

    Returns:
        [weight.shape[axis]] float32, short scales.

    Raises:
        SpecError: Impossible bits; a weight that is empty or not finite.

    Example:
        >>> weight = torch.tensor([[1.0, -1.0, 1.0, 1.4]])
        >>> scale = mse_weight_scale(weight, bits=2)
        >>> bool(1.05 < scale < 1.15)
        True
    """
    _, top = code_range(bits, symmetric=True)
    return least_error_scale(
        weight.movedim(axis, 0), top, lambda values: values.round().clamp(-top, top)
    )


def least_error_scale(
    weight: Tensor, top: int, nearest: Callable[[Tensor], Tensor], widest: float = 1.0
) -> Tensor:
    """The scale per channel with the smallest mean squared error, for codes of any kind.

    Args:
        weight: [out, ...].
        top: The largest code.
        nearest: The codes nearest to [out, n] values in units of a code, as a tensor like them.
        widest: Where the search begins, as a multiple of the range that just covers the weights.

    Returns:
        [out] float32, short scales.

    Raises:
        SpecError: A weight that is empty or not finite.
    """
    if weight.numel() == 0 or not bool(weight.isfinite().all()):
        raise SpecError("a weight is empty, NaN or infinite", hint="check the float model")
    rows = weight.detach().to(torch.float32).flatten(1)
    best = full = rows.abs().amax(dim=1) / top * widest
    least = torch.full_like(best, torch.inf)
    for shrink in (_COARSE, _FINE):
        start = best
        for fraction in shrink:
            scale = short_scale(torch.minimum(start * fraction, full))
            unit = scale.unsqueeze(1)
            error = (nearest(rows / unit) * unit).sub_(rows).square_().sum(dim=1)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    return short_scale(best)


def search_range(cost: Cost, low: Tensor, high: Tensor, *, symmetric: bool = False) -> Tensor:
    """The range of the smallest cost among shrunk ones.

    Both ends are shrunk together first, then each in turn; a symmetric or one-sided range has only
    one end to search.

    Args:
        cost: From [candidates] low and high ends to their [candidates] costs.
        low: [] float64, at most 0.
        high: [] float64, at least 0.
        symmetric: Whether the grid mirrors around 0.

    Returns:
        [2] float64: the best low and high.
    """
    shrink = torch.linspace(_SMALLEST, 1, _FRACTIONS, dtype=torch.float64)
    fixed = torch.ones_like(shrink)
    best = _best(cost, low * shrink, high * shrink)
    if symmetric or low == 0 or high == 0:
        near = torch.linspace(0.96, 1.04, _FRACTIONS + 1, dtype=torch.float64)
        return _best(cost, (best[0] * near).clamp(min=low), (best[1] * near).clamp(max=high))
    for _ in range(_SWEEPS):
        best = _best(cost, best[0] * fixed, high * shrink)
        best = _best(cost, low * shrink, best[1] * fixed)
    return best


def _best(cost: Cost, lows: Tensor, highs: Tensor) -> Tensor:
    winner = int(cost(lows, highs).argmin())
    return torch.stack((lows[winner], highs[winner]))


def _squared_error(values: Tensor, weights: Tensor, bits: int, symmetric: bool) -> Cost:
    """The squared error over values: [held bins], each as often as its weight says."""
    qmin, qmax = code_range(bits, symmetric)

    def cost(lows: Tensor, highs: Tensor) -> Tensor:
        scale, zero_point = grid_from_range(lows, highs, bits, symmetric)
        spread = values.expand(len(scale), -1)
        error = fake_quantize(spread, scale, zero_point, qmin, qmax, axis=0).sub_(spread)
        return error.square_().to(torch.float64) @ weights

    return cost
