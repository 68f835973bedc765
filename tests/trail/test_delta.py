"""Deltas: five kinds of change, by node identity."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxq.trail.delta import KINDS, Delta, compare, paired
from fxq.trail.snapshot import NodeRecord, Snapshot

X = NodeRecord("x", "Input", value="f32[1,3]")
CONV = NodeRecord("conv", "Conv2d", ("x",), value="f32[1,4]", digest="aaaaaa")
BN = NodeRecord("bn", "BatchNorm2d", ("conv",), value="f32[1,4]", digest="bbbbbb")
RELU = NodeRecord("relu", "ReLU", ("bn",), value="f32[1,4]")
BEFORE = Snapshot((X, CONV, BN, RELU))


def changed(*nodes: NodeRecord) -> Delta:
    return compare(BEFORE, Snapshot(nodes))


def test_nothing() -> None:
    delta = changed(X, CONV, BN, RELU)
    assert not delta
    assert delta.counts() == {}
    assert delta.summary() == "no change"
    assert delta.text() == ""
    assert delta.to_json() == {}


ONE = [
    ("added", (X, CONV, BN, RELU, NodeRecord("pool", "MaxPool2d", ("relu",))), ["pool"]),
    ("removed", (X, CONV, BN), ["relu"]),
    ("rewired", (X, CONV, BN, replace(RELU, inputs=("conv",))), ["relu"]),
    ("rewired", (X, CONV, BN, replace(RELU, op="ReLU6")), ["relu"]),
    ("rewired", (X, CONV, BN, replace(RELU, arguments="1")), ["relu"]),
    ("rewired", (X, CONV, BN, replace(RELU, value="f64[1,4]")), ["relu"]),
    ("noted", (X, CONV, BN, replace(RELU, facts=("nonneg",))), ["relu"]),
    ("retuned", (X, replace(CONV, digest="cccccc"), BN, RELU), ["conv"]),
]


@pytest.mark.parametrize(("kind", "nodes", "names"), ONE)
def test_each_kind(kind: str, nodes: tuple[NodeRecord, ...], names: list[str]) -> None:
    delta = changed(*nodes)
    assert delta
    assert delta.counts() == {kind: 1}
    assert delta.to_json() == {kind: names}
    assert [change.name for change in delta.of(kind)] == names
    assert all(not delta.of(other) for other in KINDS if other != kind)


def test_a_fold_is_one_removed_one_rewired_one_retuned() -> None:
    delta = changed(X, replace(CONV, digest="cccccc"), replace(RELU, inputs=("conv",)))
    assert delta.summary() == "-1 removed  ~1 rewired  #1 retuned"
    assert delta.census() == {"BatchNorm2d": -1}
    assert delta.text().splitlines() == [
        "# %conv = Conv2d:f32[1,4](%x)  #cccccc  was #aaaaaa",
        "- %bn = BatchNorm2d:f32[1,4](%conv)  #bbbbbb",
        "~ %relu = ReLU:f32[1,4](%conv)",
        "    was (%bn)",
    ]


WAS = [
    (replace(RELU, op="ReLU6"), "ReLU"),
    (replace(RELU, value="f64[1,4]"), ":f32[1,4]"),
    (replace(RELU, op="ReLU6", inputs=("x",)), "ReLU(%bn)"),
    (replace(RELU, arguments="inplace=True", digest="d"), "(%bn)"),
    (replace(RELU, inputs=("x",), facts=("nonneg",)), "(%bn)"),
]


@pytest.mark.parametrize(("after", "was"), WAS)
def test_only_what_was_otherwise_is_told(after: NodeRecord, was: str) -> None:
    (change,) = changed(X, CONV, BN, after).changes
    assert change.former() == was
    assert change.lines() == [f"~ {after.text()}", f"    was {was}"]


def test_facts_that_were_otherwise() -> None:
    before, after = replace(RELU, facts=("w8",)), replace(RELU, facts=("w4",))
    (change,) = compare(Snapshot((before,)), Snapshot((after,))).changes
    assert change.lines() == [f"! {after.text()}  was [w8]"]
    (first,) = changed(X, CONV, BN, after).changes
    assert first.lines() == [f"! {after.text()}"]


def test_without_digests() -> None:
    (change,) = changed(X, replace(CONV, digest="cccccc"), BN, RELU).changes
    assert change.lines(digests=False) == ["# %conv = Conv2d:f32[1,4](%x)"]


def test_only_some_changes() -> None:
    delta = changed(X, replace(CONV, digest="cccccc"), replace(RELU, inputs=("conv",)))
    assert delta.where(lambda change: change.kind == "retuned").to_json() == {"retuned": ["conv"]}


def test_a_replaced_operator_counts_for_both() -> None:
    delta = changed(X, CONV, BN, replace(RELU, op="ReLU6"))
    assert delta.census() == {"ReLU": -1, "ReLU6": 1}


def test_one_node_one_change_rewired_before_retuned_before_noted() -> None:
    everything = replace(CONV, inputs=(), digest="d", facts=("w",))
    assert changed(X, everything, BN, RELU).counts() == {"rewired": 1}
    both = replace(CONV, digest="d", facts=("w",))
    assert changed(X, both, BN, RELU).counts() == {"retuned": 1}


def test_a_node_that_only_moves_did_not_change() -> None:
    assert not changed(X, CONV, RELU, BN)


names = st.sampled_from("abcdef")
records = st.builds(
    NodeRecord,
    name=names,
    op=st.sampled_from(["Conv2d", "ReLU"]),
    inputs=st.lists(names, max_size=2).map(tuple),
    digest=st.sampled_from(["", "1", "2"]),
    facts=st.sampled_from([(), ("nonneg",)]),
)
snapshots = st.lists(records, unique_by=lambda record: record.name).map(
    lambda nodes: Snapshot(tuple(nodes))
)


@given(before=snapshots, after=snapshots)
def test_any_two_snapshots(before: Snapshot, after: Snapshot) -> None:
    delta, back = compare(before, after), compare(after, before)
    assert len(delta.changes) == sum(delta.counts().values()) == sum(back.counts().values())
    assert delta.census() == {name: -count for name, count in back.census().items()}
    assert len(delta.of("added")) == len(back.of("removed"))
    grown = len(after.nodes) - len(before.nodes)
    assert sum(delta.census().values()) == grown
    assert not compare(after, after)
    assert bool(delta) == (before.by_name() != after.by_name())
    assert set(delta.to_json()) == set(delta.counts())


@given(before=snapshots, after=snapshots)
def test_pairs_hold_every_node_once_in_order(before: Snapshot, after: Snapshot) -> None:
    pairs = paired(before, after)
    assert [new for _, new in pairs if new is not None] == list(after.nodes)
    gone = [old for old, new in pairs if old is not None and new is None]
    assert {node.name for node in gone} == set(before.by_name()) - set(after.by_name())
    assert len(pairs) == len(set(before.by_name()) | set(after.by_name()))
    for old, new in pairs:
        if old is not None and new is not None:
            assert old.name == new.name


def test_what_was_removed_stands_where_it_was() -> None:
    first = NodeRecord("first", "Input")
    pairs = paired(Snapshot((first, *BEFORE.nodes)), Snapshot((X, CONV, replace(BN, name="n"))))
    assert [(old or new).name for old, new in pairs if old or new] == [
        *("first", "x", "conv", "bn", "relu", "n"),
    ]
