"""What `fxq.compile` may be calibrated on, and what it says about everything else."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxq
from fxq.compiler import PROBE_SIZE, Result
from fxq.contracts import output_sqnr
from fxq.errors import CalibrationError, FxqError
from fxq.models_zoo import tiny_conv

pytestmark = pytest.mark.usefixtures("one_thread")


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = images(8, 3, 8, 8)
EXAMPLE = X[:1]


def quick(
    model: nn.Module, calibration: Any, recipe: Any = "minmax-int8", **options: Any
) -> Result:
    return fxq.compile(model, EXAMPLE, recipe, calibration=calibration, **options)


def same(one: Result, other: Result) -> bool:
    a, b = one.artifact.integers, other.artifact.integers
    names = a.tensors.keys() == b.tensors.keys()
    return (
        names
        and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
        and a.instructions == b.instructions
    )


# ---- calibration data ----------------------------------------------------------------------------

Batch = namedtuple("Batch", ["images", "labels"])
LABELS = torch.arange(8)


class Endless:
    """No length, and an iterator anew each time."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter([X[:4], X[4:]])


SOURCES: dict[str, Callable[[], Iterable[Any]]] = {
    "list": lambda: [X[:4], X[4:]],
    "tuple": lambda: (X[:4], X[4:]),
    "generator": lambda: (batch for batch in (X[:4], X[4:])),
    "no length": Endless,
    "labelled": lambda: [(X[:4], LABELS[:4]), (X[4:], LABELS[4:])],
    "labelled list": lambda: [[X[:4], LABELS[:4]], [X[4:], LABELS[4:]]],
    "named": lambda: [Batch(X[:4], LABELS[:4]), Batch(X[4:], LABELS[4:])],
    "arguments": lambda: [(X[:4],), (X[4:],)],
    "loader": lambda: DataLoader(TensorDataset(X, LABELS), batch_size=4),
    "loader of images": lambda: DataLoader(X, batch_size=4),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", SOURCES)
def test_calibration_may_come_as(name: str) -> None:
    expected = quick(tiny_conv(), [X[:4], X[4:]], check=False)
    assert same(quick(tiny_conv(), SOURCES[name](), check=False), expected)


def test_batches_may_differ_in_size() -> None:
    batches = [X[:5], X[5:7], X[7:], images(2, 3, 12, 12)]
    assert quick(tiny_conv(), batches, "aciq-4bit").artifact.ledger.coverage() == 1.0


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(torch.relu(self.a(x).mean((2, 3)) + self.b(y)))


def test_several_inputs() -> None:
    y = images(8, 5, seed=1)
    batches = [(X[:4], y[:4], LABELS[:4]), (X[4:], y[4:], LABELS[4:])]
    model = TwoInputs().eval()
    result = fxq.compile(model, (X[:1], y[:1]), "minmax-int8", calibration=batches)
    assert result.artifact.ledger.coverage() == 1.0
    assert output_sqnr(model(X, y).detach(), result.module(X, y)) > 25
    with pytest.raises(FxqError, match="takes 2 inputs, not 1"):
        result.module(X)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(torch.matmul(mask, self.a(x)))


def test_an_input_that_is_no_batch_is_not_cut() -> None:
    """A mask of [tokens, tokens] beside tokens of [batch, tokens, features]."""
    x, mask = images(8, 10, 6), torch.ones(10, 10).tril()
    batches = [(x[:4], mask), (x[4:], mask)]
    for recipe in ("minmax-int8", "aciq-4bit"):
        result = fxq.compile(Masked(), (x[:1], mask), recipe, calibration=batches)
        assert result.program.probe[1].shape == (10, 10)
        assert result.module(x, mask).shape == (8, 10, 2)


def test_the_probe_is_the_first_images() -> None:
    result = quick(tiny_conv(), [X])
    assert 1 <= len(result.program.probe[0]) <= PROBE_SIZE
    assert torch.equal(result.program.probe[0], X[: len(result.program.probe[0])])


BAD_SOURCES: dict[str, tuple[Any, str]] = {
    "nothing": (None, "no calibration data"),
    "a tensor": (X, "not one tensor"),
    "a number": (3, "not a int"),
    "a module": (nn.ReLU(), "not a ReLU"),
    "empty list": ([], "0 batches"),
    "empty generator": (iter(()), "0 batches"),
    "numbers": ([1, 2, 3], "a calibration batch is a int"),
    "text": ("images", "a calibration batch is a str"),
    "dictionaries": ([{"x": X}], "a calibration batch is a dict"),
    "arrays": ([X.numpy()], "a calibration batch is a ndarray"),
    "empty tuple": ([()], "a calibration batch is a tuple"),
    "empty batch": ([X[:0]], "empty"),
    "not a number": ([X * float("nan")], "NaN or infinity"),
    "infinite": ([X, X / 0], "NaN or infinity"),
    "channels": ([X[:, :2]], "fails on a calibration batch"),
    "channels later": ([X, X[:, :2]], "fails on a calibration batch"),
    "no batch dimension": ([X[0, 0]], "fails on a calibration batch"),
    "doubles": ([X.double()], "fails on a calibration batch"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_unusable_calibration_is_explained(name: str) -> None:
    source, match = BAD_SOURCES[name]
    with pytest.raises(CalibrationError, match=match) as caught:
        quick(tiny_conv(), source)
    assert caught.value.hint


def test_errors_of_the_users_loader_are_left_alone() -> None:
    def broken() -> Iterator[Tensor]:
        yield X
        raise ZeroDivisionError("in the loader")

    with pytest.raises((ZeroDivisionError, FxqError), match="in the loader"):
        quick(tiny_conv(), broken())
