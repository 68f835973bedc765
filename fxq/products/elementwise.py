"""Element-wise work on whole tensors in one pass over memory, where a compiler is present.

Rounding, splitting and adding up are chains of cheap operations; run one by one they cost more than
the products between them. `torch.compile` makes one loop of each chain. Small tensors, and machines
without a compiler, take the chains as they are: the numbers are the same.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxq.errors import TrainingError
from fxq.numerics.fixed_point import largest_code, limbs, smallest_code

WORTH_COMPILING = 2**18
"""How many elements a tensor has from which on the compiled loops are used."""

SAFE_EXPONENT = 100
"""Powers of two well inside of float32, whole numbers times them included."""

_log = logging.getLogger(__name__)


def statistics(x: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
    """The largest magnitude and the sum of all; NaN where one is.

    Args:
        x: ``[...]``, float; not empty.
        mask: Of the same shape: where it is not above zero, ``x`` counts as zero.
    """
    largest, total = _fused(_statistics)(*_pair(x, mask))
    return float(largest), float(total)


def rounded_sum(x: Tensor, exponent: int, bits: int, mask: Tensor | None = None) -> float:
    """The sum of the magnitudes of fixed-point numbers ``2**exponent * code`` nearest to ``x``."""
    scale = torch.tensor(2.0**-exponent, device=x.device)
    (total,) = _fused(_rounded_sum)(*_pair(x, mask), scale, _top(bits, x))
    return float(total) * math.ldexp(1.0, exponent)


def channel_sum(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[channels]``: the sum over all but dimension 1, with a mask as in `statistics`."""
    order = (0, *range(2, x.dim()), 1)
    flat = [
        None if value is None else value.permute(order).reshape(-1, x.shape[1])
        for value in (x, mask)
    ]
    found: Tensor = _fused(_channel_sum)(*flat)
    return found


def fixed_point_limbs(x: Tensor, exponent: int, bits: int, mask: Tensor | None = None) -> Tensor:
    """``[limbs, *x.shape]`` int8: the nearest fixed-point codes, in balanced digits of base 256.

    The most significant digit comes first. Each limb lies in memory as ``x`` does.

    Args:
        x: ``[...]``, float32.
        exponent: Of the resolution: codes count ``2**exponent``.
        bits: 2 to 24.
        mask: As in `statistics`.

    Raises:
        TrainingError: A value is NaN or infinite.
    """
    count = (bits + 7) // 8
    if x.numel() == 0:
        return x.new_empty((count, *x.shape), dtype=torch.int8)
    split = _SPLITS[count - 1]
    scale = torch.tensor(2.0**-exponent, device=x.device)
    dense = _dense(x if mask is None else _laid_out_as(mask, x))
    flat, largest = _fused(split)(*_pair(dense, mask), scale, _lowest(bits, x), _top(bits, x))
    if not math.isfinite(float(largest)):
        raise TrainingError(f"a tensor to be quantized holds {float(largest)}")
    strides = (dense.numel(), *dense.stride())
    result: Tensor = flat.as_strided((len(flat), *x.shape), strides)
    return result


def combined(parts: list[Tensor], powers: list[int], exponent: int) -> Tensor:
    """``2**exponent * sum(part * 256**power)``, rounded to float32 once.

    Args:
        parts: Of one shape and layout; whole numbers in int32, float32 or float64.
        powers: One per part.
        exponent: Of the sum.
    """
    first = parts[0]
    if len(parts) == 1:
        return scaled(first, exponent + 8 * powers[0])
    weights = torch.tensor([2.0 ** (exponent + 8 * power) for power in powers], dtype=torch.float64)
    alike = all(_is_dense(part) and part.stride() == first.stride() for part in parts)
    dense = parts if alike else [part.contiguous() for part in parts]
    flat = _fused(_combined)([_flat(part) for part in dense], weights.to(first.device))
    result: Tensor = flat.as_strided(first.shape, dense[0].stride())
    return result


def scaled(whole: Tensor, exponent: int) -> Tensor:
    """``2**exponent * whole``, rounded to float32 once; float32 is overwritten."""
    if whole.dtype == torch.float32 and abs(exponent) <= SAFE_EXPONENT:
        return whole.mul_(2.0**exponent)
    factor = torch.tensor(2.0**exponent, dtype=torch.float64, device=whole.device)
    dense = _dense(whole)
    flat = _fused(_scaled)(_flat(dense), factor)
    result: Tensor = flat.as_strided(dense.shape, dense.stride())
    return result


