"""Which pass, and which layer, made how much of a quantized network's error; the parts add up.

Two views of one compilation:

* The **waterfall** goes from the captured model to the final integers. After step k the output is
  ``y_k``, its error is ``e_k = |y_k - y_0|**2 / |y_0|**2`` (the inverse of the SQNR), and the part
  of step k is ``e_k - e_(k-1)``: parts telescope to the final error. A negative one repairs.
* The **layers** are looked at one by one, each on its own inputs in the float network, where
  nothing came before it. Its output goes through four stages: float; its weights are rounded; the
  values it reads are clipped to their range; they are rounded. The squared error between the first
  and the last stage is split over the three steps by `fxq.numerics.error_split.error_parts`, in
  units of the squared float output. What passes added to its bias is left out: it corrects for the
  layers before, too, whose errors are not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxq.errors import CalibrationError
from fxq.graph.op import PASS_THROUGH, Kind
from fxq.graph.ops import describe
from fxq.graph.program import Program, layer_path
from fxq.numerics.error_split import error_parts
from fxq.quant.quantizers import (
    ActivationQuantizer,
    LevelQuantizer,
    QuantizedLayer,
    along_channels,
)
from fxq.sensitivity import KeptRun
from fxq.trail.drift import Drift, finite
from fxq.trail.journal import Journal

PARTS = ("weight", "clipping", "rounding")
"""The steps of a layer's error, in the order they are taken."""

INTEGERS = "lower"
"""What the waterfall calls the step from the simulation to integer kernels."""

_FAR = 1e30  # beyond every range, and finite after division by a scale


# ---- passes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fall:
    """What one step of a compilation added to the error of the output.

    Attributes:
        name: The pass, or `INTEGERS`.
        drift: How far the probe output is from the captured model's after it.
        part: By how much the relative squared error grew; negative where it shrank.
    """

    name: str
    drift: Drift
    part: float

    def to_json(self) -> dict[str, Any]:
        """The step as JSON-ready data."""
        return {
            "pass": self.name,
            "sqnr_db": self.drift.sqnr if math.isfinite(self.drift.sqnr) else None,
            "max_error": finite(self.drift.largest),
            "flips": self.drift.flips,
            "decisions": self.drift.decisions,
            "error": finite(self.drift.error),
            "part": finite(self.part),
        }


def waterfall(journal: Journal) -> list[Fall]:
    """The steps from the captured model to the final integers; parts add up to the last error.

    Steps that were not measured are left out, so a compilation without checks has none.

    Example:
        >>> waterfall(Journal())
        []
    """
    known = [(step.name, step.drift) for step in journal if step.drift is not None]
    known += [(INTEGERS, journal.integers)] if journal.integers is not None else []
    falls, before = [], 0.0
    for name, drift in known:
        falls.append(Fall(name, drift, _growth(before, drift.error)))
        before = drift.error
    return falls


def _growth(before: float, after: float) -> float:
    return 0.0 if before == after else after - before  # two infinities are no growth


# ---- layers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerError:
    """The error that one layer adds on its own inputs, and what it is made of.

    The parts are in units of the squared float output, and add up to `error`.

    Attributes:
        node: The layer.
        path: What users know it by.
        quantizers: The nodes that quantize what it reads.
        weight: The part of its rounded weights.
        clipping: The part of the values it reads that were beyond their range.
        rounding: The part of rounding them.
        network: The relative squared error of the same output in the whole quantized network, where
            what the layer reads is wrong already, and its bias corrected.
    """

    node: str
    path: str
    quantizers: tuple[str, ...]
    weight: float
    clipping: float
    rounding: float
    network: float

    @property
    def error(self) -> float:
        """The sum of the parts."""
        return self.weight + self.clipping + self.rounding

    @property
    def sqnr(self) -> float:
        """The signal-to-noise ratio of the layer's output on its own inputs, in dB."""
        return decibels(self.error)

    def to_json(self) -> dict[str, Any]:
        """The layer as JSON-ready data."""
        parts = {name: getattr(self, name) for name in (*PARTS, "error", "network")}
        known = {"node": self.node, "path": self.path, "quantizers": list(self.quantizers)}
        return known | {name: finite(value) for name, value in parts.items()}


def decibels(error: float) -> float:
    """A relative squared error as a signal-to-noise ratio.

    Example:
        >>> decibels(0.01), decibels(0.0), decibels(math.inf)
        (20.0, inf, -inf)
    """
    if error <= 0:
        return math.inf
    return -10 * math.log10(error) if error < math.inf else -math.inf


