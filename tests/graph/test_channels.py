"""Channel spaces: what is tied together, and why some channels cannot be scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq.graph.capture import capture
from fxq.graph.channels import ChannelSpace, channel_spaces
from fxq.graph.program import Program

Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """``conv`` and ``second`` make eight channels of 6 x 6; ``deep`` is depthwise."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.deep = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.next, self.other = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 1)
        self.up, self.norm = nn.ConvTranspose2d(8, 8, 2), nn.BatchNorm2d(8)
        self.relu, self.relu6, self.tanh = nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0.0, 3.0)
        self.head, self.wide = nn.Linear(8, 5), nn.Linear(288, 5)
        self.joined, self.last = nn.Conv2d(16, 4, 1), nn.Linear(6, 6)
        self.written = forward

    def forward(self, x: Tensor) -> Any:
        return self.written(self, x)


def captured(forward: Forward, change: Callable[[Net], Any] | None = None) -> Program:
    net = Net(forward).eval()
    if change is not None:
        change(net)
    return capture(net, torch.randn(2, 3, 6, 6))


def space_of(program: Program, name: str) -> ChannelSpace:
    (found,) = [s for s in channel_spaces(program) if name in {node.name for node in s.values}]
    return found


def names(nodes: tuple[Any, ...]) -> list[str]:
    return [node.name for node in nodes]


FOLLOWED = [
    ("directly", lambda n, x: n.next(n.conv(x))),
    ("ReLU", lambda n, x: n.next(n.relu(n.conv(x)))),
    ("max pool", lambda n, x: n.next(F.max_pool2d(n.conv(x), 2))),
    ("average pool", lambda n, x: n.next(F.avg_pool2d(n.conv(x), 2))),
    ("padding", lambda n, x: n.next(F.pad(n.conv(x), (1, 0, 0, 1)))),
    ("dropout", lambda n, x: n.next(F.dropout(n.conv(x), training=False))),
    ("global pool", lambda n, x: n.head(n.conv(x).mean((2, 3)))),
    ("kept global pool", lambda n, x: n.head(F.adaptive_avg_pool2d(n.conv(x), 1).flatten(1))),
    ("flatten", lambda n, x: n.wide(n.conv(x).flatten(1))),
    ("reshape of a size", lambda n, x: n.wide(n.conv(x).reshape(x.size(0), -1))),
    ("view", lambda n, x: n.wide(n.conv(x).view(-1, 288))),
]


@pytest.mark.parametrize(("name", "forward"), FOLLOWED, ids=[f[0] for f in FOLLOWED])
def test_what_a_factor_passes(name: str, forward: Forward) -> None:
    space = space_of(captured(forward), "conv")
    assert space.obstacle is None
    assert space.channels == 8
    assert names(space.producers) == ["conv"]
    assert len(space.consumers) == 1
    assert space.upper is None


def test_addends_are_one_space() -> None:
    program = captured(lambda n, x: n.next(n.relu(n.conv(x) + n.other(n.relu(n.second(x))))))
    space = space_of(program, "conv")
    assert names(space.values) == ["conv", "other", "add", "relu_1"]
    assert names(space.producers) == ["conv", "other"]
    assert names(space.consumers) == ["next_1"]
    assert names(space_of(program, "second").consumers) == ["other"]


def test_a_depthwise_convolution_separates_two_spaces() -> None:
    program = captured(lambda n, x: n.joined(n.relu(n.deep(n.relu(n.conv(x))))))
    before, after = space_of(program, "conv"), space_of(program, "deep")
    assert (before.channels, after.channels) == (8, 16)
    assert names(before.consumers) == names(after.producers) == ["deep"]
    assert before.obstacle is after.obstacle is None


def test_a_flattened_space_has_the_channels_of_the_image() -> None:
    space = space_of(captured(lambda n, x: n.wide(n.conv(x).flatten(1))), "conv")
    assert space.channels == 8
    assert space.values[-1].meta["fxq"].shape == (2, 288)


def test_the_lowest_bound_counts() -> None:
    program = captured(lambda n, x: n.next(n.relu6(n.conv(x)) + n.tanh(n.second(x))))
    assert space_of(program, "conv").upper == 3.0


