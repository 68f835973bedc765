"""How a cost looks: the formulas, a row per layer, totals; as a table, as JSON, as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from . import show

if TYPE_CHECKING:
    from fxq.cost import Cost, LayerCost

    from .cost import Report

HEAD = ("MACs", "W", "A", "levels", "n", "FixOPs", "shift-add", "weights", "output", "layer")

FORMULAS = (
    ("FixOPs", "MACs x W x A / 64, W bits per weight, A per activation; 1 is one product of 8 x 8"),
    ("shift-add", "MACs x n x A / 64, a weight being a sum of at most n powers of two, signed"),
    ("n", "uniform W - 1, apot ceil((W - 1) / 2), pot 1; of lloyd, what its levels take"),
    ("float", "W = A = n = 32"),
)
SIZES = {
    "float": "biases and the four vectors of each batch norm included",
    "trained": "weights in W bits, all else float32",
    "deployed": "weights in W bits, float32 scale and int32 bias per channel",
}
TABLE_1 = (
    "The APoT paper's Table 1 prints more FixOPs than n x A / 64, the formula of its own text:",
    "about 0.75 x W x A / 64 in all layers but the first and the last. That is not counted here.",
)


def report(found: Report) -> None:
    """What is counted, the table, totals, sizes, and the formulas."""
    cost = found.cost
    chosen = f"; bits chosen on {found.chosen_on}" if found.chosen_on else ""
    show.line(f"{found.name}, recipe {found.recipe}; for one image{chosen}")
    show.line()
    head, *rows = _aligned([HEAD, *_cells(cost)])
    show.columns(rows, head=head)
    show.line()
    show.facts(_sizes(cost), "size", "green")
    show.line()
    show.facts(FORMULAS, "formulas", "dim")
    if any(one.levels == "apot" for one in cost.layers):
        show.line()
        show.lines(TABLE_1)


def written(path: Path) -> None:
    """Where the table was written."""
    show.lines(["", f"written: {path}"])


def as_json(found: Report) -> None:
    """Everything that was counted, for other programs."""
    about = {
        "name": found.name,
        "recipe": found.recipe,
        "bits_chosen_on": found.chosen_on or None,
        "formulas": dict(FORMULAS),
    }
    show.raw(json.dumps({**about, **found.cost.to_json()}, indent=1, allow_nan=False))


def write(found: Report, path: Path) -> None:
    """The rows and their total are in the file."""
    from fxq.cost import LayerCost

    rows = [{**asdict(one), "shape": _shape(one.shape)} for one in found.cost.layers]
    total = found.cost.to_json()["total"]
    names = ("macs", "weights", "fixops", "shift_adds")
    last = {"layer": "total", **{name: total[name] for name in names}}
    last["bytes"] = total["weight_bytes"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [one.name for one in fields(LayerCost)])
        writer.writeheader()
        writer.writerows([*rows, last])


# ---- the table ---------------------------------------------------------------------------------


def _cells(cost: Cost) -> list[list[str]]:
    total = [count_text(cost.macs), "", "", "", "", count_text(cost.fixops)]
    total += [count_text(cost.shift_adds), binary_text(cost.weight_bytes), "", "total"]
    return [*(_row(one) for one in cost.layers), total]


def _row(one: LayerCost) -> list[str]:
    widths = [f"{one.weight_bits:.3g}", f"{one.activation_bits:.3g}", one.levels]
    counts = [count_text(one.fixops), count_text(one.shift_adds)]
    size = binary_text(one.bytes) if one.weights else "shared"
    ends = [size, _shape(one.shape), one.layer]
    return [count_text(one.macs), *widths, f"{one.powers:.3g}", *counts, *ends]


def _aligned(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The cells, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [
            cell if name in _TEXT else f"{cell:>{width}}"
            for cell, width, name in zip(row, widths, HEAD, strict=True)
        ]
        for row in rows
    ]


_TEXT = {"levels", "output", "layer"}


def _shape(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)


def _sizes(cost: Cost) -> list[tuple[str, str]]:
    """Every size that is known, and what it counts."""
    sizes = {"float": cost.float_bytes, "trained": cost.trained_bytes}
    sizes["deployed"] = cost.deployed_bytes
    known = {name: count for name, count in sizes.items() if count is not None}
    return [
        (name, f"{binary_text(count)}{_ratio(cost, count)}: {SIZES[name]}")
        for name, count in known.items()
    ]


def _ratio(cost: Cost, count: int) -> str:
    smaller = cost.float_bytes is not None and 0 < count < cost.float_bytes
    return f", {(cost.float_bytes or 0) / count:.1f}x smaller" if smaller else ""


# ---- numbers -----------------------------------------------------------------------------------


def count_text(count: float) -> str:
    """A number of operations for people.

    Example:
        >>> [count_text(count) for count in (17, 1_500, 118_013_952, 1_814_073_344)]
        ['17', '1.5k', '118.01M', '1.814G']
    """
    if count < 1000:
        return f"{count:.4g}"
    if count < 1_000_000:
        return f"{count / 1000:.1f}k"
    if count < 1_000_000_000:
        return f"{count / 1_000_000:.2f}M"
    return f"{count / 1_000_000_000:.3f}G"


def binary_text(count: int) -> str:
    """A number of bytes for people, in units of 1024.

    Example:
        >>> [binary_text(count) for count in (17, 1536, 7_575_000)]
        ['17 B', '1.5 KiB', '7.22 MiB']
    """
    if count < 1024:
        return f"{count} B"
    if count < 1024**2:
        return f"{count / 1024:.1f} KiB"
    return f"{count / 1024**2:.2f} MiB"
