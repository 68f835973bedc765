"""What quantize passes share: observers become quantizers, float layers become integer layers.

Placement, stated once. The bits of a pass apply to what convolutions and linears multiply: their
weights and their inputs. The first layer and the last keep ``first_last_bits`` for both. Values
that only residual adds and pools read are sums on their way to the next quantizer, and keep
``addend_bits``; so a 4-bit network has 4-bit multiplications and 8-bit residual sums.

The scales of residual sums are settled last (`fxq.passes.settling`): moved by a few parts in
100,000 to where the codes of a sum do not depend on the kernel that adds.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import fx, nn

from fxq.errors import CalibrationError, SpecError
from fxq.graph.ops import ANCHORS, PASS_THROUGH, Kind
from fxq.graph.program import Program, facts, layer_path
from fxq.graph.regions import Regions
from fxq.graph.rewrite import Editor
from fxq.numerics.affine import grid_from_range, short_scale
from fxq.numerics.saturation import largest_pair_sum, pair_limit
from fxq.pipeline import Pass
from fxq.quant.observers import Observer
from fxq.quant.quantizers import ActivationQuantizer, QuantizedLayer, from_rows, rows

from .settling import settle_sums


@dataclass(frozen=True)
class Place:
    """A value to be quantized.

    Attributes:
        observer: Node of the observer that watched it.
        carrier: The node whose value was watched.
        bits: Bits of its codes.
        relu: Whether a fused ReLU follows the watched value.
        upper: The bound of that ReLU, where it has one.
        edge: Whether it is the input of the first layer or of the last.
        addend: Whether no layer multiplies it: only adds and pools read it.
        floor: A bound below which values make no difference: a sum that ends in a ReLU is zero
            wherever one addend is below minus the largest value of the other.
    """

    observer: fx.Node
    carrier: fx.Node
    bits: int
    relu: bool
    upper: float | None
    edge: bool
    addend: bool
    floor: float = -math.inf


@dataclass(frozen=True)
class WeightCodes:
    """The integer weights of a layer.

    Attributes:
        codes: ``[out, in/groups * k]`` integers, at most 127 in magnitude.
        scale: ``[out]``; a weight is ``codes * scale``.
        bits: ``[out]``; bits per weight.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bits: torch.Tensor


