"""How journals look: changes in colour on a terminal, the same text plain elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from fxq.trail.delta import KINDS, SIGNS
from fxq.trail.journal import format_db

from . import show

if TYPE_CHECKING:
    from fxq.trail.delta import Change, Delta
    from fxq.trail.journal import Step
    from fxq.trail.snapshot import NodeRecord, Snapshot

    from .trail import Reasons, Section

COLOURS = dict(zip(KINDS, ("green", "red", "yellow", "cyan", "magenta"), strict=True))


def counts(delta: Delta) -> Text:
    """How many nodes changed in each way, each in its colour."""
    found = delta.counts()
    if not found:
        return Text("no change", style="dim")
    parts = [Text(f"{SIGNS[kind]}{n} {kind}", style=COLOURS[kind]) for kind, n in found.items()]
    return Text("  ").join(parts)


def section(one: Section, *, stat: bool) -> None:
    """A heading with the counts, then the changed nodes unless only the statistics are wanted."""
    name = f"{one.position} {one.title:<18} " if one.step is not None else f"{one.title}  "
    show.line(Text.assemble((name, "bold"), counts(one.delta), _costs(one.step)))
    if stat:
        show.lines(_census(one.delta))
    else:
        show.lines(text for change in one.delta.changes for text in change_lines(change))


def _costs(step: Step | None) -> Text:
    if step is None:
        return Text()
    parts = [f"{step.seconds:.2f} s"]
    if step.sqnr is not None:
        parts.insert(0, format_db(step.sqnr))
    if step.misses:
        parts.append(f"{len(step.misses)} refused")
    return Text("  " + "  ".join(parts), style="dim")


def _census(delta: Delta) -> list[str]:
    parts = [f"{count:+d} {op}" for op, count in delta.census().items()]
    return ["    " + "  ".join(parts)] if parts else []


def change_lines(change: Change) -> list[Text]:
    """A change as one or two lines."""
    first, *others = change.lines()
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


def _refused(count: int) -> str:
    return f"{count} refused" if count else "nothing refused"


def _reason(name: str, why: str) -> Text:
    return Text.assemble((f"  %{name}: ", "yellow"), why)
