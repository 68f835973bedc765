"""Projection onto levels within a clip that is learned, and the clips to begin with.

The clip alpha is the value of the largest level: x becomes the level nearest to x / alpha, times
alpha. Rounding counts as the identity in the backward pass (straight-through).

Papers:
    Li, Dong, Wang, "Additive Powers-of-Two Quantization: An Efficient Non-uniform Discretization
        for Neural Networks", ICLR 2020, arXiv:1909.13144: Eq. 7 and 8 (reparameterized clipping),
        9 (weight normalization), 11 (the gradient of PACT), 14 (the error that clips minimise).
    Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018,
        arXiv:1805.06085.
    Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153: with uniform levels
        up to Q and alpha = Q * step, Eq. 8 is its gradient of the step over Q.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxq.errors import CalibrationError, SpecError
from fxq.numerics.levels import level_table

LEAST_STD = 1e-5
"""The epsilon of Eq. 9, here a floor."""

_LEAST_CLIP = 1e-8
_NORMAL_END = 16.0
# Multiples of the best so far: down to a 4000th 4 % apart, then closer around it.
_SWEEPS = (
    [0.96**i for i in range(204)],
    [1 + 0.004 * i for i in range(-12, 13)],
    [1 + 0.0005 * i for i in range(-10, 11)],
)


class ClipGradient(StrEnum):
    """What the clip learns from: all values (Eq. 8), clipped ones only (Eq. 11), or nothing."""

    RCF = "rcf"
    PACT = "pact"
    NONE = "none"


def project(
    x: Tensor,
    alpha: Tensor,
    table: Tensor,
    *,
    signed: bool,
    gradient: ClipGradient = ClipGradient.RCF,
    straight: bool = False,
    levels: tuple[int, ...] | None = None,
) -> Tensor:
    """The values nearest to x among the levels up to alpha; halfway, the larger magnitude.

    Computed in float32 (float64 for float64) whatever the autocast. NaN stays NaN. Infinity is
    clipped, and gives alpha a NaN gradient. An alpha below 1e-8 counts as 1e-8, so that training
    recovers from a step too far. Differentiable once.

    Args:
        x: [...] float.
        alpha: [] or [1], > 0, in the units of x.
        table: [2 * top + 1], or [4 * top + 1] when signed: `level_table(levels, signed=signed)`.
        signed: Whether the levels have both signs; without, negative values become 0.
        gradient: What reaches alpha, as a sum over x without any scale.
        straight: Whether the gradient of x passes beyond the clip, too.
        levels: The magnitudes as numbers; a compiler compares with them, which it can put into one
            loop with its neighbours, rather than look up.

    Returns:
        [...] like x, in its dtype and memory format.

    Example:
        >>> from fxq.numerics.levels import LevelSet, level_table, magnitudes
        >>> table = level_table(magnitudes(LevelSet.APOT, 2)).float()  # 0, 1, 2, 4
        >>> alpha = torch.tensor(8.0, requires_grad=True)
        >>> y = project(torch.tensor([-3.0, 2.9, 3.0, 9.0]), alpha, table, signed=False)
        >>> y.tolist()
        [0.0, 2.0, 4.0, 8.0]
        >>> y.sum().backward()
        >>> round(alpha.grad.item(), 4)  # (2 - 2.9) / 8 + (4 - 3) / 8 + 1
        1.0125
    """
    y: Tensor = _Projection.apply(  # type: ignore[no-untyped-call]
        x, alpha, table, signed, gradient, straight, levels
    )
    return y


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        table: Tensor,
        signed: bool,
        gradient: ClipGradient,
        straight: bool,
        levels: tuple[int, ...] | None,
    ) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        clip: Tensor = alpha.to(precise).reshape(()).clamp(min=_LEAST_CLIP)
        half_steps = len(table) // (4 if signed else 2) * 2  # 2 * top
        below = half_steps if signed else 0
        scaled = x.to(precise) * (half_steps / clip)
        scaled.clamp_(-below, half_steps).nan_to_num_(nan=half_steps + 1)
        unit = 2 * clip / half_steps
        if levels is not None and torch.compiler.is_compiling():
            y = (_compared(scaled, levels, half_steps) * unit).to(x.dtype)
        else:
            index = scaled.to(torch.int32)  # truncates: half up in magnitude
            if signed:
                index.add_(below)
            values = F.pad(table.to(precise), (0, 1), value=torch.nan) * unit
            y = _look_up(values, index).to(x.dtype)
        ctx.save_for_backward(x, y, clip)
        ctx.signed, ctx.gradient, ctx.straight = signed, gradient, straight
        ctx.alpha_like = alpha.shape, alpha.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, y, clip = ctx.saved_tensors
        # Masks are floats, 1 inside and 0 outside: on CPUs several times faster than bools.
        inside = x.abs().le_(clip) if ctx.signed else x.minimum(clip).clamp_(min=0).eq_(x)
        to_alpha = to_x = None
        if ctx.needs_input_grad[1] and ctx.gradient is not ClipGradient.NONE:
            # Outside, y is the clip itself (or 0 below an unsigned one) and y / clip the sign.
            smooth = x if ctx.gradient is ClipGradient.RCF else y
            share = torch.addcmul(y, smooth, inside, value=-1).mul_(grad)
            shape, dtype = ctx.alpha_like
            to_alpha = (share.sum(dtype=clip.dtype) / clip).to(dtype).reshape(shape)
        if ctx.needs_input_grad[0]:
            to_x = grad if ctx.straight else inside.mul_(grad)
        return to_x, to_alpha, None, None, None, None, None


def _compared(scaled: Tensor, levels: tuple[int, ...], half_steps: int) -> Tensor:
    """[...] levels nearest to ``scaled / 2``; NaN where it is beyond the largest."""
    magnitude = scaled.abs()
    total = torch.zeros_like(scaled)
    for low, high in itertools.pairwise(levels):
        total = total + torch.where(magnitude >= low + high, float(high - low), 0.0)
    found = torch.where(scaled < 0, -total, total)
    return torch.where(scaled > half_steps, torch.nan, found)


def _look_up(values: Tensor, index: Tensor) -> Tensor:
    """[...] values[index], several times faster than that, channels-last staying so."""
    if index.is_contiguous():
        return values.index_select(0, index.view(-1)).view(index.shape)
    last = index.movedim(1, -1)
    return values.index_select(0, last.reshape(-1)).view(last.shape).movedim(-1, 1)


def normalized_weight(weight: Tensor, *, detached: bool, unbiased: bool = True) -> Tensor:
    """The weight with mean 0 and standard deviation 1 over the whole tensor.

    The epsilon of Eq. 9 is not added but a floor: deviations above 1e-5 count as they are, like in
    the authors' code, and a constant weight becomes zeros.

    Args:
        weight: [out, in/groups, kh, kw] or any shape.
        detached: Whether mean and deviation are constants to the gradient (the authors' CIFAR-10
            code; that for ImageNet differentiates them).
        unbiased: Whether the deviation divides by n - 1 (the code) or by n (the paper).

    Raises:
        SpecError: The weight has fewer than two elements.

    Example:
        >>> normalized_weight(torch.tensor([1.0, 2.0, 3.0]), detached=False).tolist()
        [-1.0, 0.0, 1.0]
    """
    if weight.numel() < 2:
        raise SpecError(
            f"a weight of {weight.numel()} elements has no deviation to normalize by",
            hint="leave this layer without weight normalization",
        )
    std, mean = torch.std_mean(weight.detach() if detached else weight, correction=int(unbiased))
    return (weight - mean) / std.clamp(min=LEAST_STD)


def normal_clip(levels: Tensor) -> float:
    """The clip of the least mean squared error for N(0, 1), signed or behind a ReLU alike.

    Args:
        levels: [count] magnitudes, ascending from 0.

    Example:
        >>> from fxq.numerics.levels import LevelSet, levels_of
        >>> [round(normal_clip(levels_of(LevelSet.APOT, bits)), 2) for bits in (2, 3, 4, 5)]
        [1.22, 2.07, 2.63, 3.36]
    """
    units = levels.to(torch.float64) / float(levels[-1])
    middles = (units[1:] + units[:-1]) / 2

    def error(clip: float) -> float:  # but for the variance, which does not depend on the clip
        ends = F.pad(F.pad(middles * clip, (1, 0)), (0, 1), value=torch.inf)
        mass = torch.special.ndtr(ends).diff()
        first = -torch.exp(-0.5 * ends.square()).diff() / math.sqrt(2 * math.pi)
        return float((units * clip) @ (units * clip * mass - 2 * first))

    return _least(error, _NORMAL_END)


def least_error_clip(values: Tensor, mass: Tensor, levels: Tensor, *, signed: bool) -> float:
    """The clip of the least squared error (Eq. 14) over weighted values, within 0.1 %.

    Args:
        values: [n], the middles of a histogram's bins, say.
        mass: [n], how often each occurs.
        levels: [count] magnitudes, ascending from 0.
        signed: Whether the levels have both signs; without, negative values become 0 anyway.

    Returns:
        The clip in the units of the values; up to twice the largest of them.

    Raises:
        CalibrationError: No value has mass that levels could stand for.

    Example:
        >>> values, levels = torch.tensor([0.5, 1.0]), torch.tensor([0, 1, 2])
        >>> round(least_error_clip(values, torch.ones(2), levels, signed=False), 3)
        1.0
    """
    sizes = values.to(torch.float64).abs() if signed else values.to(torch.float64).clamp(min=0)
    held = (mass > 0) & (sizes > 0)
    sizes, mass = sizes[held], mass[held].to(torch.float64)
    if not len(sizes) or not bool(sizes.isfinite().all()):
        raise CalibrationError(
            "values are all zero, or not finite", hint="look at the calibration data"
        )
    table = level_table(levels).to(torch.float64)
    top = len(table) // 2

    def error(clip: float) -> float:
        unit = clip / top
        nearest = table[(sizes * (2 / unit)).clamp_(max=2 * top).long()]
        return float((nearest * unit).sub_(sizes).square_() @ mass)

    return _least(error, 2 * float(sizes.amax()))


def _least(error: Callable[[float], float], best: float) -> float:
    """The argument of the least error, searched from the largest down."""
    for sweep in _SWEEPS:
        best = min((best * fraction for fraction in sweep), key=error)
    return best
