"""Sets of integer levels: uniform, powers of two, and sums of powers of two.

A set is given by its magnitudes: 2**B of them with B bits beside the sign. Activations behind a
ReLU have B = bits; a signed weight has B = bits - 1 and, as zero counts once, one of 2**bits - 1
values; with 2 bits these are -1, 0 and 1 in every set. Levels are exact integers, and divided by
the largest they are the paper's. Where they fit int8, a weight is an int8 code times one scale, and
ordinary integer kernels compute with it exactly.

Halfway between two levels the larger magnitude is taken. (The authors' code takes whichever a hash
set lists first.) All thresholds are multiples of one half, so that `level_table` is exact.

Papers:
    Li, Dong, Wang, "Additive Powers-of-Two Quantization: An Efficient Non-uniform Discretization
        for Neural Networks", ICLR 2020, arXiv:1909.13144, Eq. 3, 5 and 6. Eq. 6 prints the exponent
        of its last term with a dangling index, 2**-(i + 2n); the authors' `build_power_value` and
        the printed 3-bit example mean 2**-2n.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from fxq.errors import SpecError
from fxq.numerics.clipping import least_error_scale

CODE_LIMIT = 127
"""The largest magnitude of a weight code."""

_LARGEST_TABULATED = 1 << 16


class LevelSet(StrEnum):
    """Which values may be taken, up to their scale.

    AUTO is the set of the smallest error; LLOYD the best set for given data (`fxq.numerics.lloyd`).
    """

    UNIFORM = "uniform"
    APOT = "apot"
    POT = "pot"
    LLOYD = "lloyd"
    AUTO = "auto"


MOST_BITS = {LevelSet.UNIFORM: 8, LevelSet.APOT: 6, LevelSet.POT: 4}
"""Bits per signed weight, the sign included, up to which the levels of a set fit int8."""


def magnitudes(kind: LevelSet, bits: int, base: int = 2) -> Tensor:
    """[2**bits] int64: the levels of so many bits without a sign, ascending from 0.

    Every level is a sum of one power of two (or zero) from each of several groups. No power is in
    two groups, so all sums differ.

    Args:
        kind: Uniform: all integers, which is one bit per term. PoT: one term of all bits. APoT:
            terms of `base` bits.
        bits: 1 to 8; one less than the bits of a signed weight.
        base: Bits per term of APoT (k in the paper), which divides the bits; the paper's base 2
            also takes odd bits, with one more term of a single bit (Eq. 6).

    Raises:
        SpecError: There is no such set, or its levels exceed int64 (7 or more bits per term).

    Example:
        >>> magnitudes(LevelSet.APOT, 3).tolist()
        [0, 1, 2, 3, 4, 6, 8, 10]
        >>> magnitudes(LevelSet.APOT, 3, base=3).tolist() == magnitudes(LevelSet.POT, 3).tolist()
        True
    """
    if kind not in MOST_BITS:
        raise SpecError(
            f"{kind} levels are not given by a number of bits",
            hint="uniform, apot and pot are; fxq.numerics.lloyd finds levels from data",
        )
    if not 1 <= bits <= 8:
        raise SpecError(f"levels of {bits} bits without a sign do not exist", hint="use 1 to 8")
    term_bits = {LevelSet.UNIFORM: 1, LevelSet.POT: bits}.get(kind, base)
    sums = torch.zeros(1, dtype=torch.int64)
    for exponents in _terms(bits, term_bits):
        powers = torch.tensor([0, *(2**exponent for exponent in exponents)])
        sums = (sums.unsqueeze(1) + powers).flatten()
    return sums.sort().values


def levels_of(kind: LevelSet, bits: int) -> Tensor:
    """[2**(bits - 1)] int64: the magnitudes of signed weights as int8 holds them, ascending from 0.

    Args:
        kind: Uniform, APoT (of base 2) or PoT, as for `magnitudes`.
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
    return magnitudes(kind, bits - 1)


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


def level_table(levels: Tensor, *, signed: bool = False) -> Tensor:
    """[2 * top + 1] int64: entry j is the level nearest to j / 2, as `nearest_level` decides.

    So the level nearest to any v in 0..top is entry floor(2 * v). Signed, the table is mirrored to
    [4 * top + 1]: the entry of v is trunc(2 * v) + 2 * top.

    Args:
        levels: [count] magnitudes, ascending from 0 to top.
        signed: Whether negative levels are in front.

    Raises:
        SpecError: The largest level exceeds 65536 (PoT with 5 bits beside the sign).

    Example:
        >>> level_table(torch.tensor([0, 1, 2, 4])).tolist()
        [0, 1, 1, 2, 2, 2, 4, 4, 4]
        >>> level_table(torch.tensor([0, 1]), signed=True).tolist()
        [-1, -1, 0, 1, 1]
    """
    top = int(levels[-1])
    if top > _LARGEST_TABULATED:
        raise SpecError(
            f"levels up to {top} are too many to tabulate", hint="fewer bits, or a smaller base"
        )
    start = -2 * top if signed else 0
    return nearest_level(torch.arange(start, 2 * top + 1, dtype=torch.float64) / 2, levels)


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


def _terms(bits: int, base: int) -> list[list[int]]:
    """The exponents in each term's group, counted up from the smallest power of all.

    Equation 5 counts them down: term i has 2**-i, 2**-(i + n), ... to 2**-(i + (2**base - 2) * n).
    """
    count, rest = divmod(bits, base) if base > 0 else (0, bits)
    if base == 2 and rest:
        return [[count], *([i, i + count + 1, i + 2 * count + 1] for i in range(count))]
    if rest:
        bases = [str(one) for one in range(1, 7) if bits % one == 0 or one == 2]
        raise SpecError(
            f"{bits} bits without the sign are not a whole number of terms of {base} bits",
            hint=f"choose base {' or '.join(bases)}, or other bits",
        )
    if base > 6:
        raise SpecError(
            f"levels with terms of {base} bits span more than int64 holds", hint="at most 6"
        )
    return [[i + step * count for step in range(2**base - 1)] for i in range(count)]
