from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxq.errors import CalibrationError, SpecError
from fxq.numerics import histogram as module
from fxq.numerics.histogram import Histogram

EXACT = ("counts", "exponent", "low", "high")
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
ordinary = st.floats(-1000, 1000, width=32)
values = st.lists(st.one_of(finite, ordinary), min_size=1, max_size=40)


def filled(*batches: Tensor, channels: int | None = None, bins: int | None = None) -> Histogram:
    histogram = Histogram(channels, bins)
    for batch in batches:
        histogram.update(batch)
    return histogram


def assert_same(one: Histogram, other: Histogram) -> None:
    for name in EXACT:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    torch.testing.assert_close(one.total_square, other.total_square, rtol=1e-12, atol=0)


def partition(data: list[float], cuts: list[int]) -> list[Tensor]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [torch.tensor(data[a:b]) for a, b in itertools.pairwise(places)]


@settings(max_examples=150, deadline=None)
@given(values, st.lists(st.integers(0, 99), max_size=4), st.randoms(), st.sampled_from([2, 8, 64]))
def test_only_the_multiset_matters(data: list[float], cuts: list[int], random, bins: int) -> None:
    whole = filled(torch.tensor(data), bins=bins)
    random.shuffle(data)
    parts = partition(data, cuts)
    assert_same(whole, filled(*parts, bins=bins))
    pieces = [filled(part, bins=bins) for part in parts]
    while len(pieces) > 1:
        pieces.append(pieces.pop(random.randrange(len(pieces))))
        pieces[0].merge(pieces.pop())
    assert_same(whole, pieces[0])


@settings(max_examples=150, deadline=None)
@given(values, st.sampled_from([2, 8, 2048]))
def test_bins_are_where_they_are_said_to_be(data: list[float], bins: int) -> None:
    histogram = filled(torch.tensor(data), bins=bins)
    k = int(histogram.exponent)
    expected = [0] * (2 * bins)
    for value in data:
        # Python's floats divide exactly by powers of two, unless they underflow.
        index = math.floor(math.ldexp(value, -k)) if k > -1000 else 0
        expected[index + bins] += 1
    assert histogram.counts[0].tolist() == expected
    assert (float(histogram.low), float(histogram.high)) == (min(data), max(data))
    edges = histogram.edges()
    assert float(edges[0, 0]) == -bins * 2.0**k
    # And no finer bins would have held the data.
    if k > -149:
        finer = [math.floor(math.ldexp(value, 1 - k)) for value in data]
        assert min(finer) < -bins or max(finer) >= bins


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(ordinary, finite), min_size=1, max_size=20), st.integers(1, 19))
def test_each_channel_is_its_own_histogram(data: list[tuple[float, float]], cut: int) -> None:
    x = torch.tensor(data)
    both = filled(*(part for part in x.split(cut)), channels=2, bins=16)
    for channel in (0, 1):
        alone = filled(x[:, channel], bins=16)
        for name in EXACT:
            assert torch.equal(getattr(both, name)[channel], getattr(alone, name)[0])