# ---- chains ----------------------------------------------------------------------------------


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask > 0, x, 0.0)


def _statistics(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    magnitude = _kept(x, mask).abs()
    return magnitude.amax(), magnitude.sum(dtype=torch.float64)


def _channel_sum(x: Tensor, mask: Tensor | None) -> Tensor:
    return _kept(x, mask).sum(0)


def _rounded_sum(x: Tensor, mask: Tensor | None, scale: Tensor, top: Tensor) -> tuple[Tensor]:
    rounded = torch.round(_kept(x, mask) * scale)
    return (rounded.abs().minimum(top).sum(dtype=torch.float64),)


def _codes(
    x: Tensor, mask: Tensor | None, scale: Tensor, lowest: Tensor, top: Tensor
) -> tuple[Tensor, Tensor]:
    kept = _kept(x, mask)
    codes = torch.round(kept * scale).minimum(top).maximum(lowest)
    return codes.to(torch.int32), kept.abs().amax()


def _limbs(bits: int, operands: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    codes, largest = _codes(*operands)
    return torch.stack(limbs(codes, bits)), largest


# One function each: the compiler keeps few variants of a function, and masks make some already.
def _one_limb(*operands: Any) -> tuple[Tensor, Tensor]:
    return _limbs(8, operands)


def _two_limbs(*operands: Any) -> tuple[Tensor, Tensor]:
    return _limbs(16, operands)


def _three_limbs(*operands: Any) -> tuple[Tensor, Tensor]:
    return _limbs(24, operands)


_SPLITS = (_one_limb, _two_limbs, _three_limbs)


def _combined(parts: list[Tensor], weights: Tensor) -> Tensor:
    total = parts[0].double() * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + part.double() * weight
    return total.float()


def _scaled(whole: Tensor, factor: Tensor) -> Tensor:
    return (whole.double() * factor).float()


# ---- compiling -------------------------------------------------------------------------------


def _fused(chain: Callable[..., Any]) -> Callable[..., Any]:
    """The chain for small tensors, one loop for large ones."""

    def run(first: Any, *rest: Any) -> Any:
        size = (first[0] if isinstance(first, list) else first).numel()
        if size < WORTH_COMPILING or not compiler_works():
            return chain(first, *rest)
        return _compiled(chain)(first, *rest)

    return run


@functools.cache
def _compiled(chain: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(chain, dynamic=True, fullgraph=True)


@functools.cache
def compiler_works() -> bool:
    """Whether `torch.compile` works on this machine; it is tried once, and a failure is told."""
    x, one = torch.linspace(-2, 2, WORTH_COMPILING), torch.tensor(1.0)
    try:
        found, _ = _compiled(_two_limbs)(x, None, one, -one, one)
    except Exception as error:  # of many kinds, for each part of the tool chain
        reason = str(error).strip().partition("\n")[0]
        _log.warning("torch.compile does not work here; training is slower: %s", reason)
        return False
    return torch.equal(found, _two_limbs(x, None, one, -one, one)[0])


def _pair(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Value and mask, flat, their elements in the same order."""
    if mask is None:
        return _flat(x), None
    like = _dense(mask)
    return _flat(_laid_out_as(like, x)), _flat(like)


def _laid_out_as(pattern: Tensor, x: Tensor) -> Tensor:
    """The tensor with its elements in memory as those of another of its shape are."""
    dense = _dense(pattern)
    return x if x.stride() == dense.stride() else torch.empty_like(dense).copy_(x)


def _flat(x: Tensor) -> Tensor:
    """The elements in the order of memory; copied where they do not fill it."""
    dense = _dense(x)
    return dense.as_strided((dense.numel(),), (1,)).detach()


def _dense(x: Tensor) -> Tensor:
    """The tensor, without holes or overlaps in memory."""
    return x if _is_dense(x) else x.contiguous()


def _is_dense(x: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _top(bits: int, x: Tensor) -> Tensor:
    return torch.tensor(float(largest_code(bits)), device=x.device)


def _lowest(bits: int, x: Tensor) -> Tensor:
    return torch.tensor(float(smallest_code(bits)), device=x.device)
