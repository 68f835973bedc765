"""Pictures of a run, of an analysis and of a training, as matplotlib figures.

A run is the folder that ``fxq compile`` wrote, a `Journal`, or what has one: a result, an artifact.
Figures are independent of pyplot; notebooks show them, and ``figure.savefig`` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.error_plots import journal_of, reading, sensitivity, waterfall
from fxq.errors import ArtifactError, SpecError, UnknownNameError
from fxq.quant.observers import Observer
from fxq.quant.quantizers import ActivationQuantizer, LevelQuantizer, QuantizedLayer
from fxq.trail.journal import Journal
from fxq.trail.snapshot import NodeRecord
from fxq.trail.values import of_layer, of_observer, of_quantizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fxq.picture import Picture

__all__ = [
    "bit_widths",
    "channel_ranges",
    "histogram",
    "sensitivity",
    "training_curves",
    "waterfall",
]


# ---- values and weights ------------------------------------------------------------------------


def histogram(
    source: Any,
    node: str | None = None,
    *,
    quantizer: ActivationQuantizer | LevelQuantizer | None = None,
    weights: bool = False,
) -> Picture:
    """What calibration saw of a value, where it is clipped, and the levels it is rounded to.

    Args:
        source: A run, or a `HistogramObserver`.
        node: In a run: the value, by its name or module path, or the quantizer that rounds it.
        quantizer: What rounds the values of an observer.
        weights: Show the weights of the layer instead, each in units of its channel's scale.

    Raises:
        ArtifactError: The folder is no run, or the run kept no values.
        SpecError: The source is none of these, or keeps ranges only.
        UnknownNameError: Nothing is known of a node of that name.

    Example:
        >>> import torch
        >>> from fxq.quant.observers import HistogramObserver
        >>> observer = HistogramObserver()
        >>> _ = observer(torch.linspace(-1, 4, 100))
        >>> grid = ActivationQuantizer(torch.tensor(1.0), torch.tensor(0), 2)
        >>> figure = histogram(observer, quantizer=grid)
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['ends of the range', '4 levels', 'values', 'clipped']
    """
    if isinstance(source, Observer):
        grid = None if quantizer is None else _grid_of(of_quantizer(quantizer))
        return _histogram(_with_bins(of_observer(source), "this observer"), grid, "value")
    journal = journal_of(source)
    if weights:
        name, spec = _entry(journal, journal.values.layers, "layer", node)
        grid = _Grid(spec["levels"]) if "levels" in spec else None
        label = f"weights of {name} over the scale of their channel"
        return _histogram(_with_bins(spec, name), grid, label)
    name, rounds = _value_and_quantizer(journal, node)
    seen = _with_bins(journal.values.observed[name], name)
    label = name if rounds is None else f"{name}, rounded by {rounds}"
    return _histogram(seen, _grid_in(journal, name, rounds), label)


def channel_ranges(source: Any, layer: str | None = None) -> Picture:
    """The range of the weights of each output channel, and the bits they have.

    Args:
        source: A run, or a `QuantizedLayer`.
        layer: In a run: the layer, by its name or module path.

    Raises:
        ArtifactError: The folder is no run, or the run kept no values.
        SpecError: The source is none of these.
        UnknownNameError: There is no such quantized layer.
    """
    from fxq.picture import BLUE, Picture

    if isinstance(source, QuantizedLayer):
        name, spec = "the layer", of_layer(source)
    else:
        journal = journal_of(source)
        name, spec = _entry(journal, journal.values.layers, "layer", layer)
    channels = range(len(spec["low"]))
    bits = spec["bits"] if isinstance(spec["bits"], list) else [spec["bits"]] * len(channels)
    picture = Picture(8, 4.4)
    above, below = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.vlines(channels, spec["low"], spec["high"], color=BLUE, linewidth=3)
    above.axhline(0, color="black", linewidth=0.6)
    above.set(ylabel="range of the weights", title=name)
    below.bar(channels, bits, color=BLUE)
    below.set(xlabel="output channel", ylabel="bits", ylim=(0, 8.5), yticks=(0, 4, 8))
    return picture


@dataclass(frozen=True)
class _Grid:
    """What values are rounded to, where they are clipped, and whether a ReLU cuts the low end."""

    levels: Sequence[float]
    ends: tuple[float, float] = (-math.inf, math.inf)
    relu: bool = False


def _grid_of(spec: Mapping[str, Any], relu: bool = False) -> _Grid | None:
    """The grid of a quantizer; None where every channel has its own."""
    scale, zero = spec["scale"], spec["zero_point"]
    if isinstance(scale, list):
        return None
    codes = spec.get("levels") or range(-zero, 2 ** spec["bits"] - zero)
    return _Grid([scale * code for code in codes], (spec["low"], spec["high"]), relu)


def _histogram(bins: Mapping[str, Any], grid: _Grid | None, label: str) -> Picture:
    from fxq.picture import BLUE, GREY, RED, Picture

    counts, width = bins["counts"], bins["width"]
    starts = [bins["start"] + place * width for place in range(len(counts))]
    kinds = [_fate(start + width / 2, grid) for start in starts]
    picture = Picture(7, 3.6)
    axes = picture.add_subplot()
    for kind, colour in (("values", BLUE), ("clipped", RED), ("made 0 by the ReLU", GREY)):
        own = [(s, n) for s, n, k in zip(starts, counts, kinds, strict=True) if k == kind and n]
        if own:
            left, tall = zip(*own, strict=True)
            axes.bar(left, tall, width, align="edge", color=colour, label=kind)
    if grid is not None:
        _draw_grid(axes, grid)
        axes.legend(fontsize=8)
    axes.set(xlabel=label, ylabel="count")
    return picture


def _fate(middle: float, grid: _Grid | None) -> str:
    """What becomes of the values of a bin."""
    if grid is None or grid.ends[0] <= middle <= grid.ends[1]:
        return "values"
    return "made 0 by the ReLU" if grid.relu and middle < grid.ends[0] else "clipped"


def _draw_grid(axes: Axes, grid: _Grid) -> None:
    for end, label in zip(grid.ends, ("ends of the range", None), strict=True):
        if math.isfinite(end):
            axes.axvline(end, color="black", linestyle="--", linewidth=0.8, label=label)
    axes.plot(
        grid.levels,
        [0.02] * len(grid.levels),
        "|",
        color="black",
        transform=axes.get_xaxis_transform(),
        label=f"{len(grid.levels)} levels",
    )


def _with_bins(spec: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if "counts" not in spec:
        raise SpecError(
            f"only the range of {name} is known, no histogram",
            hint="compile with --set insert-observers.statistics=histogram",
        )
    return spec


# ---- training ----------------------------------------------------------------------------------


def training_curves(run: str | Path) -> Picture:
    """The loss of every step of a training, the accuracies, and the mean clipping thresholds.

    Args:
        run: The folder that ``fxq train`` wrote, or the ``folder`` given to `fit`.

    Raises:
        ArtifactError: There is no log of a training, or it is damaged.
    """
    from fxq.training.log import STEPS, curves_picture, read_log

    folder = _training_folder(run, STEPS)
    with reading(folder / STEPS, "fxq train writes it"):
        losses, rows = read_log(folder)
    return curves_picture(losses, rows)


def bit_widths(run: str | Path) -> Picture:
    """The widths that a training on integers chose, and how often it chose anew, over epochs.

    Args:
        run: The folder that ``fxq train`` wrote, or the ``folder`` given to `fit`.

    Raises:
        ArtifactError: There are no widths, or they are damaged.
    """
    from fxq.training.widths import WIDTHS, read_widths, widths_picture

    path = _training_folder(run, WIDTHS) / WIDTHS
    with reading(path, "training with adaptive-fixed-point writes it"):
        rows = read_widths(path)
        if not rows:
            raise FileNotFoundError(path)
        return widths_picture(rows)


def _training_folder(run: str | Path, file: str) -> Path:
    from fxq.training.checkpoint import FOLDER

    inside = Path(run) / FOLDER
    return inside if (inside / file).exists() else Path(run)


# ---- runs --------------------------------------------------------------------------------------


def _records(journal: Journal) -> dict[str, NodeRecord]:
    return {node.name: node for node in journal[-1].after.nodes} if len(journal) else {}


def _entry(
    journal: Journal, known: Mapping[str, dict[str, Any]], kind: str, node: str | None
) -> tuple[str, dict[str, Any]]:
    """The name and the entry of a node, that is told by name or by module path."""
    if not journal.values:
        raise ArtifactError("the run kept no values", hint="compile with check=True, the default")
    by_path = (n.name for n in _records(journal).values() if n.path == node and n.name in known)
    name = node if node in known else next(by_path, None)
    if name is None:
        raise UnknownNameError(kind, "" if node is None else node, known)
    return name, known[name]


def _value_and_quantizer(journal: Journal, node: str | None) -> tuple[str, str | None]:
    """The value that was watched, and the quantizer named, or the first that rounds it."""
    watched = _watched(journal)
    if node in watched:
        return watched[node], node
    name, _ = _entry(journal, journal.values.observed, "watched value or quantizer", node)
    return name, next((one for one, value in watched.items() if value == name), None)


def _watched(journal: Journal) -> dict[str, str]:
    """By quantizer, in order, the value it rounds, or one that it was computed from alone."""
    records, found = _records(journal), {}
    for name in records:
        if name in journal.values.quantizers:
            at: NodeRecord | None = records[name]
            while at is not None and at.name not in journal.values.observed:
                at = records.get(at.inputs[0]) if len(at.inputs) == 1 else None
            if at is not None:
                found[name] = at.name
    return found


def _grid_in(journal: Journal, name: str, rounds: str | None) -> _Grid | None:
    if rounds is None:
        return None
    spec, record = journal.values.quantizers[rounds], _records(journal).get(name)
    fused = record is not None and any(fact.startswith("fused_relu") for fact in record.facts)
    return _grid_of(spec, relu=fused and spec["low"] == 0)
