"""Uniform affine quantization: real value = scale * (code - zero point).

Scales are *short*: 16 significant bits, so `scale * (code - zero_point)` is exact in float32 for
every code of up to 8 bits. Order of operations and fused multiply-add then cannot matter, which is
what lets two kernels agree to the last bit. Codes are those of ONNX's `QuantizeLinear`.

Papers:
    Jacob et al., "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877 (Eq. 1: the affine map;
        section 3: zero is exactly representable).
"""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from fxq.errors import SpecError

SCALE_BITS = 16
MIN_SCALE = 2.0**-40  # a dead channel still needs a scale; the product of two stays normal


@overload
def short_scale(scale: float) -> float: ...
@overload
def short_scale(scale: Tensor) -> Tensor: ...
def short_scale(scale: Tensor | float) -> Tensor | float:
    """The scale is rounded up to 16 significant bits, and is at least 2**-40.

    Rounding up keeps a range covered that was covered before; the change is below 2**-15.

    Args:
        scale: [...] or a float, in the units of the tensor, >= 0.

    Returns:
        The same shape and dtype. Exact in float32 whenever it is below 2**128.

    Raises:
        SpecError: A scale is NaN, infinite or negative.

    Example:
        >>> short_scale(0.1) * 2**19
        52429.0
        >>> short_scale(0.0) == 2.0**-40
        True
    """
    values = torch.as_tensor(scale, dtype=torch.float64)
    if not bool(((values >= 0) & (values < math.inf)).all()):
        raise SpecError("a scale is negative, NaN or infinite", hint="check the observed range")
    mantissa, exponent = torch.frexp(values.clamp(min=MIN_SCALE))
    short = torch.ldexp(torch.ceil(mantissa * 2**SCALE_BITS), exponent - SCALE_BITS)
    return short.to(scale.dtype) if isinstance(scale, Tensor) else float(short)


def code_range(bits: int, symmetric: bool = False) -> tuple[int, int]:
    """The smallest and largest code: 0 .. 2**bits-1, or -q .. q with q = 2**(bits-1)-1.

    Raises:
        SpecError: Bits outside 1..8, or symmetric with 1 bit.

    Example:
        >>> code_range(4), code_range(4, symmetric=True)
        ((0, 15), (-7, 7))
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise SpecError(f"{bits!r} bits is not possible", hint="use 1 to 8 bits, a whole number")
    if symmetric and bits == 1:
        raise SpecError(
            "a symmetric grid of 1 bit has the single level 0",
            hint="use 2 bits (ternary), or an asymmetric grid",
        )
    top = 2 ** (bits - 1) - 1
    return (-top, top) if symmetric else (0, 2**bits - 1)


@overload
def grid_from_range(
    low: float, high: float, bits: int, symmetric: bool = False
) -> tuple[float, int]: ...
@overload
def grid_from_range(
    low: Tensor, high: Tensor, bits: int, symmetric: bool = False
) -> tuple[Tensor, Tensor]: ...
def grid_from_range(
    low: Tensor | float, high: Tensor | float, bits: int, symmetric: bool = False
) -> tuple[Tensor | float, Tensor | int]:
    """A scale and zero point whose grid holds 0 exactly and reaches both ends within half a step.

    Asymmetric codes are 0 .. 2**bits-1; the range is first extended to contain 0. One that is 0
    alone becomes 0 .. 1: the smallest of scales would hold it, too, but the quotients of scales
    that kernels multiply their sums by would leave 32 bits. Symmetric codes are -q .. q with
    q = 2**(bits-1)-1, the zero point is 0 and both ends are covered.

    Args:
        low: [C], [] or a float, in the units of the tensor.
        high: Same shape as `low`, not below it.
        bits: 1 to 8.
        symmetric: Whether the grid mirrors around 0.

    Returns:
        scale: like `low`, a short scale; zero_point: int64 of the same shape, or an int.

    Raises:
        SpecError: Impossible bits; a range that is empty, NaN or infinite.

    Example:
        >>> grid_from_range(-1.0, 3.0, bits=2)
        (1.333343505859375, 1)
        >>> grid_from_range(-1.0, 3.0, bits=2, symmetric=True)
        (3.0, 0)
        >>> grid_from_range(0.0, 0.0, bits=1)
        (1.0, 0)
    """
    qmin, qmax = code_range(bits, symmetric)
    bottom = torch.as_tensor(low, dtype=torch.float64)
    top = torch.as_tensor(high, dtype=torch.float64)
    _check_range(bottom, top)
    if symmetric:
        scale = short_scale(torch.maximum(bottom.abs(), top.abs()) / qmax)
        zero_point = torch.zeros_like(scale)
    else:
        bottom, top = bottom.clamp(max=0), top.clamp(min=0)
        top = torch.where(top > bottom, top, 1.0)
        scale = short_scale((top - bottom) / qmax)
        zero_point = torch.round(-bottom / scale).clamp(qmin, qmax)
    if isinstance(low, Tensor):
        return scale.to(low.dtype), zero_point.to(torch.int64)
    return float(scale), int(zero_point)


def channel_grids(low: Tensor, high: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every channel at its own number of bits, as `grid_from_range` has it.

    A channel of 0 bits has code 0 alone, which stands for ``min(low, 0)``.

    Args:
        low: [C], in the units of the tensor.
        high: [C], not below `low`.
        bits: [C] integers, 0 to 8.

    Returns:
        scale: [C] like `low`; zero_point: [C] int64.

    Raises:
        SpecError: Impossible bits; a range that is empty, NaN or infinite.

    Example:
        >>> low, high = torch.tensor([-1.0, -1.0, 0.5]), torch.tensor([3.0, 3.0, 3.0])
        >>> scale, zero_point = channel_grids(low, high, torch.tensor([2, 0, 0]))
        >>> [round(value, 4) for value in scale[:2].tolist()], zero_point.tolist()
        ([1.3333, 1.0], [1, 1, 0])
    """
    _check_range(low, high)
    scale, zero_point = torch.empty_like(low), torch.empty_like(bits, dtype=torch.int64)
    for width in sorted(set(bits.tolist())):
        chosen = bits == width
        top = high[chosen] if width else low[chosen].clamp(min=0)
        scale[chosen], zero_point[chosen] = grid_from_range(low[chosen], top, max(width, 1))
    return scale, zero_point


