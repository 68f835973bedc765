"""The knapsack solver: exact against brute force and against scipy's integer programs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linprog

from fxq.errors import SpecError
from fxq.numerics import budget as module
from fxq.numerics.budget import choose, front

NUMBERS = st.integers(0, 20)
ITEMS = st.lists(
    st.lists(st.tuples(NUMBERS, st.integers(-5, 20)), min_size=1, max_size=4), max_size=5
)


def totals(costs: list[list[float]], losses: list[list[float]], found: list[int]) -> list[float]:
    return [sum(row[n] for row, n in zip(rows, found, strict=True)) for rows in (costs, losses)]


@given(ITEMS, st.integers(0, 60))
def test_no_other_choices_are_better(items: list[list[tuple[int, int]]], limit: int) -> None:
    costs = [[float(cost) for cost, _ in item] for item in items]
    losses = [[float(loss) for _, loss in item] for item in items]
    every = itertools.product(*(range(len(item)) for item in items))
    all_totals = [totals(costs, losses, list(found)) for found in every]
    possible = [loss for cost, loss in all_totals if cost <= limit]
    if not possible:
        least = min(cost for cost, _ in all_totals)
        with pytest.raises(SpecError, match="or less") as caught:
            choose(costs, losses, limit)
        assert f"{least:g}" in str(caught.value.hint)
        return
    cost, loss = totals(costs, losses, choose(costs, losses, limit))
    assert cost <= limit
    assert loss == min(possible)


@pytest.mark.parametrize("seed", range(8))
def test_widths_of_a_large_network(seed: int) -> None:
    """A bound that holds for any solver: the linear program, which is off by less than an item."""
    random = np.random.default_rng(seed)
    sizes = random.integers(100, 3_000_000, 60)
    costs = [[float(size * bits) for bits in (3, 4, 5, 6, 8)] for size in sizes]
    spread = random.lognormal(-5, 1, (60, 1)) * random.lognormal(0, 0.3, (60, 5))
    losses = (spread * 4.0 ** -np.array([3, 4, 5, 6, 8])).tolist()
    limit = 4.0 * float(sizes.sum())
    cost, loss = totals(costs, losses, choose(costs, losses, limit))
    relaxed = linprog(
        np.ravel(losses),
        A_ub=np.ravel(costs)[None] / limit,
        b_ub=[1.0],
        A_eq=np.kron(np.eye(60), np.ones(5)),
        b_eq=np.ones(60),
    )
    assert cost <= limit
    assert relaxed.fun <= loss * (1 + 1e-9)
    assert loss <= relaxed.fun + max(max(row) - min(row) for row in losses)


@pytest.mark.parametrize("seed", range(6))
def test_the_same_as_an_integer_program(seed: int) -> None:
    from scipy.optimize import milp

    random = np.random.default_rng(seed)
    costs = random.integers(1, 50, (10, 4)).astype(float)
    losses = random.integers(0, 1000, (10, 4)).astype(float)
    limit = float(costs.mean(1).sum())
    found = totals(costs.tolist(), losses.tolist(), choose(costs.tolist(), losses.tolist(), limit))
    wanted = milp(
        losses.ravel(),
        integrality=np.ones(40),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(np.kron(np.eye(10), np.ones(4)), 1, 1),
            LinearConstraint(costs.ravel()[None], -np.inf, limit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert found[1] == pytest.approx(wanted.fun)


def test_losses_in_proportion_to_costs_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every partial choice is as promising as every other: some have to be given up."""
    monkeypatch.setattr(module, "_STATES", 64)
    sizes = np.random.default_rng(0).integers(100, 3_000_000, 24)
    costs = [[float(size * bits) for bits in (3, 4, 5, 6, 8)] for size in sizes]
    losses = [[float(size * (8 - bits)) for bits in (3, 4, 5, 6, 8)] for size in sizes]
    limit = 4.03 * float(sizes.sum())
    cost, loss = totals(costs, losses, choose(costs, losses, limit))
    assert cost <= limit
    assert loss <= 1.001 * (8 * float(sizes.sum()) - limit)


def test_no_item_needs_no_choice() -> None:
    assert choose([], [], 0) == []


def test_all_the_budget_may_be_spent() -> None:
    assert choose([[1, 2], [1, 3]], [[1.0, 0.0], [1.0, 0.0]], 5) == [1, 1]
    assert choose([[0, 1]], [[1.0, 0.0]], 0) == [0]


@pytest.mark.parametrize(
    ("costs", "losses", "limit"),
    [
        ([[1.0]], [[math.nan]], 1),
        ([[math.inf]], [[1.0]], 1),
        ([[1.0]], [[1.0]], math.nan),
        ([[-1.0]], [[1.0]], 1),
        ([[]], [[]], 1),
        ([[1.0, 2.0]], [[1.0]], 1),
        ([[1.0]], [], 1),
    ],
    ids=str,
)
def test_numbers_that_mean_nothing(
    costs: list[list[float]], losses: list[list[float]], limit: float
) -> None:
    with pytest.raises(SpecError):
        choose(costs, losses, limit)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8))
def test_the_front(choices: list[tuple[int, int]]) -> None:
    costs, losses = ([float(x) for x in column] for column in zip(*choices, strict=True))
    kept = front(costs, losses)
    assert [costs[n] for n in kept] == sorted({costs[n] for n in kept})
    for cost, loss in zip(costs, losses, strict=True):
        assert any(costs[n] <= cost and losses[n] <= loss for n in kept)
    for one, other in itertools.permutations(kept, 2):
        assert costs[one] > costs[other] or losses[one] > losses[other]
