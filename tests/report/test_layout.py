"""The drawing: every node has a place of its own, edges go down, and nothing is crossed."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from fxq.report.layout import layout, merged_order, monotone
from fxq.trail.snapshot import NodeRecord, Snapshot


def graph(**inputs: str) -> Snapshot:
    """Nodes by name, each with the names it reads."""
    return Snapshot(tuple(NodeRecord(n, "op", tuple(read.split())) for n, read in inputs.items()))


@st.composite
def histories(draw: st.DrawFn) -> list[Snapshot]:
    """A random graph, and what remains of it when some nodes are gone and their readers rewired."""
    count = draw(st.integers(1, 14))
    reads = {
        i: draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else []
        for i in range(count)
    }
    later, alive = [], dict(reads)
    for _ in range(draw(st.integers(0, 3))):
        gone = draw(st.sampled_from(sorted(alive)))
        own = alive.pop(gone)
        alive = {
            i: list(dict.fromkeys(x for r in old for x in (own if r == gone else [r])))
            for i, old in alive.items()
        }
        later.append(dict(alive))
        if not alive:
            break
    return [
        Snapshot(
            tuple(NodeRecord(f"n{i}", "op", tuple(f"n{r}" for r in old)) for i, old in one.items())
        )
        for one in (reads, *later)
    ]


@given(histories())
def test_edges_go_down_and_no_two_nodes_that_meet_share_a_place(snapshots: list[Snapshot]) -> None:
    drawn = layout(snapshots)
    for snapshot in snapshots:
        for node in snapshot.nodes:
            for source in node.inputs:
                assert drawn.places[source][1] < drawn.places[node.name][1]
        for one, other in itertools.combinations([node.name for node in snapshot.nodes], 2):
            (x, row), (other_x, other_row) = drawn.places[one], drawn.places[other]
            assert row != other_row or abs(x - other_x) > 1


@given(histories())
def test_no_edge_runs_through_a_node(snapshots: list[Snapshot]) -> None:
    drawn = layout(snapshots)
    for snapshot in snapshots:
        for node in snapshot.nodes:
            for source in node.inputs:
                ends = [drawn.places[source], drawn.places[node.name]]
                points = [ends[0], *drawn.routes.get((source, node.name), []), ends[1]]
                for other in snapshot.nodes:
                    x, row = drawn.places[other.name]
                    if ends[0][1] < row < ends[1][1]:
                        assert abs(x - column_at(points, row)) > 0.5


def column_at(points: list[tuple[float, int]], row: int) -> float:
    """Where an edge crosses a row: it bends above the place it goes to, and is straight between."""
    above, below = next(p for p in itertools.pairwise(points) if p[0][1] <= row <= p[1][1])
    return above[0] if row == above[1] else below[0]


def test_an_edge_uses_the_place_of_a_node_that_was_removed() -> None:
    before = graph(x="", conv="x", bn="conv", relu="bn")
    after = graph(x="", conv="x", relu="conv")
    drawn = layout([before, after])
    assert drawn.routes == {}
    assert {x for x, _ in drawn.places.values()} == {0.0}


def test_what_replaces_a_node_stands_next_to_it_in_one_column() -> None:
    watched = graph(x="", x_observer="x", conv="x_observer")
    rounded = graph(x="", x_quantizer="x", conv="x_quantizer")
    drawn = layout([watched, rounded])
    assert len({row for _, row in drawn.places.values()}) == 4
    assert {x for x, _ in drawn.places.values()} == {0.0}


def test_a_shortcut_goes_around_the_branch() -> None:
    drawn = layout([graph(x="", a="x", b="a", add="b x")])
    bends = drawn.routes["x", "add"]
    assert all(abs(x - drawn.places["a"][0]) > 0.5 for x, _ in bends)
    assert ("x", "a") not in drawn.routes


def test_a_constant_stands_right_above_its_reader() -> None:
    drawn = layout([graph(x="", c="", a="x", b="a", mul="b c")])
    assert drawn.places["c"][1] == drawn.places["mul"][1] - 1


def test_new_nodes_come_right_after_what_they_follow() -> None:
    first, second = graph(x="", a="x", out="a"), graph(x="", q="x", a="q", r="a", out="r")
    assert merged_order([first, second]) == ["x", "q", "a", "r", "out"]


def test_nothing_is_drawn_of_nothing() -> None:
    assert layout([]).rows == 0


@given(
    st.lists(st.floats(-9, 9), min_size=1, max_size=7).flatmap(
        lambda wanted: st.tuples(
            st.just(wanted),
            st.lists(st.sampled_from([1.0, 2.0]), min_size=len(wanted), max_size=len(wanted)),
        )
    )
)
def test_monotone_is_the_min_max_formula(case: tuple[list[float], list[float]]) -> None:
    """Against the closed form of isotonic regression: the largest of the least means."""
    wanted, weights = case
    count = len(wanted)

    def mean(first: int, last: int) -> float:
        part = slice(first, last + 1)
        return float(np.average(wanted[part], weights=weights[part]))

    expected = [
        max(min(mean(i, j) for j in range(k, count)) for i in range(k + 1)) for k in range(count)
    ]
    assert monotone(wanted, weights) == pytest.approx(expected, abs=1e-9)
