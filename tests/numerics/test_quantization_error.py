"""The metrics of a quantized tensor against numpy, loops, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from fxq.errors import SpecError
from fxq.numerics.quantization_error import (
    divergence,
    mean_shift,
    mean_shift_bits,
    pointwise_error,
    relative_error,
    squared_correlation,
)

values = st.floats(-1e3, 1e3, width=32)
pairs = st.lists(st.tuples(values, values), min_size=1, max_size=30)
METRICS = (mean_shift, relative_error, pointwise_error, divergence)


@given(pairs)
def test_the_sums_are_those_of_loops(both: list[tuple[float, float]]) -> None:
    total = math.fsum(abs(x) for x, _ in both)
    assume(total > 1e-3)
    x, q = (torch.tensor(side) for side in zip(*both, strict=True))
    shift = abs(total - math.fsum(abs(q) for _, q in both)) / total
    error = math.fsum(abs(x - q) for x, q in both) / total
    points = math.fsum(abs(x - q) / abs(x) for x, q in both if x)
    assert mean_shift(x, q) == pytest.approx(shift, rel=1e-9, abs=1e-9)
    assert relative_error(x, q) == pytest.approx(error, rel=1e-9)
    assert pointwise_error(x, q) == pytest.approx(points, rel=1e-9)
    assert mean_shift(x, q) <= relative_error(x, q) + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_do_not_lose_what_float32_would(dtype: torch.dtype) -> None:
    x = torch.tensor([2.0**24, 1.0], dtype=dtype)  # their sum is no float32 number
    assert mean_shift(x, torch.tensor([2.0**24, 0.0])) == pytest.approx(1 / (2**24 + 1), rel=1e-9)


@given(st.floats(0, 1e9))
def test_diff_is_a_logarithm_to_base_2(shift: float) -> None:
    assert mean_shift_bits(shift) == pytest.approx(np.log2(shift + 1), rel=1e-9, abs=1e-15)


def test_the_threshold_of_diff_is_two_percent() -> None:
    assert mean_shift_bits(2**0.03 - 1) == pytest.approx(0.03)
    assert round(2**0.03 - 1, 3) == 0.021
    assert mean_shift_bits(1e-18) > 0  # no cancellation against the 1


def test_divergence_is_that_of_scipy_on_smoothed_histograms() -> None:
    rng = np.random.default_rng(0)
    x = rng.laplace(size=5000)
    q = np.round(x * 4) / 4
    bounds = (min(x.min(), q.min()), max(x.max(), q.max()))
    counts = [np.histogram(v, bins=64, range=bounds)[0] + 0.5 for v in (x, q)]
    found = divergence(torch.from_numpy(x), torch.from_numpy(q), bins=64)
    assert found == pytest.approx(stats.entropy(*counts), rel=1e-6)


def test_divergence_falls_with_finer_steps_and_ends_at_zero() -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    found = [divergence(x, (x * 2.0**k).round() / 2.0**k) for k in range(8)]
    assert found == sorted(found, reverse=True)
    assert divergence(x, x) == 0
    assert divergence(torch.ones(5), torch.ones(5)) == 0
    assert math.isfinite(divergence(torch.zeros(5), torch.ones(5)))


def test_nothing_of_nothing_is_no_error() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert [metric(zeros, zeros) for metric in METRICS] == [0, 0, 0, 0]
    assert mean_shift(zeros, ones) == math.inf
    assert relative_error(zeros, ones) == math.inf
    assert pointwise_error(zeros, ones) == 0  # no value has a relative error


@pytest.mark.parametrize("metric", METRICS)
def test_what_cannot_be_compared_is_refused(metric: object) -> None:
    assert callable(metric)
    for x, q in (
        (torch.ones(2), torch.ones(3)),
        (torch.ones(0), torch.ones(0)),
        (torch.tensor([math.nan]), torch.ones(1)),
        (torch.ones(1), torch.tensor([math.inf])),
    ):
        with pytest.raises(SpecError):
            metric(x, q)


def test_divergence_needs_bins() -> None:
    with pytest.raises(SpecError, match="bins"):
        divergence(torch.ones(2), torch.ones(2), bins=1)


@given(st.lists(st.tuples(st.integers(-99, 99), st.integers(-99, 99)), min_size=3, max_size=20))
def test_squared_correlation_is_that_of_numpy(points: list[tuple[int, int]]) -> None:
    a, b = ([float(v) for v in side] for side in zip(*points, strict=True))
    assume(len(set(a)) > 1 and len(set(b)) > 1)
    expected = np.corrcoef(a, b)[0, 1] ** 2
    assert squared_correlation(a, b) == pytest.approx(expected, abs=1e-9)
    assert squared_correlation([-3 * v + 7 for v in a], b) == pytest.approx(expected, abs=1e-9)


def test_squared_correlation_at_extreme_sizes() -> None:
    for size in (1e-200, 1e200):
        assert squared_correlation([0.0, size, 2 * size], [1.0, 2.0, 3.0]) == pytest.approx(1)
        assert squared_correlation([size, -size, size], [1.0, 2.0, 3.0]) == pytest.approx(0)


@pytest.mark.parametrize(
    ("metric", "accuracy"),
    [
        ([], []),
        ([1.0], [2.0]),
        ([1.0, 2.0], [1.0, 2.0, 3.0]),
        ([0.1, 0.1, 0.1], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [0.7, 0.7, 0.7]),
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, math.inf]),
    ],
)
def test_correlations_that_do_not_exist_are_refused(
    metric: list[float], accuracy: list[float]
) -> None:
    with pytest.raises(SpecError, match="no correlation"):
        squared_correlation(metric, accuracy)
