"""Equalization: known answers, brute force over groups, and what scaling may never do."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fxq.errors import SpecError
from fxq.numerics import equalization
from fxq.numerics.equalization import (
    activation_scale,
    column_ranges,
    cross_layer_scale,
    keep_within,
    row_ranges,
    scale_columns,
)

MAGNITUDES = st.lists(st.floats(1e-2, 1e2), min_size=4, max_size=4).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def test_examples() -> None:
    result = doctest.testmod(equalization)
    assert result.attempted >= 6
    assert result.failed == 0


@pytest.mark.parametrize(("inputs", "out", "groups"), [(4, 6, 1), (4, 6, 2), (4, 4, 4), (4, 8, 4)])
def test_a_scaled_column_is_a_scaled_input(inputs: int, out: int, groups: int) -> None:
    weight = torch.randn(out, inputs // groups, 3, 3, dtype=torch.float64)
    scale = torch.rand(inputs, dtype=torch.float64) + 0.1
    x = torch.randn(2, inputs, 5, 5, dtype=torch.float64)
    want = functional.conv2d(x * scale.view(1, -1, 1, 1), weight, groups=groups)
    have = functional.conv2d(x, scale_columns(weight, scale, groups), groups=groups)
    assert torch.allclose(have, want)


@pytest.mark.parametrize(("inputs", "out", "groups"), [(4, 6, 1), (4, 6, 2), (4, 4, 4), (4, 8, 4)])
def test_column_ranges_by_probing_each_input(inputs: int, out: int, groups: int) -> None:
    weight = torch.randn(out, inputs // groups, 1, 1)
    for channel, found in enumerate(column_ranges(weight, groups)):
        unit = torch.zeros(1, inputs, 1, 1)
        unit[0, channel] = 1
        assert float(found) == float(functional.conv2d(unit, weight, groups=groups).abs().max())


def test_row_ranges_of_a_convolution() -> None:
    weight = torch.zeros(2, 3, 3, 3)
    weight[0, 1, 2, 0], weight[1, 0, 0, 0] = -5, 4
    assert row_ranges(weight).tolist() == [5, 4]


@given(MAGNITUDES, MAGNITUDES)
def test_rows_and_columns_meet_at_their_geometric_mean(rows: Tensor, columns: Tensor) -> None:
    scale = cross_layer_scale(rows, columns)
    assert torch.allclose(rows / scale, columns * scale)
    assert torch.allclose(rows / scale, (rows * columns).sqrt())


@given(MAGNITUDES, MAGNITUDES, st.floats(0, 1))
def test_activation_scales_are_shares(ranges: Tensor, columns: Tensor, strength: float) -> None:
    scale = activation_scale(ranges, columns, strength)
    assert float(scale.max()) == 1
    assert float(scale.min()) > 0
    doubled = activation_scale(2 * ranges, 3 * columns, strength)
    assert torch.allclose(scale, doubled)


@given(MAGNITUDES, MAGNITUDES)
def test_the_ends_of_strength(ranges: Tensor, columns: Tensor) -> None:
    even = ranges / activation_scale(ranges, columns, 1.0)
    assert torch.allclose(even, ranges.max().expand(4))
    level = columns * activation_scale(ranges, columns, 0.0)
    assert torch.allclose(level, columns.min().expand(4))


def test_silent_channels_keep_their_scale() -> None:
    assert activation_scale(torch.zeros(3), torch.ones(3), 0.5).tolist() == [1, 1, 1]
    assert activation_scale(torch.tensor([1.0, 1e-9]), torch.ones(2), 1.0).tolist() == [1, 1]
    assert cross_layer_scale(torch.zeros(2), torch.ones(2)).tolist() == [1, 1]
    assert cross_layer_scale(torch.ones(2), torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.parametrize("columns", [torch.zeros(2), torch.tensor([0.0, 1.0])])
def test_unread_columns_give_finite_scales(columns: Tensor) -> None:
    for strength in (0.0, 0.5, 1.0):
        scale = activation_scale(torch.tensor([1.0, 2.0]), columns, strength)
        assert bool(scale.isfinite().all() & (scale > 0).all())


@given(MAGNITUDES, MAGNITUDES, st.floats(0, 1))
def test_a_bound_cuts_nothing_seen(ranges: Tensor, columns: Tensor, strength: float) -> None:
    ranges = ranges.clamp(max=6)
    scale = keep_within(activation_scale(ranges, columns, strength), ranges, 6.0)
    assert bool((6.0 * scale >= ranges * (1 - 1e-12)).all())
    assert bool((scale <= 1).all())


@pytest.mark.parametrize("strength", [-0.1, 1.5, math.nan])
def test_strength_is_a_share(strength: float) -> None:
    with pytest.raises(SpecError, match="strength must be 0 to 1"):
        activation_scale(torch.ones(2), torch.ones(2), strength)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_ranges_must_be_ranges(bad: float) -> None:
    with pytest.raises(SpecError, match="finite and not negative"):
        activation_scale(torch.tensor([1.0, bad]), torch.ones(2), 0.5)


def test_groups_must_divide() -> None:
    with pytest.raises(SpecError, match="does not split into 2 groups"):
        column_ranges(torch.ones(3, 2), 2)
