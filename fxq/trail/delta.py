"""`Delta`: what changed between two snapshots, by node identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fxq.graph import html
from fxq.trail.snapshot import NodeRecord, Snapshot

KINDS = ("added", "removed", "rewired", "noted", "retuned")
SIGNS = {"added": "+", "removed": "-", "rewired": "~", "noted": "!", "retuned": "#"}
SHOWN = 500
"""So many changes are shown in a notebook, which long pages make slow."""


@dataclass(frozen=True)
class Change:
    """One node that differs.

    Attributes:
        kind: ``added``, ``removed``, ``rewired`` (other inputs or operator), ``noted`` (other
            facts) or ``retuned`` (other parameters); the first that applies, in that order.
        before: The node before, or None.
        after: The node after, or None.
    """

    kind: str
    before: NodeRecord | None
    after: NodeRecord | None

    @property
    def name(self) -> str:
        """The node's name."""
        record = self.after or self.before
        assert record is not None
        return record.name

    def lines(self, digests: bool = True) -> list[str]:
        """The change as one line, or two: what was otherwise before stands on a line of its own."""
        record = self.after or self.before
        assert record is not None
        line = f"{SIGNS[self.kind]} {record.text(digests)}"
        former = self.former(digests)
        if not former:
            return [line]
        if self.kind == "rewired":
            return [line, f"    was {former}"]
        return [f"{line}  was {former}"]

    def former(self, digests: bool = True) -> str:
        """Those parts of the node that were otherwise before.

        Example:
            >>> before, after = NodeRecord("r", "ReLU", ("bn",)), NodeRecord("r", "ReLU", ("c",))
            >>> Change("rewired", before, after).former()
            '(%bn)'
        """
        before, after = self.before, self.after
        if before is None or after is None:
            return ""
        head = before.op if before.op != after.op else ""
        head += f":{before.value}" if before.value not in ("", after.value) else ""
        head += f"({before.operands()})" if before.operands() != after.operands() else ""
        noted = before.facts and before.facts != after.facts
        tuned = digests and before.digest not in ("", after.digest)
        parts = [head, f"[{', '.join(before.facts)}]" * bool(noted), f"#{before.digest}" * tuned]
        return "  ".join(part for part in parts if part)


@dataclass(frozen=True)
class Delta:
    """Every change from one snapshot to the next; false when there is none."""

    changes: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.changes)

    def of(self, kind: str) -> tuple[Change, ...]:
        """The changes of one kind."""
        return tuple(change for change in self.changes if change.kind == kind)

    def counts(self) -> dict[str, int]:
        """How many nodes changed in each way; kinds without a change are left out."""
        counted = {kind: len(self.of(kind)) for kind in KINDS}
        return {kind: count for kind, count in counted.items() if count}

    def summary(self) -> str:
        """One line, for example ``-20 removed  #20 retuned``; ``no change`` where nothing did."""
        parts = [f"{SIGNS[kind]}{count} {kind}" for kind, count in self.counts().items()]
        return "  ".join(parts) or "no change"

    def text(self) -> str:
        """The changes, one or two lines each."""
        return "\n".join(line for change in self.changes for line in change.lines())

    def _repr_html_(self) -> str:
        told = [
            html.text(line, change.kind)
            for change in self.changes[:SHOWN]
            for line in change.lines()
        ]
        if len(self.changes) > SHOWN:
            told.append(html.text(f"… and {len(self.changes) - SHOWN} more; see delta.text()"))
        return f"<div>{self.summary_html()}</div>{html.code(told)}"

    def summary_html(self) -> str:
        """`summary`, in colour."""
        counted = self.counts().items()
        parts = [html.text(f"{SIGNS[kind]}{count} {kind}", kind) for kind, count in counted]
        return "&ensp;".join(parts) or "no change"

    def census(self) -> dict[str, int]:
        """By how much the count of each operator changed."""
        counts: dict[str, int] = {}
        for change in self.changes:
            for record, step in ((change.before, -1), (change.after, 1)):
                if record is not None:
                    counts[record.op] = counts.get(record.op, 0) + step
        return {name: count for name, count in sorted(counts.items()) if count}

    def where(self, keeps: Callable[[Change], bool]) -> Delta:
        """Only the changes that a function keeps."""
        return Delta(tuple(change for change in self.changes if keeps(change)))

    def to_json(self) -> dict[str, Any]:
        """The names of the changed nodes by kind."""
        return {kind: [change.name for change in self.of(kind)] for kind in self.counts()}


def compare(before: Snapshot, after: Snapshot) -> Delta:
    """What changed from one snapshot to another, in the order of `paired`.

    Example:
        >>> before = Snapshot((NodeRecord("c", "Conv2d", digest="a36008"),))
        >>> after = Snapshot((NodeRecord("c", "Conv2d", digest="17dd02"),))
        >>> compare(before, after).summary()
        '#1 retuned'
    """
    changes = []
    for previous, record in paired(before, after):
        if record is None:
            changes.append(Change("removed", previous, None))
        elif previous is None:
            changes.append(Change("added", None, record))
        elif kind := _difference(previous, record):
            changes.append(Change(kind, previous, record))
    return Delta(tuple(changes))


Pair = tuple[NodeRecord | None, NodeRecord | None]


def paired(before: Snapshot, after: Snapshot) -> list[Pair]:
    """Every node of two graphs, before and after, in the order of the graph after.

    What was removed stands where it was: behind the last node before it that is still there.

    Example:
        >>> a, b, c = (NodeRecord(name, "ReLU") for name in "abc")
        >>> pairs = paired(Snapshot((a, b)), Snapshot((a, c)))
        >>> [tuple(node and node.name for node in pair) for pair in pairs]
        [('a', 'a'), ('b', None), (None, 'c')]
    """
    old, new = before.by_name(), after.by_name()
    gone: dict[str, list[Pair]] = {}
    place = ""
    for record in before.nodes:
        if record.name in new:
            place = record.name
        else:
            gone.setdefault(place, []).append((record, None))
    pairs = list(gone.get("", []))
    for record in after.nodes:
        pairs.append((old.get(record.name), record))
        pairs += gone.get(record.name, [])
    return pairs


def _difference(before: NodeRecord, after: NodeRecord) -> str | None:
    if (before.op, before.inputs, before.arguments, before.value) != (
        after.op,
        after.inputs,
        after.arguments,
        after.value,
    ):
        return "rewired"
    if before.digest != after.digest:
        return "retuned"
    return "noted" if before.facts != after.facts else None
