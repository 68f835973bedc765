"""The parts of an error add up, and are what Shapley's formula says."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxq.errors import SpecError
from fxq.numerics.error_split import error_parts

NUMBERS = st.floats(-100, 100, width=32)


def shapley(steps: list[Tensor]) -> list[float]:
    """By definition: what a step adds to the squared sum, averaged over all orders."""
    shares = [0.0] * len(steps)
    orders = list(itertools.permutations(range(len(steps))))
    for order in orders:
        total = torch.zeros_like(steps[0])
        for place in order:
            after = total + steps[place]
            shares[place] += float(after.square().sum() - total.square().sum()) / len(orders)
            total = after
    return shares


@given(st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=2, max_size=5))
def test_parts_are_shapley_values_and_add_up(rows: list[list[float]]) -> None:
    stages = list(torch.tensor(rows, dtype=torch.float64))
    parts = error_parts(stages)
    distance = float((stages[-1] - stages[0]).square().sum())
    size = max(1.0, *(float(one.square().sum()) for one in stages))
    assert sum(parts) == pytest.approx(distance, abs=1e-9 * size)
    steps = [after - before for before, after in itertools.pairwise(stages)]
    assert parts == pytest.approx(shapley(steps), abs=1e-9 * size)


def test_a_step_that_undoes_another_is_negative() -> None:
    zero, far = torch.zeros(4), torch.ones(4)
    assert error_parts([zero, far, zero + 0.5]) == [2.0, -1.0]
    assert error_parts([zero, far, zero]) == [0.0, 0.0]


def test_sums_are_in_float64() -> None:
    stages = [torch.zeros(1), torch.tensor([1e20]), torch.tensor([1e20])]
    assert math.isclose(error_parts(stages)[0], 1e40, rel_tol=1e-6)  # float32 would overflow


@pytest.mark.parametrize("stages", [[], [torch.zeros(2)], [torch.zeros(2), torch.zeros(3)]])
def test_stages_must_fit(stages: list[Tensor]) -> None:
    with pytest.raises(SpecError, match="stages of one shape"):
        error_parts(stages)
