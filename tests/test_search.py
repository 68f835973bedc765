"""The fewest layers at 8 bits: bisection, removal, and what cannot be reached."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fxq
from fxq import search as module
from fxq.errors import CalibrationError, FxqError
from fxq.models_zoo import builtin_data, digits_convnet
from fxq.search import Candidate, Search, Trial, candidates, raise_layers


@pytest.fixture(scope="module", autouse=True)
def small_networks(one_thread: None) -> None:
    """Every test here runs on one thread."""


class Network:
    """A network whose drop is the sum of what its layers that are not raised cost."""

    def __init__(self, costs: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.costs, self.compiled = costs, 0
        known = [Candidate(f"l{n}", (f"l{n}=8",), float(-n)) for n in range(len(costs))]
        monkeypatch.setattr(module, "candidates", lambda result: known)

    def compile(self, settings: Sequence[str]) -> Any:
        self.compiled += 1
        return SimpleNamespace(raised={text.removesuffix("=8") for text in settings})

    def drop(self, result: Any) -> float:
        return sum(cost for n, cost in enumerate(self.costs) if f"l{n}" not in result.raised)

    def search(self, limit: float) -> Search:
        return raise_layers(self.compile, self.drop, limit)


def test_nothing_is_raised_where_nothing_need_be(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network([0.1, 0.1], monkeypatch)
    found = network.search(0.5)
    assert (found.raised, found.candidates, network.compiled) == ((), 0, 1)
    assert found.drop == pytest.approx(0.2)


@pytest.mark.parametrize("needed", range(1, 12))
def test_the_shortest_prefix(needed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network([1.0] * needed + [0.0] * (11 - needed), monkeypatch)
    found = network.search(0.5)
    assert found.raised == tuple(f"l{n}" for n in range(needed))
    assert found.drop == 0
    assert len(found.trials) == network.compiled <= 1 + 5 + 4


def test_members_that_are_not_needed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network([0.0, 2.0, 0.0, 0.0, 2.0, 0.0], monkeypatch)
    found = network.search(0.5)
    assert found.raised == ("l1", "l4")
    assert [trial.raised for trial in found.trials][:2] == [(), ("l0", "l1", "l2")]


def test_what_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network([1.0, 1.0, 1.0], monkeypatch)
    told: list[Trial] = []
    with pytest.raises(FxqError, match=r"even with every layer at 8 bits the drop is 0\.75"):
        raise_layers(
            network.compile, lambda result: network.drop(result) + 0.75, 0.5, on_trial=told.append
        )
    assert told[-1].raised == ("l0", "l1", "l2")


def test_nothing_left_to_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network([], monkeypatch)
    with pytest.raises(FxqError, match="every layer"):
        raise_layers(network.compile, lambda result: 3.0, 0.5)


class Fork(nn.Module):
    """Two layers read one value; one of them is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.right = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.left(x) + self.right(x))
        return self.head(torch.relu(self.left(x)).mean((2, 3)))


IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_settings_raise_a_layer_and_what_it_reads() -> None:
    result = fxq.compile(Fork(), IMAGES[:1], "aciq-4bit", calibration=[IMAGES])
    found = {one.path: one for one in candidates(result)}
    assert set(found) == {"left", "right"}  # the first layer and the last have 8 bits
    raised = fxq.compile(
        Fork(), IMAGES[:1], "aciq-4bit", calibration=[IMAGES], settings=found["right"].settings
    )
    assert [one.path for one in candidates(raised)] == ["left"]
    program = raised.program
    widths = {
        str(node.target): int(module.bits.min())
        for node in program.nodes()
        if (module := program.submodule(node)) is not None and hasattr(module, "codes")
    }
    assert widths == {"first": 8, "left": 4, "right": 8, "head": 8}
    both = [*found["right"].settings, *found["left"].settings]
    full = fxq.compile(Fork(), IMAGES[:1], "aciq-4bit", calibration=[IMAGES], settings=both)
    assert candidates(full) == []


def test_the_most_sensitive_layer_comes_first() -> None:
    """The same ranking as raising each layer alone and comparing outputs would start with."""
    data = builtin_data("digits", "train")
    images = next(iter(data.batches(64, seed=0)))[0]
    settings = ["weight_bits=2", "activation_bits=2"]
    result = fxq.compile(
        digits_convnet(), images[:1], "aciq-4bit", calibration=[images], settings=settings
    )
    found = candidates(result)
    assert len(found) == 3
    assert [one.loss for one in found] == sorted((one.loss for one in found), reverse=True)
    assert found[-1].loss > 0


def test_images_are_needed() -> None:
    result = fxq.compile(Fork(), IMAGES[:1], "aciq-4bit", calibration=[IMAGES])
    result.program.sample.clear()
    with pytest.raises(CalibrationError, match="kept no"):
        candidates(result)