@dataclass(frozen=True)
class Quantization(Pass):
    """Observers have become quantizers, and layers hold integer weights.

    Args:
        weight_bits: Bits per weight, 2 to 8.
        activation_bits: Bits of the values that layers multiply, 1 to 8.
        first_last_bits: Bits of both in the first layer and the last; 0 makes no exception.
        addend_bits: Bits of values that only adds and pools read.
    """

    after: ClassVar[tuple[str, ...]] = ("insert-observers", "calibrate")

    weight_bits: int = 8
    activation_bits: int = 8
    first_last_bits: int = 8
    addend_bits: int = 8

    @abstractmethod
    def activation_range(self, observer: Observer, place: Place) -> tuple[Any, Any]:
        """The ends of the range to quantize, from what the observer saw."""

    @abstractmethod
    def weight_codes(self, weight: torch.Tensor, bits: int) -> WeightCodes:
        """Integer codes for ``weight: [out, in/groups * k]``."""

    def symmetric_activations(self) -> bool:
        """Whether the zero point of signed values is in the middle of the codes."""
        return False

    def apply(self, program: Program, edit: Editor) -> None:
        """Quantizers are in place and layers hold integers."""
        self.check_options()
        regions = Regions(program)
        edges: set[fx.Node] = set().union(*regions.first_and_last())
        places = self._places(program, regions, edges)
        self._quantize_layers(program, edit, regions, edges)
        self._quantize_values(program, edit, places)
        settle_sums(program, edit)

    def check_options(self, where: str = "") -> None:
        """Every number of bits is one there are containers for.

        Raises:
            SpecError: One is not; the error names the option and, for an override, the layer.
        """
        lowest = {"weight_bits": 2, "activation_bits": 1, "addend_bits": 1, "first_last_bits": 0}
        for name, low in lowest.items():
            bits = getattr(self, name)
            if isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= 8:
                raise SpecError(
                    f"{name} must be {low} to 8, not {bits!r}", where=where or self.name
                )

    def for_layer(self, program: Program, node: fx.Node, edges: set[fx.Node]) -> Self:
        """This pass with the options that hold for one layer.

        Raises:
            SpecError: An override asks for impossible bits.
        """
        options = dict(program.layer_options(node))
        options.pop("skip", None)
        names = set(self.options())
        chosen = {name: value for name, value in options.items() if name in names}
        if node in edges and self.first_last_bits:
            chosen.setdefault("weight_bits", max(self.first_last_bits, self.weight_bits))
            chosen.setdefault("activation_bits", max(self.first_last_bits, self.activation_bits))
        own = replace(self, **chosen)
        own.check_options(f"layer {layer_path(node)}")
        return own

    # ---- values ------------------------------------------------------------------------------

    def _places(self, program: Program, regions: Regions, edges: set[fx.Node]) -> list[list[Place]]:
        """The observed values, those that share an observer together."""
        groups: dict[str, list[Place]] = {}
        for node in regions.ops:
            if regions.kind(node) is not Kind.OBSERVER or facts(node).observes is None:
                continue
            carrier = program.node(str(facts(node).observes))
            relu = facts(carrier).fused_relu
            upper = facts(program.node(relu)).upper if relu else facts(carrier).upper
            readers = self._layers_reading(regions, node)
            place = Place(
                observer=node,
                carrier=carrier,
                bits=self._bits_for(program, readers, edges),
                relu=relu is not None or facts(carrier).nonneg,
                upper=upper,
                edge=bool(readers) and all(reader in edges for reader in readers),
                addend=not readers,
                floor=self._floor(program, regions, node),
            )
            groups.setdefault(str(node.target), []).append(place)
        return [self._agree(group) for group in groups.values()]

    def _layers_reading(self, regions: Regions, node: fx.Node) -> list[fx.Node]:
        """The layers that multiply a value, also through concatenations that share its scale."""
        found: list[fx.Node] = []
        for user in regions.consumers(node):
            if regions.is_anchor(user):
                found.append(user)
            elif regions.kind(user) is Kind.CAT:
                found += self._layers_reading(regions, user)
        return found

    def _floor(self, program: Program, regions: Regions, node: fx.Node) -> float:
        """Minus the largest value that is ever added to this one before a ReLU."""
        users = list(node.users)
        if len(users) != 1 or regions.kind(users[0]) is not Kind.ADD:
            return -math.inf
        if facts(users[0]).fused_relu is None:
            return -math.inf
        others = [other for other in regions.ops[users[0]].inputs if other is not node]
        watched = _observer_behind(regions, others[0]) if others else None
        observer = program.submodule(watched) if watched is not None else None
        if not isinstance(observer, Observer) or observer.is_empty:
            return -math.inf
        return -float(observer.range()[1].max())

    def _bits_for(self, program: Program, readers: list[fx.Node], edges: set[fx.Node]) -> int:
        wanted = [self.for_layer(program, node, edges).activation_bits for node in readers]
        return min(wanted, default=max(self.addend_bits, self.activation_bits))

    def _agree(self, group: list[Place]) -> list[Place]:
        """Values that share a scale share bits; they have a ReLU's range only if all do."""
        bits = min(place.bits for place in group)
        relu = all(place.relu for place in group)
        uppers = [place.upper for place in group]
        upper = None if None in uppers else max(u for u in uppers if u is not None)
        floor = min(place.floor for place in group)
        return [replace(place, bits=bits, relu=relu, upper=upper, floor=floor) for place in group]

    def _quantize_values(self, program: Program, edit: Editor, places: list[list[Place]]) -> None:
        for group in places:
            edit.current = group[0].observer
            observer = program.submodule(group[0].observer)
            assert isinstance(observer, Observer)
            if observer.is_empty:
                raise CalibrationError(
                    f"the observer of %{group[0].carrier.name} has seen no data",
                    hint="calibration must run the whole network",
                )
            quantizer = self._quantizer(observer, group[0])
            for place in group:
                edit.current = place.observer
                self._replace_observer(program, edit, place, quantizer)

    def _quantizer(self, observer: Observer, place: Place) -> ActivationQuantizer:
        low, high = self.activation_range(observer, place)
        low, high = (torch.as_tensor(end, dtype=torch.float64) for end in (low, high))
        if place.relu:
            low = torch.zeros_like(high)
        low = torch.minimum(low.clamp(min=place.floor), high)
        if place.upper is not None:
            high = high.clamp(max=place.upper)
        if self.symmetric_activations() and not place.relu:
            scale, zero_point = _centred(low, high, place.bits)
        else:
            scale, zero_point = grid_from_range(low, high, place.bits)
        return ActivationQuantizer(scale, zero_point, place.bits)

    def _replace_observer(
        self, program: Program, edit: Editor, place: Place, quantizer: ActivationQuantizer
    ) -> None:
        """The observer is gone; the quantizer stands behind the fused ReLU, where there is one."""
        relu = facts(place.carrier).fused_relu
        source = place.observer.all_input_nodes[0]
        readers = set(place.observer.users)
        edit.reroute(place.observer, source)
        program.graph.erase_node(place.observer)
        point = source
        if relu is not None:
            point = program.node(relu)
            readers = set(point.users)
        inserted = edit.insert_module(f"{point.name}_quantizer", quantizer, after=point)
        edit.reroute(point, inserted, lambda user: user in readers)
        edit.hit(inserted)

    # ---- layers ------------------------------------------------------------------------------

    def _quantize_layers(
        self, program: Program, edit: Editor, regions: Regions, edges: set[fx.Node]
    ) -> None:
        done: set[str] = set()
        anchors = regions.anchors()
        for position, node in enumerate(anchors, 1):
            edit.current = node
            program.report_progress(self.name, position, len(anchors))
            if str(node.target) not in done:
                done.add(str(node.target))
                self._quantize_layer(program, edit, node, self.for_layer(program, node, edges))
            edit.hit(node)
        for node in regions.ops:
            if regions.kind(node) in ANCHORS and node in regions.reasons:
                edit.miss(node, f"stays in float: {regions.reasons[node]}")

    def _quantize_layer(self, program: Program, edit: Editor, node: fx.Node, options: Self) -> None:
        layer: Any = program.submodule(node)
        weight = rows(layer, layer.weight.detach()).double()
        found = options.weight_codes(weight, options.weight_bits)
        if is_depthwise(layer):
            found = _unsaturated(weight, found)
        codes = from_rows(layer, found.codes.to(torch.int8), layer.weight.shape)
        edit.replace_module(node, QuantizedLayer(layer, codes, found.scale, found.bits))
        edit.write_facts(node, note=f"w{_span(found.bits)}")


