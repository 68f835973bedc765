"""Sets of integer levels for weights: uniform, powers of two, and sums of powers of two.

A set is given by its magnitudes, 2**B of them with B = bits - 1 bits beside the sign. Zero counts
once, so a signed weight takes one of 2**bits - 1 values; with 2 bits these are -1, 0 and 1 in every
set. All levels fit int8: a weight is an int8 code times one scale, and ordinary integer kernels
compute with it exactly.

Papers:
    Li, Dong, Wang, "Additive Powers-of-Two Quantization: An Efficient Non-uniform Discretization
        for Neural Networks", ICLR 2020, arXiv:1909.13144, Eq. 5 and 6. Eq. 6 leaves an index of its
        last term open; the order of exponents is that of the authors' code, `build_power_value`.
        Their ties go to whichever level a hash set lists first, ours to the larger magnitude.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from fxq.errors import SpecError
from fxq.numerics.clipping import least_error_scale

CODE_LIMIT = 127
"""The largest magnitude of a weight code."""


class LevelSet(StrEnum):
    """Which values weights may take, up to their scale; AUTO is the set of the smallest error."""

    UNIFORM = "uniform"
    APOT = "apot"
    POT = "pot"
    AUTO = "auto"


MOST_BITS = {LevelSet.UNIFORM: 8, LevelSet.APOT: 6, LevelSet.POT: 4}
"""Bits per signed weight, the sign included, up to which the levels of a set fit int8."""


def levels_of(kind: LevelSet, bits: int) -> Tensor:
    """[2**(bits - 1)] int64: the magnitudes of a set, ascending from 0.

    Args:
        kind: Uniform: all integers. APoT: sums of one power of two (or zero) from each of several
            interleaved groups, so that all sums differ. PoT: powers of two.
        bits: Bits per signed weight, the sign included; 2 to `MOST_BITS[kind]`.

    Raises:
        SpecError: The levels do not fit int8, or there is no such set.

    Example:
        >>> levels_of(LevelSet.APOT, 4).tolist()
        [0, 1, 2, 3, 4, 6, 8, 10]
        >>> levels_of(LevelSet.POT, 4).tolist()
        [0, 1, 2, 4, 8, 16, 32, 64]
    """
    most = MOST_BITS.get(kind, 0)
    if not 2 <= bits <= most:
        raise SpecError(
            f"there are no {kind} levels of {bits} bits that fit int8",
            hint=f"use 2 to {most} bits" if most else "choose uniform, apot or pot",
        )
    if kind is LevelSet.UNIFORM:
        return torch.arange(2 ** (bits - 1))
    if kind is LevelSet.POT:
        return torch.cat((torch.zeros(1), 2.0 ** torch.arange(2 ** (bits - 1) - 1))).to(torch.int64)
    terms, odd = divmod(bits - 1, 2)
    sums = torch.zeros(1, dtype=torch.int64)
    if odd:
        sums = _plus(sums, terms)
    for term in range(terms):
        low = terms - 1 - term
        sums = _plus(sums, low, low + terms + odd, low + 2 * terms + odd)
    return sums.sort().values


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """The nearest levels, of either sign; halfway between two, the larger magnitude.

    Args:
        values: [...] in units of a level.
        levels: [count] magnitudes, ascending from 0.

    Returns:
        [...] int64.

    Example:
        >>> nearest_level(torch.tensor([-99.0, -5.0, 0.4, 7.0]), levels_of(LevelSet.APOT, 4))
        tensor([-10,  -6,   0,   8])
    """
    middles = (levels[1:] + levels[:-1]).to(values.dtype) / 2
    magnitudes = levels[torch.bucketize(values.abs(), middles, right=True)]
    return torch.where(values < 0, -magnitudes, magnitudes)


def mse_level_scale(weight: Tensor, levels: Tensor) -> Tensor:
    """The scale per channel with the smallest mean squared error, as `mse_weight_scale` searches.

    Up to twice the range of the weights: with levels far apart at the top it can pay to leave the
    topmost unused.

    Args:
        weight: [out, ...].
        levels: [count] magnitudes, ascending from 0.

    Returns:
        [out] float32, short scales: weights are near `nearest_level(weight / scale) * scale`.

    Raises:
        SpecError: A weight that is empty or not finite.

    Example:
        >>> weight = torch.tensor([[1.0, -1.0, 2.0, 4.4]])
        >>> scale = mse_level_scale(weight, levels_of(LevelSet.POT, 3))
        >>> bool(1.0 < scale < 1.1)
        True
    """

    def nearest(values: Tensor) -> Tensor:
        return nearest_level(values, levels).to(values.dtype)

    return least_error_scale(weight, int(levels[-1]), nearest, widest=2.0)


def _plus(sums: Tensor, *exponents: int) -> Tensor:
    """[len(sums) * (1 + len(exponents))]: each sum plus nothing, and plus each power of two."""
    terms = torch.tensor([0, *(2**exponent for exponent in exponents)])
    return (sums.unsqueeze(1) + terms).flatten()
