"""`FollowedRange`: nothing is rounded, and the range of what passed is deployed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fxq.quant.learned_values import FollowedRange

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(low: float, high: float) -> Tensor:
    x = torch.empty(2, 3, 4, 4).uniform_(low / 2, high / 2)
    x[0, 0, 0, 0], x[1, 2, 3, 3] = low, high
    return x


def ends(module: FollowedRange) -> tuple[float, float]:
    return float(module.low), float(module.high)


def grid(module: FollowedRange) -> tuple[float, float]:
    """The smallest and the largest value of what is deployed."""
    found = module.frozen()
    zero, scale = int(found.zero_point), float(found.scale)
    return -zero * scale, (2**found.bits - 1 - zero) * scale


@pytest.mark.parametrize("mode", [True, False])
def test_it_is_the_identity(mode: bool) -> None:
    module = FollowedRange(8, nonneg=False).train(mode)
    x = batch(-1, 2).requires_grad_()
    assert module(x) is x


def test_the_first_batch_sets_the_range_and_the_mean_of_the_first_follows() -> None:
    module = FollowedRange(8, nonneg=False)
    module(batch(-2, 4))
    assert ends(module) == (-2, 4)
    module(batch(-4, 6))
    assert ends(module) == pytest.approx((-3, 5))
    module(batch(-6, 8))
    assert ends(module) == pytest.approx((-4, 6))


def test_later_batches_weigh_a_tenth_and_one_in_eight_counts() -> None:
    module = FollowedRange(8, nonneg=False, momentum=0.9)
    for _ in range(16):
        module(batch(-1, 1))
    module(batch(-1, 11))  # the 17th
    assert ends(module) == pytest.approx((-1, 2))
    for _ in range(7):
        module(batch(-99, 99))
    assert ends(module) == pytest.approx((-1, 2))
    module(batch(-1, 12))
    assert ends(module) == pytest.approx((-1, 3))
    assert int(module.batches) == 25


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.flatten(1),
        lambda x: x[:, :, ::3, ::3],
    ],
)
def test_any_layout(layout: object) -> None:
    module = FollowedRange(8, nonneg=False)
    module(layout(batch(-3, 5)))  # type: ignore[operator]
    assert ends(module) == (-3, 5)


def test_eval_and_empty_batches_change_nothing() -> None:
    module = FollowedRange(8, nonneg=False)
    module(batch(-1, 1))
    before = copy.deepcopy(module.state_dict())
    module(torch.empty(0, 3, 4, 4))
    module.eval()(batch(-9, 9))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_what_is_deployed_covers_the_range() -> None:
    module = FollowedRange(8, nonneg=False)
    module(batch(-2, 4))
    low, high = grid(module)
    step = float(module.frozen().scale)
    assert (low, high) == pytest.approx((-2, 4), abs=step)
    x = batch(-2, 4)
    assert float((module.frozen()(x) - x).abs().max()) <= step


def test_behind_a_relu() -> None:
    """The values below zero that are seen before it do not count, nor those above its bound."""
    module = FollowedRange(8, nonneg=True, upper=6.0)
    module(batch(-50, 5))
    assert grid(module) == pytest.approx((0, 5), rel=0.01)
    bounded = FollowedRange(8, nonneg=True, upper=6.0)
    bounded(batch(-50, 50))
    assert grid(bounded) == pytest.approx((0, 6), rel=0.01)


@pytest.mark.parametrize("nonneg", [False, True])
def test_before_any_batch_there_is_a_grid_nevertheless(nonneg: bool) -> None:
    found = FollowedRange(8, nonneg=nonneg).frozen()
    assert float(found.scale) > 0
    assert found(torch.zeros(3)).tolist() == [0, 0, 0]


def test_its_state_is_saved() -> None:
    module, other = FollowedRange(8, nonneg=False), FollowedRange(8, nonneg=False)
    for value in range(1, 12):
        module(batch(-value, value))
    other.load_state_dict(module.state_dict())
    for one in (module, other):
        one(batch(-7, 99))
    assert ends(module) == ends(other)
    assert module.describe() == other.describe() == repr(module)[len("FollowedRange(") : -1]
