"""Lloyd-Max levels against the published table, exhaustive search and plain dynamic programming."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxq.errors import CalibrationError, SpecError
from fxq.numerics.lloyd import lloyd_levels, normal_lloyd_levels

# Max 1960, Table I: output levels for the unit Gaussian, N odd; and the error.
TABLE = {
    3: ([1.224], 0.1902),
    5: ([0.7646, 1.724], 0.07994),
    7: ([0.5606, 1.188, 2.033], 0.04400),
    9: ([0.4436, 0.9188, 1.476, 2.255], 0.02785),
}


def squared_error(values: Tensor, mass: Tensor, levels: Tensor) -> float:
    distance = (values.abs().double().unsqueeze(1) - levels).abs().amin(1)
    return float(distance.square() @ mass.double())


@pytest.mark.parametrize("outputs", TABLE)
def test_the_published_levels_of_a_gaussian(outputs: int) -> None:
    printed, error = TABLE[outputs]
    found = normal_lloyd_levels((outputs + 1) // 2)
    assert found.exact.tolist() == pytest.approx([0, *printed], abs=6e-4)
    assert found.alpha == found.exact[-1]
    grid = torch.linspace(-8, 8, 40_001).double()
    density = torch.exp(-0.5 * grid.square())
    assert squared_error(grid, density / density.sum(), found.exact) == pytest.approx(
        error, rel=2e-3
    )


@pytest.mark.parametrize("count", [8, 16, 64, 128])
def test_every_level_is_the_mean_of_its_part(count: int) -> None:
    exact = normal_lloyd_levels(count).exact
    grid = torch.linspace(0, 8, 400_001).double()
    density = torch.exp(-0.5 * grid.square())
    nearest = torch.bucketize(grid, (exact[1:] + exact[:-1]) / 2)
    mass = torch.zeros(count).double().index_add_(0, nearest, density)
    means = torch.zeros(count).double().index_add_(0, nearest, density * grid) / mass
    torch.testing.assert_close(means[1:], exact[1:], rtol=0, atol=3e-4 if count < 100 else 2e-3)


@given(
    sizes=st.lists(st.integers(0, 60), min_size=5, max_size=8, unique=True),
    signs=st.integers(0, 255),
    mass=st.lists(st.integers(1, 9), min_size=8, max_size=8),
    count=st.integers(2, 4),
)
def test_no_partition_is_better(sizes: list[int], signs: int, mass: list[int], count: int) -> None:
    values = torch.tensor([-s if signs >> i & 1 else s for i, s in enumerate(sizes)]).double()
    weights = torch.tensor(mass[: len(sizes)])
    found = lloyd_levels(values, weights, count)
    ordered, order = values.abs().sort()
    held = weights[order].double()
    best = np.inf
    for cuts in itertools.combinations_with_replacement(range(len(sizes) + 1), count - 1):
        parts = [0, *cuts, len(sizes)]
        levels = [0.0]
        for a, b in itertools.pairwise(parts[1:]):
            levels.append(float(ordered[a:b] @ held[a:b] / held[a:b].sum()) if a < b else 0.0)
        best = min(best, squared_error(values, weights, torch.tensor(levels).double()))
    assert squared_error(values, weights, found.exact) == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("power", [1, 3])
def test_grouping_many_values_costs_next_to_nothing(power: int) -> None:
    generator = torch.Generator().manual_seed(power)
    values = torch.randn(2500, generator=generator).double() ** power
    found = lloyd_levels(values, torch.ones(2500), 8)
    ordered = np.sort(values.abs().numpy())
    first = np.concatenate(([0.0], ordered.cumsum()))
    second = np.concatenate(([0.0], (ordered**2).cumsum()))
    size = np.subtract.outer(np.arange(2501), np.arange(2501)).astype(float)
    errors = np.where(
        size > 0,
        np.subtract.outer(second, second)
        - np.subtract.outer(first, first) ** 2 / np.where(size > 0, size, 1),
        np.inf,
    )
    least = second
    for _ in range(7):
        least = (errors + least[None, :]).min(1)
    ours = squared_error(values, torch.ones(2500), found.exact)
    assert least[-1] * (1 - 1e-9) <= ours <= least[-1] * 1.003


def test_integers_stand_for_the_levels() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(3))
    found = lloyd_levels(values, torch.ones(5000), 8)
    assert found.levels.dtype == torch.int64
    assert found.levels[0] == 0
    assert found.levels[-1] == 127
    spread = found.levels * (found.alpha / 127)
    assert bool(((spread - found.exact).abs() <= found.alpha / 254 + 1e-12).all())
    coarse = lloyd_levels(values, torch.ones(5000), 8, limit=7)
    assert coarse.levels.tolist() == list(range(8))


def test_integers_stay_different_where_levels_crowd() -> None:
    values = torch.cat((torch.linspace(0, 1e-3, 50), torch.tensor([1.0])))
    levels = lloyd_levels(values, torch.ones(51), 16).levels.tolist()
    assert levels == [*range(15), 127]


def test_order_sign_and_repetition_do_not_matter() -> None:
    values = torch.tensor([3.0, -1.0, 1.0, 0.0, 7.0, -3.0])
    found = lloyd_levels(values, torch.ones(6), 3)
    merged = lloyd_levels(
        torch.tensor([0.0, 1.0, 3.0, 7.0, 99.0]), torch.tensor([1, 2, 2, 1, 0]), 3
    )
    assert torch.equal(found.exact, merged.exact)


@pytest.mark.parametrize("count", [0, 1, 129])
def test_impossible_counts(count: int) -> None:
    with pytest.raises(SpecError, match="different integers"):
        normal_lloyd_levels(count)


@pytest.mark.parametrize(
    ("values", "mass", "says"),
    [
        ([0.0, 1.0, torch.nan], [1.0, 1, 1], "not finite"),
        ([0.0, 1.0, 2.0], [1.0, -1, 1], "negative"),
        ([0.0, 0.0, 0.0], [1.0, 1, 1], "different magnitudes"),
        ([1.0, -1.0, 2.0], [1.0, 1, 0], "different magnitudes"),
        ([], [], "different magnitudes"),
    ],
)
def test_values_without_levels(values: list[float], mass: list[float], says: str) -> None:
    with pytest.raises(CalibrationError, match=says):
        lloyd_levels(torch.tensor(values), torch.tensor(mass), 3)
