"""Cut points: the nodes that everything after them depends on, and on nothing else before them."""

from __future__ import annotations

from torch import fx


def cut_points(graph: fx.Graph) -> list[fx.Node]:
    """The nodes past which only their own value is still needed, in order.

    Between two of them lies a block of the network, such as one with a residual connection.

    Args:
        graph: A graph without side effects.

    Example:
        >>> import torch
        >>> class Residual(torch.nn.Module):
        ...     def forward(self, x):
        ...         y = x.relu()
        ...         return (y.exp() + y).sum()
        >>> [node.name for node in cut_points(fx.symbolic_trace(Residual()).graph)]
        ['x', 'relu', 'add', 'sum_1']
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    constants = {node for node in position if node.op == "get_attr"}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in position}
    found = []
    live = {node for node in position if node.op == "placeholder"}
    for node, index in position.items():
        live = {other for other in live if last_use[other] > index}
        if last_use[node] > index and node not in constants:
            live.add(node)
        if live == {node}:
            found.append(node)
    return found
