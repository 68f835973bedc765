"""What was broken on purpose is found: the pass, and the node."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxq import registry
from fxq.bisect import CAPTURE, Bisection, Measured, bisect, smallest_set
from fxq.errors import CalibrationError, FxqError, RecipeError
from fxq.measure import OutputSqnr
from fxq.models_zoo import tiny_residual
from fxq.recipe import Recipe

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
INT8 = Recipe.load("minmax-int8")


@pytest.fixture(scope="module", autouse=True)
def small_networks(one_thread: None) -> None:
    """Every test here runs on one thread."""


@pytest.fixture(scope="module", autouse=True)
def broken() -> Iterator[None]:
    """The passes of ``broken.py`` are known by name."""
    before = dict(registry._plugins)
    registry.load_plugin(Path(__file__).parent / "broken.py")
    yield
    registry._plugins.clear()
    registry._plugins.update(before)


def with_passes(*names: str, at: int | None = None, **options: str) -> Recipe:
    """The recipe with broken passes put in, or, at 0, in the place of the fold."""
    added = tuple(registry.find_pass(name)(**options) for name in names)
    passes = (*INT8.passes, *added) if at is None else (*added, *INT8.passes[1:])
    return replace(INT8, passes=passes)


def found_in(recipe: Recipe, bound: float, **options: Any) -> Bisection:
    torch.manual_seed(0)
    model = tiny_residual().eval()
    metric = OutputSqnr(model, [IMAGES])
    return bisect(model, IMAGES[:1], recipe, metric, bound, calibration=[IMAGES], **options)


@pytest.mark.parametrize(
    ("recipe", "first", "node"),
    [
        (lambda: with_passes("fold-with-wrong-eps", at=0, norm="bn1"), 0, "conv1"),
        (lambda: with_passes("shrink-clip", layer="conv2"), -1, None),
        (lambda: with_passes("swap-channels", layer="conv1"), -1, "conv1"),
    ],
    ids=["eps", "clip", "channels"],
)
def test_what_is_broken_is_named(
    recipe: Callable[[], Recipe], first: int, node: str | None
) -> None:
    chosen = recipe()
    wrong = chosen.passes[first].name
    measured = list(found_in(chosen, -100.0).measured)
    place = [one.name for one in measured].index(wrong)
    assert measured[place - 1].value > measured[place].value + 2
    found = found_in(chosen, measured[place].value + 1)
    assert found.first == found.measured[-1].name == wrong
    (culprit,) = found.culprits
    assert culprit.node == node or culprit.operator == "ActivationQuantizer"
    assert found.together == pytest.approx(measured[place].value, abs=0.5)


def test_measurements_are_told_in_order() -> None:
    told: list[Measured] = []
    found = found_in(INT8, 0.0, on_measured=told.append)
    assert tuple(told) == found.measured
    assert [one.name for one in told] == [CAPTURE, *(one.name for one in INT8.passes), "lower"]
    assert told[0].value == math.inf
    assert found.first is None
    assert found.culprits == ()


def test_few_bits_are_a_set_none_of_which_can_be_left_out() -> None:
    recipe = Recipe.load("naive-4bit").with_settings(["weight_bits=2"])
    last = found_in(recipe, -100.0).measured[-2].value
    found = found_in(recipe, last + 3)
    assert found.first in ("quantize-minmax", "correct-bias")
    assert 1 <= len(found.culprits) <= found.changed
    assert found.together is not None
    assert found.together < last + 3
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["first"] == found.first


def test_a_network_that_is_bad_in_float() -> None:
    torch.manual_seed(0)
    with pytest.raises(FxqError, match="below the bound already: 50"):
        bisect(tiny_residual().eval(), IMAGES[:1], INT8, lambda _: 50.0, 60, calibration=[IMAGES])


def test_what_is_no_number_is_below() -> None:
    values = iter([90.0, math.nan])
    found = bisect(
        nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval(),
        IMAGES[:1],
        INT8,
        lambda _: next(values, math.nan),
        60,
        calibration=[IMAGES],
    )
    assert found.first == "fold-batch-norm"


def test_recipes_that_train_are_refused() -> None:
    with pytest.raises(RecipeError, match="to be trained"):
        found_in(Recipe.load("apot-4bit"), 10)


def test_there_must_be_inputs() -> None:
    with pytest.raises(CalibrationError, match="no inputs"):
        OutputSqnr(nn.Identity(), [])


# ---- the search --------------------------------------------------------------------------------


@given(st.integers(1, 8), st.data())
def test_the_set_fails_and_no_member_can_be_left_out(size: int, draw: st.DataObject) -> None:
    """Against every family of sets that fail, where more of them is never better."""
    members = "abcdefgh"[:size]
    needed = draw.draw(
        st.lists(st.sets(st.sampled_from(members), min_size=1), min_size=1, max_size=3)
    )

    def fails(some: Sequence[str]) -> bool:
        return any(need <= set(some) for need in needed)

    found = smallest_set(members, fails)
    assert fails(found)
    assert not any(fails([one for one in found if one != left]) for left in found)


def test_a_set_that_holds() -> None:
    assert smallest_set("abc", lambda some: False) == []
    assert smallest_set("", lambda some: True) == []
