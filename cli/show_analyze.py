"""How an analysis looks: the waterfall, the ranked layers, a CSV file and a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.attribution import PARTS
from fxq.trail.drift import number
from fxq.trail.journal import format_db

from . import show

if TYPE_CHECKING:
    from fxq.analysis import QuantLayer
    from fxq.attribution import LayerError


@dataclass(frozen=True)
class Row:
    """What is known of one layer.

    Attributes:
        layer: The layer.
        figures: What was measured of it, as ``analysis.json`` has it.
        error: What its error is made of.
    """

    layer: QuantLayer
    figures: Mapping[str, Any]
    error: LayerError

    def figure(self, way: str, name: str) -> float | None:
        """One figure; None where it was not measured."""
        return number(self.figures.get(way, {}).get(name))

    @property
    def loss(self) -> float:
        """What rows are ranked by: the SQNR with only this layer quantized, the worst first."""
        found = self.figure("alone", "sqnr")
        return float("inf") if found is None else found

    def share(self, part: str) -> str:
        """A part of its error, in per cent of the error."""
        total = self.error.error
        return f"{round(100 * getattr(self.error, part) / total)} %" if total > 0 else ""


def rows_of(
    layers: Sequence[QuantLayer], figures: Mapping[str, Any], errors: Sequence[LayerError]
) -> list[Row]:
    """One row per layer, the most sensitive first."""
    known = {one.node: one for one in errors}
    rows = [Row(layer, figures[layer.node], known[layer.node]) for layer in layers]
    return sorted(rows, key=lambda row: row.loss)


def tell(
    rows: Sequence[Row],
    waterfall: Sequence[Mapping[str, Any]],
    folder: Path,
    sample: int,
    source: str | None,
) -> None:
    """The passes, then the layers, then what the columns mean."""
    show.lines(["", "the output on the probe batch against the captured model"])
    show.columns([_fall(one) for one in waterfall], head=_FALL)
    show.lines(["", "layers, the most sensitive first"])
    scored = any(row.figure("alone", "score") is not None for row in rows)
    show.columns([_cells(row, scored) for row in rows], head=_head(scored))
    files = ", ".join(f"analysis.{ending}" for ending in ("json", "csv", "png"))
    told = [
        "",
        f"alone: only this layer is quantized; without: all but this one; SQNR on {sample} "
        "calibration inputs",
        "own: SQNR of the layer's output on float inputs; then what its error is made of; M1 of "
        "its weights and values",
    ]
    show.lines([*told, *([f"score: {source}"] if source else [])])
    show.line(f"written to {folder}: {files}, attribution.json")


_FALL = ("pass", "SQNR", "largest", "flips", "error", "part")


def _fall(one: Mapping[str, Any]) -> list[str]:
    flips = f"{one['flips']} of {one['decisions']}" if one["decisions"] else ""
    error, part = number(one["error"]), number(one["part"])
    sqnr = "" if one["sqnr_db"] is None else f"{one['sqnr_db']:.1f} dB"
    return [
        str(one["pass"]),
        sqnr or ("exact" if error == 0 else "not finite"),
        f"{number(one['max_error']):.3g}",
        flips,
        f"{error:.2e}",
        f"{'+' if part > 0 else '−'}{abs(part):.2e}" if part else "0",
    ]


def _head(scored: bool) -> list[str]:
    scores = ["top-1 alone", "without"] if scored else []
    return ["layer", "bits", "alone", "without", *scores, "own", *PARTS, "M1 w", "M1 x"]


def _cells(row: Row, scored: bool) -> list[str]:
    ways = ("alone", "without")
    sqnrs = [format_db(row.figure(way, "sqnr")) for way in ways]
    scores = [_plain(row.figure(way, "score")) for way in ways] if scored else []
    shifts = [_plain(row.figure(what, "m1"), 4) for what in ("weights", "values")]
    shares = [row.share(part).replace("-", "−") for part in PARTS]
    own = format_db(row.error.sqnr)
    return [row.layer.path, row.layer.bits, *sqnrs, *scores, own, *shares, *shifts]


def _plain(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# ---- files -------------------------------------------------------------------------------------


def write(rows: Sequence[Row], folder: Path) -> None:
    """``analysis.csv`` and ``analysis.png`` are in the folder, beside the JSON files."""
    from fxq import plot

    with (folder / "analysis.csv").open("w", encoding="utf-8", newline="") as file:
        flat = [_flat(row) for row in rows]
        names = list(dict.fromkeys(name for one in flat for name in one))
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)
    plot.sensitivity(folder).savefig(folder / "analysis.png", dpi=120)


def _flat(row: Row) -> dict[str, Any]:
    """A row of the CSV file: every figure under ``group.name``."""
    groups = {
        f"{way}.{name}": value
        for way, group in row.figures.items()
        if way != "layer"
        for name, value in group.items()
    }
    parts = {part: getattr(row.error, part) for part in (*PARTS, "error", "network")}
    return {**row.layer.to_json(), **groups, **parts}
