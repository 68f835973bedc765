"""Analytic clipping values (ACIQ) for any number of steps, not only powers of two.

A paper's M bits are `steps = 2**M`. A real grid has fewer: 2**M - 1 steps when asymmetric and
2**M - 2 when symmetric and signed; give the real number. `prior` scales are b = mean|x - mean(x)|
(Laplace) or the standard deviation (Gauss) of the values *before* a ReLU. Every function works
elementwise, in float64 inside, and raises SpecError for a statistic that is NaN or infinite, a
negative scale, or steps that are not positive.

Papers:
    Banner, Nahshan, Soudry, "Post training 4-bit quantization of convolutional networks for
        rapid-deployment", NeurIPS 2019, arXiv:1810.05723. Eq. 5-6 and A.9-A.10 (Laplace), A.13
        (Gauss), A.18-A.19 (fused ReLU). Eq. A.14, the derivative of A.13, is misprinted; here
        A.13 itself is minimised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from typing import TypeVar

import torch
from torch import Tensor

from fxq.errors import SpecError

Values = TypeVar("Values", float, Tensor)

_NEWTON_STEPS = 100
_ROOT_TWO = math.sqrt(2.0)
_ROOT_HALF_PI = math.sqrt(math.pi / 2)
_ROOT_TWO_PI = math.sqrt(2 * math.pi)


class Prior(StrEnum):
    """The assumed shape of the values before clipping; FIT is whichever `fitted_prior` picks."""

    LAPLACE = "laplace"
    GAUSS = "gauss"
    FIT = "fit"


def laplace_clip(b: Values, steps: Values | float) -> Values:
    """The clip that minimises rounding plus clipping error of a Laplace input: b * W0(3 N**2).

    Eq. 6 of the paper, solved for any N.

    Args:
        b: [...] or a float; Laplace scale mean|x - mean|, in units of the tensor, like the result.
        steps: [...] or a float; N steps between -clip and clip.

    Example:
        >>> [round(laplace_clip(1.0, 2**bits), 4) for bits in (2, 3, 4)]
        [2.8307, 3.8972, 5.0286]
    """
    return _like(b, _scale(b) * _wright_omega(math.log(3) + 2 * _steps(steps).log()))


def gauss_clip(sigma: Values, steps: Values | float) -> Values:
    """The clip that minimises rounding plus clipping error of a Gaussian input (A.13).

    Args:
        sigma: [...] or a float; standard deviation, in units of the tensor, like the result.
        steps: [...] or a float; N steps between -clip and clip.

    Example:
        >>> [round(gauss_clip(1.0, 2**bits), 4) for bits in (2, 3, 4)]
        [1.7106, 2.1516, 2.5591]
    """
    slack = 1 / (3 * _steps(steps) ** 2)

    def slope(a: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * _gauss_excess(a) - a * slack, -2 * _gauss_tail(a) - slack

    return _like(sigma, _scale(sigma) * _newton(slope, torch.zeros_like(slack)))


def laplace_clip_fused_relu(b: Values, steps: Values | float) -> Values:
    """The best clip of relu(x) for a zero-mean Laplace x: b * W0(12 N**2), one bit more than plain.

    Eq. A.18; arguments as `laplace_clip`, with N steps between 0 and clip.

    Example:
        >>> round(laplace_clip_fused_relu(1.0, 15), 4)
        6.0937
    """
    return laplace_clip(b, 2 * steps)


def gauss_clip_fused_relu(sigma: Values, steps: Values | float) -> Values:
    """The best clip of relu(x) for a zero-mean Gaussian x: that of twice the steps.

    Eq. A.19; arguments as `gauss_clip`, with N steps between 0 and clip.

    Example:
        >>> round(gauss_clip_fused_relu(1.0, 16), 4)
        2.9362
    """
    return gauss_clip(sigma, 2 * steps)


def laplace_clip_mean_aware(mean: Values, b: Values, steps: Values | float) -> Values:
    """The best upper end of [0, clip] for relu(x), x Laplace with any mean (ours, from A.17).

    clip = b * W0(6 N**2 * exp(mean/b) / P(x > 0)), evaluated through its logarithm. Independent of
    the mean when that is below 0. When the mean is so large that the clip falls below it
    (mean/b > 6 N**2) the tail is no longer a plain exponential and the root is found by Newton.

    Args:
        mean: [...] or a float; mean of x before the ReLU.
        b: Like `mean`; Laplace scale of x.
        steps: [...] or a float; N steps between 0 and clip.

    Returns:
        Like `mean`. Where b is 0 the clip is max(mean, 0).

    Example:
        >>> [round(laplace_clip_mean_aware(mean, 1.0, 15), 2) for mean in (-2.0, 0.0, 2.0)]
        [6.09, 6.09, 7.29]
    """
    scale, count, centre = _scale(b), _steps(steps), _finite(mean)
    u = centre / _positive(scale)
    log_mass = _laplace_log_positive_mass(u)
    unit = _wright_omega(math.log(6) + 2 * count.log() + u - log_mass)
    if bool((unit < u).any()):
        unit = torch.where(unit < u, _laplace_clip_below_mean(u, log_mass.exp(), count), unit)
    return _like(mean, torch.where(scale > 0, unit * scale, centre.clamp(min=0)))


def gauss_clip_mean_aware(mean: Values, sigma: Values, steps: Values | float) -> Values:
    """The best upper end of [0, clip] for relu(x), x Gaussian with any mean (ours, from A.17).

    Args:
        mean: [...] or a float; mean of x before the ReLU.
        sigma: Like `mean`; standard deviation of x.
        steps: [...] or a float; N steps between 0 and clip.

    Returns:
        Like `mean`. Where sigma is 0 the clip is max(mean, 0).

    Example:
        >>> [round(gauss_clip_mean_aware(mean, 1.0, 16), 2) for mean in (-2.0, 0.0, 2.0)]
        [1.85, 2.94, 4.6]
    """
    scale, count, centre = _scale(sigma), _steps(steps), _finite(mean)
    u = centre / _positive(scale)
    slack = 1 / (6 * count**2)

    def slope(a: Tensor) -> tuple[Tensor, Tensor]:
        excess, tail = _gauss_excess_given_positive(a, u)
        return 2 * excess - a * slack, -2 * tail - slack

    unit = _newton(slope, torch.zeros_like(u * slack))
    return _like(mean, torch.where(scale > 0, unit * scale, centre.clamp(min=0)))


def prior_clip(
    prior: Prior, scale: Values, steps: Values | float, fused_relu: bool = False
) -> Values:
    """The zero-mean clip of a prior: one of the four functions above, chosen by name.

    Args:
        prior: Laplace (scale is b) or Gauss (scale is the standard deviation).
        scale: [...] or a float, in the units of the tensor, like the result.
        steps: [...] or a float; N steps of the whole range.
        fused_relu: Whether the range is [0, clip] instead of [-clip, clip].

    Example:
        >>> prior_clip(Prior.GAUSS, 2.0, 16) == gauss_clip(2.0, 16)
        True
    """
    count = 2 * steps if fused_relu else steps
    return laplace_clip(scale, count) if _is_laplace(prior) else gauss_clip(scale, count)


def clip_mse(
    prior: Prior,
    clip: Values,
    scale: Values | float,
    steps: Values | float,
    *,
    fused_relu: bool = False,
    mean: Values | float = 0.0,
) -> Values:
    """The model's mean squared error at a clip: rounding noise step**2/12 plus clipping noise.

    Eq. A.9 and A.13, and A.18 and A.19 when fused (those for a mean of 0).

    Args:
        prior: Laplace (scale is b) or Gauss (scale is the standard deviation).
        clip: [...] or a float, > 0. The range is [-clip, clip], or [0, clip] when fused.
        scale: [...] or a float, > 0.
        steps: [...] or a float; steps of the whole range.
        fused_relu: Whether the error is that of relu(x) on [0, clip].
        mean: [...] or a float; mean of x, only used when fused (else the range is centred on it).

    Returns:
        Like `clip`, in its units squared.

    Example:
        >>> round(clip_mse(Prior.LAPLACE, 5.0286, 1.0, 16), 4)
        0.046
    """
    unit, alpha, count = _positive(_scale(scale)), _finite(clip), _steps(steps)
    a = alpha / unit
    u = (_finite(mean) if fused_relu else torch.zeros_like(a)) / unit
    if _is_laplace(prior):
        mass, tail = _laplace_log_positive_mass(u).exp(), _laplace_square_excess(a - u)
    else:
        mass, tail = _gauss_tail(-u), _gauss_square_excess(a - u)
    rounding = mass * (a / count) ** 2 / 12 if fused_relu else (2 * a / count) ** 2 / 12
    return _like(clip, unit**2 * (rounding + (tail if fused_relu else 2 * tail)))


def aciq_range(
    mean: Values,
    scale: Values,
    low: Values,
    high: Values,
    steps: Values | float,
    prior: Prior = Prior.LAPLACE,
    fused_relu: bool = False,
    mean_aware: bool = False,
) -> tuple[Values, Values]:
    """The range to quantize: the ACIQ window, never wider than what was observed.

    Fused: [0, min(high, clip)] with clip = max(mean, 0) + alpha (the authors' code), or the
    mean-aware optimum. Not fused: [max(low, mean - alpha), min(high, mean + alpha)]; the authors'
    code slides a window of width 2 alpha up to `low` instead, covering values that never occur.

    Args:
        mean: [C] or a float; mean before the ReLU.
        scale: Like `mean`; b or the standard deviation before the ReLU, as the prior says.
        low: Like `mean`; the smallest value observed.
        high: Like `mean`; the largest value observed.
        steps: [C] or a float; steps of the whole range.
        prior: Laplace or Gauss.
        fused_relu: Whether a ReLU follows, so that negative values become 0.
        mean_aware: Whether a fused clip accounts for the mean; no effect when not fused.

    Returns:
        low, high: like `mean`.

    Example:
        >>> low, high = aciq_range(1.0, 1.0, -4.0, 20.0, 16)
        >>> round(low, 2), round(high, 2)
        (-4.0, 6.03)
        >>> round(aciq_range(1.0, 1.0, -4.0, 20.0, 15, fused_relu=True, mean_aware=True)[1], 2)
        6.53
    """
    centre, bottom, top = _finite(mean), _finite(low), _finite(high)
    if not fused_relu:
        alpha = _finite(prior_clip(prior, scale, steps))
        lower, upper = torch.maximum(bottom, centre - alpha), torch.minimum(top, centre + alpha)
        return _like(mean, lower), _like(mean, upper)
    if mean_aware:
        rule = laplace_clip_mean_aware if _is_laplace(prior) else gauss_clip_mean_aware
        clip = _finite(rule(mean, scale, steps))
    else:
        clip = centre.clamp(min=0) + _finite(prior_clip(prior, scale, steps, fused_relu=True))
    upper = torch.minimum(top, clip).clamp(min=0)
    return _like(mean, torch.zeros_like(upper)), _like(mean, upper)


def _is_laplace(prior: Prior) -> bool:
    if prior is Prior.FIT:
        raise SpecError("there is no clip of a law still to be fitted", hint="call fitted_prior")
    return prior is Prior.LAPLACE


def _wright_omega(log_z: Tensor) -> Tensor:
    """W0(exp(log_z)): the root of a + log(a) == log_z, without forming exp(log_z)."""
    # With y = log(a) the function exp(y) + y is convex; starting right of the root, Newton's
    # method descends to it without ever overshooting.
    y = torch.where(log_z > 1, log_z.clamp(min=1).log(), log_z)
    for _ in range(40):
        a = y.exp()
        y = y - (a + y - log_z) / (a + 1)
    return y.exp()


def _newton(slope: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor) -> Tensor:
    """Root of a convex decreasing function from its left side, where Newton never overshoots."""
    a = start
    for _ in range(_NEWTON_STEPS):
        value, derivative = slope(a)
        moved = a - value / derivative
        if torch.equal(moved, a):
            break
        a = moved
    return a


def _laplace_log_positive_mass(u: Tensor) -> Tensor:
    """The logarithm of P(x > 0) for a Laplace x with b = 1 and mean u."""
    return torch.where(u < 0, u - math.log(2), torch.log1p(-0.5 * torch.exp(-u.clamp(min=0))))


def _laplace_clip_below_mean(u: Tensor, mass: Tensor, steps: Tensor) -> Tensor:
    slack = mass / (6 * steps**2)

    def slope(a: Tensor) -> tuple[Tensor, Tensor]:
        below = torch.exp(-(u - a).clamp(min=0))
        return 2 * (u - a) + below - a * slack, below - 2 - slack

    return _newton(slope, 2 * u / (2 + slack))


def _gauss_tail(t: Tensor) -> Tensor:
    """P(z > t) for a standard normal z."""
    return 0.5 * torch.erfc(t / _ROOT_TWO)


def _laplace_square_excess(t: Tensor) -> Tensor:
    """E[max(x - t, 0)**2] for a Laplace x with b = 1 and mean 0."""
    below = (-t).clamp(min=0)
    return torch.where(t < 0, below**2 + 2 - torch.exp(-below), torch.exp(-t.clamp(min=0)))


def _gauss_square_excess(t: Tensor) -> Tensor:
    """E[max(z - t, 0)**2] for a standard normal z."""
    return (t * t + 1) * _gauss_tail(t) - t * torch.exp(-0.5 * t * t) / _ROOT_TWO_PI


def _gauss_excess(t: Tensor) -> Tensor:
    """E[max(z - t, 0)] for a standard normal z."""
    return torch.exp(-0.5 * t * t) / _ROOT_TWO_PI - t * _gauss_tail(t)


def _mills(t: Tensor) -> Tensor:
    """P(z > t) divided by the density at t; finite for any t >= 0."""
    ratio: Tensor = torch.special.erfcx(t / _ROOT_TWO)
    return _ROOT_HALF_PI * ratio


def _gauss_excess_given_positive(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """E[max(x - a, 0)] and P(x > a), both divided by P(x > 0), for x normal with mean u."""
    up = u.clamp(min=0)
    mass = _gauss_tail(-up)
    excess, tail = _gauss_excess(a - up) / mass, _gauss_tail(a - up) / mass
    # Far below 0 every term underflows; ratios to the density at 0 do not.
    down = u.clamp(max=0)
    t = a - down
    ratio = torch.exp(-0.5 * a * (a - 2 * down)) / _mills(-down)
    square = t.clamp(min=1).pow(-2)  # 1 - t*mills(t) cancels for large t: use its series there
    bracket = torch.where(t > 50, square * (1 - 3 * square), 1 - t * _mills(t))
    below = u < 0
    return torch.where(below, ratio * bracket, excess), torch.where(below, ratio * _mills(t), tail)


def _like(sample: Values, result: Tensor) -> Values:
    if isinstance(sample, Tensor):
        return result.to(sample.dtype) if sample.is_floating_point() else result
    return float(result)


def _scale(value: Tensor | float) -> Tensor:
    scale = _finite(value)
    if bool((scale < 0).any()):
        raise SpecError("a prior's scale is negative", hint="b and sigma are mean distances, >= 0")
    return scale


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _steps(value: Tensor | float) -> Tensor:
    steps = _finite(value)
    if bool((steps <= 0).any()):
        raise SpecError("a grid needs more than 0 steps", hint="give 2**bits - 1, or more exactly")
    return steps


def _finite(value: Tensor | float) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if not bool(tensor.isfinite().all()):
        raise SpecError("a statistic is NaN or infinite", hint="was the observer fed any batch?")
    return tensor
