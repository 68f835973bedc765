"""How an ablation looks: a table, a CSV file and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from . import show
from .ablate import Outcome, Row, figure

Column = tuple[str, list[str]]
"""An option, and its value in each row."""


def tell(outcome: Outcome, folder: Path) -> None:
    """The combinations in a table, each with its accuracy and its distance from float."""
    table = _columns(outcome.rows)
    head = [*(_short(name) for name, _ in table), *_measures(outcome.rows)]
    reference = figure(outcome.reference)
    cells = [
        [*(values[place] for _, values in table), *_texts(row, reference)]
        for place, row in enumerate(outcome.rows)
    ]
    show.line()
    show.columns(cells, head=head)
    files = ", ".join(str(folder / f"ablation.{ending}") for ending in ("csv", "json", "png"))
    show.lines(["", f"float: {outcome.reference} on {outcome.source}", f"written: {files}"])


def write(outcome: Outcome, folder: Path) -> None:
    """``ablation.csv`` and ``ablation.png`` are in the folder."""
    table = _columns(outcome.rows)
    with (folder / "ablation.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        seeds = [f"seed {seed}" for seed in outcome.seeds]
        writer.writerow([*(name for name, _ in table), *seeds, "mean", "float"])
        for place, row in enumerate(outcome.rows):
            chosen = [values[place] for _, values in table]
            reference = figure(outcome.reference)
            writer.writerow([*chosen, *row.figures, mean(row.figures), reference])
    _draw(outcome, folder / "ablation.png")


def _draw(outcome: Outcome, path: Path) -> None:
    """One bar per combination, with the spread over seeds, and a line where float is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = _columns(outcome.rows)
    labels = [
        "  ".join(f"{_short(name)} {values[place]}" for name, values in table)
        for place in range(len(outcome.rows))
    ]
    middle = [mean(row.figures) for row in outcome.rows]
    below = [m - min(row.figures) for m, row in zip(middle, outcome.rows, strict=True)]
    above = [max(row.figures) - m for m, row in zip(middle, outcome.rows, strict=True)]
    reference = figure(outcome.reference)
    picture = Figure(figsize=(9, 1.2 + 0.32 * len(labels)), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    bars = axes.barh(labels, middle, xerr=[below, above], color="#4c78a8", ecolor="#222222")
    axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=8)
    axes.axvline(reference, color="#e45756", linestyle="--")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(f"{_measures(outcome.rows)[0]}, {outcome.source}")
    axes.set_title(f"{outcome.model}; dashed: float, {reference:.2f}")
    picture.savefig(path, dpi=120)


def _columns(rows: Sequence[Row]) -> list[Column]:
    """The options and their values, row by row."""
    pairs = [[setting.split("=", 1) for setting in row.settings] for row in rows]
    return [(first[0], [row[place][1] for row in pairs]) for place, first in enumerate(pairs[0])]


def _short(name: str) -> str:
    """An option without its pass."""
    return name.rpartition(".")[2]


def _measures(rows: Sequence[Row]) -> list[str]:
    """What the last columns hold."""
    score = rows[0].scores[0]
    what = "top-1 (%)" if score.total else next(iter(score.values))
    spread = ["spread"] if len(rows[0].scores) > 1 else []
    return [what, *spread, "against float"]


def _texts(row: Row, reference: float) -> list[str]:
    """What was measured, for people."""
    middle = mean(row.figures)
    spread = [f"{max(row.figures) - min(row.figures):.2f}"] if len(row.scores) > 1 else []
    return [f"{middle:.2f}", *spread, f"{middle - reference:+.2f}".replace("-", "−")]
