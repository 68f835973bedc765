"""Which channels of a network are the same, from the layers that make them to their readers.

A positive factor per channel passes unchanged through ReLU, pooling, zero padding, addition and
flattening. Values tied together by such operators form a *channel space*: dividing channel ``c`` of
every layer that makes one, and multiplying column ``c`` of every layer that reads one, by the same
number changes nothing outside it. A depthwise convolution reads one space and makes another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxq.graph.ops import ANCHORS, Kind, Op, describe
from fxq.graph.program import Program, facts

_POOLS = frozenset({Kind.MAX_POOL, Kind.AVG_POOL, Kind.GLOBAL_AVG_POOL})
_ROW_MAJOR = frozenset(
    {"contiguous", "flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"}
)
"""Reshapes that keep the order of the elements."""


@dataclass(frozen=True)
class ChannelSpace:
    """Values whose channels can only be scaled together.

    A value of a flattened image is wider than the space: dimension 1 of it has ``k * channels``
    entries, of which each run of ``k`` belongs to one channel.

    Attributes:
        values: The nodes whose values they are, in order.
        channels: How many factors the space has.
        producers: The convolutions and linears that make one of them, in order.
        consumers: Those that read one, in order.
        upper: The lowest bound of a ReLU among them; None where no ReLU has a bound.
        obstacle: Why the channels cannot be scaled; None where they can.
    """

    values: tuple[fx.Node, ...]
    channels: int
    producers: tuple[fx.Node, ...]
    consumers: tuple[fx.Node, ...]
    upper: float | None = None
    obstacle: str | None = None


def channel_spaces(program: Program) -> list[ChannelSpace]:
    """The channel spaces that a convolution or linear makes or reads, in order of first value.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fxq.graph.capture import capture
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))
        >>> for space in channel_spaces(capture(net, torch.zeros(1, 3, 2, 2))):
        ...     print(space.channels, space.obstacle is None)
        3 False
        8 True
        5 False
    """
    return list(_Channels(program).spaces())


class _Channels:
    """The operators of a program, and which values share their channels."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._ops = {node: describe(node, program.module) for node in program.nodes()}
        self._uses = _uses_of_parameters(program)

    def spaces(self) -> Iterator[ChannelSpace]:
        for values in self._tied():
            producers = tuple(n for n in values if self._ops[n].kind in ANCHORS)
            readers = {user: None for node in values for user in node.users}
            consumers = tuple(n for n in self._ops if n in readers and self._is_anchor(n))
            if producers or consumers:
                yield self._space(values, producers, consumers)

    def _space(
        self,
        values: tuple[fx.Node, ...],
        producers: tuple[fx.Node, ...],
        consumers: tuple[fx.Node, ...],
    ) -> ChannelSpace:
        found = (self._obstacle(node) for v in values for node in (v, *v.users))
        obstacle = next((why for why in found if why), None)
        widths = [_shape(node)[1] for node in values if len(_shape(node)) >= 2]
        uppers = [self._ops[n].attributes.get("upper") for n in values if self._is_relu(n)]
        upper = min((u for u in uppers if u is not None), default=None)
        return ChannelSpace(values, math.gcd(*widths), producers, consumers, upper, obstacle)

    def _tied(self) -> Iterator[tuple[fx.Node, ...]]:
        """Values whose channels are one and the same, by union of what keeps channels apart."""
        root: dict[fx.Node, fx.Node] = {}
        members: dict[fx.Node, list[fx.Node]] = {}
        for node, op in self._ops.items():
            if op.kind in (Kind.OUTPUT, Kind.SIZE):
                continue
            sources = op.inputs if _keeps_channels(node, op) else ()
            joined = list(dict.fromkeys(root[source] for source in sources))
            first = joined[0] if joined else node
            merged = [member for old in joined for member in members.pop(old)] + [node]
            members[first] = merged
            root.update(dict.fromkeys(merged, first))
        order = {node: position for position, node in enumerate(self._ops)}
        for found in sorted(members.values(), key=lambda group: min(map(order.__getitem__, group))):
            yield tuple(sorted(found, key=order.__getitem__))

    def _is_anchor(self, node: fx.Node) -> bool:
        return self._ops[node].kind in ANCHORS

    def _is_relu(self, node: fx.Node) -> bool:
        return self._ops[node].kind is Kind.RELU

    def _obstacle(self, node: fx.Node) -> str | None:
        """Why a node that makes or reads a value keeps its channels from being scaled."""
        op = self._ops[node]
        if op.kind is Kind.INPUT:
            return f"%{node.name} is an input of the network"
        if op.kind is Kind.OUTPUT:
            return "it is an output of the network"
        if op.kind in ANCHORS:
            return self._layer_obstacle(node, op)
        if op.kind is Kind.SIZE or _keeps_channels(node, op):
            return None
        why = op.reason or "it does not keep channels in place"
        return f"%{node.name} ({op.kind.value}): {why}"

    def _layer_obstacle(self, node: fx.Node, op: Op) -> str | None:
        layer: Any = op.module
        if layer._parameters.get("weight") is None:
            return f"the weights of %{node.name} are quantized or computed already"
        if any(self._uses[id(own)] > 1 for own in layer.parameters()):
            return f"%{node.name} shares its weights with another call"
        if getattr(layer, "transposed", False):
            return f"%{node.name} is a transposed convolution"
        rank = len(_shape(op.inputs[0])) if op.inputs else 0
        wanted = 2 if op.kind is Kind.LINEAR else len(layer.kernel_size) + 2
        if rank != wanted:
            return f"%{node.name} reads {rank} dimensions, so dimension 1 is not its channels"
        return None


def _keeps_channels(node: fx.Node, op: Op) -> bool:
    """Whether a positive factor per channel of what a node reads is one of what it makes."""
    if op.kind not in _RULES or not op.inputs:
        return False
    before, after = _shape(op.inputs[0]), _shape(node)
    return len(before) >= 2 and len(after) >= 2 and _RULES[op.kind](op, before, after)


def _pads_images_only(op: Op, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return len(op.attributes["pad"]) <= 2 * (len(before) - 2)


def _keeps_order(op: Op, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a reshape leaves each image's elements, and so its channels, in order."""
    return op.attributes["call"] in _ROW_MAJOR and before[0] == after[0]


_RULES: dict[Kind, Any] = {
    Kind.RELU: lambda op, before, after: True,
    Kind.IDENTITY: lambda op, before, after: True,
    Kind.ADD: lambda op, before, after: True,
    **dict.fromkeys(_POOLS, lambda op, before, after: len(before) == 4),
    Kind.PAD: _pads_images_only,
    Kind.RESHAPE: _keeps_order,
}
"""What keeps channels apart and is positively homogeneous, and on which shapes."""


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a value; empty where it is unknown."""
    return facts(node).shape or ()


def _uses_of_parameters(program: Program) -> Counter[int]:
    """How many calls use each parameter, by identity; reading it as a value is a use too."""
    uses: Counter[int] = Counter()
    for node in program.nodes():
        module = program.submodule(node)
        if module is not None:
            uses.update({id(own) for own in module.parameters()})
        if node.op == "get_attr":
            uses[id(_attribute(program, str(node.target)))] += 1
    return uses


def _attribute(program: Program, path: str) -> Any:
    parent, _, leaf = path.rpartition(".")
    return getattr(program.module.get_submodule(parent), leaf)
