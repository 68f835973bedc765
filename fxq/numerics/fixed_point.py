"""Fixed-point numbers: real value = code * 2**exponent, and codes as sums of int8 limbs.

A resolution that is a power of two makes scaling exact: in float32 for every code of up to 24 bits.
Codes are rounded to nearest, halves to even.

Papers:
    Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020 (appendix B, table 1: the
        resolution and the rounding). Two departures. Above 8 bits codes are symmetric, and the
        widths 16 and 24 stop at the largest number of balanced int8 limbs, 32639 and 8355711
        instead of 32767 and 8388607, so that products run as int8 products. And the exponent stays
        within what float32 can hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.errors import SpecError

MIN_EXPONENT = -126  # 2**126 and 2**-126 are both normal float32 numbers
TOP_BITS = 24  # a float32 significand

_BALANCED = {16: 127 * 256 + 127, 24: 127 * 65536 + 127 * 256 + 127}


def largest_code(bits: int) -> int:
    """The largest code: 2**(bits-1) - 1, at 16 and 24 bits the largest that int8 limbs can hold.

    Args:
        bits: 2 to 24.

    Raises:
        SpecError: Impossible bits.

    Example:
        >>> largest_code(8), largest_code(16), largest_code(24)
        (127, 32639, 8355711)
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= TOP_BITS:
        raise SpecError(
            f"{bits!r} bits is not a fixed-point width",
            hint=f"use 2 to {TOP_BITS} bits, a whole number",
        )
    return _BALANCED.get(bits, (1 << (bits - 1)) - 1)


def smallest_code(bits: int) -> int:
    """The smallest code: -2**(bits-1) up to 8 bits, minus the largest above.

    Raises:
        SpecError: Impossible bits.

    Example:
        >>> smallest_code(8), smallest_code(16)
        (-128, -32639)
    """
    return -largest_code(bits) - (bits <= 8)


def resolution_exponent(largest: float, bits: int) -> int:
    """The smallest s with largest <= largest_code(bits) * 2**s, computed without a logarithm.

    It is at least -126, which a tensor of zeros gets, and at most 128 - bits, so that every code is
    a finite float32 number; values beyond (above 2**127 at 8 bits, less 1 %) are clamped.

    Args:
        largest: The largest absolute value Z, >= 0.
        bits: 2 to 24.

    Raises:
        SpecError: Impossible bits; Z is negative, NaN or infinite.

    Example:
        >>> resolution_exponent(127.0, bits=8), resolution_exponent(127.1, bits=8)
        (0, 1)

    Reference:
        Zhang et al., CVPR 2020, appendix B, table 1: ceil(log2(Z / (2**(n-1) - 1))).
    """
    top = largest_code(bits)
    if not 0 <= largest < math.inf:
        raise SpecError(
            f"the largest absolute value is {largest}, which no fixed-point number can hold",
            hint="look for NaN or infinite values in the tensor",
        )
    if largest == 0:
        return MIN_EXPONENT
    # Both mantissas lie in [1/2, 1), their ratio in (1/2, 2): it rounds up to 1 or to 2.
    mantissa, exponent = math.frexp(largest)
    top_mantissa, top_exponent = math.frexp(top)
    wanted = exponent - top_exponent + (mantissa > top_mantissa)
    return max(MIN_EXPONENT, min(wanted, 128 - bits))


def fixed_point_codes(x: Tensor, exponent: int, bits: int) -> Tensor:
    """The codes of the nearest fixed-point numbers, halves to the even code.

    Clamped to -2**(bits-1) .. largest_code(bits) up to 8 bits, to +-largest_code(bits) above. The
    code of NaN is not defined: look at the statistics of the tensor first.

    Args:
        x: [...] floating point, any device.
        exponent: log2 of the resolution, -126 to 126.
        bits: 2 to 24.

    Returns:
        [...] int32.

    Raises:
        SpecError: Impossible bits or exponent.

    Example:
        >>> fixed_point_codes(torch.tensor([0.5, 1.5, -2.5, 99.0]), exponent=0, bits=4)
        tensor([ 0,  2, -2,  7], dtype=torch.int32)
    """
    return _rounded(x, exponent, bits).to(torch.int32)


def fixed_point(x: Tensor, exponent: int, bits: int) -> Tensor:
    """The nearest fixed-point numbers themselves: codes * 2**exponent.

    Exact in float32 and float64. A narrower dtype is computed in float32 and then rounded once more
    to itself; bfloat16 holds every code of up to 8 bits.

    Args:
        x: [...] floating point, any device.
        exponent: log2 of the resolution, -126 to 126.
        bits: 2 to 24.

    Returns:
        [...] of the dtype of `x`. NaN stays NaN.

    Raises:
        SpecError: Impossible bits or exponent.

    Example:
        >>> fixed_point(torch.tensor([0.3, -0.7, 5.0]), exponent=-2, bits=4).tolist()
        [0.25, -0.75, 1.75]
    """
    return (_rounded(x, exponent, bits) * 2.0**exponent).to(x.dtype)


def limbs(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Codes as balanced digits of base 256, so an integer product becomes a sum of int8 products.

    Args:
        codes: [...] int32, within those of `fixed_point_codes`; others overflow.
        bits: 2 to 24.

    Returns:
        One, two (above 8 bits) or three (above 16) tensors [...] int8, most significant first.

    Raises:
        SpecError: Impossible bits.

    Example:
        >>> [limb.item() for limb in limbs(torch.tensor(1000, dtype=torch.int32), bits=16)]
        [4, -24]
    """
    largest_code(bits)
    digits: list[Tensor] = []
    for _ in range((bits - 1) // 8):
        low = ((codes + 128) & 255) - 128
        digits.append(low.to(torch.int8))
        codes = (codes - low) >> 8
    return (codes.to(torch.int8), *reversed(digits))


def from_limbs(parts: Sequence[Tensor]) -> Tensor:
    """The codes whose `limbs` these are.

    Args:
        parts: One to three tensors [...] int8, most significant first.

    Returns:
        [...] int32.

    Example:
        >>> from_limbs([torch.tensor([4], dtype=torch.int8), torch.tensor([-24], dtype=torch.int8)])
        tensor([1000], dtype=torch.int32)
    """
    codes = parts[0].to(torch.int32)
    for part in parts[1:]:
        codes = codes * 256 + part
    return codes


def _rounded(x: Tensor, exponent: int, bits: int) -> Tensor:
    """The codes of `x`, still floating point."""
    top = largest_code(bits)
    if not MIN_EXPONENT <= exponent <= -MIN_EXPONENT:
        raise SpecError(
            f"a resolution of 2**{exponent} is beyond float32",
            hint=f"use an exponent of {MIN_EXPONENT} to {-MIN_EXPONENT}",
        )
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    return torch.round(wide * 2.0**-exponent).clamp(smallest_code(bits), top)
