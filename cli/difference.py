"""`Section`: two graphs that are compared, and which of their differences are told."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fxq.errors import UnknownNameError
from fxq.trail.delta import Change, Delta, compare, paired
from fxq.trail.snapshot import NodeRecord, Snapshot

if TYPE_CHECKING:
    from fxq.trail.drift import Drift
    from fxq.trail.journal import Step


@dataclass(frozen=True)
class Filter:
    """Which changes are told: all that match one of the words of each kind that is given.

    Attributes:
        nodes: Globs over node names and module paths.
        ops: Globs over operators, before or after.
        kinds: Kinds of change.
    """

    nodes: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.nodes or self.ops or self.kinds)

    def keeps(self, change: Change) -> bool:
        """Whether a change is told."""
        records = [one for one in (change.before, change.after) if one is not None]
        return (
            (not self.kinds or change.kind in self.kinds)
            and (not self.nodes or any(_named(one, glob) for one in records for glob in self.nodes))
            and (not self.ops or any(_does(one, glob) for one in records for glob in self.ops))
        )

    def check(self, records: Sequence[NodeRecord]) -> None:
        """Every glob matches something in the graphs.

        Raises:
            UnknownNameError: One does not.
        """
        for glob in self.nodes:
            if not any(_named(one, glob) for one in records):
                known = {one.name for one in records} | {one.path for one in records if one.path}
                raise UnknownNameError("node", glob, known)
        for glob in self.ops:
            if not any(_does(one, glob) for one in records):
                raise UnknownNameError("operator", glob, {one.op for one in records})


def _named(record: NodeRecord, glob: str) -> bool:
    """Whether a glob means a node; ``layer1.*`` also means what passes inserted there."""
    pattern = glob.removeprefix("%")
    names = ((record.name, pattern), (record.path, pattern), (record.name, _flat(pattern)))
    return any(fnmatch.fnmatchcase(*both) for both in names)


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _does(record: NodeRecord, glob: str) -> bool:
    return fnmatch.fnmatchcase(record.op, glob)


@dataclass(frozen=True)
class Section:
    """Two graphs that are compared.

    Attributes:
        position: Position of the pass, from 1, after which the second one is.
        title: What is compared, for people.
        sides: What the two graphs are called.
        before: The first graph.
        after: The second graph.
        keeps: Which changes are told.
        step: The pass that leads from the first to the second, where there is one.
        recipe: How the passes that led to the two graphs differ, where they are of two runs.
    """

    position: int
    title: str
    sides: tuple[str, str]
    before: Snapshot
    after: Snapshot
    keeps: Filter
    step: Step | None = None
    recipe: tuple[str, ...] = ()

    @cached_property
    def delta(self) -> Delta:
        """The changes that are told."""
        return compare(self.before, self.after).where(self.keeps.keeps)

    @cached_property
    def moved(self) -> dict[str, Drift]:
        """How far the pass moved each value, of the nodes that are told."""
        known = {} if self.step is None else self.step.moved
        told = {change.name: change for change in compare(self.before, self.after).changes}
        found = {}
        for record in self.after.nodes:
            change = told.get(record.name, Change("", record, record))
            if record.name in known and self.keeps.keeps(change):
                found[record.name] = known[record.name]
        return found

    @property
    def strangers(self) -> bool:
        """Whether no node but inputs and outputs is in both graphs."""
        places = ("Input", "Output")
        first, second = (
            {one.name for one in graph.nodes if one.op not in places}
            for graph in (self.before, self.after)
        )
        return bool(first and second) and not first & second

    def rows(self) -> list[Change | NodeRecord]:
        """The changes that are told, among the other nodes of the second graph, in order."""
        told = {change.name: change for change in self.delta.changes}
        rows: list[Change | NodeRecord] = []
        for before, after in paired(self.before, self.after):
            record = after or before
            if record is not None and record.name in told:
                rows.append(told[record.name])
            elif after is not None:
                rows.append(after)
        return rows

    def hunks(self, context: int) -> list[list[Change | NodeRecord]]:
        """The rows around the changes, with so many unchanged nodes before and after them."""
        rows = self.rows()
        near = {
            place + offset
            for place, row in enumerate(rows)
            if isinstance(row, Change)
            for offset in range(-context, context + 1)
        }
        hunks: list[list[Change | NodeRecord]] = []
        for place, row in enumerate(rows):
            if place not in near:
                continue
            if place - 1 not in near or not hunks:
                hunks.append([])
            hunks[-1].append(row)
        return hunks

    def to_json(self) -> dict[str, Any]:
        """The section as JSON-ready data."""
        return {
            "position": self.position,
            "name": self.title,
            "from": self.sides[0],
            "to": self.sides[1],
            "recipe": list(self.recipe),
            "counts": self.delta.counts(),
            "census": self.delta.census(),
            "changes": [_change_to_json(change) for change in self.delta.changes],
            "moved": {name: one.short() for name, one in self.moved.items()},
        }


def _change_to_json(change: Change) -> dict[str, Any]:
    record = change.after or change.before
    return {
        "kind": change.kind,
        "node": change.name,
        "op": record and record.op,
        "path": record and record.path,
        "before": change.before and change.before.text(),
        "after": change.after and change.after.text(),
    }
