"""Cut points: known graphs, and random ones against the definition by paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxq.graph.capture import capture
from fxq.graph.cuts import cut_points
from fxq.models_zoo import tiny_concat, tiny_residual


def names(graph: fx.Graph) -> list[str]:
    return [node.name for node in cut_points(graph)]


def traced(forward: Callable[..., Any]) -> fx.Graph:
    return fx.symbolic_trace(forward).graph


class Weighted(nn.Module):
    """Constants that are read late, and one that is changed first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, mask = self.weight, self.mask
        return x.relu().exp() * weight + mask


GRAPHS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "chain": (lambda x: x.relu().exp().abs(), ["x", "relu", "exp", "abs_1"]),
    "residual": (lambda x: ((y := x.relu()).exp() + y).abs(), ["x", "relu", "add", "abs_1"]),
    "nested": (
        lambda x: ((y := x.relu()) + ((z := y.exp()) + z.abs())).sin(),
        ["x", "relu", "add_1", "sin"],
    ),
    "overlapping": (lambda x: ((y := x.relu().exp()) + x).abs() + y, ["x", "add_1"]),
    "branches": (lambda x: torch.cat([x.relu(), x.exp()]).abs(), ["x", "cat", "abs_1"]),
    "two inputs": (lambda x, y: (x.relu() + y).abs(), ["add", "abs_1"]),
    "an input read late": (lambda x, y: x.relu().exp().abs() + y, ["add"]),
    "an input not read": (lambda x, y: x.relu().abs(), ["x", "relu", "abs_1"]),
    "two outputs": (lambda x: ((y := x.relu()).exp(), y.abs()), ["x", "relu"]),
    "an output on the way": (lambda x: ((y := x.relu()), y.exp().abs()), ["x", "relu"]),
    "read twice by one": (lambda x: (y := x.relu()) + y, ["x", "relu", "add"]),
    "read by name": (lambda x: torch.add(input=x.relu(), other=x).abs(), ["x", "add", "abs_1"]),
    "an input given back": (lambda x: x, ["x"]),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_known_graphs(name: str) -> None:
    forward, expected = GRAPHS[name]
    assert names(traced(forward)) == expected


def test_constants_are_there_anyway() -> None:
    graph = fx.symbolic_trace(Weighted()).graph
    assert names(graph) == ["x", "relu", "exp", "mul", "add"]


def test_networks_of_the_zoo() -> None:
    x = torch.zeros(1, 3, 8, 8)
    residual = names(capture(tiny_residual(), x).graph)
    assert residual[:4] == ["x", "stem", "stem_bn", "stem_relu"]
    assert not {"conv1", "bn1", "relu1", "conv2", "bn2"} & set(residual)
    assert residual[4] == "add"
    branches = {"narrow", "narrow_bn", "narrow_relu", "wide", "wide_bn", "wide_relu"}
    graph = capture(tiny_concat(), x).graph
    others = [node.name for node in graph.nodes if node.name not in branches | {"output"}]
    assert names(graph) == others


@st.composite
def graphs(draw: Callable[..., Any]) -> fx.Graph:
    """Inputs, constants, and operators of one to three values; no dead code."""
    graph = fx.Graph()
    values = [graph.placeholder(f"x{n}") for n in range(draw(st.integers(1, 3)))]
    for position in range(draw(st.integers(1, 14))):
        near = st.integers(max(0, len(values) - 3), len(values) - 1)  # else cuts are rare
        read = [values[n] for n in draw(st.lists(near, min_size=1, max_size=2))]
        if draw(st.integers(0, 4)) == 0:
            read.append(graph.get_attr(f"weight{position}"))
        values.append(graph.call_function(torch.cat, (read,)))
    last = values[-1:] if draw(st.booleans()) else values[-2:]
    graph.output(tuple(last))
    graph.eliminate_dead_code()
    return graph


@given(graphs())
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_removing_a_cut_point_parts_inputs_from_outputs(graph: fx.Graph) -> None:
    """And removing no other node does."""
    paths = networkx.DiGraph()
    for node in graph.nodes:
        paths.add_node(node)
        paths.add_edges_from((source, node) for source in node.all_input_nodes)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in graph.nodes if node.op == "output")
    expected = [
        node
        for node in graph.nodes
        if node.op not in ("get_attr", "output") and parts(paths, node, inputs, output)
    ]
    assert cut_points(graph) == expected


def parts(paths: Any, node: fx.Node, inputs: list[fx.Node], output: fx.Node) -> bool:
    """Whether every path from an input to the output leads through the node, and there is one."""
    if not networkx.has_path(paths, node, output):
        return False
    rest = paths.copy()
    rest.remove_node(node)
    return not any(
        networkx.has_path(rest, source, output) for source in inputs if source is not node
    )
