"""Pictures of where an error comes from: `waterfall` by pass, `sensitivity` by layer."""

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
from fxq.errors import ArtifactError, SpecError
from fxq.trail.drift import number
from fxq.trail.journal import Journal, format_db

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fxq.picture import Picture

ANALYSIS, ATTRIBUTION = "analysis.json", "attribution.json"


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
    before, after = [], [0.0]
    for _, error in steps:
        before.append(after[-1])
        after.append(error if math.isfinite(error) else after[-1])  # no bar, only its word
    del after[0]
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
    axes.set_xlim(0, 1.2 * max(after) or 1.0)
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
    with reading(path, "fxq analyze writes it"):
        layers = _ranked(json.loads(path.read_text(encoding="utf-8"))["layers"])
    causes = _causes(path.with_name(ATTRIBUTION))
    labels = [layer.label for layer in layers]
    picture = _rows(labels, width=10 if causes else 6)
    panels = picture.subplots(1, 2 if causes else 1, sharey=True, squeeze=False)[0]
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
    with reading(path, "fxq analyze writes it"):
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
    axes.set_xlabel("error of the layer's own output, relative")
    axes.locator_params(axis="x", nbins=5)
    axes.legend(fontsize=8)


def _errors_by_step(source: Any) -> list[tuple[str, float]]:
    """The error of the output after each step that was measured."""
    if isinstance(source, (str, Path)) and not (Path(source) / "journal.json").exists():
        path = Path(source) / ATTRIBUTION
        with reading(path, "give a run folder, or what fxq analyze wrote"):
            falls = json.loads(path.read_text(encoding="utf-8"))["waterfall"]
            found = [(str(one["pass"]), number(one["error"])) for one in falls]
            return [(name, error) for name, error in found if error is not None]
    return [(fall.name, fall.drift.error) for fall in falls_of(journal_of(source))]


def _rows(labels: Sequence[str], width: float = 7) -> Picture:
    from fxq.picture import Picture

    return Picture(width, 1.2 + 0.28 * len(labels))


def _label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """The first row is at the top, and there is room for words beside the bars."""
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.18)


# ---- where it is read from ---------------------------------------------------------------------


def journal_of(source: Any) -> Journal:
    """The journal of a run: of its folder, of a result or artifact, or itself.

    Raises:
        ArtifactError: The folder is no run.
        SpecError: The source is none of these.
    """
    if isinstance(source, (str, Path)):
        return Journal.load(Path(source))
    found = source if isinstance(source, Journal) else getattr(source, "journal", None)
    if isinstance(found, Journal):
        return found
    raise SpecError(
        f"a {type(source).__name__} is nothing that can be drawn",
        hint="give a run folder, a journal, or the result of fxq.compile",
    )


@contextlib.contextmanager
def reading(path: Path, hint: str) -> Iterator[None]:
    """What goes wrong while a file is read is told with its name.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError("there is no such file", where=str(path), hint=hint) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ArtifactError(
            f"the file cannot be read: {error}", where=str(path), hint=hint
        ) from error
