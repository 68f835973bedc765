"""DOT: a picture that Graphviz would accept, with every node, every edge and every change."""

from __future__ import annotations

import re

from fxq.trail.delta import Change
from fxq.trail.dot import FILLS, dot
from fxq.trail.snapshot import NodeRecord, Snapshot

X = NodeRecord("x", "Input", value="f32[1,3]")
CONV = NodeRecord("conv", "Conv2d", ("x",), digest="a")
BN = NodeRecord("bn", "BatchNorm2d", ("conv",))
RELU = NodeRecord("relu", "ReLU", ("bn",))
BEFORE = Snapshot((X, CONV, BN, RELU))
AFTER = Snapshot(
    (
        X,
        NodeRecord("conv", "Conv2d", ("x",), digest="b"),
        NodeRecord("relu", "ReLU", ("conv",)),
        NodeRecord("new", "MaxPool2d", ("relu", "relu")),
    )
)
QUOTED = r'"(?:[^"\\]|\\.)*"'
STATEMENT = re.compile(rf"  {QUOTED}( -> {QUOTED})?( \[(\w+={QUOTED}(, )?|\w+=\w+(, )?)+\])?")


def nodes(picture: str) -> dict[str, str]:
    return dict(re.findall(r'^  "(\w+)" \[(.*)\]$', picture, re.M))


def edges(picture: str) -> dict[tuple[str, str], str]:
    found = re.findall(r'^  "(\w+)" -> "(\w+)"(.*)$', picture, re.M)
    return {(first, second): style for first, second, style in found}


def test_every_change_has_its_colour_and_sign() -> None:
    drawn = nodes(dot(BEFORE, AFTER))
    kinds = {"conv": "retuned", "bn": "removed", "relu": "rewired", "new": "added"}
    for name, kind in kinds.items():
        assert FILLS[kind] in drawn[name]
    labels = {name: re.findall(r'label="(.) ', style) for name, style in drawn.items()}
    assert labels == {"x": [], "conv": ["#"], "bn": ["-"], "relu": ["~"], "new": ["+"]}
    assert "dashed" in drawn["bn"]
    assert "dashed" not in drawn["new"]


def test_edges_of_both_graphs_once() -> None:
    drawn = edges(dot(BEFORE, AFTER))
    assert set(drawn) == {
        ("x", "conv"),
        ("conv", "bn"),
        ("bn", "relu"),
        ("conv", "relu"),
        ("relu", "new"),
    }
    assert drawn["x", "conv"] == ""
    assert "dashed" in drawn["conv", "bn"]
    assert "dashed" in drawn["bn", "relu"]
    assert "dashed" not in drawn["conv", "relu"] != ""


def test_marked_and_drawn_are_chosen() -> None:
    def added(change: Change) -> bool:
        return change.kind == "added"

    picture = dot(BEFORE, AFTER, keeps=added, shown=lambda one: one.name in ("relu", "new"))
    assert set(nodes(picture)) == {"relu", "new"}
    assert set(edges(picture)) == {("relu", "new")}
    assert FILLS["rewired"] not in picture


def test_names_with_quotes_are_escaped() -> None:
    odd = NodeRecord('a"b\\', 'f"\n', ())
    reader = NodeRecord("c", "ReLU", ('a"b\\',))
    lines = dot(Snapshot(()), Snapshot((odd, reader)), title='"t"').splitlines()
    assert '  label="\\"t\\""; labelloc=t' in lines
    assert all(STATEMENT.fullmatch(line) for line in lines[4:-1])
    assert len(lines[4:-1]) == 3


def test_nothing_to_compare() -> None:
    assert nodes(dot(Snapshot(()), Snapshot(()))) == {}
    unchanged = dot(BEFORE, BEFORE)
    assert not any(fill in unchanged for fill in FILLS.values())
