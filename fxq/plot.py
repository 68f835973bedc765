"""Pictures of a run, of an analysis and of a training, as matplotlib figures.

A run is the folder that ``fxq compile`` wrote, a `Journal`, or what has one: a result, an artifact.
Figures are independent of pyplot; notebooks show them, and ``figure.savefig`` writes them.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.attribution import PARTS, decibels
from fxq.attribution import waterfall as falls_of
from fxq.errors import ArtifactError, SpecError, UnknownNameError
from fxq.quant.observers import HistogramObserver, Observer
from fxq.quant.quantizers import ActivationQuantizer, LevelQuantizer, QuantizedLayer
from fxq.trail.drift import number
from fxq.trail.journal import Journal, format_db
from fxq.trail.snapshot import NodeRecord
from fxq.trail.values import of_layer, of_observer, of_quantizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fxq.picture import Picture

ANALYSIS, ATTRIBUTION = "analysis.json", "attribution.json"


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
        >>> observer = HistogramObserver()
        >>> _ = observer(torch.linspace(-1, 4, 100))
        >>> grid = ActivationQuantizer(torch.tensor(1.0), torch.tensor(0), 2)
        >>> figure = histogram(observer, quantizer=grid)
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['values', 'clipped', 'ends of the range', '4 levels']
    """
    if isinstance(source, Observer):
        grid = None if quantizer is None else _grid_of(of_quantizer(quantizer))
        return _histogram(_with_bins(of_observer(source), "this observer"), grid, "value")
    journal = _journal(source)
    if weights:
        name, spec = _entry(journal, journal.values.layers, "layer", node)
        ends = [float(level) for level in spec.get("levels", ())]
        grid = _Grid(ends[0], ends[-1], ends) if ends else None
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
        journal = _journal(source)
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
    """Where values are clipped, what they are rounded to, and whether a ReLU cuts the low end."""

    low: float
    high: float
    levels: Sequence[float]
    relu: bool = False


def _grid_of(spec: Mapping[str, Any], relu: bool = False) -> _Grid | None:
    """The grid of a quantizer; None where every channel has its own."""
    scale, zero = spec["scale"], spec["zero_point"]
    if isinstance(scale, list):
        return None
    codes = spec.get("levels") or range(-zero, 2 ** spec["bits"] - zero)
    return _Grid(spec["low"], spec["high"], [scale * code for code in codes], relu)


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
            axes.bar(*zip(*own, strict=True), width, align="edge", color=colour, label=kind)
    if grid is not None:
        _draw_grid(axes, grid)
        axes.legend(fontsize=8)
    axes.set(xlabel=label, ylabel="count")
    return picture


def _fate(middle: float, grid: _Grid | None) -> str:
    """What becomes of the values of a bin."""
    if grid is None or grid.low <= middle <= grid.high:
        return "values"
    return "made 0 by the ReLU" if grid.relu and middle < grid.low else "clipped"


def _draw_grid(axes: Axes, grid: _Grid) -> None:
    for end, label in ((grid.low, "ends of the range"), (grid.high, None)):
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


# ---- error -------------------------------------------------------------------------------------


def waterfall(source: Any) -> Picture:
    """What every pass added to the error of the output, from the captured model to the integers.

    A bar begins where the one before ended; what a pass repairs goes back. At its end stands the
    SQNR that is left.

    Args:
        source: A run, or a folder that ``fxq analyze`` wrote to.

    Raises:
        ArtifactError: The folder is neither.
        SpecError: The source is none of these, or the run was compiled without checks.
    """
    from fxq.picture import BLUE, RED

    steps = _errors_by_step(source)
    if not steps:
        raise SpecError("no pass was measured", hint="compile with check=True, the default")
    after = [error if math.isfinite(error) else math.nan for _, error in steps]
    before = [0.0, *after[:-1]]
    parts = [end - start for start, end in zip(before, after, strict=True)]
    picture = _rows([name for name, _ in steps])
    axes = picture.add_subplot()
    bars = axes.barh(
        range(len(steps)), parts, left=before, color=[RED if p > 0 else BLUE for p in parts]
    )
    left = [format_db(decibels(error)) for _, error in steps]
    axes.bar_label(bars, left, padding=4, fontsize=8)
    axes.set_xlabel("squared error of the output, relative")
    _label_rows(axes, [name for name, _ in steps])
    return picture


