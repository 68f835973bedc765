"""What `mixed-precision` chooses widths for: weights of layers, and the values layers read.

A value that several layers read, or that shares its scale with others in a concatenation, has one
width; a layer that is called on several values ties them. What is tied is one `Cluster`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fxq.graph.program import Program, facts
from fxq.graph.regions import Regions
from fxq.numerics.affine import code_range, fake_quantize, grid_from_range
from fxq.numerics.budget import front
from fxq.numerics.clipping import mse_clip_from_histogram, mse_weight_scale
from fxq.quant.observers import HistogramObserver, Observer
from fxq.quant.quantizers import ActivationQuantizer, from_rows, output_channels, rows
from fxq.sensitivity import Change, KeptRun

from .places import Place, layers_reading, observed_places


@dataclass
class Weights:
    """The weights of a layer.

    Attributes:
        nodes: The calls of the layer.
        layer: The layer.
        operations: Multiply-adds of all calls, on the example input.
        losses: The damage at each choice of bits.
        bits: The chosen bits.
    """

    nodes: list[fx.Node]
    layer: Any
    operations: int
    losses: list[float] = field(default_factory=list)
    bits: int = 0

    @property
    def size(self) -> int:
        """How many weights there are."""
        return int(self.layer.weight.numel())

    def changes(self, run: KeptRun, bits: int) -> dict[fx.Node, Change]:
        """The layer with weights of so many bits, each channel with its best scale."""
        flat = rows(self.layer, self.layer.weight.detach())
        low, high = code_range(bits, symmetric=True)
        rounded = fake_quantize(flat, mse_weight_scale(flat, bits), 0, low, high, axis=0)
        weight = {"weight": from_rows(self.layer, rounded, self.layer.weight.shape)}
        return {
            node: lambda x: torch.func.functional_call(self.layer, weight, (x,))
            for node in self.nodes
        }


@dataclass
class Values:
    """Values that share a scale.

    Attributes:
        nodes: The nodes whose output will be quantized: fused ReLUs, else the observers.
        observer: What watched them.
        relu: Whether negative values become zero.
        upper: A bound of the values, where there is one.
        size: How many values there are, on the example input.
        losses: The damage at each choice of bits.
    """

    nodes: list[fx.Node]
    observer: Observer
    relu: bool
    upper: float | None
    size: int
    losses: list[float] = field(default_factory=list)

    def changes(self, run: KeptRun, bits: int) -> dict[fx.Node, Change]:
        """The values rounded to so many bits, over the range with the least error."""
        low, high = self._range(bits)
        if self.upper is not None:
            high = high.clamp(max=self.upper)
        scale, zero_point = grid_from_range(low, high, bits)
        quantizer = ActivationQuantizer(scale, zero_point, bits)
        return {node: _then(run, node, quantizer) for node in self.nodes}

    def _range(self, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.observer, HistogramObserver):
            return mse_clip_from_histogram(self.observer.histogram, bits, fused_relu=self.relu)
        low, high = self.observer.range()
        return (torch.zeros_like(low), high.clamp(min=0)) if self.relu else (low, high)


def _then(run: KeptRun, node: fx.Node, quantizer: ActivationQuantizer) -> Change:
    return lambda *args, **kwargs: quantizer(run.compute(node, *args, **kwargs))


@dataclass(frozen=True)
class Deal:
    """A width for the values of a cluster and one for each of its layers.

    Attributes:
        cost: Bit operations.
        loss: The sum of the damages.
        values: Bits of the values.
        weights: Bits of the weights of each layer.
    """

    cost: float
    loss: float
    values: float
    weights: tuple[int, ...] = ()


@dataclass
class Cluster:
    """Layers and the values they read, which have one width.

    Attributes:
        layers: The layers.
        values: The values; none where their bits are not chosen.
        bits: The chosen bits of the values.
    """

    layers: list[Weights]
    values: list[Values] = field(default_factory=list)
    bits: int = 0

    @property
    def parts(self) -> list[Weights | Values]:
        """Everything whose damage is measured."""
        return [*self.layers, *self.values]

    def deals(self, choices: Sequence[int], otherwise: float) -> list[Deal]:
        """The widths worth considering, from the cheapest.

        Args:
            choices: Bits to choose from.
            otherwise: Bits of values that are not chosen for.
        """
        starts = [Deal(0.0, 0.0, otherwise)]
        if self.values:
            losses = zip(*(value.losses for value in self.values), strict=True)
            starts = [Deal(0.0, sum(row), b) for b, row in zip(choices, losses, strict=True)]
        return _worthy([deal for start in starts for deal in self._from(start, choices)])

    def _from(self, start: Deal, choices: Sequence[int]) -> list[Deal]:
        deals = [start]
        for layer in self.layers:
            deals = _worthy(
                [
                    replace(
                        deal,
                        cost=deal.cost + layer.operations * bits * start.values,
                        loss=deal.loss + loss,
                        weights=(*deal.weights, bits),
                    )
                    for deal in deals
                    for bits, loss in zip(choices, layer.losses, strict=True)
                ]
            )
        return deals

    def take(self, deal: Deal) -> None:
        """The cluster has the widths of a deal."""
        self.bits = int(deal.values)
        for layer, bits in zip(self.layers, deal.weights, strict=True):
            layer.bits = bits


def _worthy(deals: list[Deal]) -> list[Deal]:
    kept = front([deal.cost for deal in deals], [deal.loss for deal in deals])
    return [deals[place] for place in kept]


def clusters_of(program: Program, free: list[fx.Node], *, activations: bool) -> list[Cluster]:
    """What the calls of layers whose bits are free have in common, in the order of the layers."""
    calls: dict[str, list[fx.Node]] = {}
    for node in free:
        calls.setdefault(str(node.target), []).append(node)
    clusters = {target: Cluster([_weights(program, nodes)]) for target, nodes in calls.items()}
    if activations:
        for values, readers in _values_read(program, set(free)):
            _tie(clusters, values, [str(node.target) for node in readers])
    return list({id(cluster): cluster for cluster in clusters.values()}.values())


def _tie(clusters: dict[str, Cluster], values: Values, targets: list[str]) -> None:
    """The layers that read a value are one cluster, with it."""
    tied = list({id(clusters[target]): clusters[target] for target in targets}.values())
    first = tied[0]
    for other in tied[1:]:
        first.layers += other.layers
        first.values += other.values
    first.values.append(values)
    clusters.update({target: first for target, one in clusters.items() if one in tied[1:]})


def _weights(program: Program, nodes: list[fx.Node]) -> Weights:
    layer: Any = program.submodule(nodes[0])
    each = layer.weight.numel() // output_channels(layer)
    return Weights(nodes, layer, sum(_elements(node) for node in nodes) * each)


def _values_read(program: Program, free: set[fx.Node]) -> Iterator[tuple[Values, list[fx.Node]]]:
    """Values that share an observer, with the free layers that multiply one of them."""
    regions = Regions(program)
    for group in observed_places(program, regions, set(), bits_for=lambda layers: 8):
        readers = [n for place in group for n in layers_reading(regions, place.observer)]
        readers = [node for node in readers if node in free]
        if readers:
            yield _values(program, group), readers


def _values(program: Program, group: list[Place]) -> Values:
    fused = [facts(place.carrier).fused_relu for place in group]
    observer: Any = program.submodule(group[0].observer)
    return Values(
        nodes=[
            place.observer if relu is None else program.node(relu)
            for place, relu in zip(group, fused, strict=True)
        ],
        observer=observer,
        relu=group[0].relu,
        upper=group[0].upper,
        size=sum(_elements(place.observer) for place in group),
    )


def _elements(node: fx.Node) -> int:
    """How many values a node computes on the example input."""
    return torch.Size(facts(node).shape or ()).numel()
