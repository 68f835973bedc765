"""Schedules, parameter groups, options, order and shares."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxq.errors import SpecError, TrainingError
from fxq.training import Schedule, TrainingOptions
from fxq.training.data import epoch_order, share_of, steps_per_epoch
from fxq.training.optimizer import make_optimizer, parameter_groups, set_rates
from fxq.training.schedule import rate_factor

# ---- schedules ---------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 40), st.floats(0, 0.99))
def test_cosine_is_its_closed_form(epochs: int, per_epoch: int, share: float) -> None:
    options = TrainingOptions(epochs=epochs, warmup=share * epochs)
    total = epochs * per_epoch
    warm = min(round(share * epochs * per_epoch), total - 1)
    found = [rate_factor(step, per_epoch, options) for step in range(total)]
    assert found[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])
    rest = total - warm
    assert found[warm:] == pytest.approx(
        [math.cos(math.pi * step / rest / 2) ** 2 for step in range(rest)]
    )
    assert found[warm] == 1
    assert all(0 < factor <= 1 for factor in found)


def test_steps_fall_at_their_milestones() -> None:
    options = TrainingOptions(
        epochs=10, schedule=Schedule.STEP, milestones=(0.4, 0.8), decay=0.2, warmup=1
    )
    found = [rate_factor(step, 3, options) for step in range(30)]
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert found[3:] == pytest.approx([1] * 9 + [0.2] * 12 + [0.04] * 6)


# ---- groups ------------------------------------------------------------------------------------


class Quantizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(2, 2))
        self.alphabet = nn.Parameter(torch.ones(2, 2))


def network() -> nn.Module:
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 2, 3),
            "norm": nn.BatchNorm2d(2),
            "wide": nn.LayerNorm((2, 3)),
            "linear": nn.Linear(3, 4),
            "act": nn.PReLU(),
            "q": Quantizer(),
        }
    )


def test_what_decays() -> None:
    groups = {kind: [n for n, _ in named] for kind, named in parameter_groups(network()).items()}
    assert groups["weights"] == ["conv.weight", "linear.weight", "q.alphabet"]
    assert groups["alpha"] == ["q.alpha"]
    assert set(groups["plain"]) == {
        *("conv.bias", "norm.weight", "norm.bias", "wide.weight", "wide.bias"),
        *("linear.bias", "act.weight"),
    }


def test_rates_and_decays_of_the_groups() -> None:
    options = TrainingOptions(lr=0.1, alpha_lr=0.3, weight_decay=1e-3, alpha_weight_decay=1e-5)
    optimizer = make_optimizer(network(), options)
    set_rates(optimizer, 0.5)
    found = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(0.05, 1e-3), (0.05, 0.0), (0.15, 1e-5)]
    same = make_optimizer(network(), TrainingOptions(lr=0.1, weight_decay=1e-3))
    assert same.param_groups[2]["top_lr"] == 0.1
    assert same.param_groups[2]["weight_decay"] == 1e-3


def test_nothing_to_train() -> None:
    with pytest.raises(TrainingError, match="no trainable parameters"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), TrainingOptions())


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"alpha_lr": -0.1},
        {"momentum": 1.0},
        {"nesterov": True, "momentum": 0.0},
        {"weight_decay": -1e-4},
        {"alpha_weight_decay": math.nan},
        {"warmup": 10.0},
        {"milestones": (0.7, 0.5)},
        {"milestones": (1.5,)},
        {"decay": 0.0},
        {"label_smoothing": 1.0},
        {"distill": 1.1},
        {"distill": -0.1},
        {"temperature": 0.0},
        {"temperature": math.inf},
        {"clip_gradients": 0.0},
        {"seed": -1},
    ],
    ids=str,
)
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="must be") as caught:
        TrainingOptions(**wrong)
    assert next(iter(wrong)) in str(caught.value.where)


# ---- order and shares --------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(0, 5), st.integers(0, 5))
def test_the_order_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    found = epoch_order(count, seed, epoch)
    assert sorted(found.tolist()) == list(range(count))
    assert torch.equal(found, epoch_order(count, seed, epoch))


@given(st.integers(1, 6), st.integers(1, 9))
def test_shares_are_even_and_make_up_the_batch(processes: int, each: int) -> None:
    batch = torch.randperm(processes * each)
    shares = [share_of(batch, rank, processes) for rank in range(processes)]
    assert [len(share) for share in shares] == [each] * processes
    assert list(itertools.chain(*shares)) == batch.tolist()


def test_a_batch_that_cannot_be_shared() -> None:
    assert steps_per_epoch(range(100), 32, 2) == 3
    with pytest.raises(TrainingError, match="33 cannot be shared evenly by 2 processes"):
        steps_per_epoch(range(100), 33, 2)
