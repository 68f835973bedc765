"""How sensitive a network is to each of its layers, both ways.

*Alone*: the layer and the values it reads are quantized, everything else computes in float.
*Without*: everything is quantized but the layer and the values it reads. A value that several
layers read is quantized, or not, for all of them.

Papers:
    Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020 (section 5.1: M1 to M4).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxq.attribution import read_quantizers
from fxq.graph.program import Program, layer_path
from fxq.measure import Metric
from fxq.numerics.quantization_error import (
    divergence,
    mean_shift,
    pointwise_error,
    relative_error,
)
from fxq.quant.quantizers import QuantizedLayer, float_counterpart
from fxq.sensitivity import KeptRun
from fxq.trail.drift import finite

METRICS: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "m1": mean_shift,
    "m2": relative_error,
    "m3": pointwise_error,
    "m4": divergence,
}
"""M1 to M4 of the paper: of a tensor, and of what it is rounded to."""


@dataclass(frozen=True)
class QuantLayer:
    """A layer with integer weights, and what it reads.

    Attributes:
        node: Its first call.
        path: What users know it by.
        weight_bits: The fewest bits of an output channel.
        value_bits: The bits of the values it reads; None where they are float.
        modules: Names of the modules that are quantized for it: itself, and its quantizers.
    """

    node: str
    path: str
    weight_bits: int
    value_bits: int | None
    modules: tuple[str, ...]

    @property
    def bits(self) -> str:
        """Bits of weights and values, for people."""
        values = "float" if self.value_bits is None else str(self.value_bits)
        return f"{self.weight_bits}/{values}"

    def to_json(self) -> dict[str, Any]:
        """The layer as JSON-ready data."""
        known = {"node": self.node, "path": self.path}
        return known | {"weight_bits": self.weight_bits, "value_bits": self.value_bits}


def quantized_layers(program: Program) -> list[QuantLayer]:
    """The layers with integer weights, in execution order; one that is called twice is one.

    Example:
        >>> import fxq
        >>> from fxq.models_zoo import tiny_conv
        >>> images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> result = fxq.compile(tiny_conv(), images[:1], "aciq-4bit", calibration=[images])
        >>> [(one.path, one.bits) for one in quantized_layers(result.program)]
        [('conv1', '8/8'), ('conv2', '4/4'), ('fc', '8/8')]
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in program.nodes():
        if isinstance(program.submodule(node), QuantizedLayer):
            calls.setdefault(str(node.target), []).append(node)
    return [_layer(program, target, nodes) for target, nodes in calls.items()]


def _layer(program: Program, target: str, nodes: Sequence[fx.Node]) -> QuantLayer:
    layer: Any = program.submodule(nodes[0])
    reads = [one for node in nodes for one in read_quantizers(program, node)]
    bits = [int(getattr(program.submodule(one), "bits", 8)) for one in reads]
    modules = dict.fromkeys([target, *(str(one.target) for one in reads)])
    return QuantLayer(
        node=nodes[0].name,
        path=layer_path(nodes[0]),
        weight_bits=int(layer.bits.min()),
        value_bits=min(bits, default=None),
        modules=tuple(modules),
    )


@contextlib.contextmanager
def in_float(program: Program, targets: Sequence[str]) -> Iterator[None]:
    """These quantized modules compute in float, until the body ends."""
    own = {name: program.module.get_submodule(name) for name in targets}
    try:
        for name, module in own.items():
            program.module.set_submodule(name, float_counterpart(module) or module)
        yield
    finally:
        for name, module in own.items():
            program.module.set_submodule(name, module)


def sensitivity(
    program: Program, layer: QuantLayer, metrics: Mapping[str, Metric]
) -> dict[str, dict[str, float]]:
    """Each metric where only this layer is quantized, and where only this one is not.

    Args:
        program: A program after a quantize pass; it is as before afterwards.
        layer: The layer.
        metrics: By name.

    Returns:
        ``alone`` and ``without``, each metric by its name.
    """
    every = [
        str(node.target)
        for node in program.nodes()
        if float_counterpart(program.submodule(node)) is not None
    ]
    chosen = {"alone": [n for n in dict.fromkeys(every) if n not in layer.modules]}
    chosen["without"] = list(layer.modules)
    found = {}
    for way, targets in chosen.items():
        with in_float(program, targets):
            found[way] = {name: metric(program.module) for name, metric in metrics.items()}
    return found


def distribution_errors(
    program: Program, layer: QuantLayer, run: KeptRun
) -> dict[str, dict[str, float]]:
    """M1 to M4 of a layer's weights and of the values it reads.

    Args:
        program: The program.
        layer: The layer.
        run: The program in float on some inputs; values are those of the layer's first call.

    Returns:
        ``weights``, and ``values`` where they are quantized; each metric by its name.
    """
    node = program.node(layer.node)
    module: Any = program.submodule(node)
    pairs = {"weights": (module.layer.weight.detach(), module.weight())}
    quantizers = read_quantizers(program, node)
    if quantizers:
        exact = run.value(quantizers[0], {})
        with torch.no_grad():
            pairs["values"] = (
                exact,
                program.module.get_submodule(str(quantizers[0].target))(exact),
            )
    return {
        what: {name: metric(*pair) for name, metric in METRICS.items()}
        for what, pair in pairs.items()
    }


def plain(values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Figures in groups as JSON-ready data."""
    return {key: {name: finite(v) for name, v in group.items()} for key, group in values.items()}
