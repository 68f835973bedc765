"""`Delta`: what changed between two snapshots, by node identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxq.trail.snapshot import NodeRecord, Snapshot

KINDS = ("added", "removed", "rewired", "noted", "retuned")
SIGNS = {"added": "+", "removed": "-", "rewired": "~", "noted": "!", "retuned": "#"}


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

    def lines(self) -> list[str]:
        """The change as one line, or two where both sides are worth seeing."""
        sign = SIGNS[self.kind]
        record = self.after or self.before
        assert record is not None
        if self.kind == "rewired" and self.before is not None:
            return [f"{sign} {record.text()}", f"    was {self.before.text()}"]
        if self.kind == "retuned" and self.before is not None:
            return [f"{sign} {record.text()}  was #{self.before.digest}"]
        return [f"{sign} {record.text()}"]


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

    def census(self) -> dict[str, int]:
        """By how much the count of each operator changed."""
        counts: dict[str, int] = {}
        for change in self.changes:
            for record, step in ((change.before, -1), (change.after, 1)):
                if record is not None:
                    counts[record.op] = counts.get(record.op, 0) + step
        return {name: count for name, count in sorted(counts.items()) if count}

    def to_json(self) -> dict[str, Any]:
        """The names of the changed nodes by kind."""
        return {kind: [change.name for change in self.of(kind)] for kind in self.counts()}


def compare(before: Snapshot, after: Snapshot) -> Delta:
    """What changed from one snapshot to another.

    Example:
        >>> before = Snapshot((NodeRecord("c", "Conv2d", digest="a36008"),))
        >>> after = Snapshot((NodeRecord("c", "Conv2d", digest="17dd02"),))
        >>> compare(before, after).summary()
        '#1 retuned'
    """
    old, new = before.by_name(), after.by_name()
    changes = []
    for record in after.nodes:
        previous = old.get(record.name)
        if previous is None:
            changes.append(Change("added", None, record))
        elif kind := _difference(previous, record):
            changes.append(Change(kind, previous, record))
    for record in before.nodes:
        if record.name not in new:
            changes.append(Change("removed", record, None))
    return Delta(tuple(changes))


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
