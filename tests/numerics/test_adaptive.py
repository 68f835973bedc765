"""Width, resolution and interval: against the formulas in numpy, and on known distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fxq.errors import SpecError
from fxq.numerics.adaptive import (
    FLOAT_BITS,
    NUMBERS,
    Adaptation,
    AdaptationOptions,
    Mode,
    adjusted,
    advance,
    is_due,
)
from fxq.numerics.fixed_point import fixed_point, resolution_exponent

PAPER = AdaptationOptions()
Rounded = Callable[[int, int], float]


def step_on(state: Adaptation, options: AdaptationOptions, x: torch.Tensor) -> Adaptation:
    def rounded(bits: int, exponent: int) -> float:
        return float(fixed_point(x, exponent, bits).double().abs().sum())

    largest = float(x.abs().max())
    return adjusted(state, options, largest, float(x.double().abs().sum()), rounded)


def shifted(shares: dict[int, float], total: float = 100.0) -> Rounded:
    """A tensor whose sum moves by these shares at these widths."""
    return lambda bits, exponent: total * (1 - shares[bits])


def after(state: Adaptation, options: AdaptationOptions, shares: dict[int, float]) -> Adaptation:
    return adjusted(state, options, 1.0, 100.0, shifted(shares))


# ---- the width -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "bits"),
    [
        (stats.norm(), 8),
        (stats.laplace(), 8),
        (stats.t(3), 16),
        (stats.t(2), 16),
        (stats.lognorm(2), 16),
    ],
)
def test_light_tails_get_8_bits_and_heavy_ones_16(law: Any, bits: int) -> None:
    x = torch.from_numpy(law.rvs(size=200_000, random_state=0)).float()
    found = step_on(Adaptation.start(PAPER), PAPER, x)
    assert found.bits == bits
    assert found.exponent == resolution_exponent(float(x.abs().max()), bits)
    for width in range(8, bits + 1, 8):  # Eq. 2, in numpy from the definition
        step = 2.0 ** math.ceil(np.log2(x.abs().max().item() / (2 ** (width - 1) - 1)))
        exact = x.double().numpy()
        share = abs(np.abs(exact).sum() - np.abs(np.rint(exact / step) * step).sum())
        diff = np.log2(share / np.abs(exact).sum() + 1)
        assert (diff <= 0.03) == (width == bits)
    assert found.diff == pytest.approx(diff, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "tried"),
    [
        (PAPER, [8, 16, 24]),
        (AdaptationOptions(start_bits=4), [4, 8, 16, 24]),
        (AdaptationOptions(top_bits=16), [8, 16]),
        (AdaptationOptions(start_bits=6, growth=4, top_bits=12), [6, 8, 12]),
        (AdaptationOptions(start_bits=11, top_bits=11), [11]),
    ],
)
def test_a_width_grows_by_multiples_and_ends_in_float(
    options: AdaptationOptions, tried: list[int]
) -> None:
    seen: list[tuple[int, int]] = []

    def hopeless(bits: int, exponent: int) -> float:
        seen.append((bits, exponent))
        return 50.0

    found = adjusted(Adaptation.start(options), options, 3.0, 100.0, hopeless)
    assert seen == [(bits, resolution_exponent(3.0, bits)) for bits in tried]
    assert (found.bits, found.diff) == (FLOAT_BITS, 0.0)


def test_the_threshold_itself_is_still_good() -> None:
    edge = 2**0.03 - 1
    for share, bits in ((edge * (1 - 1e-9), 8), (edge * (1 + 1e-9), 16)):
        assert after(Adaptation.start(PAPER), PAPER, {8: share, 16: 0.0}).bits == bits
    exact = replace(PAPER, threshold=1.0)  # Diff is 1 where the whole sum is lost
    assert after(Adaptation.start(exact), exact, {8: 1.0}).bits == 8


def test_mode2_never_narrows_and_mode1_does() -> None:
    good, bad = {8: 0.0, 16: 0.0}, {8: 0.5, 16: 0.0}
    mode1 = replace(PAPER, mode=Mode.RECURSIVE)
    for options, widths in ((PAPER, [8, 16, 16, 16]), (mode1, [8, 16, 8, 16])):
        state, found = Adaptation.start(options), []
        for shares in (good, bad, good, bad):
            state = after(state, options, shares)
            found.append(state.bits)
        assert found == widths


def test_float_stays_in_mode2_and_may_end_in_mode1() -> None:
    state = Adaptation(FLOAT_BITS)
    assert after(state, PAPER, {}).bits == FLOAT_BITS  # nothing is rounded, nothing asked
    assert after(state, replace(PAPER, mode=Mode.RECURSIVE), {8: 0.0}).bits == 8


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_static_width_stays_and_its_resolution_follows(bits: int) -> None:
    options = AdaptationOptions.static(bits)
    state = Adaptation.start(options)
    for largest in (1.0, 1000.0):
        state = adjusted(state, options, largest, 100.0, lambda bits, exponent: 0.0)
        assert (state.bits, state.exponent) == (bits, resolution_exponent(largest, bits))
        assert state.diff == 1.0


# ---- the interval ----------------------------------------------------------------------------


@given(st.floats(0, 0.02), st.floats(-3, 3))
def test_the_interval_is_that_of_the_paper(share: float, octaves: float) -> None:
    before = Adaptation(8, moving_range=2.0, step=50, next_step=50, adjustments=3)
    largest = 2.0 ** (2.0 + octaves)
    found = adjusted(before, PAPER, largest, 100.0, shifted({8: share}))
    diff = np.log2((100 - 100 * (1 - share)) / 100 + 1)
    moving = 0.04 * np.log2(largest) + 0.96 * 2.0
    change = max(100 * diff**2, abs(moving - 2.0))
    wanted = np.clip(0.1 / change - 2, 1, 1000) if change else 1000
    assert found.moving_range == pytest.approx(moving)
    assert abs(found.next_step - 50 - np.floor(wanted)) <= (wanted > 100 or wanted % 1 < 1e-6)
    assert (found.step, found.adjustments) == (51, 4)


def test_the_first_range_begins_the_moving_average() -> None:
    first = after(Adaptation.start(PAPER), PAPER, {8: 0.0})
    assert (first.moving_range, first.next_step) == (0.0, 1)
    second = after(first, PAPER, {8: 0.0})
    assert second.next_step == 1001  # nothing has changed: the cap
    assert adjusted(second, PAPER, 2.0, 1.0, lambda bits, exponent: 1.0).moving_range == 0.04


@pytest.mark.parametrize(
    ("share", "interval"),
    [(0.02, 1), (0.0145, 1), (0.009, 3), (1e-3, 478), (1e-4, 1000), (1e-170, 1000)],
)
def test_the_interval_is_at_least_one_and_capped(share: float, interval: int) -> None:
    state = Adaptation(8, moving_range=0.0)
    found = adjusted(state, PAPER, 1.0, 1.0, lambda bits, exponent: 1 - share)
    assert found.next_step == interval


def test_a_vanishing_change_does_not_overflow_the_interval() -> None:
    tiny = replace(PAPER, alpha=5e-324, beta=1e300, delta=0.0)
    state = Adaptation(8, moving_range=1.0)
    assert adjusted(state, tiny, 8.0, 1.0, lambda bits, exponent: 1.0).next_step == 1000


def test_decisions_do_not_depend_on_the_scale_of_the_tensor() -> None:
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(5000, generator=draw) * 1.02**i for i in range(60)]
    runs = []
    for scale in (1.0, 2.0**-20):
        state = Adaptation.start(PAPER)
        run = []
        for x in batches:
            state = step_on(state, PAPER, x * scale) if is_due(state) else advance(state)
            run.append((state.bits, state.next_step, state.diff))
        runs.append(run)
    assert runs[0] == runs[1]
    assert len({next_step for _, next_step, _ in runs[0]}) > 3


def test_every_one_of_the_initial_steps_is_due_and_then_fewer() -> None:
    options = replace(PAPER, initial_steps=5)
    state, due = Adaptation.start(options), []
    for step in range(2000):
        assert state.step == step
        if is_due(state):
            due.append(step)
        state = after(state, options, {8: 0.0}) if is_due(state) else advance(state)
    assert due == [0, 1, 2, 3, 4, 5, 1005]
    assert state.adjustments == len(due)


# ---- bad and empty input ---------------------------------------------------------------------


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-37])
def test_zeros_change_nothing_and_are_looked_at_again(largest: float) -> None:
    for before in (Adaptation.start(PAPER), Adaptation(16, -9, 3.5, 70, 70, 12, 0.01)):
        found = adjusted(before, PAPER, largest, largest, lambda bits, exponent: 0.0)
        assert (found.bits, found.exponent) == (before.bits, before.exponent)
        assert found.moving_range == before.moving_range
        assert (found.step, found.next_step) == (before.step + 1, before.step + 1)
        assert (found.adjustments, found.diff) == (before.adjustments + 1, 0.0)
        assert is_due(found)


def test_a_range_after_zeros_is_a_first_range() -> None:
    zeros = adjusted(Adaptation.start(PAPER), PAPER, 0.0, 0.0, lambda bits, exponent: 0.0)
    assert adjusted(zeros, PAPER, 4.0, 9.0, lambda bits, exponent: 9.0).moving_range == 2.0


def test_a_sum_that_underflowed_is_no_error() -> None:
    found = adjusted(Adaptation.start(PAPER), PAPER, 1.0, 0.0, lambda bits, exponent: 0.0)
    assert (found.bits, found.diff) == (8, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_statistics_that_are_no_numbers_are_refused(bad: float) -> None:
    start = Adaptation.start(PAPER)
    for largest, total, share in ((bad, 1.0, 0.0), (1.0, bad, 0.0), (1.0, 1.0, 1 - bad)):
        with pytest.raises(SpecError, match="sum of absolute values") as caught:
            adjusted(start, PAPER, largest, total, shifted({8: share}, total=1.0))
        assert "NaN or infinite" in str(caught.value)


@pytest.mark.parametrize("size", [1e-30, 1e38])
def test_extreme_ranges_find_a_width(size: float) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(3)).clamp(-3, 3) * (size / 3)
    found = step_on(Adaptation.start(PAPER), PAPER, x)
    assert found.bits == 8
    assert fixed_point(x, found.exponent, 8).isfinite().all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "mode3"},
        {"start_bits": 1},
        {"start_bits": 25},
        {"growth": 0},
        {"top_bits": 32},
        {"top_bits": 20},
        {"alpha": 0.0},
        {"alpha": math.nan},
        {"beta": 0.0},
        {"beta": math.inf},
        {"delta": -1.0},
        {"gamma": math.nan},
        {"threshold": 0.0},
        {"initial_steps": -1},
        {"longest_interval": 0},
    ],
)
def test_a_wrong_option_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        AdaptationOptions(**wrong)
    assert caught.value.where == next(iter(wrong))


# ---- the state -------------------------------------------------------------------------------

counts = st.integers(0, 2**40)
states = st.builds(
    Adaptation,
    bits=st.sampled_from([4, 8, 16, 24, 32]),
    exponent=st.integers(-126, 126),
    moving_range=st.floats(-150, 128) | st.just(-math.inf),
    step=counts,
    next_step=counts,
    adjustments=counts,
    diff=st.floats(0, 10),
)


@given(states)
def test_a_state_survives_a_float64_buffer(state: Adaptation) -> None:
    buffer = torch.tensor(state.to_numbers(), dtype=torch.float64)
    assert buffer.shape == (NUMBERS,)
    back = Adaptation.from_numbers(buffer.tolist())
    assert back == state
    assert isinstance(back.step, int)


@pytest.mark.parametrize(
    "numbers",
    [
        [],
        [8.0] * (NUMBERS - 1),
        [8.0] * (NUMBERS + 1),
        [8.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [8.0, 0.0, 0.0, math.inf, 0.0, 0.0, 0.0],
        [8.0, 0.0, math.nan, 0.0, 0.0, 0.0, 0.0],
    ],
)
def test_other_numbers_are_no_state(numbers: list[float]) -> None:
    with pytest.raises(SpecError, match="no state"):
        Adaptation.from_numbers(numbers)