def attribute(program: Program, batches: Iterable[Any]) -> list[LayerError]:
    """What every layer with integer weights adds to the error, in execution order.

    A layer that is called more than once has one record per call.

    Args:
        program: A program after a quantize pass; its layers keep their float weights.
        batches: Inputs, as `fxq.compile` takes them to calibrate on; every value of the network on
            one batch is kept in memory.

    Raises:
        CalibrationError: There are no batches.

    Example:
        >>> import fxq
        >>> from fxq.models_zoo import tiny_conv
        >>> images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> result = fxq.compile(tiny_conv(), images[:1], "minmax-int8", calibration=[images])
        >>> found = attribute(result.program, [images])
        >>> [one.node for one in found], all(one.sqnr > 30 for one in found)
        (['conv1', 'conv2', 'fc'], True)
    """
    totals: dict[str, _Total] = {}
    for batch in batches:
        _add_batch(program, batch, totals)
    if not totals and not any(_is_layer(program, node) for node in program.nodes()):
        return []
    if not totals:
        raise CalibrationError("there are no batches to attribute the error on")
    return [total.result() for total in totals.values()]


def attribution_json(journal: Journal, layers: Sequence[LayerError]) -> dict[str, Any]:
    """What ``attribution.json`` of a run holds."""
    return {
        "layers": [one.to_json() for one in layers],
        "waterfall": [one.to_json() for one in waterfall(journal)],
    }


@dataclass
class _Total:
    """What was summed for one layer over batches."""

    node: str
    path: str
    quantizers: tuple[str, ...]
    parts: list[float] = field(default_factory=lambda: [0.0] * len(PARTS))
    signal: float = 0.0
    network: float = 0.0

    def add(self, stages: Sequence[Tensor], actual: Tensor) -> None:
        """One more batch; ``actual`` is the layer's output in the whole quantized network."""
        for place, part in enumerate(error_parts(stages)):
            self.parts[place] += part
        self.signal += float(stages[0].double().square().sum())
        self.network += float((actual.double() - stages[0].double()).square().sum())

    def result(self) -> LayerError:
        """The sums in units of the signal."""
        parts = [*self.parts, self.network]
        return LayerError(
            self.node, self.path, self.quantizers, *(_relative(one, self.signal) for one in parts)
        )


def _relative(part: float, signal: float) -> float:
    return part / signal if signal else math.copysign(math.inf, part) if part else 0.0


def _add_batch(program: Program, batch: Any, totals: dict[str, _Total]) -> None:
    inputs = program.laid_out(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,))
    exact = KeptRun(program, inputs[: len(program.example_inputs)])
    actual = _Outputs(program)
    with torch.no_grad():
        actual.run(*inputs[: len(program.example_inputs)])
    layers = [node for node in program.nodes() if _is_layer(program, node)]
    for done, node in enumerate(layers, 1):
        quantizers = tuple(dict.fromkeys(read_quantizers(program, node)))
        names = tuple(one.name for one in quantizers)
        total = totals.setdefault(node.name, _Total(node.name, layer_path(node), names))
        total.add(_stages(program, exact, node, quantizers), actual.outputs[node.name])
        program.report_progress("split errors", done, len(layers))


def _stages(
    program: Program, exact: KeptRun, node: fx.Node, quantizers: Sequence[fx.Node]
) -> list[Tensor]:
    """The output of a layer: float, then with one more thing quantized each time."""
    layer: Any = program.submodule(node)
    own = {one: program.submodule(one) for one in quantizers}
    clipped = {one: _clip(module) for one, module in own.items()}

    def unshifted(x: Tensor) -> Tensor:
        result: Tensor = layer(x)
        return result - along_channels(layer, layer.bias_shift.to(x.dtype), result)

    changes: list[Mapping[fx.Node, Any]] = [
        {},
        {node: unshifted},
        {node: unshifted, **clipped},
        {node: unshifted, **own},
    ]
    return [exact.value(node, change) for change in changes]


def _clip(quantizer: nn.Module | None) -> Callable[[Tensor], Tensor]:
    """Cuts values at the ends of what a quantizer can represent; one without ends cuts nothing."""
    if not isinstance(quantizer, (ActivationQuantizer, LevelQuantizer)):
        return lambda x: x

    def clip(x: Tensor) -> Tensor:
        low, high = (quantizer(torch.full_like(x, end)) for end in (-_FAR, _FAR))
        return x.clamp(low, high)

    return clip


def _is_layer(program: Program, node: fx.Node) -> bool:
    return isinstance(program.submodule(node), QuantizedLayer)


def read_quantizers(program: Program, node: fx.Node) -> list[fx.Node]:
    """The quantizers whose values a layer multiplies, maybe moved in between."""
    found = []
    for source in describe(node, program.module).inputs:
        if getattr(program.submodule(source), "fxq_kind", None) == "quantizer":
            found.append(source)
        elif describe(source, program.module).kind in {*PASS_THROUGH, Kind.CAT}:
            found += read_quantizers(program, source)
    return found


class _Outputs(fx.Interpreter):
    """The network as it is, with what its quantized layers put out."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.outputs: dict[str, Tensor] = {}
        self._layers = {node.name for node in program.nodes() if _is_layer(program, node)}

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        value = super().run_node(n)
        if n.name in self._layers:
            self.outputs[n.name] = value
        return value