def _check_range(low: Tensor, high: Tensor) -> None:
    if low.shape != high.shape:
        raise SpecError(f"low is {list(low.shape)} but high is {list(high.shape)}")
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise SpecError("a range is NaN or infinite", hint="was the observer fed any batch?")
    if bool((low > high).any()):
        raise SpecError("a range ends below its start", hint="swap low and high")


def quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    qmin: int,
    qmax: int,
    axis: int | None = None,
) -> Tensor:
    """Codes `clamp(rint(x / scale) + zero_point, qmin, qmax)`, in float32, ties to even.

    This is what ONNX's `QuantizeLinear` computes, to the last bit. Torch multiplies by the
    reciprocal, and `torch.quantize_per_tensor` rounds after the zero point is in; both differ from
    this only where `x / scale` is within float32 rounding of a tie. Infinities saturate; the code
    of a NaN is undefined (nothing is raised: the check would cost more than the rounding).

    Args:
        x: [...] in real units.
        scale: [] or a float; [x.shape[axis]] with an axis.
        zero_point: Like `scale`, an integer.
        qmin: Smallest code.
        qmax: Largest code.
        axis: The dimension of x that owns the scales, or None for one scale.

    Returns:
        [...] int32.

    Raises:
        SpecError: The scale's shape does not fit the axis.

    Example:
        >>> quantize(torch.tensor([-1.0, 0.25, 0.75, 9.0]), 0.5, 1, 0, 3).tolist()
        [0, 1, 3, 3]
    """
    return _codes(x, scale, zero_point, qmin, qmax, axis).to(torch.int32)


def dequantize(
    codes: Tensor, scale: Tensor | float, zero_point: Tensor | int, axis: int | None = None
) -> Tensor:
    """Real values `scale * (code - zero_point)` in float32; exact when the scale is short.

    Args:
        codes: [...] integers.
        scale: [] or a float; [codes.shape[axis]] with an axis.
        zero_point: Like `scale`, an integer.
        axis: The dimension that owns the scales, or None.

    Returns:
        [...] float32.

    Raises:
        SpecError: The scale's shape does not fit the axis.

    Example:
        >>> dequantize(torch.tensor([0, 1, 3]), 0.5, 1).tolist()
        [-0.5, 0.0, 1.0]
    """
    steps = codes.to(torch.float32) - _along(zero_point, codes, axis)
    return steps * _along(scale, codes, axis)


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    qmin: int,
    qmax: Tensor | int,
    axis: int | None = None,
) -> Tensor:
    """Equal to `dequantize(quantize(x))`, without the trip through integers.

    Args:
        x: [...] in real units.
        scale: [] or a float; [x.shape[axis]] with an axis.
        zero_point: Like `scale`, an integer.
        qmin: Smallest code.
        qmax: Largest code; [x.shape[axis]] where channels have their own.
        axis: The dimension of x that owns the scales, or None.

    Returns:
        [...] float32.

    Raises:
        SpecError: The scale's shape does not fit the axis.

    Example:
        >>> fake_quantize(torch.tensor([-1.0, 0.3, 9.0]), 0.5, 1, 0, 3).tolist()
        [-0.5, 0.5, 1.0]
    """
    codes = _codes(x, scale, zero_point, qmin, qmax, axis)
    return codes.sub_(_along(zero_point, x, axis)).mul_(_along(scale, x, axis))


def _codes(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    qmin: int,
    qmax: Tensor | int,
    axis: int | None,
) -> Tensor:
    # x.float() may be x itself, so the first operation must not be in place.
    codes = (x.to(torch.float32) / _along(scale, x, axis)).round_()
    codes.add_(_along(zero_point, x, axis))
    if isinstance(qmax, Tensor):
        return torch.minimum(codes.clamp_(min=qmin), _along(qmax, x, axis))
    return codes.clamp_(qmin, qmax)


def _along(value: Tensor | float, x: Tensor, axis: int | None) -> Tensor:
    """The value as float32, shaped to broadcast against x along the axis."""
    tensor = torch.as_tensor(value, dtype=torch.float32, device=x.device)
    if tensor.numel() == 1:
        return tensor.reshape(())
    if axis is None or tensor.dim() != 1 or tensor.numel() != x.shape[axis]:
        raise SpecError(
            f"parameters of shape {list(tensor.shape)} do not fit axis {axis} of {list(x.shape)}",
            hint="give one scale and zero point per index of the axis",
        )
    shape = [1] * x.dim()
    shape[axis] = -1
    return tensor.view(shape)
