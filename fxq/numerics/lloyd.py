"""Lloyd-Max levels: the levels of the least squared error for given values, zero being one.

A baseline to measure level sets by: nothing with as many levels represents these values better, but
unlike sums of powers of two the levels have no structure that hardware could use.

Papers:
    Max, "Quantizing for Minimum Distortion", IRE Transactions on Information Theory 6, 1960 (the
        conditions, and Table I for the unit Gaussian).
    Lloyd, "Least Squares Quantization in PCM", IEEE Transactions on Information Theory 28, 1982
        (method I, the iteration).
    Wu, Rokne, "An O(KN log N) Algorithm for Optimum K-level Quantization on Histograms of N
        points", ACM Computer Science Conference 1989 (the optimum by dynamic programming).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxq.errors import CalibrationError, SpecError
from fxq.numerics.levels import CODE_LIMIT

_GROUPS = 512  # by rank, and as many by size: the dynamic program looks at pairs of ends
_MOST_ITERATIONS = 2000
_NORMAL_END, _NORMAL_BINS = 6.5, 1024


@dataclass(frozen=True)
class LloydLevels:
    """The best levels for some values, and the same levels as integers.

    Attributes:
        levels: [count] int64 magnitudes, ascending from 0 to the limit that was asked for.
        exact: [count] float64, what they stand for: near levels * alpha / limit.
        alpha: The largest exact level: the clip, in the units of the values.
    """

    levels: Tensor
    exact: Tensor
    alpha: float


def lloyd_levels(
    values: Tensor, mass: Tensor, count: int, *, limit: int = CODE_LIMIT
) -> LloydLevels:
    """The magnitudes of the least squared error over weighted values, with 0 among them.

    The optimum over at most 1024 groups of neighbouring values, then Lloyd's iteration over all of
    them. With no more than 1024 different magnitudes it is the optimum itself.

    Args:
        values: [n] in any order; signs are dropped, as levels are mirrored for signed weights.
        mass: [n], how often each occurs: a histogram's counts of the bins around the values.
        count: How many levels, 0 included: 2**(bits - 1) for signed weights.
        limit: The largest integer level.

    Raises:
        SpecError: More levels than integers, or fewer than two.
        CalibrationError: Values or masses are not finite, a mass is negative, or fewer different
            magnitudes have mass than levels are wanted.

    Example:
        >>> found = lloyd_levels(torch.tensor([0.0, 0.2, 1.0, -1.2, 4.0]), torch.ones(5), 3)
        >>> found.levels.tolist(), round(found.alpha, 2)
        ([0, 35, 127], 4.0)
    """
    if not 2 <= count <= limit + 1:
        raise SpecError(
            f"{count} levels cannot be different integers up to {limit}",
            hint="use 2 levels or more, and fewer bits than int8 has",
        )
    sizes, mass = _distinct(values, mass)
    if int((sizes > 0).sum()) < count - 1:
        raise CalibrationError(
            f"{count} levels for {len(sizes)} different magnitudes",
            hint="use uniform levels, or more data",
        )
    moments = torch.stack([mass * sizes**power for power in range(3)])
    sums = F.pad(moments.cumsum(1), (1, 0))
    best = _best_ends(sums, _group_ends(sizes), count)

    def centres(thresholds: Tensor, levels: Tensor) -> Tensor:
        inner = torch.searchsorted(sizes, thresholds)
        return _centres(sums, F.pad(F.pad(inner, (1, 0)), (0, 1), value=len(sizes)), levels)

    exact = _settled(_centres(sums, best, torch.zeros(count, dtype=torch.float64)), centres)
    return LloydLevels(_as_integers(exact, limit), exact, float(exact[-1]))


def normal_lloyd_levels(count: int, *, limit: int = CODE_LIMIT) -> LloydLevels:
    """The levels of the least squared error for N(0, 1), as magnitudes with 0 among them.

    Args:
        count: How many levels, 0 included; mirrored, 2 * count - 1.
        limit: The largest integer level.

    Raises:
        SpecError: More levels than integers, or fewer than two.

    Example:
        >>> [round(one, 3) for one in normal_lloyd_levels(4).exact.tolist()]
        [0.0, 0.561, 1.188, 2.033]
    """
    bins = torch.arange(_NORMAL_BINS, dtype=torch.float64)
    middles = (bins + 0.5) * (_NORMAL_END / _NORMAL_BINS)
    start = lloyd_levels(middles, torch.exp(-0.5 * middles.square()), count, limit=limit)
    exact = _settled(start.exact, _normal_centres)
    return LloydLevels(_as_integers(exact, limit), exact, float(exact[-1]))


def _distinct(values: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """[m] float64 twice: different magnitudes in ascending order, and the mass of each."""
    sizes, mass = values.flatten().to(torch.float64).abs(), mass.flatten().to(torch.float64)
    if not bool((sizes.isfinite() & mass.isfinite() & (mass >= 0)).all()):
        raise CalibrationError(
            "values or masses are not finite, or a mass is negative",
            hint="look for an overflow in the float model",
        )
    held = mass > 0
    distinct, where = torch.unique(sizes[held], return_inverse=True)
    return distinct, torch.zeros_like(distinct).index_add_(0, where, mass[held])


def _group_ends(sizes: Tensor) -> Tensor:
    """[groups + 1] positions between which neighbours stay together; all where there are few."""
    if len(sizes) <= 2 * _GROUPS:
        return torch.arange(len(sizes) + 1)
    rank = torch.arange(len(sizes)) * _GROUPS // len(sizes)
    width = (sizes * (_GROUPS / sizes[-1])).long()
    _, members = torch.unique_consecutive(rank + width, return_counts=True)
    return F.pad(members.cumsum(0), (1, 0))


def _best_ends(sums: Tensor, ends: Tensor, count: int) -> Tensor:
    """[count + 1] positions: the partition of the least squared error, by dynamic programming.

    Args:
        sums: [3, m + 1] of mass, mass * size and mass * size**2 below each position.
        ends: [groups + 1] positions to choose from.
        count: Parts; the first has its level at 0, all others theirs in the middle of mass.
    """
    mass, first, second = (row[ends] - row[ends].unsqueeze(1) for row in sums)
    backwards = torch.ones_like(mass, dtype=torch.bool).tril()
    errors = (second - first**2 / mass.clamp(min=torch.finfo(mass.dtype).tiny)).masked_fill(
        backwards, torch.inf
    )
    least, choices = second[0], []
    for _ in range(count - 1):
        least, choice = (least.unsqueeze(1) + errors).min(0)
        choices.append(choice)
    path = [len(ends) - 1]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return ends[[0, *reversed(path)]]


def _centres(sums: Tensor, ends: Tensor, default: Tensor) -> Tensor:
    """[count] middles of mass of the parts, the first at 0; the default where a part is empty."""
    mass, first, _ = sums[:, ends].diff(dim=1)
    centres = torch.where(mass > 0, first / mass, default)
    centres[0] = 0
    return centres


def _normal_centres(thresholds: Tensor, levels: Tensor) -> Tensor:
    """[count] middles of mass of N(0, 1) between the thresholds, the first at 0."""
    ends = F.pad(F.pad(thresholds, (1, 0)), (0, 1), value=torch.inf)
    mass = torch.special.ndtr(ends).diff() * math.sqrt(2 * math.pi)
    centres: Tensor = -torch.exp(-0.5 * ends.square()).diff() / mass
    centres[0] = 0
    return centres


def _settled(levels: Tensor, centres: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[count] levels in the middle of what is nearest to them: Lloyd's method I.

    Args:
        levels: [count] to begin with.
        centres: From [count - 1] thresholds, and the levels around them, to [count] middles.
    """
    for _ in range(_MOST_ITERATIONS):
        previous, levels = levels, centres((levels[1:] + levels[:-1]) / 2, levels)
        if torch.allclose(previous, levels, rtol=1e-12, atol=0):
            break
    return levels


def _as_integers(exact: Tensor, limit: int) -> Tensor:
    """[count] int64: all different, the last at the limit."""
    index = torch.arange(len(exact))
    near = (exact * (limit / exact[-1])).round().long()
    rising = (near - index).cummax(0).values + index
    return rising.minimum(limit + 1 - len(exact) + index)