def _observer_behind(regions: Regions, node: fx.Node) -> fx.Node | None:
    """The observer whose value a node passes on, if any."""
    while regions.kind(node) in PASS_THROUGH:
        node = regions.ops[node].inputs[0]
    return node if regions.kind(node) is Kind.OBSERVER else None


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each output channel of a convolution reads one input channel."""
    groups = int(getattr(layer, "groups", 1))
    return groups > 1 and groups == int(getattr(layer, "in_channels", 0))


def nearest_codes(weight: torch.Tensor, scale: torch.Tensor, top: int) -> torch.Tensor:
    """``[out, ...]`` int32: the codes nearest to ``weight: [out, ...]``, clamped to ``±top``."""
    return torch.round(weight / scale.unsqueeze(1)).clamp(-top, top).to(torch.int32)


def _unsaturated(weight: torch.Tensor, found: WeightCodes) -> WeightCodes:
    """Codes a depthwise kernel computes exactly: channels that could saturate get a wider scale.

    A channel of fewer than 8 bits keeps its levels, rounded to the wider scale: it gets no more.
    """
    limit = pair_limit(255)
    codes, scale = found.codes, found.scale.double()
    levels = codes * scale.unsqueeze(1)
    values = torch.where((found.bits < 8).unsqueeze(1), levels, weight)
    while bool((over := (worst := largest_pair_sum(codes)) > limit).any()):
        scale = torch.where(over, short_scale(scale * worst / (limit - 0.5)), scale)
        codes = torch.where(over.unsqueeze(1), nearest_codes(values, scale, 127), codes)
    return WeightCodes(codes, scale, found.bits)


def _centred(low: Any, high: Any, bits: int) -> tuple[Any, Any]:
    """A grid with its zero point in the middle of the codes."""
    top = torch.maximum(-low, high)
    scale, _ = grid_from_range(-top, top, bits, symmetric=True)
    return scale, torch.full_like(torch.as_tensor(scale), 2 ** (bits - 1), dtype=torch.int64)


def _span(bits: torch.Tensor) -> str:
    low, high = int(bits.min()), int(bits.max())
    return f"{low}" if low == high else f"{low}..{high}"