def sensitivity(source: str | Path) -> Picture:
    """The layers, the most sensitive first: what quantizing each alone costs the output.

    Beside it stands what the layer's own error is made of, where ``attribution.json`` is there.

    Args:
        source: The folder that ``fxq analyze`` wrote to, or its ``analysis.json``.

    Raises:
        ArtifactError: There is no analysis, or it is damaged.
    """
    from fxq.picture import BLUE

    path = Path(source) / ANALYSIS if Path(source).is_dir() else Path(source)
    with _reading(path, "fxq analyze writes it"):
        layers = _ranked(json.loads(path.read_text(encoding="utf-8"))["layers"])
    causes = _causes(path.with_name(ATTRIBUTION))
    labels = [layer.label for layer in layers]
    picture = _rows(labels, width=10 if causes else 6)
    panels = picture.subplots(1, 2 if causes else 1, squeeze=False)[0]
    values = [layer.sqnr if math.isfinite(layer.sqnr) else 0.0 for layer in layers]
    bars = panels[0].barh(range(len(layers)), values, color=BLUE)
    panels[0].bar_label(bars, [format_db(one.sqnr) for one in layers], padding=3, fontsize=7)
    panels[0].set_xlabel("SQNR of the output, only this layer quantized (dB)")
    _label_rows(panels[0], labels)
    if causes:
        _draw_causes(panels[1], [causes.get(layer.node, {}) for layer in layers])
    return picture


@dataclass(frozen=True)
class _Layer:
    """A layer of an analysis, and the SQNR where it alone is quantized."""

    node: str
    label: str
    sqnr: float


def _ranked(layers: Mapping[str, Mapping[str, Any]]) -> list[_Layer]:
    found = []
    for node, figures in layers.items():
        about = figures.get("layer", {})  # not in analyses of older versions
        bits = f"  {about['bits']}" if "bits" in about else ""
        sqnr = number(figures["alone"]["sqnr"])
        label = f"{about.get('path', node)}{bits}"
        found.append(_Layer(node, label, math.inf if sqnr is None else sqnr))
    return sorted(found, key=lambda layer: layer.sqnr)


def _causes(path: Path) -> dict[str, dict[str, float]]:
    """By layer, the parts of its error; nothing where the file is missing."""
    if not path.exists():
        return {}
    with _reading(path, "fxq analyze writes it"):
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        return {one["node"]: {part: number(one[part]) or 0.0 for part in PARTS} for one in layers}


def _draw_causes(axes: Axes, causes: Sequence[Mapping[str, float]]) -> None:
    """Bars of parts, positive ones to the right, negative ones to the left."""
    from fxq.picture import BLUE, RED, YELLOW

    rows = range(len(causes))
    right, left = [0.0] * len(causes), [0.0] * len(causes)
    for part, colour in zip(PARTS, (BLUE, RED, YELLOW), strict=True):
        sizes = [one.get(part, 0.0) for one in causes]
        starts = [right[row] if sizes[row] >= 0 else left[row] for row in rows]
        axes.barh(rows, sizes, left=starts, color=colour, label=part)
        for row in rows:
            (right if sizes[row] >= 0 else left)[row] += sizes[row]
    axes.set(xlabel="error of the layer's own output, relative", yticks=())
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=5)
    axes.legend(fontsize=8)


def _errors_by_step(source: Any) -> list[tuple[str, float]]:
    """The error of the output after each step that was measured."""
    if isinstance(source, (str, Path)) and not (Path(source) / "journal.json").exists():
        path = Path(source) / ATTRIBUTION
        with _reading(path, "give a run folder, or what fxq analyze wrote"):
            falls = json.loads(path.read_text(encoding="utf-8"))["waterfall"]
            found = [(str(one["pass"]), number(one["error"])) for one in falls]
            return [(name, error) for name, error in found if error is not None]
    return [(fall.name, fall.drift.error) for fall in falls_of(_journal(source))]


def _rows(labels: Sequence[str], width: float = 7) -> Picture:
    from fxq.picture import Picture

    return Picture(width, 1.2 + 0.28 * len(labels))


def _label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """The first row is at the top, and there is room for words beside the bars."""
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.18)


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
    with _reading(folder / STEPS, "fxq train writes it"):
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
    with _reading(path, "training with adaptive-fixed-point writes it"):
        rows = read_widths(path)
        if not rows:
            raise FileNotFoundError(path)
        return widths_picture(rows)


def _training_folder(run: str | Path, file: str) -> Path:
    from fxq.training.checkpoint import FOLDER

    inside = Path(run) / FOLDER
    return inside if (inside / file).exists() else Path(run)


# ---- runs --------------------------------------------------------------------------------------


def _journal(source: Any) -> Journal:
    if isinstance(source, (str, Path)):
        return Journal.load(Path(source))
    found = source if isinstance(source, Journal) else getattr(source, "journal", None)
    if isinstance(found, Journal):
        return found
    raise SpecError(
        f"a {type(source).__name__} is nothing that can be drawn",
        hint="give a run folder, a journal, or the result of fxq.compile",
    )


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
    """The value that was watched, and what rounds it: the quantizer named, or the first there is."""
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


@contextlib.contextmanager
def _reading(path: Path, hint: str) -> Iterator[None]:
    """Trouble with a file names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError("there is no such file", where=str(path), hint=hint) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ArtifactError(
            f"the file cannot be read: {error}", where=str(path), hint=hint
        ) from error
