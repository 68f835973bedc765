"""Codes of the sum of two quantized tensors, and scales at which all kernels give the same.

Our definition rounds the sum of two real values, which are exact, and adds the zero point to what
is rounded. ONNX Runtime folds all scales and zero points into two ratios and a constant, and rounds
last: ``clamp(rint(qa * ra + (qb * rb + fixed)))`` with ``ra = sa / sc``, ``rb = sb / sc`` and
``fixed = zc - (ra * za + rb * zb)`` in float32, where each product may or may not be fused with the
sum it goes into. The two differ where the exact sum is within float32 rounding of a tie between two
codes. There are 65536 pairs of codes at most, so that can be found out, and a scale moved a little.

That no pair is near a tie would be the stronger thing to ask for, and more than there is: the
errors add up to some 2**-14 of a code, so of 65536 sums about eight are expected that near. What is
asked for is that every form gives the same code for every pair.

Not covered: on ARM, ONNX Runtime multiplies by integers of 22 bits, and rounds ties away from zero.

Papers:
    Boldo, Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using
        rounding to odd", IEEE Transactions on Computers 57 (4), 2008 (the fused multiply-add).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxq.numerics.affine import SCALE_BITS

STEPS = 64
"""How many short scales are tried; the last is at most 0.2 % above the first."""


@dataclass(frozen=True)
class Codes:
    """Codes ``low .. 2**bits - 1`` and what they stand for: ``scale * (code - zero_point)``.

    Attributes:
        scale: A short scale.
        zero_point: The code of 0.
        bits: 1 to 8.
        relu: Whether codes below the zero point are raised to it.
    """

    scale: float
    zero_point: int
    bits: int
    relu: bool = False

    @property
    def low(self) -> int:
        """The smallest code."""
        return self.zero_point if self.relu else 0

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def all(self) -> Tensor:
        """``[2**bits]`` float32: every code a tensor of these bits can hold."""
        return torch.arange(self.top + 1, dtype=torch.float32)


def sum_codes(left: Codes, right: Codes, total: Codes) -> Tensor:
    """``[2**left.bits, 2**right.bits]`` int32: the sum of every pair of codes, by our definition.

    Example:
        >>> sum_codes(Codes(0.5, 0, 1), Codes(1.0, 1, 2), Codes(0.5, 2, 3)).tolist()
        [[0, 2, 4, 6], [1, 3, 5, 7]]
    """
    return _defined(left.all().unsqueeze(1), right.all(), left, right, total).to(torch.int32)


def disputed(left: Codes, right: Codes, total: Codes) -> Tensor:
    """``[n, 2]`` int64: the pairs of codes whose sum depends on how it is computed.

    Example:
        >>> half = Codes(0.5, 0, 2)
        >>> disputed(half, Codes(2.0, 0, 1), Codes(1.0, 1, 3)).tolist()  # sums of 0.5, 1.5, ...
        [[1, 0], [1, 1], [3, 0], [3, 1]]
    """
    pairs = _near_ties(left, right, total)
    if not len(pairs):
        return pairs
    qa, qb = pairs.to(torch.float32).unbind(1)
    expected = _defined(qa, qb, left, right, total)
    differs = torch.zeros(len(pairs), dtype=torch.bool)
    for codes in _folded(qa, qb, left, right, total):
        differs |= (codes != expected).any(0)
    return pairs[differs]


def agreeing_scale(left: Codes, right: Codes, total: Codes) -> float | None:
    """The nearest short scale, from the sum's own upwards, at which no pair is `disputed`.

    Returns:
        The scale; None where none of the first `STEPS` is one.

    Example:
        >>> half = Codes(0.5, 0, 2)
        >>> [agreeing_scale(half, half, Codes(scale, 1, 3)) for scale in (0.5, 1.0)]
        [0.5, 1.000030517578125]
    """
    scale = total.scale
    for _ in range(STEPS):
        if not len(disputed(left, right, replace(total, scale=scale))):
            return scale
        scale = _next_short(scale)
    return None


def _next_short(scale: float) -> float:
    """The next larger number of `SCALE_BITS` significant bits."""
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(mantissa * 2**SCALE_BITS + 1, exponent - SCALE_BITS)


def _near_ties(left: Codes, right: Codes, total: Codes) -> Tensor:
    """``[n, 2]`` int64: the pairs that some form could round to another code than the rest.

    With ``u = 2**-24`` and ``A``, ``B`` the largest ``|qa * ra|``, ``|qb * rb|``, a form rounds
    ten times at most: two ratios, two products, their sum, the constant, two products with codes
    and two sums. What it rounds is never above ``A + B + zc``, so it errs by less than
    ``10 u (A + B + zc)``. The margin is 16 u, for the second order and for float64 here.
    """
    ratios = [one.scale / total.scale for one in (left, right)]
    terms = [
        (one.all().double() - one.zero_point) * ratio
        for one, ratio in zip((left, right), ratios, strict=True)
    ]
    exact = terms[0].unsqueeze(1) + terms[1] + total.zero_point
    largest = ratios[0] * left.top + ratios[1] * right.top + total.top
    margin = 16 * 2.0**-24 * largest
    near = (exact - exact.floor() - 0.5).abs() <= margin
    inside = (exact > total.low - margin) & (exact < total.top + margin)
    return (near & inside).nonzero()


def _defined(qa: Tensor, qb: Tensor, left: Codes, right: Codes, total: Codes) -> Tensor:
    """Codes of sums, by our definition."""
    value = (qa - left.zero_point) * left.scale + (qb - right.zero_point) * right.scale
    inverse = 1.0 / torch.tensor(total.scale, dtype=torch.float32)
    codes = (value * inverse).round_() + total.zero_point
    return codes.clamp_(total.low, total.top)


def _folded(qa: Tensor, qb: Tensor, left: Codes, right: Codes, total: Codes) -> Iterator[Tensor]:
    """``[3, n]`` codes of sums, by each form with ratios and a constant.

    A row for each way to compute the constant; the addends in either order; every product fused
    with its sum, or not.
    """
    scale = torch.tensor(total.scale, dtype=torch.float32)
    ra, rb = (torch.tensor(one.scale, dtype=torch.float32) / scale for one in (left, right))
    za, zb = (torch.tensor(float(one.zero_point)) for one in (left, right))
    offsets = [ra * za + rb * zb, _fma(ra, za, rb * zb), _fma(rb, zb, ra * za)]
    fixed = (total.zero_point - torch.stack(offsets)).unsqueeze(1)
    orders = [((qa, ra), (qb, rb)), ((qb, rb), (qa, ra))]
    for (first, second), inner, outer in itertools.product(orders, _MULTIPLY_ADDS, _MULTIPLY_ADDS):
        value = outer(*second, inner(*first, fixed))
        yield value.round().clamp_(total.low, total.top)


def _multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``f32(f32(a * b) + c)``."""
    return a * b + c


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``f32(a * b + c)`` of float32 tensors, rounded once."""
    product, addend = a.double() * b.double(), c.double()  # the product is exact
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # total + error is exact (Knuth's TwoSum)
    # Rounded to odd: an inexact total whose last bit is even moves one bit towards the error. What
    # has 53 bits then rounds to 24 as if it were exact.
    bits = total.view(torch.int64)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    moves = (error != 0) & ((bits & 1) == 0)
    return torch.where(moves, bits + step, bits).view(torch.float64).float()


_MULTIPLY_ADDS = (_multiply_add, _fma)
