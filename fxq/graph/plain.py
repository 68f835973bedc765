"""A graph module as plain data, to be pickled or put together anew with all its facts.

Torch pickles a graph module as source code, which loses what passes wrote about the nodes, and
fails on models whose annotations are strings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import fx, nn
from torch.fx.node import map_aggregate

from fxq.graph.program import Facts, facts, write_facts


@dataclass(frozen=True)
class _Reference:
    """A node, in the arguments of another."""

    name: str


@dataclass(frozen=True)
class _Row:
    """A node."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    facts: Facts


@dataclass(frozen=True)
class PlainGraph:
    """A graph module as plain data.

    Attributes:
        root: Its submodules, parameters and buffers.
        rows: Its nodes, in order.
        name: The name of its class.
    """

    root: nn.Module
    rows: tuple[_Row, ...]
    name: str

    @classmethod
    def of(cls, module: fx.GraphModule) -> Self:
        """The data of a module, with which it shares its submodules."""
        root = nn.Module()
        held = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "training")
        root.__dict__.update({name: module.__dict__[name] for name in held})
        return cls(root, tuple(_row(node) for node in module.graph.nodes), type(module).__name__)

    def module(self) -> fx.GraphModule:
        """The module again: its submodules in the order of the nodes, as in every copy of it."""
        graph, nodes = fx.Graph(), dict[str, fx.Node]()

        def resolved(value: Any) -> Any:
            return nodes[value.name] if isinstance(value, _Reference) else value

        for row in self.rows:
            args: Any = map_aggregate(row.args, resolved)
            kwargs: Any = map_aggregate(row.kwargs, resolved)
            node = graph.create_node(row.op, row.target, args, kwargs, row.name)
            write_facts(node, **vars(row.facts))
            nodes[row.name] = node
        return fx.GraphModule(self.root, graph, self.name)


def _row(node: fx.Node) -> _Row:
    def reference(value: Any) -> Any:
        return _Reference(value.name) if isinstance(value, fx.Node) else value

    args, kwargs = map_aggregate(node.args, reference), map_aggregate(node.kwargs, reference)
    return _Row(node.op, node.name, node.target, args, kwargs, facts(node))
