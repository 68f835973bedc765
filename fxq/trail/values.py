"""`Values`: what calibration saw and where the grids lie, small enough to keep with every run."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from fxq.errors import ArtifactError
from fxq.graph.program import Program, facts
from fxq.numerics.histogram import Histogram
from fxq.quant.observers import HistogramObserver, Observer
from fxq.quant.quantizers import ActivationQuantizer, LevelQuantizer, QuantizedLayer, rows

FILE = "values.json"
FORMAT = 1
BINS = 64
"""No histogram that is kept has more bins."""

SAMPLE = 2**15
"""Of a layer with more weights, about so many are put into bins, evenly spaced."""

DIGITS = 4
"""Significant digits of what is kept; it is for looking at, not for computing with."""


@dataclass
class Values:
    """Ranges, histograms and grids by node name, as JSON-ready data.

    Attributes:
        observed: By the name of the value that was watched: ``low``, ``high``, ``count``, the
            number of values, ``batches``; the bins as ``start``, ``width`` and ``counts`` where a
            histogram was kept; and ``channels``, the ranges ``low`` and ``high`` of each, where
            there are any.
        quantizers: By node: ``bits``, ``scale``, ``zero_point``, and ``low`` and ``high``, between
            which values are not clipped; numbers, or lists with an entry per channel; ``levels``
            where they are not all codes.
        layers: By node, of its weights, a list with an entry per output channel: ``low``, ``high``,
            ``scale`` and ``bits``, a number where all are the same; the bins of about `SAMPLE`
            float weights, each divided by its scale; and the codes among them as ``levels``, where
            they are few.
    """

    observed: dict[str, dict[str, Any]] = field(default_factory=dict)
    quantizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.observed or self.quantizers or self.layers)

    def observe(self, program: Program) -> None:
        """Holds what the observers of a program have seen so far; they may be gone later."""
        for node in program.nodes():
            module = program.submodule(node)
            if not isinstance(module, Observer) or module.is_empty:
                continue
            name = facts(node).observes or node.name
            known = self.observed.get(name)
            if known is None or known["batches"] != int(module.batches):
                self.observed[name] = of_observer(module)

    def finish(self, program: Program) -> None:
        """Holds the quantizers and the integer weights of a program after its last pass."""
        for node in program.nodes():
            module = program.submodule(node)
            if isinstance(module, (ActivationQuantizer, LevelQuantizer)):
                self.quantizers[node.name] = of_quantizer(module)
            elif isinstance(module, QuantizedLayer):
                self.layers[node.name] = of_layer(module)

    def joined(self, later: Values) -> Values:
        """These and those of a later part of the same compilation, which win."""
        return Values(
            {**self.observed, **later.observed},
            {**self.quantizers, **later.quantizers},
            {**self.layers, **later.layers},
        )

    def to_json(self) -> dict[str, Any]:
        """The values as JSON-ready data, not copied."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def save(self, folder: Path) -> None:
        """``values.json`` is in the folder, on few lines; none where there is nothing to keep."""
        if not self:
            (folder / FILE).unlink(missing_ok=True)
            return
        text = json.dumps({"format": FORMAT, **self.to_json()}, separators=(",", ":"))
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Values:
        """What `save` wrote; nothing where the run kept none.

        Raises:
            ArtifactError: The file is damaged or of another format.
        """
        path = folder / FILE
        if not path.exists():
            return cls()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT or not all(isinstance(v, dict) for v in data.values()):
                raise ValueError(f"it is not of format {FORMAT}")
            return cls(**data)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise ArtifactError(
                f"the values cannot be read: {error}",
                where=str(path),
                hint="compile again; the file was changed or cut short",
            ) from error


# ---- what is kept of a module ------------------------------------------------------------------


def of_observer(observer: Observer) -> dict[str, Any]:
    """What an observer saw, as an entry of `Values.observed`.

    Raises:
        CalibrationError: It has seen nothing.
    """
    low, high = observer.range()
    found: dict[str, Any] = {
        "batches": int(observer.batches),
        "count": int(observer.values),
        "low": _short(float(low.min())),
        "high": _short(float(high.max())),
    }
    if isinstance(observer, HistogramObserver):
        found |= binned(observer.histogram)
    if observer.channels is not None:
        found["channels"] = {"low": _numbers(low), "high": _numbers(high)}
    return found