def test_spaces_come_in_order_and_cover_every_layer_once() -> None:
    program = captured(lambda n, x: n.next(n.relu(n.conv(x) + n.second(x))))
    spaces = channel_spaces(program)
    assert [space.values[0].name for space in spaces] == ["x", "conv", "next_1"]
    made = [node for space in spaces for node in space.producers]
    assert names(tuple(made)) == ["conv", "second", "next_1"]


REFUSED = [
    ("input", lambda n, x: n.next(n.conv(x)), "x", "%x is an input of the network"),
    ("output", lambda n, x: n.conv(x), "conv", "it is an output of the network"),
    (
        "output besides",
        lambda n, x: (y := n.conv(x), n.next(y)),
        "conv",
        "it is an output of the network",
    ),
    (
        "unknown operator",
        lambda n, x: n.next(torch.sigmoid(n.conv(x))),
        "conv",
        "%sigmoid (other): no integer sigmoid",
    ),
    (
        "two signs",
        lambda n, x: n.next(n.conv(x).clamp(-1, 1)),
        "conv",
        "%clamp (other): hardtanh(-1, 1) is not a ReLU",
    ),
    (
        "concatenation",
        lambda n, x: n.joined(torch.cat([n.conv(x), n.second(x)], 1)),
        "conv",
        "%cat (cat): it does not keep channels in place",
    ),
    (
        "concatenated",
        lambda n, x: n.joined(torch.cat([n.conv(x), n.second(x)], 1)),
        "cat",
        "%cat (cat): it does not keep channels in place",
    ),
    (
        "batch norm",
        lambda n, x: n.next(n.norm(n.conv(x))),
        "conv",
        "%norm (batch_norm): it does not keep channels in place",
    ),
    (
        "permutation",
        lambda n, x: n.next(n.conv(x).permute(0, 1, 3, 2)),
        "conv",
        "%permute (reshape): it does not keep channels in place",
    ),
    (
        "padded channels",
        lambda n, x: n.joined(F.pad(n.conv(x), (0, 0, 0, 0, 4, 4))),
        "conv",
        "%pad (pad): it does not keep channels in place",
    ),
    (
        "input added",
        lambda n, x: n.next(n.other(y := F.pad(x, (0, 0, 0, 0, 0, 5))) + y),
        "other",
        "%pad (pad): it does not keep channels in place",
    ),
    (
        "linear on rows",
        lambda n, x: n.last(n.conv(x)),
        "conv",
        "%last reads 4 dimensions, so dimension 1 is not its channels",
    ),
    (
        "called twice",
        lambda n, x: n.other(n.other(n.conv(x))),
        "conv",
        "%other shares its weights with another call",
    ),
    (
        "transposed",
        lambda n, x: n.next(n.up(n.conv(x))),
        "conv",
        "%up is a transposed convolution",
    ),
    (
        "weights read as a value",
        lambda n, x: n.next(n.conv(x)) + n.next.weight.sum(),
        "conv",
        "%next_1 shares its weights with another call",
    ),
]


@pytest.mark.parametrize(("name", "forward", "value", "why"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refusals(name: str, forward: Forward, value: str, why: str) -> None:
    assert space_of(captured(forward), value).obstacle == why


def test_weights_tied_between_layers_are_refused() -> None:
    def tie(net: Net) -> None:
        net.second.weight = net.conv.weight

    program = captured(lambda n, x: n.next(n.relu(n.conv(x)) + n.second(x)), tie)
    assert space_of(program, "conv").obstacle == "%conv shares its weights with another call"


def test_computed_weights_are_refused() -> None:
    program = captured(lambda n, x: n.next(n.conv(x)))
    torch.nn.utils.parametrizations.weight_norm(program.module.get_submodule("next"))
    assert "quantized or computed" in str(space_of(program, "conv").obstacle)


def test_a_pool_over_channels_is_refused() -> None:
    program = captured(lambda n, x: n.wide(F.max_pool2d(n.conv(x).flatten(2), 1).flatten(1)))
    assert "max_pool" in str(space_of(program, "conv").obstacle)
