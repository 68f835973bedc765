"""Where integers can flow: from one convolution or linear to the next, through what can follow.

A *carrier* is a node whose value gets a scale of its own; pools, reshapes and paddings between two
carriers share the scale of what they read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxq.graph.ops import ANCHORS, FOLLOWERS, PASS_THROUGH, Kind, Op, describe
from fxq.graph.program import Program, facts


@dataclass
class Regions:
    """What of a program runs on integers.

    Attributes:
        program: The program.
        ops: Every node, read as an operator.
        reasons: Convolutions and linears that stay in float, and why.
    """

    program: Program
    ops: dict[fx.Node, Op] = field(init=False)
    reasons: dict[fx.Node, str] = field(init=False)
    _leads: dict[fx.Node, bool] = field(init=False, default_factory=dict)
    _integer: dict[fx.Node, bool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        nodes = list(self.program.nodes())
        self.ops = {node: describe(node, self.program.module) for node in nodes}
        self.reasons = {}
        for node in nodes:
            why = self._why_float(node)
            if why is not None:
                self.reasons[node] = why
        for node in reversed(nodes):
            self._leads[node] = any(self._user_leads(user) for user in node.users)
        for node in nodes:
            self._integer[node] = self._is_integer(node)

    def kind(self, node: fx.Node) -> Kind:
        """What a node computes."""
        return self.ops[node].kind

    def is_anchor(self, node: fx.Node) -> bool:
        """Whether a node is a convolution or linear that runs on integers."""
        return self.ops[node].kind in ANCHORS and node not in self.reasons

    def anchors(self) -> list[fx.Node]:
        """The convolutions and linears that run on integers, in order."""
        return [node for node in self.ops if self.is_anchor(node)]

    def leads_to_anchor(self, node: fx.Node) -> bool:
        """Whether an anchor reads the node's value, directly or through followers."""
        return self._leads[node]

    def is_integer(self, node: fx.Node) -> bool:
        """Whether a node's value is produced as integers."""
        return self._integer[node]

    def first_and_last(self) -> tuple[set[fx.Node], set[fx.Node]]:
        """The anchors with no anchor anywhere before them, and those with none after."""
        anchors = {node for node in self.ops if self.ops[node].kind in ANCHORS}
        above: dict[fx.Node, bool] = {}
        for node in self.ops:
            above[node] = any(above[n] or n in anchors for n in node.all_input_nodes)
        below: dict[fx.Node, bool] = {}
        for node in reversed(list(self.ops)):
            below[node] = any(below[n] or n in anchors for n in node.users)
        first = {node for node in anchors if not above[node]}
        return first, {node for node in anchors if not below[node]}

    def consumers(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes that read a value, looking through what shares its scale."""
        for user in node.users:
            if self.ops[user].kind in PASS_THROUGH or self.ops[user].kind in (
                Kind.OBSERVER,
                Kind.QUANTIZER,
            ):
                yield from self.consumers(user)
            elif self.ops[user].kind is not Kind.SIZE:
                yield user

    def carrier(self, node: fx.Node) -> fx.Node:
        """The node whose scale a value has: itself, or what it was pooled or reshaped from."""
        while self.ops[node].kind in PASS_THROUGH and self.is_integer(node):
            node = self.ops[node].inputs[0]
        return node

    def _user_leads(self, user: fx.Node) -> bool:
        if self.is_anchor(user):
            return True
        return self.ops[user].kind in FOLLOWERS and self._leads[user]

    def _is_integer(self, node: fx.Node) -> bool:
        kind = self.ops[node].kind
        if kind is Kind.CONV:
            return self.is_anchor(node)
        if kind is Kind.LINEAR:
            return self.is_anchor(node) and self._leads[node]
        if kind not in FOLLOWERS or not self.ops[node].inputs:
            return False
        if not all(self._integer[source] for source in self.ops[node].inputs):
            return False
        return self._leads[node] or facts(node).fused_into is not None

    def _why_float(self, node: fx.Node) -> str | None:
        """Why a convolution or linear cannot run on integers; None where it can, or is neither."""
        op = self.ops[node]
        if op.kind not in ANCHORS:
            return None
        if self.program.layer_options(node).get("skip"):
            return "the recipe skips it"
        return why_no_kernel(op.module, op.inputs)


def why_no_kernel(module: Any, inputs: tuple[fx.Node, ...]) -> str | None:
    """Why no integer kernel computes a layer; None where one does."""
    layer: nn.Module = getattr(module, "layer", module)
    value = facts(inputs[0]) if inputs else None
    if value is None or value.shape is None or value.dtype is not torch.float32:
        return f"its input is {value.dtype if value else 'unknown'}, not one float32 tensor"
    if isinstance(layer, nn.Linear):
        return None if len(value.shape) >= 2 else "its input has no batch dimension"
    conv: Any = layer
    if conv.padding_mode != "zeros":
        return f"kernels pad with zeros, not by {conv.padding_mode}"
    dims = len(conv.kernel_size)
    if len(value.shape) != dims + 2:
        return "its input has no batch dimension"
    if conv.transposed:
        return "there is no per-channel integer kernel for transposed convolutions"
    return None
