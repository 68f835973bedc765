"""`Journal`: the record of a compilation, one `Step` per pass; every view is a reader of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxq.errors import ArtifactError, UnknownNameError
from fxq.graph import html
from fxq.graph.rewrite import Miss
from fxq.trail.delta import Delta, compare
from fxq.trail.drift import INFINITIES, Drift, finite, number
from fxq.trail.snapshot import Snapshot, strings
from fxq.trail.values import Values

FORMAT = 1

_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError)
"""What reading a file that is no journal raises."""


@dataclass(frozen=True)
class Step:
    """What one pass did.

    Attributes:
        name: The pass.
        options: Its options, by name.
        contract: What it promised, for example ``same-numbers``.
        before: The graph before.
        after: The graph after.
        hits: Names of the nodes it rewrote.
        misses: The matches it refused.
        seconds: How long it took.
        sqnr: Signal-to-noise ratio of the probe output against the step before, in dB; infinite
            where it is bit-identical, None where it was not measured.
        total_sqnr: The same against the captured model.
        notes: What the pass wants told, one sentence each.
        drift: How far the probe output is from the captured model's; None where not measured.
        moved: By node, how far its value on the probe batch is from what it stands for before the
            pass, see `fxq.trail.probe`; only values that changed.
    """

    name: str
    options: dict[str, Any]
    contract: str
    before: Snapshot
    after: Snapshot
    hits: tuple[str, ...] = ()
    misses: tuple[Miss, ...] = ()
    seconds: float = 0.0
    sqnr: float | None = None
    total_sqnr: float | None = None
    notes: tuple[str, ...] = ()
    drift: Drift | None = None
    moved: dict[str, Drift] = field(default_factory=dict)

    @property
    def delta(self) -> Delta:
        """What changed."""
        return compare(self.before, self.after)

    @property
    def census(self) -> dict[str, int]:
        """By how much the count of each operator changed."""
        return self.delta.census()

    def summary(self) -> str:
        """The step on one line."""
        parts = [f"{self.name:<18} {self.delta.summary():<44}"]
        parts.append(f"{format_db(self.sqnr):>9}" if self.sqnr is not None else " " * 9)
        parts.append(f"{self.seconds:7.2f} s")
        return " ".join(parts)


@dataclass
class Journal:
    """The steps of a compilation, in order.

    Attributes:
        steps: One per pass.
        integers: How far the lowered module is from the captured model, where that was measured.
        values: What calibration saw, and the grids of what was quantized.
        reference: What the captured model puts out on the probe batch; it is not saved.

    Example:
        >>> Journal([]).text()
        'no pass has run'
    """

    steps: list[Step] = field(default_factory=list)
    integers: Drift | None = None
    values: Values = field(default_factory=Values)
    reference: Any = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __getitem__(self, name: str | int) -> Step:
        """The step at a position, or the last step of a pass of that name."""
        if isinstance(name, int):
            return self.steps[name]
        for step in reversed(self.steps):
            if step.name == name:
                return step
        raise UnknownNameError("step", name, [step.name for step in self.steps])

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        if not self.steps:
            return "no pass has run"
        rows = [
            (
                str(position),
                html.folded(html.text(step.name), step.delta._repr_html_()),
                step.delta.summary_html(),
                html.text(format_db(step.sqnr)),
                html.text(format_db(step.total_sqnr)),
                f"{step.seconds:.2f} s",
            )
            for position, step in enumerate(self.steps, 1)
        ]
        return html.table(("", "pass", "changed", "cost", "SQNR", "time"), rows)

    def text(self) -> str:
        """One line per pass: what changed, what it cost, how long it took."""
        lines = [f"{position} {step.summary()}" for position, step in enumerate(self.steps, 1)]
        return "\n".join(lines) or "no pass has run"

    def save(self, folder: Path) -> None:
        """Write ``journal.json``, ``values.json`` and numbered snapshots ``00-capture.txt``, …."""
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("[0-9][0-9]-*.txt"):
            stale.unlink()
        (folder / "journal.json").write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")
        self.values.save(folder)
        if self.steps:
            _write_text(folder / "00-capture.txt", self.steps[0].before)
        for position, step in enumerate(self.steps, 1):
            _write_text(folder / f"{position:02d}-{step.name}.txt", step.after)

    def to_json(self) -> dict[str, Any]:
        """The journal as JSON-ready data; each snapshot is stored once."""
        snapshots: list[Snapshot] = []
        if self.steps:
            snapshots = [self.steps[0].before, *(step.after for step in self.steps)]
        return {
            "format": FORMAT,
            "snapshots": [graph.to_json() for graph in snapshots],
            "code": [graph.code for graph in snapshots],
            "steps": [_step_to_json(step) for step in self.steps],
            "integers": self.integers and self.integers.to_json(),
        }

    @classmethod
    def load(cls, folder: Path) -> Journal:
        """The journal saved in a folder.

        Raises:
            ArtifactError: The file is missing, damaged or of a newer format.
        """
        path = folder / "journal.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            journal = cls.from_json(data)
        except FileNotFoundError as error:
            raise ArtifactError(
                "there is no journal here",
                where=str(path),
                hint="give the run folder that fxq compile printed",
            ) from error
        except _DAMAGE as error:
            raise ArtifactError(
                f"the journal cannot be read: {error}",
                where=str(path),
                hint="compile again; the file was changed or cut short",
            ) from error
        journal.values = Values.load(folder)
        return journal

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Journal:
        """The journal that `to_json` wrote."""
        if data["format"] != FORMAT:
            raise ValueError(f"journal format {data['format']!r}, this fxq reads {FORMAT}")
        graphs = data["snapshots"]
        codes = data.get("code", [""] * len(graphs))  # older runs have none
        snapshots = [Snapshot.from_json(*both) for both in zip(graphs, codes, strict=True)]
        steps = [
            _step_from_json(entry, snapshots[position], snapshots[position + 1])
            for position, entry in enumerate(data["steps"])
        ]
        return cls(steps, Drift.from_json(data.get("integers")))


def format_db(value: float | None) -> str:
    """A signal-to-noise ratio for people: ``31.4 dB``; ``exact`` where nothing changed."""
    if value is None:
        return ""
    return INFINITIES.get(value, f"{value:.1f} dB")


def _write_text(path: Path, graph: Snapshot) -> None:
    path.write_text(graph.text() + "\n", encoding="utf-8")


def _step_to_json(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "options": step.options,
        "contract": step.contract,
        "hits": list(step.hits),
        "misses": [{"node": miss.node, "why": miss.why} for miss in step.misses],
        "seconds": round(step.seconds, 4),
        "sqnr": finite(step.sqnr),
        "total_sqnr": finite(step.total_sqnr),
        "notes": list(step.notes),
        "drift": step.drift and step.drift.to_json(),
        "moved": {name: one.short() for name, one in step.moved.items()},
        "delta": step.delta.to_json(),
    }


def _step_from_json(entry: dict[str, Any], before: Snapshot, after: Snapshot) -> Step:
    return Step(
        name=str(entry["name"]),
        options=dict(entry["options"]),
        contract=str(entry["contract"]),
        before=before,
        after=after,
        hits=strings(entry["hits"]),
        misses=tuple(Miss(*strings([miss["node"], miss["why"]])) for miss in entry["misses"]),
        seconds=float(entry["seconds"]),
        sqnr=number(entry["sqnr"]),
        total_sqnr=number(entry["total_sqnr"]),
        notes=strings(entry["notes"]),
        drift=Drift.from_json(entry.get("drift")),
        moved={name: Drift.of_short(one) for name, one in entry.get("moved", {}).items()},
    )
