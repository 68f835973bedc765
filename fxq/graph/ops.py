"""One vocabulary for the module, function and method spellings of the operators fxq knows.

`describe` turns a node into an `Op`: what it computes (its `Kind`), the nodes it reads and its
attributes. Passes and the lowering read `Op`s, so none of them matches spellings itself.
"""

from __future__ import annotations

from torch import fx, nn

from fxq.graph.call_ops import describe_call
from fxq.graph.module_ops import describe_module, is_frozen_batch_norm
from fxq.graph.op import ANCHORS, FOLLOWERS, PASS_THROUGH, Kind, Op, pair, target_name

__all__ = [
    "ANCHORS",
    "FOLLOWERS",
    "PASS_THROUGH",
    "Kind",
    "Op",
    "describe",
    "is_frozen_batch_norm",
    "pair",
    "target_name",
]


def describe(node: fx.Node, root: nn.Module) -> Op:
    """The operator a node computes; `Kind.OTHER` with a reason where fxq does not know it.

    Args:
        node: A node of a graph module.
        root: That graph module.

    Example:
        >>> graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
        >>> [describe(node, graph).kind.value for node in graph.graph.nodes]
        ['input', 'conv', 'relu', 'output']
    """
    if node.op == "placeholder":
        return Op(Kind.INPUT)
    if node.op == "output":
        return Op(Kind.OUTPUT, tuple(node.all_input_nodes))
    if node.op == "get_attr":
        return Op(Kind.CONSTANT)
    if node.op == "call_module":
        return describe_module(node, root.get_submodule(str(node.target)))
    return describe_call(node)