@pytest.mark.parametrize("channels", [None, 6])
def test_memory_layout_and_chunks_do_not_matter(
    channels: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 6, 5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 1
    plain = filled(x, channels=channels)
    others = [x.to(memory_format=torch.channels_last), x.permute(0, 1, 3, 2), x[:, :, :, ::1]]
    wide = torch.zeros(3, 6, 5, 14)
    wide[..., ::2] = x
    others.append(wide[..., ::2])
    for other in others:
        assert_same(plain, filled(other, channels=channels))
    monkeypatch.setattr(module, "_CHUNK", 16)
    assert_same(plain, filled(x, channels=channels))
    assert_same(filled(x.half()), filled(x.half().float()))
    expanded = torch.tensor([[1.0, 2.0]]).expand(5, 2)
    assert int(filled(expanded).count()) == 10


@pytest.mark.parametrize("law", ["laplace", "normal", "relu", "far"])
def test_statistics_against_numpy(law: str) -> None:
    random = np.random.default_rng(0)
    data = {
        "laplace": random.laplace(0.3, 2.0, 100_000),
        "normal": random.normal(-1, 0.01, 100_000),
        "relu": random.normal(0, 1, 100_000).clip(0),
        "far": random.normal(100, 1, 100_000),
    }[law].astype(np.float32)
    histogram = filled(torch.from_numpy(data))
    exact = data.astype(np.float64)
    bin_width = 2.0 ** int(histogram.exponent)
    assert histogram.mean().item() == pytest.approx(exact.mean(), abs=bin_width / 1024)
    assert histogram.std().item() == pytest.approx(exact.std(ddof=1), abs=bin_width / 1024)
    deviation = np.abs(exact - exact.mean()).mean()
    assert histogram.abs_deviation().item() == pytest.approx(deviation, abs=bin_width / 2)
    for fraction in (0.0, 0.001, 0.25, 0.5, 0.99, 1.0):
        expected = np.quantile(exact, fraction)
        assert histogram.quantile(fraction).item() == pytest.approx(expected, abs=1.01 * bin_width)
    assert [end.item() for end in histogram.range()] == [data.min(), data.max()]
    assert histogram.quantile(1.0).item() == data.max()


def test_a_constant_has_no_spread() -> None:
    histogram = filled(torch.full((1000,), 5.03))
    assert histogram.std().item() == pytest.approx(0, abs=1e-5)
    assert histogram.abs_deviation().item() == pytest.approx(0, abs=1e-5)
    assert histogram.quantile(0.3).item() == pytest.approx(5.03)
    zeros = filled(torch.zeros(10))
    assert zeros.mean().item() == zeros.std().item() == zeros.abs_deviation().item() == 0


def test_single_value_per_channel_and_dead_channels() -> None:
    histogram = filled(torch.tensor([[3.0, 0.0]]), channels=2)
    assert histogram.mean().tolist() == [3.0, 0.0]
    assert histogram.std().tolist() == [0.0, 0.0]
    assert histogram.count().tolist() == [1, 1]


def test_state_round_trip_shares_and_survives() -> None:
    x = torch.randn(4, 3, 8)
    histogram = filled(x, channels=3)
    clone = Histogram.from_state({k: v.clone() for k, v in histogram.state().items()})
    live = Histogram.from_state(histogram.state())
    live.update(x)
    assert_same(histogram, filled(x, x, channels=3))
    clone.update(x)
    assert_same(clone, histogram)
    assert Histogram.from_state(filled(x).state()).mean().shape == ()
    assert Histogram.from_state(filled(x).state(), per_channel=True).mean().shape == (1,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels", [None, 2])
def test_values_that_are_not_finite_are_refused_and_leave_no_trace(
    bad: float, channels: int | None
) -> None:
    histogram = Histogram(channels)
    x = torch.zeros(3, 2)
    x[1, 1] = bad
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        histogram.update(x)
    assert histogram.is_empty


def test_misuse() -> None:
    with pytest.raises(CalibrationError, match="empty"):
        Histogram().update(torch.zeros(0, 3))
    with pytest.raises(CalibrationError, match="channels"):
        Histogram(4).update(torch.zeros(2, 3))
    with pytest.raises(CalibrationError, match="channels"):
        Histogram(4).update(torch.zeros(4))
    with pytest.raises(CalibrationError, match="do not merge"):
        Histogram(4).merge(Histogram())
    with pytest.raises(CalibrationError, match="missing"):
        Histogram.from_state({"counts": torch.zeros(1, 4)})
    state = Histogram().state() | {"low": torch.zeros(3)}
    with pytest.raises(CalibrationError, match="low"):
        Histogram.from_state(state)
    for read in ("mean", "std", "abs_deviation", "range"):
        with pytest.raises(CalibrationError, match="counted nothing"):
            getattr(Histogram(), read)()
    with pytest.raises(SpecError):
        filled(torch.ones(2)).quantile(1.5)
    for bins in (1, 3, 1000):
        with pytest.raises(SpecError):
            Histogram(bins_per_sign=bins)
    with pytest.raises(SpecError):
        Histogram(0)
