"""What the page shows, as JSON-ready data: the run's own record, and where to draw it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxq.errors import ArtifactError
from fxq.integer.ledger import Ledger
from fxq.report.layout import layout, merged_order
from fxq.trail.delta import KINDS
from fxq.trail.drift import finite
from fxq.trail.journal import Journal, Step
from fxq.trail.snapshot import NodeRecord, Snapshot


@dataclass(frozen=True)
class Run:
    """What a run folder says about itself.

    Attributes:
        name: What the page is called after where no network is named.
        journal: What each pass did.
        ledger: Where each node went; None where the program was not lowered.
        recipe: The recipe as TOML.
        metadata: ``metadata.json``.
        attribution: ``attribution.json``: ``layers``, each a ``node`` with its error by cause, and
            ``waterfall``, passes with the ``sqnr_db`` they left; empty where there is none.
        sensitivity: Of ``analysis.json``: for each layer the SQNR of the output where it alone is
            quantized (``alone``), and where it alone is not (``without``), most sensitive first.
    """

    name: str
    journal: Journal
    ledger: Ledger | None = None
    recipe: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    attribution: dict[str, Any] = field(default_factory=dict)
    sensitivity: list[dict[str, Any]] = field(default_factory=list)


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        ArtifactError: There is no journal, or a file is damaged.
    """
    ledger = _json(folder / "ledger.json")
    return Run(
        name=folder.resolve().name,
        journal=Journal.load(folder),
        ledger=None if ledger is None else Ledger.from_json(ledger),
        recipe=_text(folder / "recipe.toml") or "",
        metadata=_object(folder / "metadata.json"),
        attribution=_object(folder / "attribution.json"),
        sensitivity=_sensitivity(_object(folder / "analysis.json")),
    )


def page_data(run: Run) -> dict[str, Any]:
    """Everything the page needs; nodes are told by their place in ``names``."""
    graphs = _graphs(run.journal)
    names = merged_order(graphs)
    number = {name: index for index, name in enumerate(names)}
    drawing = layout(graphs)
    records: dict[NodeRecord, int] = {}
    return {
        "name": run.name,
        "names": names,
        "places": [drawing.places[name] for name in names],
        "routes": [
            [number[source], number[target], points]
            for (source, target), points in drawing.routes.items()
        ],
        "rows": drawing.rows,
        "graphs": [_numbered(graph.nodes, records) for graph in graphs],
        "records": [_record(record, number) for record in records],
        "steps": [_step(step, number) for step in run.journal],
        "ledger": None if run.ledger is None else run.ledger.to_json(),
        "values": run.journal.values.to_json(),
        "integers": run.journal.integers and run.journal.integers.to_json(),
        "recipe": run.recipe,
        "metadata": run.metadata,
        "attribution": run.attribution,
        "sensitivity": run.sensitivity,
    }


def _sensitivity(analysis: dict[str, Any]) -> list[dict[str, Any]]:
    """Layers of an analysis with both their SQNRs; those without figures are left out."""
    found = []
    for node, figures in analysis.get("layers", {}).items():
        both = {which: figures.get(which, {}).get("sqnr") for which in ("alone", "without")}
        if all(isinstance(value, (int, float)) for value in both.values()):
            found.append({"node": node, **both})
    return sorted(found, key=lambda layer: float(layer["alone"]))


def _graphs(journal: Journal) -> list[Snapshot]:
    if not len(journal):
        return []
    return [journal[0].before, *(step.after for step in journal)]


def _numbered(nodes: Iterable[NodeRecord], records: dict[NodeRecord, int]) -> list[int]:
    """Each record by its number; one that is the same in many graphs is stored once."""
    return [records.setdefault(node, len(records)) for node in nodes]


def _record(record: NodeRecord, number: dict[str, int]) -> list[Any]:
    inputs = [number[name] for name in record.inputs if name in number]
    return [
        number[record.name],
        record.op,
        inputs,
        record.arguments,
        record.value,
        list(record.facts),
        record.digest,
        record.path,
    ]


def _step(step: Step, number: dict[str, int]) -> dict[str, Any]:
    delta = step.delta
    return {
        "name": step.name,
        "options": step.options,
        "contract": step.contract,
        "seconds": round(step.seconds, 4),
        "sqnr": finite(step.sqnr),
        "total_sqnr": finite(step.total_sqnr),
        "drift": step.drift and step.drift.to_json(),
        "moved": [[number[name], *one.short()] for name, one in step.moved.items()],
        "notes": list(step.notes),
        "misses": [[number.get(miss.node), miss.node, miss.why] for miss in step.misses],
        "changes": {kind: [number[change.name] for change in delta.of(kind)] for kind in KINDS},
    }


def _text(path: Path) -> str | None:
    """The text of a file; None where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error


def _object(path: Path) -> dict[str, Any]:
    data = _json(path)
    if data is not None and not isinstance(data, dict):
        raise _damaged(path, "it does not hold an object")
    return data or {}


def _damaged(path: Path, error: object) -> ArtifactError:
    return ArtifactError(
        f"the file cannot be read: {error}",
        where=str(path),
        hint="compile again; it was changed or cut short",
    )
