"""`Mixture`: two versions of one network, mixed node by node.

Every node of the later version stands for a value of the earlier one, its *counterpart*: what the
same readers read before. A convolution that a batch norm was folded into stands for that batch
norm; a quantizer that was put behind a value stands for that value. A node can then compute *as
before*: the piece of the earlier graph between the counterparts of its inputs and its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

Piece = tuple[fx.Node, ...]
"""Nodes of the earlier graph that compute a counterpart, in order; the last one is it."""


Reads = Mapping[str, Sequence[str]]
"""The nodes of a graph in order, each with those it reads."""


def reads_of(graph: fx.Graph) -> dict[str, tuple[str, ...]]:
    """What each node of a graph reads, by name."""
    return {node.name: tuple(one.name for one in node.all_input_nodes) for node in graph.nodes}


def stand_ins(before: Reads, after: Reads) -> dict[str, str]:
    """The node of the earlier graph whose value each node of the later graph stands for.

    Nodes that stand for nothing are left out.

    Args:
        before: A graph.
        after: The same after some passes, which left names as they were.

    Example:
        >>> before = {"x": (), "conv": ("x",), "bn": ("conv",), "relu": ("bn",)}
        >>> after = {"x": (), "conv": ("x",), "relu": ("conv",)}
        >>> stand_ins(before, after)
        {'x': 'x', 'conv': 'bn', 'relu': 'relu'}
    """
    users: dict[str, list[str]] = {}
    for name, inputs in after.items():
        for one in inputs:
            users.setdefault(one, []).append(name)
    found = {}
    for name in after:
        read = {one for user in users.get(name, ()) for one in _read_as(name, user, before, after)}
        if len(read) == 1:
            found[name] = read.pop()
        elif name in before:
            found[name] = name
    return found


def _read_as(name: str, user: str, before: Reads, after: Reads) -> list[str]:
    """What a user of a node read before in the place of it."""
    old, new = before.get(user, ()), after[user]
    if len(old) != len(new):
        return []
    return [was for now, was in zip(new, old, strict=True) if now == name]


def counterparts(before: fx.Graph, after: fx.Graph) -> dict[fx.Node, fx.Node]:
    """`stand_ins` as nodes, without outputs."""
    earlier, later = ({node.name: node for node in graph.nodes} for graph in (before, after))
    found = stand_ins(reads_of(before), reads_of(after))
    pairs = ((later[name], earlier[was]) for name, was in found.items())
    return {node: was for node, was in pairs if "output" not in (node.op, was.op)}


class Mixture(nn.Module):
    """Runs the later version of a network, some of whose nodes compute as in the earlier one.

    Args:
        before: The earlier version.
        after: The later version.

    Attributes:
        kept: Names of the nodes that compute as in the later version; all, at first.
    """

    def __init__(self, before: fx.GraphModule, after: fx.GraphModule) -> None:
        super().__init__()
        self.before, self.after = before, after
        self._stands_for = counterparts(before.graph, after.graph)
        self._pieces = {
            node.name: piece for node in after.graph.nodes if (piece := self._piece(node))
        }
        self.kept: Collection[str] = set(self._pieces)

    def forward(self, *inputs: Any) -> Any:
        """The output of the mixture."""
        with torch.no_grad():
            return _Mixed(self).run(*inputs)

    @torch.no_grad()
    def introduced(self, *inputs: Any) -> dict[str, float]:
        """By how much each node's own computation changed, as a relative squared error.

        A node is given what its inputs stand for in the earlier version, so that it is blamed for
        what it does itself, never for what comes before it.

        Returns:
            Nodes that can compute as before and do not, in order; infinite where the shape changed.
        """
        earlier = fx.Interpreter(self.before, garbage_collect_values=False)
        earlier.run(*inputs)
        values = dict(earlier.env)
        later = fx.Interpreter(self.after)
        found = {}
        for node in self.after.graph.nodes:
            if node.name not in self._pieces:
                continue
            reads = node.all_input_nodes
            later.env = {one: values[self._stands_for[one]] for one in reads}
            error = _apart(values[self._stands_for[node]], later.run_node(node))
            if error > 0:
                found[node.name] = error
        return found

    def _piece(self, node: fx.Node) -> Piece:
        """What computes a node as before; nothing where that is not told by its inputs."""
        own = self._stands_for.get(node)
        reads = [self._stands_for.get(one) for one in node.all_input_nodes]
        if own is None or not reads or None in reads:
            return ()
        needed, todo = set(), [own]
        while todo:
            one = todo.pop()
            if one in reads or one in needed:
                continue
            if one.op == "placeholder":
                return ()
            needed.add(one)
            todo += one.all_input_nodes
        between = [one for one in self.before.graph.nodes if one in needed]
        return tuple(between) if between else (own,)

    def as_before(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """The value of a node as the earlier version computes it from what it reads now."""
        runner = fx.Interpreter(self.before)
        runner.env = {self._stands_for[one]: env[one] for one in node.all_input_nodes}
        for one in self._pieces[node.name]:
            if one not in runner.env:
                runner.env[one] = runner.run_node(one)
        return runner.env[self._stands_for[node]]

    def is_as_before(self, node: fx.Node) -> bool:
        """Whether a node computes as in the earlier version."""
        return node.name in self._pieces and node.name not in self.kept


class _Mixed(fx.Interpreter):
    """The run of a mixture."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__(mixture.after)
        self._mixture = mixture

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, of one version or the other."""
        if self._mixture.is_as_before(n):
            return self._mixture.as_before(n, self.env)
        return super().run_node(n)


def _apart(want: Any, have: Any) -> float:
    """The squared error over the squared magnitude; 0 for what is no tensor of numbers."""
    if not isinstance(want, torch.Tensor) or not isinstance(have, torch.Tensor):
        return 0.0
    if want.shape != have.shape:
        return float("inf")
    if torch.equal(want, have) or not want.is_floating_point():
        return 0.0
    error = float((want.double() - have.double()).square().sum())
    signal = float(want.double().square().sum())
    return error / signal if signal else float("inf")
