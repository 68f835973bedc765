"""`Ledger`: where every node of the captured graph ended up, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from fxq.errors import ArtifactError
from fxq.graph.program import Program
from fxq.trail.journal import Journal

PLACES = ("int8", "folded", "float")


@dataclass(frozen=True)
class LedgerEntry:
    """One node.

    Attributes:
        node: Its name.
        path: The module path users know it by.
        op: What it computes.
        where: ``int8`` (runs on integers), ``folded`` (runs inside another), or ``float``.
        why: What it was folded into, or why it stayed in float.
        layer: Whether it is a convolution or linear, which coverage counts.
    """

    node: str
    path: str
    op: str
    where: str
    why: str = ""
    layer: bool = False


@dataclass(frozen=True)
class Ledger:
    """Every node of the captured graph.

    Example:
        >>> ledger = Ledger((LedgerEntry("c", "conv", "Conv2d", "int8", layer=True),))
        >>> ledger.coverage(), ledger.warnings(1.0)
        (1.0, [])
    """

    entries: tuple[LedgerEntry, ...]

    def coverage(self) -> float:
        """The share of convolutions and linears that run on integers; 1 where there are none."""
        layers = [entry for entry in self.entries if entry.layer]
        return sum(entry.where == "int8" for entry in layers) / len(layers) if layers else 1.0

    def counts(self) -> dict[str, int]:
        """How many nodes ended up where."""
        counted = Counter(entry.where for entry in self.entries)
        return {place: counted[place] for place in PLACES}

    def in_float(self) -> list[LedgerEntry]:
        """The nodes that run in float."""
        return [entry for entry in self.entries if entry.where == "float"]

    def warnings(self, promised: float) -> list[str]:
        """What to tell the user when fewer layers run on integers than the recipe promised."""
        if self.coverage() >= promised:
            return []
        layers = [entry for entry in self.entries if entry.layer]
        left = [entry for entry in layers if entry.where == "float"]
        lines = [
            f"{len(layers) - len(left)} of {len(layers)} convolutions and linears run on integers; "
            f"the recipe promised {promised:.0%}"
        ]
        return lines + [f"{entry.path or entry.node} stays in float: {entry.why}" for entry in left]

    def simulated(self) -> list[str]:
        """What to tell the user of a simulation: how many layers compute in float, and why.

        Example:
            >>> Ledger((LedgerEntry("c", "c", "Conv2d", "float", "so", layer=True),)).simulated()
            ['1 of 1 layers compute in float (1: so); accuracy means something, speed does not']
        """
        layers = [entry for entry in self.entries if entry.layer]
        reasons = Counter(entry.why for entry in layers if entry.where == "float")
        if not reasons:
            return []
        told = "; ".join(f"{count}: {why}" for why, count in reasons.most_common())
        return [
            f"{reasons.total()} of {len(layers)} layers compute in float ({told}); "
            "accuracy means something, speed does not"
        ]

    def to_json(self) -> list[dict[str, Any]]:
        """The ledger as JSON-ready data."""
        return [asdict(entry) for entry in self.entries]

    @classmethod
    def from_json(cls, data: Any) -> Ledger:
        """The ledger that `to_json` wrote.

        Raises:
            ArtifactError: The data is not a ledger.
        """
        try:
            if not isinstance(data, list):
                raise TypeError(f"it is a {type(data).__name__}, not a list")
            return cls(tuple(_entry(item) for item in data))
        except TypeError as error:
            raise ArtifactError(f"the ledger is damaged: {error}") from error


def _entry(item: dict[str, Any]) -> LedgerEntry:
    entry = LedgerEntry(**item)
    texts = (entry.node, entry.path, entry.op, entry.where, entry.why)
    if not all(isinstance(text, str) for text in texts) or not isinstance(entry.layer, bool):
        raise TypeError(f"{item} is no entry")
    return entry


def removed_by_passes(program: Program, journal: Journal | None) -> list[LedgerEntry]:
    """The captured nodes that passes folded away; none where there is no journal."""
    if journal is None:
        return []
    present = {node.name for node in program.nodes()}
    captured = {record.name for record in journal[0].before.nodes} if len(journal) else set()
    return [
        LedgerEntry(change.name, change.name, change.before.op, "folded", f"by {step.name}")
        for step in journal
        for change in step.delta.of("removed")
        if change.before is not None and change.name in captured and change.name not in present
    ]
