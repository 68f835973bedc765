"""A comparison of two graphs in the language of Graphviz: one picture, the changes in colour."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fxq.trail.delta import SIGNS, Change, compare, paired
from fxq.trail.snapshot import NodeRecord, Snapshot

FILLS = {
    "added": "#b7e4c7",
    "removed": "#f7c0bb",
    "rewired": "#fde69a",
    "noted": "#bde3f2",
    "retuned": "#e3c6f0",
}
_PLAIN, _GONE, _NEW, _GREY = "#f4f4f4", "#c0392b", "#1e8449", "#666666"


def dot(
    before: Snapshot,
    after: Snapshot,
    *,
    title: str = "",
    keeps: Callable[[Change], bool] = lambda change: True,
    shown: Callable[[NodeRecord], bool] = lambda record: True,
) -> str:
    r"""Both graphs in one picture, for ``dot -Tsvg``.

    What is not there any more is dashed. The sign of a change stands before the name of its node,
    so that nothing depends on colour alone.

    Args:
        before: The graph before.
        after: The graph after.
        title: Stands above the picture.
        keeps: Which changes are marked; the others look unchanged.
        shown: Which nodes are drawn.

    Example:
        >>> x, y = NodeRecord("x", "Input"), NodeRecord("y", "ReLU", ("x",))
        >>> print(dot(Snapshot((x,)), Snapshot((x, y))))
        digraph changes {
          graph [rankdir=TB, fontname="Helvetica"]
          node [shape=box, style="filled,rounded", fontname="Helvetica", color="#666666"]
          "x" [label="x\nInput", fillcolor="#f4f4f4"]
          "y" [label="+ y\nReLU", fillcolor="#b7e4c7"]
          "x" -> "y" [color="#1e8449"]
        }
    """
    kinds = {one.name: one.kind for one in compare(before, after).changes if keeps(one)}
    drawn = [
        (record, kinds.get(record.name, ""))
        for old, new in paired(before, after)
        if (record := new or old) is not None and shown(record)
    ]
    lines = ["digraph changes {", '  graph [rankdir=TB, fontname="Helvetica"]']
    if title:
        lines.append(f"  label={_quoted(title)}; labelloc=t")
    lines.append(
        f'  node [shape=box, style="filled,rounded", fontname="Helvetica", color="{_GREY}"]'
    )
    lines += [f"  {_node(record, kind)}" for record, kind in drawn]
    lines += [f"  {edge}" for edge in _edges(before, after, {one.name for one, _ in drawn})]
    return "\n".join([*lines, "}"])


def _node(record: NodeRecord, kind: str) -> str:
    sign = f"{SIGNS[kind]} " if kind else ""
    rows = [f"{sign}{record.name}", record.op, record.value]
    label = "\\n".join(_escaped(row) for row in rows if row)
    attributes = f'label="{label}", fillcolor="{FILLS.get(kind, _PLAIN)}"'
    dashed = f', style="filled,rounded,dashed", color="{_GONE}"' if kind == "removed" else ""
    return f"{_quoted(record.name)} [{attributes}{dashed}]"


def _edges(before: Snapshot, after: Snapshot, drawn: set[str]) -> Iterator[str]:
    old, new = _arrows(before), _arrows(after)
    for one in [*new, *(arrow for arrow in old if arrow not in new)]:
        if not drawn.issuperset(one):
            continue
        style = "" if one in old else f' [color="{_NEW}"]'
        style = style if one in new else f' [color="{_GONE}", style=dashed]'
        yield f"{_quoted(one[0])} -> {_quoted(one[1])}{style}"


def _arrows(graph: Snapshot) -> dict[tuple[str, str], None]:
    """The edges, once each, in order."""
    return {(source, node.name): None for node in graph.nodes for source in node.inputs}


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
