"""How many bits each channel gets.

Two rules share the name "per-channel bit allocation". The paper's keeps the number of *bins*
(sum of 2**bits) within a quota and rounds down; the authors' code makes the *mean number of bits*
hit a goal and rounds to nearest. The second spends up to twice the bins of the first.

Papers:
    Banner, Nahshan, Soudry, "Post training 4-bit quantization of convolutional networks for
        rapid-deployment", NeurIPS 2019, arXiv:1810.05723 (Eq. 11, A.26-A.27), and its code,
        github.com/submission2019/cnn-quantization.
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch
from torch import Tensor

from fxq.errors import SpecError

_MAX_ROUNDS = 10  # both constants are those of the authors' code
_CLOSE_ENOUGH = 0.01


class Allocation(StrEnum):
    """How bits are spread over the channels of a tensor."""

    NONE = "none"
    BINS = "bins"
    MEAN_BITS = "mean-bits"


def channel_bits(rule: Allocation, alpha: Tensor, bits: int, low: int = 0) -> Tensor:
    """The bits of every channel under a rule, for an average of about `bits`.

    Where no channel varies there is nothing to share out, and all get the same.

    Args:
        rule: `allocate_bins`, `allocate_mean_bits`, or the same bits for all.
        alpha: [C] spread of each channel, >= 0, any unit.
        bits: The average.
        low: The fewest bits a channel may get.

    Returns:
        [C] int64, `low` to 8.

    Raises:
        SpecError: As the rule does.

    Example:
        >>> channel_bits(Allocation.MEAN_BITS, torch.tensor([1.0, 2.0, 4.0, 9.0]), 4).tolist()
        [3, 4, 4, 5]
    """
    if rule is Allocation.NONE or not bool(alpha.any()):
        return torch.full((len(alpha),), bits, dtype=torch.int64)
    if rule is Allocation.BINS:
        return allocate_bins(alpha, len(alpha) * 2.0**bits).clamp(min=low)
    return allocate_mean_bits(alpha, bits, low=low)


def allocate_bins(alpha: Tensor, total_bins: float, high: int = 8) -> Tensor:
    """Bits floor(log2(total_bins * a**(2/3) / sum a**(2/3))), so 2**bits stays within the quota.

    Channels of less than one bin get 0 bits: they are replaced by a constant. For an average of M
    bits the paper's quota is `len(alpha) * 2**M`.

    Args:
        alpha: [C] spread of each channel (std, b or range), >= 0, any unit.
        total_bins: The quota of quantization intervals over all channels.
        high: The most bits a channel may get.

    Returns:
        [C] int64, 0 to `high`.

    Raises:
        SpecError: alpha is empty, negative, not finite or all zero; the quota is not positive.

    Example:
        >>> allocate_bins(torch.tensor([1.0, 1.0, 8.0]), total_bins=3 * 16).tolist()
        [3, 3, 5]

    Reference:
        Banner et al. 2019, Eq. 11.
    """
    if not 0 < total_bins < math.inf:
        raise SpecError(f"a quota of {total_bins} bins is not possible", hint="give C * 2**bits")
    return _log2_bins(alpha, math.log2(total_bins)).floor().clamp(0, high).to(torch.int64)


def allocate_mean_bits(alpha: Tensor, mean_bits: float, low: int = 0, high: int = 8) -> Tensor:
    """Bits proportional to the log of a**(2/3), rounded, whose mean is close to `mean_bits`.

    The paper's rule is applied with rounding and clamping; then its target moves by half the gap
    between goal and mean, at most ten times, until the gap is at most 0.01 bits.

    Args:
        alpha: [C] spread of each channel (std, b or range), >= 0, any unit.
        mean_bits: The goal for the mean of the result.
        low: The fewest bits a channel may get.
        high: The most bits a channel may get.

    Returns:
        [C] int64, `low` to `high`.

    Raises:
        SpecError: alpha is empty, negative, not finite or all zero; the goal is out of reach.

    Example:
        >>> allocate_mean_bits(torch.tensor([1.0, 2.0, 4.0, 9.0]), mean_bits=4).tolist()
        [3, 4, 4, 5]

    Reference:
        The authors' code, `get_bits_alloc_fixed_target` with rounding.
    """
    if not low <= mean_bits <= high:
        raise SpecError(
            f"a mean of {mean_bits} bits is not possible between {low} and {high}",
            hint="choose a goal inside the limits",
        )
    target = float(mean_bits)
    for _ in range(_MAX_ROUNDS):
        bits = _log2_bins(alpha, target + math.log2(len(alpha) or 1)).round().clamp(low, high)
        gap = mean_bits - float(bits.mean())
        if abs(gap) <= _CLOSE_ENOUGH:
            break
        target += gap / 2
    return bits.to(torch.int64)


def _log2_bins(alpha: Tensor, log2_total: float) -> Tensor:
    """[C] float64: log2 of each channel's share of the bins; -inf for a dead channel."""
    spread = alpha.detach().to(torch.float64)
    if spread.dim() != 1 or spread.numel() == 0:
        raise SpecError(f"alpha must be [channels], not {list(alpha.shape)}")
    if not bool((spread.isfinite() & (spread >= 0)).all()) or not bool(spread.any()):
        raise SpecError(
            "a channel's spread is negative, NaN or infinite, or all are zero",
            hint="was the observer fed any batch?",
        )
    weight = (spread / spread.max()) ** (2 / 3)  # the unit cancels, and so cannot underflow
    return log2_total + (weight / weight.sum()).log2()
