"""What cannot be captured says where, what and what to do: the real file, the real line."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq.errors import CaptureError
from fxq.graph.capture import capture
from fxq.graph.trace_error import traced_line

X = torch.randn(2, 4)


class Net(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def data_dependent_if(net: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:  # HERE
        return x
    return net.lin(x)


def data_dependent_while(net: Any, x: Tensor) -> Tensor:
    y = net.lin(x)
    while y.sum() > 0:  # HERE
        y = y - 1
    return y


def iterates(net: Any, x: Tensor) -> Tensor:
    total = 0
    for row in x:  # HERE
        total = total + row
    return total


def assigns_an_item(net: Any, x: Tensor) -> Tensor:
    y = net.lin(x)
    y[:, 0] = 0  # HERE
    return y


def integer(net: Any, x: Tensor) -> Tensor:
    count = int(x.sum())  # HERE
    return x * count


def floating(net: Any, x: Tensor) -> Tensor:
    return x * float(x.sum())  # HERE


def length(net: Any, x: Tensor) -> Tensor:
    return x * len(x)  # HERE


def item(net: Any, x: Tensor) -> Tensor:
    count = x.sum().item()
    return x.new_zeros(int(count))  # HERE


def repeats(net: Any, x: Tensor) -> Tensor:
    for _ in range(x.size(0)):  # HERE
        x = net.lin(x)
    return x


def list_index(net: Any, x: Tensor) -> Tensor:
    return x * [1, 2, 3][x.argmax()]  # HERE


def new_tensor(net: Any, x: Tensor) -> Tensor:
    return x + torch.zeros(x.size(0), 4)  # HERE


def makes_a_module(net: Any, x: Tensor) -> Tensor:
    return nn.ReLU()(x)  # HERE


def converts(net: Any, x: Tensor) -> Tensor:
    return torch.tensor(x)  # HERE


def own_defect(net: Any, x: Tensor) -> Tensor:
    return net.lin(x) + net.nothing  # HERE


UNTRACEABLE = [
    (data_dependent_if, "a branch or loop that depends on a tensor value", "concrete_args"),
    (data_dependent_while, "a branch or loop that depends on a tensor value", "concrete_args"),
    (iterates, "iteration over a traced value", "index the elements"),
    (assigns_an_item, "assignment into a slice of a tensor", "torch.where"),
    (integer, "a traced value used as a Python integer", "leaf_modules"),
    (floating, "a traced value used as a Python float", "on tensors"),
    (length, "len() of a traced value", "x.size(0)"),
    (item, "a traced value used as a Python integer", "leaf_modules"),
    (repeats, "a traced value used as a Python integer", "leaf_modules"),
    (list_index, "a traced value used as a Python integer", "leaf_modules"),
    (new_tensor, "a new tensor of a traced size", "x.new_zeros"),
    (makes_a_module, "a module made inside forward", "in __init__"),
    (converts, "an operation that symbolic tracing does not follow", "leaf_modules"),
    (own_defect, "its forward fails", "it fails there, too"),
]


def line_of(function: Any, mark: str = "# HERE") -> str:
    """``file:line`` of the marked line of a function."""
    lines, first = inspect.getsourcelines(function)
    (offset,) = [number for number, line in enumerate(lines) if mark in line]
    return f"{__file__}:{first + offset} "


@pytest.mark.parametrize(
    ("function", "construct", "remedy"), UNTRACEABLE, ids=[f[0].__name__ for f in UNTRACEABLE]
)
def test_untraceable(function: Any, construct: str, remedy: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Net(function), X)
    error = caught.value
    assert error.what.startswith(f"Net cannot be traced symbolically: {construct} (")
    assert error.where.startswith(line_of(function) + f"in {function.__name__}: ")
    assert error.where.endswith("# HERE")
    assert remedy in error.hint
    assert error.__cause__ is not None


def test_the_line_of_a_submodule_is_found() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Net(iterates)))
    with pytest.raises(CaptureError) as caught:
        capture(model, X)
    assert caught.value.where.startswith(line_of(iterates))
    assert caught.value.what.startswith("Sequential cannot be traced")


class NoForward(nn.Module):
    pass


def test_a_missing_forward_names_the_class() -> None:
    with pytest.raises(CaptureError, match="a module without a forward") as caught:
        capture(NoForward(), X)
    line = inspect.getsourcelines(NoForward)[1]
    assert caught.value.where == f"{__file__}:{line} in class NoForward"
    assert caught.value.hint == "define forward()"


def test_a_missing_forward_of_a_submodule_names_the_call() -> None:
    def calls(net: Any, x: Tensor) -> Tensor:
        return net.sub(x)  # HERE

    model = Net(calls)
    model.sub = NoForward()
    with pytest.raises(CaptureError, match=r"Module \[NoForward\]") as caught:
        capture(model, X)
    assert caught.value.where.startswith(line_of(calls))


# ---- the example -----------------------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)  # CONV
        return self.fc(x.flatten(1))  # FC


@pytest.mark.parametrize(
    ("example", "mark", "node", "shown"),
    [
        (torch.zeros(1, 3, 8, 8), "# FC", "(%fc)", "float32[1, 3, 8, 8]"),
        (torch.zeros(1, 1, 8, 8), "# CONV", "(%conv)", "float32[1, 1, 8, 8]"),
        (torch.zeros(1, 3, 8, 8).long(), "# CONV", "(%conv)", "int64[1, 3, 8, 8]"),
        (torch.zeros(1, 3, 8, 8).double(), "# CONV", "(%conv)", "float64[1, 3, 8, 8]"),
    ],
)
def test_a_wrong_example_names_the_line_and_the_node(
    example: Tensor, mark: str, node: str, shown: str
) -> None:
    with pytest.raises(CaptureError, match="the model fails on the example input: ") as caught:
        capture(TwoLayers(), example)
    assert caught.value.where.startswith(line_of(TwoLayers.forward, mark))
    assert caught.value.where.endswith(node)
    assert shown in caught.value.hint


def test_a_wrong_example_in_a_submodule_names_its_path() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 2), nn.Linear(3, 1)))
    with pytest.raises(CaptureError) as caught:
        capture(model, X)
    assert caught.value.where == "%_1_1 in 1.1"  # no line of the user's code called it


def test_a_model_that_is_none() -> None:
    for wrong in (TwoLayers, TwoLayers().state_dict(), torch.relu, None):
        with pytest.raises(CaptureError, match=r"must be a torch\.nn\.Module, not ") as caught:
            capture(wrong, X)
        assert caught.value.hint


def test_a_model_that_cannot_be_copied_names_the_attribute() -> None:
    model = nn.Sequential(TwoLayers())
    model[0].guard = threading.Lock()
    with pytest.raises(CaptureError, match="the model cannot be copied") as caught:
        capture(model, X)
    assert "attribute 0.guard; " in caught.value.where
    assert Path(inspect.getsourcefile(nn.Sequential)).name in caught.value.where
    assert "locks" in caught.value.hint


def test_warnings_of_the_users_forward_are_not_ours() -> None:
    def warns(net: Any, x: Tensor) -> Tensor:
        torch.nn.functional.sigmoid  # noqa: B018
        import warnings

        warnings.warn("the user's", stacklevel=1)
        return x

    capture(Net(warns), X)


def test_traced_line_without_a_stack() -> None:
    assert traced_line(None) is None
    assert traced_line(f'File "{torch.__file__}", line 3, in forward\n    pass') is None