def of_quantizer(module: ActivationQuantizer | LevelQuantizer) -> dict[str, Any]:
    """The grid of a quantizer, as an entry of `Values.quantizers`."""
    if isinstance(module, LevelQuantizer):
        scale, top = float(module.scale), int(module.levels[-1])
        return {
            "bits": module.bits,
            "scale": _short(scale),
            "zero_point": module.zero_point,
            "low": _short(-scale * top if module.signed else 0.0),
            "high": _short(scale * top),
            "levels": _level_list(module),
        }
    low = -module.scale * module.zero_point
    high = module.scale * (torch.as_tensor(module.top) - module.zero_point)
    bits = module.bits if module.channel_bits is None else _same(module.channel_bits.tolist())
    return {
        "bits": bits,
        "scale": _numbers(module.scale),
        "zero_point": module.zero_point.tolist(),
        "low": _numbers(low),
        "high": _numbers(high),
    }


def _level_list(module: LevelQuantizer) -> list[int]:
    levels = [int(level) for level in module.levels.tolist()]
    return [-level for level in levels[:0:-1]] + levels if module.signed else levels


def of_layer(module: QuantizedLayer) -> dict[str, Any]:
    """The weights of a layer, as an entry of `Values.layers`."""
    weight: Any = module.layer.weight
    flat = rows(module.layer, weight.detach().float())
    low, high = flat.amin(dim=1), flat.amax(dim=1)  # faster than aminmax with a dim
    found = {
        "bits": _same(module.bits.tolist()),
        "scale": _numbers(module.scale),
        "low": _numbers(low),
        "high": _numbers(high),
    }
    stride = max(1, flat.numel() // SAMPLE) | 1  # odd, to meet every place of a kernel
    codes = rows(module.layer, module.codes).reshape(-1)[::stride]
    channels = torch.arange(0, flat.numel(), stride) // max(1, flat.shape[1])
    steps = flat.reshape(-1)[::stride] / module.scale[channels]
    if bool(steps.isfinite().all()):
        found |= _bins(steps)
    seen = codes.unique().tolist()  # type: ignore[no-untyped-call]
    used = sorted({*seen, int(module.codes.min()), int(module.codes.max())})
    if len(used) <= BINS // 2:
        found["levels"] = used
    return found


# ---- histograms --------------------------------------------------------------------------------


def binned(histogram: Histogram) -> dict[str, Any]:
    """A histogram in at most `BINS` bins whose width is a power of two; no count is split.

    Returns:
        ``start``, the left edge of the first bin, the ``width`` of each, and ``counts``.

    Example:
        >>> histogram = Histogram()
        >>> histogram.update(torch.tensor([-1.0, 0.0, 0.0, 2.0]))
        >>> found = binned(histogram)
        >>> found["start"], found["width"], sum(found["counts"]), len(found["counts"])
        (-1.0, 0.0625, 4, 49)
    """
    low, high = float(histogram.low.min()), float(histogram.high.max())
    exponent = max(int(histogram.exponent.max()), _exponent(high - low))
    first, last = (math.floor(math.ldexp(end, -exponent)) for end in (low, high))
    half = histogram.bins_per_sign
    shift = (exponent - histogram.exponent).clamp(max=63).unsqueeze(1)
    index = (torch.arange(-half, half) >> shift) - first
    counts = torch.zeros(last - first + 1, dtype=torch.int64)
    counts.scatter_add_(0, index.clamp(0, last - first).flatten(), histogram.counts.flatten())
    width = math.ldexp(1.0, exponent)
    return {"start": first * width, "width": width, "counts": counts.tolist()}


def _exponent(span: float) -> int:
    """The least power of two of which `BINS` cover a span wherever it begins."""
    return math.ceil(math.log2(span / (BINS - 1))) if span > 0 else -149


def _bins(x: torch.Tensor) -> dict[str, Any]:
    """The values of a tensor in bins, as of `binned`; wide ones for few levels, never over 64."""
    low, high = (float(end) for end in x.aminmax())
    width = math.ldexp(1.0, _exponent(high - low)) if high > low else 1.0
    first, last = math.floor(low / width), math.floor(high / width)
    count = last - first + 1
    counts = torch.histc(x, bins=count, min=first * width, max=(last + 1) * width)
    return {"start": first * width, "width": width, "counts": [int(n) for n in counts.tolist()]}


# ---- numbers -----------------------------------------------------------------------------------


def _numbers(values: torch.Tensor) -> Any:
    """A number, or a list of them, of few digits."""
    if values.dim() == 0:
        return _short(float(values))
    return [_short(float(value)) for value in values.tolist()]


def _short(value: float) -> float | None:
    """A number of few digits; JSON has no infinity."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _same(values: list[int]) -> int | list[int]:
    """One number where all are the same."""
    return values[0] if len(set(values)) == 1 else values
