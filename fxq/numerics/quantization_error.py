"""How far quantization moves a tensor's distribution, and how well that predicts accuracy.

Papers:
    Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020 (Eq. 2: Diff; section 5.1: the
        metrics M1 to M4; Eq. 4: their squared correlation with accuracy).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.errors import SpecError


def mean_shift(x: Tensor, quantized: Tensor) -> float:
    """M1: by what share quantization changes the mean absolute value; 0 where both are all zero.

    Args:
        x: [...] before quantization, in float64 or narrower; sums are float64.
        quantized: Same shape.

    Returns:
        |sum |x| - sum |q|| / sum |x|, >= 0; infinite if only `x` is all zero.

    Raises:
        SpecError: The shapes differ, there are no values, or one is NaN or infinite.

    Example:
        >>> mean_shift(torch.tensor([-4.0, 0.5, 0.5]), torch.tensor([-4.0, 0.0, 0.0]))
        0.2
    """
    exact, other = _pair(x, quantized)
    total = exact.abs().sum()
    return _ratio(float((total - other.abs().sum()).abs()), float(total))


def mean_shift_bits(shift: float) -> float:
    """Diff, what a bit width is judged by: log2(M1 + 1).

    A threshold of 0.03 on it is a mean that has moved by 2.1 %.

    Args:
        shift: `mean_shift`, >= 0.

    Returns:
        In bits, >= 0.

    Example:
        >>> mean_shift_bits(1.0), round(mean_shift_bits(0.021), 3)
        (1.0, 0.03)

    Reference:
        Zhang et al., CVPR 2020, Eq. 2.
    """
    return math.log1p(shift) / math.log(2)


def relative_error(x: Tensor, quantized: Tensor) -> float:
    """M2: the absolute error as a share of the mean absolute value; 0 where both are all zero.

    Args:
        x: [...] before quantization.
        quantized: Same shape.

    Returns:
        sum |x - q| / sum |x|, >= 0; infinite if only `x` is all zero.

    Raises:
        SpecError: The shapes differ, there are no values, or one is NaN or infinite.

    Example:
        >>> relative_error(torch.tensor([1.0, -3.0]), torch.tensor([2.0, -2.0]))
        0.5
    """
    exact, other = _pair(x, quantized)
    return _ratio(float((exact - other).abs().sum()), float(exact.abs().sum()))


def pointwise_error(x: Tensor, quantized: Tensor) -> float:
    """M3: the sum (not the mean) of every value's own relative error.

    Zeros in `x` have no relative error and are left out.

    Args:
        x: [...] before quantization.
        quantized: Same shape.

    Returns:
        sum |x - q| / |x| over x != 0, >= 0.

    Raises:
        SpecError: The shapes differ, there are no values, or one is NaN or infinite.

    Example:
        >>> pointwise_error(torch.tensor([1.0, -4.0, 0.0]), torch.tensor([2.0, -3.0, 0.0]))
        1.25
    """
    exact, other = _pair(x, quantized)
    present = exact != 0
    exact, other = exact[present], other[present]
    return float(((exact - other).abs() / exact.abs()).sum())


def divergence(x: Tensor, quantized: Tensor, bins: int = 256) -> float:
    """M4: the Kullback-Leibler divergence of the quantized histogram from the original one.

    Both are counted in equal bins over the range of the two together. Each bin of both gets half a
    count more, because quantization empties bins and the divergence would be infinite; it therefore
    depends on how many values there are, which the paper leaves open along with the bins.

    Args:
        x: [...] before quantization.
        quantized: Same shape.
        bins: At least 2.

    Returns:
        sum P * log(P / Q) in nats, >= 0; 0 where the histograms are equal.

    Raises:
        SpecError: Fewer than 2 bins; the shapes differ, there are no values, or one is NaN or
            infinite.

    Example:
        >>> x = torch.linspace(-1, 1, 1000)
        >>> round(divergence(x, x.round()), 2), round(divergence(x, (x * 99).round() / 99), 2)
        (2.1, 0.31)
    """
    if bins < 2:
        raise SpecError(f"a histogram of {bins} bins says nothing", hint="use at least 2")
    exact, other = _pair(x, quantized)
    low = min(float(exact.min()), float(other.min()))
    high = max(float(exact.max()), float(other.max()))
    shares = [torch.histc(values, bins, low, high) + 0.5 for values in (exact, other)]
    p, q = (share / share.sum() for share in shares)
    return max(0.0, float((p * (p / q).log()).sum()))


def squared_correlation(metric: Sequence[float], accuracy: Sequence[float]) -> float:
    """R**2: the share of the accuracy's variance that a straight line through a metric explains.

    Args:
        metric: [n] values of M1 to M4, one for each quantized network.
        accuracy: [n] their accuracies, any unit.

    Returns:
        0 to 1.

    Raises:
        SpecError: Fewer than 2 points or not as many of each; a value is NaN or infinite; either
            is constant.

    Example:
        >>> round(squared_correlation([0.0, 1.0, 2.0], [90.0, 80.0, 60.0]), 3)
        0.964

    Reference:
        Zhang et al., CVPR 2020, Eq. 4.
    """
    if len(metric) != len(accuracy) or len(metric) < 2:
        raise SpecError(
            f"no correlation of {len(metric)} metrics with {len(accuracy)} accuracies",
            hint="give at least 2 points, as many of each",
        )
    a, b = (_direction(name, v) for name, v in (("metric", metric), ("accuracy", accuracy)))
    return min(1.0, float(a @ b) ** 2)


def _direction(name: str, values: Sequence[float]) -> Tensor:
    """[n] float64: the values less their mean, as a vector of length 1."""
    points = torch.tensor(values, dtype=torch.float64)
    if not bool(points.isfinite().all()) or bool((points == points[0]).all()):
        raise SpecError(
            "no correlation where all values are equal, or one is NaN or infinite", where=name
        )
    points = points / points.abs().max()  # so that no square overflows or underflows
    return torch.nn.functional.normalize(points - points.mean(), dim=0, eps=0.0)


def _pair(x: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != quantized.shape or x.numel() == 0:
        raise SpecError(
            f"cannot compare shapes {list(x.shape)} and {list(quantized.shape)}",
            hint="give two tensors of the same shape that are not empty",
        )
    pair = x.detach().to(torch.float64), quantized.detach().to(torch.float64)
    if not all(bool(values.isfinite().all()) for values in pair):
        raise SpecError("the error of NaN or infinite values is not defined")
    return pair


def _ratio(error: float, total: float) -> float:
    """The error as a share of the total; nothing of nothing is 0."""
    if total == 0:
        return math.inf if error else 0.0
    return error / total
