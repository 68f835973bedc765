"""A layered drawing of all the graphs of a compilation at once, so that no node ever moves aside.

Nodes of one name share one place in every graph; between steps only rows open and close. What takes
another's place, as a quantizer that of an observer, stands next to it in one column. Layers are
longest paths, orders are barycentres (Sugiyama, Tagawa, Toda, "Methods for visual understanding
of hierarchical system structures", IEEE SMC 1981), and positions within a layer the least squares
ones that keep the order (pool adjacent violators).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from fxq.trail.snapshot import Snapshot

SWEEPS = 12
"""Barycentre sweeps, down and up in turn."""

LANE = 0.14
"""The room of an edge that passes a layer, in widths of a node."""

GAP = 0.12
"""The room between two neighbours."""

_Edge = tuple[str, str]


@dataclass(frozen=True)
class Layout:
    """Where nodes are, and where edges bend.

    Attributes:
        places: By node, its column (the centre, in widths of a node) and its row.
        routes: By edge that is not straight, the places it passes between its ends.
        rows: How many rows there are.
    """

    places: dict[str, tuple[float, int]]
    routes: dict[_Edge, list[tuple[float, int]]]
    rows: int


def layout(snapshots: Sequence[Snapshot]) -> Layout:
    """A drawing that holds every node of every snapshot.

    Example:
        >>> from fxq.trail.snapshot import NodeRecord
        >>> chain = Snapshot((NodeRecord("x", "Input"), NodeRecord("y", "relu", ("x",))))
        >>> layout([chain]).places
        {'x': (0.0, 0), 'y': (0.0, 1)}
    """
    order = merged_order(snapshots)
    graph = _union(snapshots, order)
    rows = _rows(graph, order)
    through = _passages(graph, rows, snapshots)
    drawing = _with_lanes(graph, rows, through)
    columns = _columns(drawing)
    places = {name: (round(columns[name], 3), rows[name]) for name in order}
    routes = {}
    for edge, inner in through.items():
        ends = [edge[0], *inner, edge[1]]
        lanes = [lane for pair in itertools.pairwise(ends) for lane in _stops(*pair, rows)]
        points = [(round(columns[stop], 3), drawing.nodes[stop]["row"]) for stop in lanes]
        bends = _bends([places[edge[0]], *points])
        if bends:
            routes[edge] = bends
    return Layout(places, routes, max(rows.values(), default=-1) + 1)


def merged_order(snapshots: Iterable[Snapshot]) -> list[str]:
    """Every node name once; each new one right after what it follows in its own snapshot."""
    order: list[str] = []
    known: set[str] = set()
    for graph in snapshots:
        following: dict[str | None, list[str]] = {}
        last: str | None = None
        for node in graph.nodes:
            if node.name in known:
                last = node.name
            else:
                following.setdefault(last, []).append(node.name)
                known.add(node.name)
        if following:
            order = [
                *following.get(None, []),
                *(name for old in order for name in (old, *following.get(old, []))),
            ]
    return order


def _union(snapshots: Sequence[Snapshot], order: list[str]) -> nx.DiGraph:
    """All edges that go forward in the merged order; each knows the snapshots it is in."""
    position = {name: index for index, name in enumerate(order)}
    graph = nx.DiGraph()
    graph.add_nodes_from(order)
    for index, snapshot in enumerate(snapshots):
        names = {node.name for node in snapshot.nodes}
        for node in snapshot.nodes:
            for source in node.inputs:
                if source in names and position[source] < position[node.name]:
                    graph.add_edge(source, node.name)
                    graph.edges[source, node.name].setdefault("steps", set()).add(index)
    _stack_rivals(graph, position)
    return graph


def _stack_rivals(graph: nx.DiGraph, position: dict[str, int]) -> None:
    """Readers of one value that are never there together follow each other in one column."""
    there = {
        name: set().union(*(found["steps"] for *_, found in graph.edges(name, data=True)))
        | set().union(*(found["steps"] for *_, found in graph.in_edges(name, data=True)))
        for name in graph
    }
    for name in list(graph):
        readers = sorted(graph.successors(name), key=lambda reader: position[reader])
        for index, later in enumerate(readers):
            for rival in reversed(readers[:index]):
                if not there[rival] & there[later]:
                    if not graph.has_edge(rival, later):
                        graph.add_edge(rival, later, steps=set())
                    break


def _rows(graph: nx.DiGraph, order: list[str]) -> dict[str, int]:
    """Longest paths from the inputs; what has no inputs stands right above what reads it."""
    rows: dict[str, int] = {}
    for name in order:
        rows[name] = 1 + max((rows[source] for source in graph.predecessors(name)), default=-1)
    for name in order:
        readers = [rows[reader] for reader in graph.successors(name)]
        if readers and not graph.in_degree(name):
            rows[name] = min(readers) - 1
    return rows


def _passages(
    graph: nx.DiGraph, rows: dict[str, int], snapshots: Sequence[Snapshot]
) -> dict[_Edge, tuple[str, ...]]:
    """By edge over several rows, the nodes through whose empty places it may run."""
    present = [{node.name for node in snapshot.nodes} for snapshot in snapshots]
    found: dict[_Edge, tuple[str, ...]] = {}
    for source, target, steps in graph.edges(data="steps"):
        if steps and rows[target] - rows[source] > 1:
            busy = set().union(*(present[step] for step in steps))
            found[source, target] = _empty_path(graph, rows, (source, target), busy)
    return found


def _empty_path(
    graph: nx.DiGraph, rows: dict[str, int], edge: _Edge, busy: set[str]
) -> tuple[str, ...]:
    """The nodes of the path of most nodes between its ends that are never there with the edge."""
    source, target = edge
    came_from: dict[str, str] = {}
    length = {source: 0}
    waiting = [(rows[source], source)]
    while waiting:  # row by row, so that a node is read when all paths to it are known
        _, name = heapq.heappop(waiting)
        for reader in graph.successors(name):
            inside = rows[reader] < rows[target] and reader not in busy
            direct = reader == target and name == source
            if direct or not (inside or reader == target):
                continue
            if reader not in length and inside:
                heapq.heappush(waiting, (rows[reader], reader))
            if length[name] >= length.get(reader, 0):
                length[reader], came_from[reader] = length[name] + 1, name
    return _back(came_from, came_from[target], source) if target in came_from else ()


def _back(came_from: dict[str, str], name: str, source: str) -> tuple[str, ...]:
    path = []
    while name != source:
        path.append(name)
        name = came_from[name]
    return tuple(reversed(path))


def _stops(source: str, target: str, rows: dict[str, int]) -> list[Any]:
    """What stands for an edge in the rows it crosses, and its end where that is a passage."""
    lanes: list[Any] = [(source, target, row) for row in range(rows[source] + 1, rows[target])]
    return [*lanes, target]


def _with_lanes(
    graph: nx.DiGraph, rows: dict[str, int], through: dict[_Edge, tuple[str, ...]]
) -> nx.DiGraph:
    """The graph with a place in every row that an edge crosses; edges then join adjacent rows."""
    drawing = nx.DiGraph()
    for name, row in rows.items():
        drawing.add_node(name, row=row, width=1.0)
    for source, target, steps in graph.edges(data="steps"):
        if not steps and rows[target] - rows[source] > 1:
            continue
        ends = [source, *through.get((source, target), ()), target]
        for first, second in itertools.pairwise(ends):
            previous: Any = first
            for stop in _stops(first, second, rows):
                if isinstance(stop, tuple):
                    drawing.add_node(stop, row=stop[2], width=LANE)
                drawing.add_edge(previous, stop)
                previous = stop
    return drawing


def _columns(drawing: nx.DiGraph) -> dict[Any, float]:
    """The column of every node and lane: few crossings first, then straight edges."""
    layers: dict[int, list[Any]] = {}
    for name, row in drawing.nodes(data="row"):
        layers.setdefault(row, []).append(name)
    rows = sorted(layers)
    above = {name: list(found) for name, found in drawing.pred.items()}
    below = {name: list(found) for name, found in drawing.succ.items()}
    for sweep in range(SWEEPS):
        _order_by_neighbours(layers, above if sweep % 2 == 0 else below, down=sweep % 2 == 0)
    columns = dict.fromkeys(drawing, 0.0)
    offsets = {row: _offsets(drawing, layers[row]) for row in rows}
    for sweep in range(2 * SWEEPS):
        nearer, farther = (above, below) if sweep % 2 == 0 else (below, above)
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wishes = [
                _mean(columns, nearer[name] or farther[name], columns[name]) for name in layers[row]
            ]
            _settle(layers[row], offsets[row], wishes, columns)
    middle = sorted(columns.values())[len(columns) // 2] if columns else 0.0
    return {name: column - middle for name, column in columns.items()}


def _order_by_neighbours(
    layers: dict[int, list[Any]], neighbours: dict[Any, list[Any]], *, down: bool
) -> None:
    index = {name: float(place) for layer in layers.values() for place, name in enumerate(layer)}
    for row in sorted(layers, reverse=not down):
        layer = layers[row]
        wanted = {name: _mean(index, neighbours[name], index[name]) for name in layer}
        layer.sort(key=lambda name: wanted[name])
        index.update({name: float(place) for place, name in enumerate(layer)})


def _mean(places: dict[Any, float], names: list[Any], otherwise: float) -> float:
    """The mean place of some names; another where there are none."""
    return sum(places[name] for name in names) / len(names) if names else otherwise


def _offsets(drawing: nx.DiGraph, layer: list[Any]) -> list[float]:
    """How far right of the first of a layer each stands at least."""
    widths = [drawing.nodes[name]["width"] for name in layer]
    steps = [(left + right) / 2 + GAP for left, right in itertools.pairwise(widths)]
    return list(itertools.accumulate(steps, initial=0.0))


def _settle(
    layer: list[Any], offsets: list[float], wishes: list[float], columns: dict[Any, float]
) -> None:
    """The layer stands as near to its wishes as its order and its widths allow."""
    wanted = [wish - offset for wish, offset in zip(wishes, offsets, strict=True)]
    weights = [1.0 if isinstance(name, str) else 2.0 for name in layer]
    for name, offset, place in zip(layer, offsets, monotone(wanted, weights), strict=True):
        columns[name] = place + offset


def monotone(wanted: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing numbers nearest to those wanted, in weighted least squares.

    Example:
        >>> monotone([3.0, 1.0, 5.0], [1.0, 1.0, 1.0])
        [2.0, 2.0, 5.0]
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in zip(wanted, weights, strict=True):
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, heavier, more = blocks.pop()
            mean = (mean * weight + before * heavier) / (weight + heavier)
            weight, count = weight + heavier, count + more
        blocks.append((mean, weight, count))
    return [mean for mean, _, count in blocks for _ in range(count)]


def _bends(points: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """The places between the ends of an edge where it does not go straight down."""
    triples = zip(points, points[1:], points[2:], strict=False)
    return [here for above, here, below in triples if not above[0] == here[0] == below[0]]
