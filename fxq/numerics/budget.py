"""One choice per item, with the smallest total loss that a budget pays for.

This is the multiple-choice knapsack problem, solved exactly by dynamic programming over the partial
choices that are still worth it: none of equal or smaller cost loses less, and the linear relaxation
of what is left could still beat the best choices known. The relaxation is off by less than one
item, so few partial choices remain, unless losses are in exact proportion to costs.

Papers:
    Sinha, Zoltners, "The multiple-choice knapsack problem", Operations Research 27(3), 1979
        (dominance, the relaxation as a bound).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.errors import SpecError

_ROUNDING = 1e-12
"""Relative error of a sum of losses; what a bound may be off by."""

_STATES = 2**17
"""Partial choices kept at most; of more, those that promise the smallest loss. 160 layers of real
networks need a few thousand."""


def choose(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """One choice per item: no other choices within the budget have a smaller total loss.

    Args:
        costs: ``[items][choices]`` what each choice costs, at least 0; items may differ in how many
            choices they have. Sums are exact for whole numbers.
        losses: Of the same shape; what each choice loses.
        budget: What the choices may cost together.

    Returns:
        ``[items]`` position of the choice.

    Raises:
        SpecError: Not even the cheapest choices are within the budget; an item has no choice; a
            number is not finite, or a cost negative.

    Example:
        >>> choose([[1, 2, 4], [1, 2, 4]], [[9.0, 5.0, 0.0], [3.0, 2.0, 0.0]], budget=5)
        [2, 0]
    """
    _check(costs, losses, budget)
    fronts = [front(*item) for item in zip(costs, losses, strict=True)]
    items = [
        (_of([cost[place] for place in kept]), _of([loss[place] for place in kept]))
        for cost, loss, kept in zip(costs, losses, fronts, strict=True)
    ]
    segments = _segments(items)
    easy = _greedy(items, segments, budget)
    best = math.fsum(float(loss[place]) for (_, loss), place in zip(items, easy, strict=True))
    slack = _ROUNDING * sum(float(loss.abs().max()) for _, loss in items)
    spent, lost = _of([0.0]), _of([0.0])
    steps: list[tuple[Tensor, Tensor]] = []
    for position, (cost, loss) in enumerate(items):
        total = (spent.unsqueeze(1) + cost).flatten()
        value = (lost.unsqueeze(1) + loss).flatten()
        reach = value + _relaxed(items, segments, position + 1, budget - total)
        worth = reach.argsort()[: int((reach <= best + slack).sum())][:_STATES]
        kept = worth[_undominated(total[worth], value[worth])]
        steps.append((kept // len(cost), kept % len(cost)))
        spent, lost = total[kept], value[kept]
    found = _traced(steps, int(lost.argmin())) if len(lost) else easy
    return [kept[place] for kept, place in zip(fronts, found, strict=True)]


def front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """The choices worth considering: of every other one, one of these costs and loses no more.

    Args:
        costs: ``[choices]``.
        losses: ``[choices]``.

    Returns:
        Positions, from the cheapest to the one that loses least.

    Example:
        >>> front([1, 2, 3, 3], [5.0, 7.0, 2.0, 1.0])
        [0, 3]
    """
    return _undominated(_of(costs), _of(losses)).tolist()


def _traced(steps: Sequence[tuple[Tensor, Tensor]], state: int) -> list[int]:
    """The choices that led to a state, from the parents and choices of each step."""
    found = []
    for parents, choices in reversed(steps):
        found.append(int(choices[state]))
        state = int(parents[state])
    return found[::-1]


def _check(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float
) -> None:
    numbers = [budget, *(x for rows in (costs, losses) for row in rows for x in row)]
    if not all(map(math.isfinite, numbers)) or any(x < 0 for row in costs for x in row):
        raise SpecError("costs, losses and budget must be finite, and costs not negative")
    if [len(row) for row in costs] != [len(row) for row in losses] or not all(map(len, costs)):
        raise SpecError("every item needs at least one choice, each with a cost and a loss")
    least = sum(min(row) for row in costs)
    if least > budget:
        raise SpecError(
            f"no choices cost {budget:g} or less",
            hint=f"the smallest possible budget is {least:g}",
        )


def _of(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _undominated(costs: Tensor, losses: Tensor) -> Tensor:
    """``[kept]`` positions by rising cost, each with a smaller loss than all before."""
    by_loss = torch.argsort(losses, stable=True)
    order = by_loss[torch.argsort(costs[by_loss], stable=True)]
    least = torch.cummin(losses[order], 0).values
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = least[1:] < least[:-1]
    return order[first]


# ---- the linear relaxation ---------------------------------------------------------------------


def _segments(items: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """``[segments, 4]``: item, choice, cost and gain of each step along an item's convex hull.

    Sorted by gain per cost, so that a prefix is the best use of what it costs altogether.
    """
    steps = [
        (item, stop, float(cost[stop] - cost[start]), float(loss[start] - loss[stop]))
        for item, (cost, loss) in enumerate(items)
        for start, stop in _hull(cost.tolist(), loss.tolist())
    ]
    steps.sort(key=lambda step: -step[3] / step[2])
    return _of([x for step in steps for x in step]).view(-1, 4)


def _hull(costs: list[float], losses: list[float]) -> list[tuple[int, int]]:
    """The edges of the lower convex hull of a front, from the cheapest choice on."""
    edges, start = [], 0
    while start < len(costs) - 1:
        later = range(start + 1, len(costs))
        slope = [(losses[start] - losses[n]) / (costs[n] - costs[start]) for n in later]
        stop = start + 1 + max(range(len(slope)), key=lambda n: (slope[n], n))
        edges.append((start, stop))
        start = stop
    return edges


def _greedy(items: Sequence[tuple[Tensor, Tensor]], segments: Tensor, budget: float) -> list[int]:
    """Good choices within the budget: steps along the hulls as long as they fit."""
    at = [0] * len(items)
    spent = sum(float(cost[0]) for cost, _ in items)
    for item, stop, _, _ in segments.tolist():
        cost = items[int(item)][0]
        more = float(cost[int(stop)] - cost[at[int(item)]])
        if spent + more <= budget:
            at[int(item)] = int(stop)
            spent += more
    return at


def _relaxed(
    items: Sequence[tuple[Tensor, Tensor]], segments: Tensor, first: int, budgets: Tensor
) -> Tensor:
    """``[n]``: the least the items from ``first`` on lose within ``budgets: [n]``, if divisible."""
    left = budgets - sum(float(cost[0]) for cost, _ in items[first:])
    least = sum(float(loss[0]) for _, loss in items[first:])
    own = segments[segments[:, 0] >= first]
    zero = torch.zeros(1, dtype=torch.float64)
    cost = torch.cat((zero, own[:, 2].cumsum(0)))
    gain = torch.cat((zero, own[:, 3].cumsum(0)))
    place = (torch.searchsorted(cost, left.clamp(min=0), right=True) - 1).clamp(max=len(own))
    slope = torch.cat((own[:, 3] / own[:, 2], zero))[place]
    found = least - gain[place] - slope * (left.clamp(min=0) - cost[place])
    return torch.where(left < 0, math.inf, found)
