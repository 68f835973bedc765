"""Arguments of ``forward``: fixed ones, defaults, keywords, several inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq.errors import CaptureError
from fxq.graph.capture import as_inputs, capture
from fxq.graph.program import Program

X = torch.tensor([[1.0, -2.0]])


def run(program: Program, *inputs: Any) -> Any:
    """The output in the layout the inputs have, so that it equals the model's to the last bit."""
    with torch.no_grad():
        return program.module(*inputs)


def inputs_of(program: Program) -> list[str]:
    return [str(node.target) for node in program.nodes() if node.op == "placeholder"]


class Many(nn.Module):
    def forward(
        self,
        x: Tensor,
        flag: bool,
        mask: Tensor | None = None,
        count: int = 2,
        mode: str = "a",
        *,
        scale: float | None = None,
    ) -> Tensor:
        if flag:
            x = x + 1
        if mask is not None:
            x = x + mask
        for _ in range(count):
            x = x * 2
        if mode == "a":
            x = x - 1
        return x if scale is None else x * scale


@pytest.mark.parametrize(
    "fixed",
    [
        {"flag": True},
        {"flag": False, "count": 0},
        {"flag": True, "mode": "b", "scale": 3.0},
        {"flag": False, "mask": None, "count": 3},
        {"flag": False, "mask": torch.ones(2)},
    ],
)
def test_concrete_args_are_constants(fixed: dict[str, Any]) -> None:
    program = capture(Many(), X, concrete_args=fixed)
    assert inputs_of(program) == ["x"]
    assert torch.equal(run(program, X), Many()(X, **fixed))


def test_the_example_decides_which_defaults_stay_open() -> None:
    mask = torch.full((1, 2), 5.0)
    program = capture(Many(), (X, mask), concrete_args={"flag": True})
    assert inputs_of(program) == ["x", "mask"]
    assert torch.equal(run(program, X, -mask), Many()(X, True, -mask))


def test_a_default_that_no_example_replaces_takes_its_branch() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x if mask is None else x + mask

    assert torch.equal(run(capture(Masked(), X), X), X)
    assert torch.equal(run(capture(Masked(), (X, X)), X, X), 2 * X)


def test_names_that_begin_alike_are_told_apart() -> None:
    class Alike(nn.Module):
        def forward(self, x: Tensor, x1: Tensor, x10: Tensor, x_1: bool = True) -> Tensor:
            return x + 2 * x1 + 3 * x10 if x_1 else x

    program = capture(Alike(), (X, X, X), concrete_args={"x_1": True})
    assert inputs_of(program) == ["x", "x1", "x10"]
    assert torch.equal(run(program, X, 2 * X, 3 * X), 14 * X)


def test_an_input_that_is_not_used_stays_an_input() -> None:
    class Unused(nn.Module):
        def forward(self, x: Tensor, ignored: Tensor, mask: Tensor | None = None) -> Tensor:
            return x + 1

    assert torch.equal(run(capture(Unused(), (X, X)), X, X), X + 1)
    assert torch.equal(run(capture(Unused(), (X, X, X)), X, X, X), X + 1)
    program = capture(Unused(), (X, X), concrete_args={"mask": None})
    assert inputs_of(program) == ["x", "ignored"]


def test_keyword_only_arguments() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(2, 3)

        def forward(self, x: Tensor, *, double: bool = False) -> Tensor:
            y = self.lin(input=x)
            return y * 2 if double else y

    model = Keywords().eval()
    assert torch.equal(run(capture(model, X), X), model(X))
    program = capture(model, X, concrete_args={"double": True})
    assert torch.equal(run(program, X), model(X, double=True))


class Inner(nn.Module):
    def forward(self, x: Tensor, *, other: Tensor, sign: int = 1) -> Tensor:
        return x + sign * other


def test_submodules_called_with_keywords() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()
            self.conv = nn.Conv1d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(input=x.unsqueeze(1)).squeeze(1)
            return self.inner(x=y, other=x, sign=-1)

    model = Outer().eval()
    assert torch.equal(run(capture(model, X), X), model(X))
    kept = capture(model, X, leaf_modules=[Inner])
    assert torch.equal(run(kept, X), model(X))
    assert "inner" in [node.target for node in kept.nodes()]


def test_several_inputs_of_different_dtypes() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 2)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return x + self.table(index)

    model = Embedded().eval()
    index = torch.tensor([3])
    assert torch.equal(run(capture(model, (X, index)), X, index), model(X, index))


def test_an_unknown_argument_suggests_the_nearest() -> None:
    with pytest.raises(CaptureError, match="no argument 'flags' to fix") as caught:
        capture(Many(), X, concrete_args={"flags": True})
    assert caught.value.hint == "did you mean 'flag'?"


@pytest.mark.parametrize(("example", "what"), [((X, X), "has 2 entries"), ((), "leaves out input")])
def test_too_many_or_too_few_inputs(example: tuple[Tensor, ...], what: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(nn.Linear(2, 1), example)
    assert caught.value.what == f"forward takes (input), the example {what}"
    assert "in class Linear" in caught.value.where


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(CaptureError, match="the example leaves out flag"):
        capture(Many(), X)


def test_as_inputs() -> None:
    assert as_inputs(X) == (X,)
    assert as_inputs([X, X]) == (X, X)
    with pytest.raises(CaptureError, match="must be a tensor or a tuple of arguments, not dict"):
        as_inputs({"x": X})
