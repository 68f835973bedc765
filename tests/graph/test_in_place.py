"""In-place operators: the graph has none, and gives the numbers the model gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq.errors import CaptureError
from fxq.graph.capture import capture
from fxq.graph.program import Program


def run(program: Program, *inputs: Any) -> Any:
    """The output in the layout the inputs have, so that it equals the model's to the last bit."""
    with torch.no_grad():
        return program.module(*inputs)


class Net(nn.Module):
    """A network whose forward is the function under test."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.relu6 = nn.ReLU6(inplace=True)
        self.drop = nn.Dropout(0.5, inplace=True)
        self.same = nn.Identity()
        self.register_buffer("buffer", torch.ones(4, 1, 1))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def add_method(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.add_(1)
    return y * 2


def chained_writes(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.add_(1)
    y.mul_(3)
    z = y - 1
    y.relu_()
    return y + z


def read_between(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    before = y * 1
    y.relu_()
    return torch.cat([before, y, net.other(y)], 1)


def module_then_read(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = net.relu(y)
    return net.other(z) + y  # y is what the ReLU left there


def reused_module(net: Any, x: Tensor) -> Tensor:
    y = net.relu(net.conv(x))
    w = net.other(y)
    z = net.relu(w)
    return z + w + y  # the second call of one module overwrites, too


def function_by_position(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = F.relu(y, True)
    return z - 2 * y


def function_by_name(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = F.hardtanh(y, 0.0, 0.5, inplace=True)
    return z - 2 * y


def underscore_functions(net: Any, x: Tensor) -> Tensor:
    y, z, w = net.conv(x), net.conv(x) + 1, net.conv(x) - 1
    F.relu_(y)
    torch.relu_(z)
    F.leaky_relu_(w, 0.1)
    torch.sigmoid_(z)
    F.elu_(w)
    return y + z + w


def augmented_operators(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    old = y
    y += net.conv(x)
    y *= 2
    y -= 0.5
    y /= 3
    return y + old  # the very same tensor


def augmented_numbers(net: Any, x: Tensor) -> Tensor:
    size = x.size(2)
    size *= 2
    size += 1
    return net.conv(x) * size


def residual_into_shortcut(net: Any, x: Tensor) -> Tensor:
    shortcut = net.conv(x)
    out = net.other(shortcut)
    out += shortcut
    return net.relu(out)


def clamp_and_masks(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.clamp_(0, 0.5)
    y.masked_fill_(y > 0.2, 0.1)
    return y


def dropout_module(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = net.drop(y)
    z.relu_()
    return y + z  # in eval mode dropout returns its input, so this is one tensor


def identity_alias(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    alias = net.same(y)
    alias.relu_()
    return net.other(y)


def input_is_written(net: Any, x: Tensor) -> Tensor:
    x.mul_(2)
    return net.conv(x)


def relu_on_the_input(net: Any, x: Tensor) -> Tensor:
    return net.conv(net.relu6(x)) + net.conv(x)


def view_after(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.relu_()
    return y.flatten(1) + y.reshape(y.size(0), -1)


def last_view_only(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x).flatten(1)
    y.relu_()
    return y


def disjoint_halves(net: Any, x: Tensor) -> Tensor:
    left, right = net.conv(x).chunk(2, 1)
    left.relu_()
    return torch.cat([left, right], 1)


def size_of_the_base(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = y.view(x.size(0), -1)
    z.relu_()
    return z * y.shape[1] * y.size(2) * y.dim()


def unsqueezed(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    other = y.detach()
    y.unsqueeze_(0)
    return y.sum(0) + other


def out_argument(net: Any, x: Tensor) -> Tensor:
    y, z = net.conv(x), net.conv(x)
    torch.add(y, 1, out=z)
    return y + z


def result_not_used(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.sigmoid_()
    return net.conv(x)


SAME = [
    add_method,
    chained_writes,
    read_between,
    module_then_read,
    reused_module,
    function_by_position,
    function_by_name,
    underscore_functions,
    augmented_operators,
    augmented_numbers,
    residual_into_shortcut,
    clamp_and_masks,
    dropout_module,
    identity_alias,
    input_is_written,
    relu_on_the_input,
    view_after,
    last_view_only,
    disjoint_halves,
    size_of_the_base,
    unsqueezed,
    out_argument,
    result_not_used,
]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("function", SAME, ids=lambda function: function.__name__)
def test_same_numbers_and_nothing_is_written(function: Any, batch: int) -> None:
    model = Net(function).eval()
    x = torch.randn(batch, 3, 5, 5)
    with torch.no_grad():
        want = copy.deepcopy(model)(x.clone())
    example, given = x.clone(), x.clone()
    program = capture(model, example)
    assert torch.equal(example, x), "capture wrote into the example"
    for _ in range(2):
        assert torch.equal(run(program, given), want)
        assert torch.equal(given, x), "the program writes into its input"
    for node in program.nodes():
        name = str(getattr(node.target, "__name__", node.target))
        assert not name.endswith("_")
        assert not name.startswith("i") or name in ("input_1", "identity")
        assert "inplace" not in node.kwargs
        assert not getattr(program.submodule(node), "inplace", False)


def test_the_users_modules_stay_in_place() -> None:
    model = Net(module_then_read)
    capture(model, torch.randn(1, 3, 5, 5))
    assert model.relu.inplace
    assert model.training


# ---- what cannot be expressed ----------------------------------------------------------------


def through_a_slice(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y[:, :2].relu_()
    return y


def through_a_transpose(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.transpose(1, 2).add_(1)
    return y


def view_from_before(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    flat = y.flatten(1)
    y.relu_()
    return flat


def view_of_a_view(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.flatten(2).flatten(1).mul_(2)
    return y


def into_a_buffer(net: Any, x: Tensor) -> Tensor:
    net.buffer.add_(x.mean())
    return x * net.buffer.sum()


def no_such_form(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.zero_()
    return y + x.sum()


REFUSED = [
    (through_a_slice, "%conv shares", "y[:, :2].relu_()"),
    (through_a_transpose, "%conv shares", "y.transpose(1, 2).add_(1)"),
    (view_from_before, "%flatten shares", "y.relu_()"),
    (view_of_a_view, "%conv shares", "y.flatten(2).flatten(1).mul_(2)"),
    (into_a_buffer, "a parameter or buffer of the model, buffer", "net.buffer.add_"),
    (no_such_form, "the in-place zero_ has no out-of-place form", "y.zero_()"),
]


@pytest.mark.parametrize(("function", "what", "line"), REFUSED)
def test_refused_with_the_line(function: Any, what: str, line: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Net(function), torch.randn(2, 3, 5, 5))
    assert what in caught.value.what
    assert line in caught.value.where
    assert __file__ in caught.value.where
    assert caught.value.hint
