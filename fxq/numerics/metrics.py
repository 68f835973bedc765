"""How far an approximation is from its reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxq.errors import SpecError


def mse(reference: Tensor, approximation: Tensor) -> float:
    """The mean squared error, summed in float64.

    Args:
        reference: [...].
        approximation: Same shape.

    Returns:
        In the units of the tensors, squared.

    Raises:
        SpecError: The shapes differ, or there are no values.

    Example:
        >>> mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        2.0
    """
    exact, other = _pair(reference, approximation)
    return float((exact - other).square().mean())


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """The signal-to-quantization-noise ratio 10*log10(sum r**2 / sum (r-a)**2), in decibels.

    Args:
        reference: [...].
        approximation: Same shape.

    Returns:
        inf when the two are equal; -inf when only the reference is all zero; NaN stays NaN.

    Raises:
        SpecError: The shapes differ, or there are no values.

    Example:
        >>> sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
        20.0
        >>> sqnr_db(torch.zeros(2), torch.zeros(2))
        inf
    """
    exact, other = _pair(reference, approximation)
    noise = float((exact - other).square().sum())
    signal = float(exact.square().sum())
    if math.isnan(noise) or math.isnan(signal):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal / noise > 0 else -math.inf


def max_abs_error(reference: Tensor, approximation: Tensor) -> float:
    """The largest absolute difference of any value.

    Args:
        reference: [...].
        approximation: Same shape.

    Returns:
        In the units of the tensors.

    Raises:
        SpecError: The shapes differ, or there are no values.

    Example:
        >>> max_abs_error(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
        2.0
    """
    exact, other = _pair(reference, approximation)
    return float((exact - other).abs().max())


def cosine_similarity(reference: Tensor, approximation: Tensor) -> float:
    """The cosine of the angle between the two, seen as vectors.

    Args:
        reference: [...].
        approximation: Same shape.

    Returns:
        -1 to 1. Two zero tensors are alike (1); one zero tensor is like nothing (0).

    Raises:
        SpecError: The shapes differ, or there are no values.

    Example:
        >>> cosine_similarity(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]))
        1.0
    """
    exact, other = (tensor.flatten() for tensor in _pair(reference, approximation))
    # Scaled by the largest value first, so that no square overflows or underflows.
    sizes = float(exact.abs().max()), float(other.abs().max())
    if 0.0 in sizes:
        return 1.0 if sizes[0] == sizes[1] else 0.0
    exact, other = exact / sizes[0], other / sizes[1]
    cosine = float(exact @ other) / float(exact.norm() * other.norm())
    return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))


def argmax_agreement(reference: Tensor, approximation: Tensor, dim: int = -1) -> float:
    """The share of predictions that name the same class.

    Args:
        reference: [n, ..., classes] scores.
        approximation: Same shape.
        dim: The dimension of the classes.

    Returns:
        0 to 1.

    Raises:
        SpecError: The shapes differ, or there are no values.

    Example:
        >>> argmax_agreement(torch.eye(4), torch.eye(4).roll(1, 0)), argmax_agreement(
        ...     torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        ... )
        (0.0, 0.5)
    """
    exact, other = _pair(reference, approximation)
    same = exact.argmax(dim=dim) == other.argmax(dim=dim)
    return float(same.to(torch.float64).mean())


def _pair(reference: Tensor, approximation: Tensor) -> tuple[Tensor, Tensor]:
    if reference.shape != approximation.shape:
        raise SpecError(
            f"cannot compare shapes {list(reference.shape)} and {list(approximation.shape)}"
        )
    if reference.numel() == 0:
        raise SpecError("there is nothing to compare: the tensors are empty")
    return reference.detach().to(torch.float64), approximation.detach().to(torch.float64)
