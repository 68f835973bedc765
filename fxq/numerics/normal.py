"""Ranges without data, of values known only by the mean and deviation of each channel.

Papers:
    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV
        2019, arXiv:1906.04721: section 5 (ranges of n = 6 deviations from batch norms), appendix C
        (the clipped normal distribution).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxq.errors import SpecError


def normal_range(mean: Tensor, std: Tensor, deviations: float = 6.0) -> tuple[Tensor, Tensor]:
    """The range of the given number of deviations around every mean, over all channels.

    Args:
        mean: [C].
        std: [C], like `mean`, >= 0.
        deviations: How many of them, > 0.

    Returns:
        low, high: [] in the units of the mean.

    Raises:
        SpecError: Deviations are not positive.

    Example:
        >>> ends = normal_range(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.5]), 3.0)
        >>> [end.item() for end in ends]
        [-3.0, 3.5]
    """
    if not 0 < deviations < math.inf:
        raise SpecError(f"a range of {deviations} deviations is not possible", hint="6, say")
    return (mean - deviations * std).amin(), (mean + deviations * std).amax()


def rectified_normal(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and deviation of relu(x) for normal x.

    Args:
        mean: [...] of x.
        std: [...] of x, like `mean`, >= 0.

    Returns:
        mean, std: like `mean`, float64.

    Example:
        >>> [round(one.item(), 4) for one in rectified_normal(torch.zeros(()), torch.ones(()))]
        [0.3989, 0.5838]
    """
    centre, spread = mean.to(torch.float64), std.to(torch.float64)
    t = centre / spread.clamp(min=torch.finfo(torch.float64).tiny)
    positive = torch.special.ndtr(t)
    density = torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)
    first = centre * positive + spread * density
    second = (centre**2 + spread**2) * positive + centre * spread * density
    return first, (second - first**2).clamp(min=0).sqrt()
