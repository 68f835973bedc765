"""How journals look: changes in colour on a terminal, the same text plain elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.text import Text

from fxq.trail.delta import KINDS, SIGNS

from . import show

if TYPE_CHECKING:
    from fxq.trail.delta import Change, Delta
    from fxq.trail.snapshot import NodeRecord, Snapshot

    from .trail import Reasons

COLOURS = dict(zip(KINDS, ("green", "red", "yellow", "cyan", "magenta"), strict=True))


def counts(delta: Delta) -> Text:
    """How many nodes changed in each way, each in its colour."""
    return totals(delta.counts())


def totals(found: Mapping[str, int]) -> Text:
    """The same of counts by kind."""
    if not any(found.values()):
        return Text("no change", style="dim")
    parts = [
        Text(f"{SIGNS[kind]}{found[kind]} {kind}", style=COLOURS[kind])
        for kind in KINDS
        if found.get(kind)
    ]
    return Text("  ").join(parts)


def change_lines(change: Change, digests: bool = True) -> list[Text]:
    """A change as one or two lines."""
    first, *others = change.lines(digests)
    return [
        Text(first, style=COLOURS[change.kind]),
        *(Text(text, style="dim") for text in others),
    ]


def graph(snapshot: Snapshot, digests: bool) -> None:
    """The nodes of a graph, one per line."""
    show.lines(_node(node, digests) for node in snapshot.nodes)


def _node(node: NodeRecord, digests: bool) -> Text:
    text = Text(node.text(digests))
    text.highlight_regex(r"(?<== )[^(:]+", "bold")
    text.highlight_regex(r"  \[.*\]", "cyan")
    text.highlight_regex(r"  #\w+$", "dim")
    return text


def reasons(found: Reasons, node: str | None, only: str | None) -> None:
    """Every refusal under its pass, then what stayed in float."""
    for name, misses in found.by_pass.items():
        if not misses and (only is None or node is not None):
            continue
        show.line(Text(f"{name}: {_refused(len(misses))}", style="bold"))
        show.lines(_reason(*miss) for miss in misses)
    if not any(found.by_pass.values()) and only is None:
        matching = f" on a node that matches {node}" if node else ""
        show.line(f"no pass refused anything{matching}")
    if found.in_float is not None:
        total = show.plural(found.nodes, "node")
        show.line(Text(f"in float: {len(found.in_float)} of {total}", style="bold"))
        show.lines(_reason(*entry) for entry in found.in_float)
    if found.unproven:
        title = (
            f"computed in float64 on CPUs without VNNI: {show.plural(len(found.unproven), 'layer')}"
        )
        show.line(Text(title, style="bold"))
        show.lines(_reason(*entry) for entry in found.unproven)


def _refused(count: int) -> str:
    return f"{count} refused" if count else "nothing refused"


def _reason(name: str, why: str) -> Text:
    return Text.assemble((f"  %{name}: ", "yellow"), why)
