"""What quantize passes share: observers become quantizers, float layers become integer layers.

Placement, stated once. The bits of a pass apply to what convolutions and linears multiply: their
weights and their inputs. The first layer and the last keep ``first_last_bits`` for both. Values
that only residual adds and pools read are sums on their way to the next quantizer, and keep
``addend_bits``; so a 4-bit network has 4-bit multiplications and 8-bit residual sums.

The scales of residual sums are settled last (`fxq.passes.settling`): moved by a few parts in
100,000 to where the codes of a sum do not depend on the kernel that adds.
"""

from __future__ import annotations

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
from fxq.numerics.affine import channel_grids, grid_from_range
from fxq.numerics.allocation import Allocation
from fxq.numerics.histogram import Histogram
from fxq.numerics.levels import LevelSet
from fxq.pipeline import Pass
from fxq.quant.observers import HistogramObserver, Observer
from fxq.quant.quantizers import ActivationQuantizer, QuantizedLayer, from_rows, rows

from .placement import describe_placement
from .places import Place, observed_places
from .settling import settle_sums
from .weights import BiasCorrection, WeightCodes, WeightRange, WeightScheme, unsaturated


@dataclass(frozen=True)
class Quantization(Pass):
    """Observers have become quantizers, and layers hold integer weights.

    Args:
        weight_bits: Bits per weight, 2 to 8.
        activation_bits: Bits of the values that layers multiply, 1 to 8.
        first_last_bits: Bits of both in the first layer and the last; 0 makes no exception.
        addend_bits: Bits of values that only adds and pools read.
        weight_range: ``absmax`` covers all weights of a channel; ``mse`` has the least error.
        per_channel_weights: Whether each output channel has a range of its own.
        bias_correction: What of each channel's weights is restored after rounding: nothing, the
            mean, or mean and variance. See `fxq.passes.weights` for how exactly.
        allocation: How bits are spread over the channels of a layer of fewer than 8 bits: evenly,
            within a quota of bins (the ACIQ paper), or to a mean number of bits (its code).
        level_set: ``uniform``, sums of powers of two (``apot``), powers of two (``pot``), or for
            each layer the one of the smallest error (``auto``). Layers of 8 bits are uniform, and
            those where a set has levels beyond int8: more than 6 bits with apot, than 4 with pot.
    """

    after: ClassVar[tuple[str, ...]] = ("insert-observers", "calibrate")

    weight_bits: int = 8
    activation_bits: int = 8
    first_last_bits: int = 8
    addend_bits: int = 8
    weight_range: WeightRange = WeightRange.ABSMAX
    per_channel_weights: bool = True
    bias_correction: BiasCorrection = BiasCorrection.NONE
    allocation: Allocation = Allocation.NONE
    level_set: LevelSet = LevelSet.UNIFORM

    @abstractmethod
    def activation_range(self, observer: Observer, place: Place) -> tuple[Any, Any]:
        """The ends of the range to quantize, from what the observer saw."""

    def needs_data(self, place: Place) -> bool:
        """Whether a value's range is taken from what its observer saw."""
        return True

    def channel_bits(self, observer: Observer, place: Place) -> torch.Tensor | None:
        """``[channels]``: the bits of every channel of a value; None where all have the same."""
        return None

    def weight_codes(self, weight: torch.Tensor, bits: int) -> WeightCodes:
        """Integer codes for ``weight: [out, in/groups * k]`` float64, as the options say."""
        scheme = WeightScheme(
            self.weight_range,
            self.per_channel_weights,
            self.bias_correction,
            self.allocation,
            self.level_set,
        )
        return scheme.codes(weight, bits)

    def symmetric_activations(self) -> bool:
        """Whether the zero point of signed values is in the middle of the codes."""
        return False

    def apply(self, program: Program, edit: Editor) -> None:
        """Quantizers are in place and layers hold integers."""
        self.check_options()
        regions = Regions(program)
        first, last = regions.first_and_last()
        edges = first | last
        places = observed_places(
            program, regions, edges, lambda layers: self._bits_for(program, layers, edges)
        )
        self._quantize_layers(program, edit, regions, edges)
        self._quantize_values(program, edit, regions, places)
        settle_sums(program, edit)
        edit.note(f"placement: {describe_placement(program, first, last)}")

    def check_options(self, where: str = "") -> None:
        """Every number of bits is one there are containers for, and the options go together.

        Raises:
            SpecError: They do not; the error names the option and, for an override, the layer.
        """
        lowest = {"weight_bits": 2, "activation_bits": 1, "addend_bits": 1, "first_last_bits": 0}
        for name, low in lowest.items():
            bits = getattr(self, name)
            if isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= 8:
                raise SpecError(
                    f"{name} must be {low} to 8, not {bits!r}", where=where or self.name
                )
        if self.allocation is not Allocation.NONE and not self.per_channel_weights:
            raise SpecError(
                "channels cannot have bits of their own without ranges of their own",
                where=where or self.name,
                hint="set per_channel_weights = true, or allocation = none",
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

    def _bits_for(self, program: Program, layers: list[fx.Node], edges: set[fx.Node]) -> int:
        wanted = [self.for_layer(program, node, edges).activation_bits for node in layers]
        return min(wanted, default=max(self.addend_bits, self.activation_bits))

    def _quantize_values(
        self, program: Program, edit: Editor, regions: Regions, places: list[list[Place]]
    ) -> None:
        for group in places:
            edit.current = group[0].observer
            observer = program.submodule(group[0].observer)
            assert isinstance(observer, Observer)
            quantizer = self.quantizer(observer, group[0])
            is_static = isinstance(quantizer, ActivationQuantizer)
            if is_static and len(group) == 1 and self._feeds_adds(regions, group[0]):
                self._split(program, edit, observer, group[0], quantizer)
                continue
            for place in group:
                edit.current = place.observer
                self._replace_observer(program, edit, place, quantizer)

    def _feeds_adds(self, regions: Regions, place: Place) -> bool:
        """Whether a value of few bits is also read by what keeps ``addend_bits``."""
        if facts(place.observer).bits_of is not None:  # they are the value's own
            return False
        readers = {regions.kind(node) for node in regions.consumers(place.observer)}
        is_layer_input = bool(readers & ANCHORS) and Kind.CAT not in readers
        return place.bits < self.addend_bits and is_layer_input and bool(readers - ANCHORS)

    def _split(
        self,
        program: Program,
        edit: Editor,
        observer: Observer,
        place: Place,
        quantizer: nn.Module,
    ) -> None:
        """Adds and pools read a value at ``addend_bits``; layers read it requantized."""
        wide = replace(place, bits=self.addend_bits, addend=True)
        kept = self._replace_observer(program, edit, wide, self.quantizer(observer, wide))
        self._narrow(edit, Regions(program), kept, quantizer)

    def _narrow(self, edit: Editor, regions: Regions, point: fx.Node, quantizer: nn.Module) -> None:
        """The layers that read a value, or what pools and paddings make of it, read it narrower."""
        users = list(point.users)
        layers = {user for user in users if _only_layers_read(regions, user)}
        if layers:
            narrow = edit.insert_module(f"{point.name}_low", quantizer, after=point)
            edit.reroute(point, narrow, lambda user: user in layers)
            edit.hit(narrow)
        for user in users:
            if user not in layers and regions.kind(user) in PASS_THROUGH:
                self._narrow(edit, regions, user, quantizer)

    def quantizer(self, observer: Observer, place: Place) -> nn.Module:
        """What rounds a value.

        Raises:
            CalibrationError: Its observer has seen no data.
        """
        if observer.is_empty and self.needs_data(place):
            raise CalibrationError(
                f"the observer of %{place.carrier.name} has seen no data",
                hint="run calibrate before; it must run the whole network",
            )
        low, high = self.activation_range(observer, place)
        low, high = (torch.as_tensor(end, dtype=torch.float64) for end in (low, high))
        if place.relu:
            low = torch.zeros_like(high)
        low = torch.minimum(low.clamp(min=place.floor), high)
        if place.upper is not None:
            high = high.clamp(max=place.upper)
        bits = self.channel_bits(observer, place)
        if bits is not None:
            return ActivationQuantizer(*channel_grids(low, high, bits), bits)
        if self.symmetric_activations() and not place.relu:
            scale, zero_point = _centred(low, high, place.bits)
        else:
            scale, zero_point = grid_from_range(low, high, place.bits)
        return ActivationQuantizer(scale, zero_point, place.bits)

    def _replace_observer(
        self, program: Program, edit: Editor, place: Place, quantizer: nn.Module
    ) -> fx.Node:
        """The observer is gone; the quantizer stands behind the fused ReLU, where there is one.

        One that finds its range at run time needs what comes before the ReLU, and takes its place.
        """
        relu = facts(place.carrier).fused_relu
        if relu is not None and not isinstance(quantizer, ActivationQuantizer):
            edit.write_facts(place.carrier, fused_relu=None)
            edit.write_facts(program.node(relu), fused_into=None)
            relu = None
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
        return inserted

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
            found = unsaturated(weight, found)
        codes = from_rows(layer, found.codes.to(torch.int8), layer.weight.shape)
        edit.replace_module(node, QuantizedLayer(layer, codes, found.scale, found.bits))
        kind = "" if options.level_set is LevelSet.UNIFORM else f" {found.level_set}"
        edit.write_facts(node, note=f"w{_span(found.bits)}{kind}")


def histogram_of(observer: Observer, what: str) -> Histogram:
    """The distribution an observer saw.

    Raises:
        SpecError: It remembers only the range; the error says for what it is needed.
    """
    if not isinstance(observer, HistogramObserver):
        raise SpecError(
            f"{what} needs the distribution of the activations, not only their range",
            hint='set statistics = "histogram" on insert-observers',
        )
    return observer.histogram


def _only_layers_read(regions: Regions, node: fx.Node) -> bool:
    """Whether a reader of a value is a layer, or passes it on to layers alone."""
    if regions.is_anchor(node):
        return True
    if regions.kind(node) not in PASS_THROUGH:
        return False
    readers = list(regions.consumers(node))
    return bool(readers) and all(regions.is_anchor(reader) for reader in readers)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each output channel of a convolution reads one input channel."""
    groups = int(getattr(layer, "groups", 1))
    return groups > 1 and groups == int(getattr(layer, "in_channels", 0))


def _centred(low: Any, high: Any, bits: int) -> tuple[Any, Any]:
    """A grid with its zero point in the middle of the codes."""
    top = torch.maximum(-low, high)
    scale, _ = grid_from_range(-top, top, bits, symmetric=True)
    return scale, torch.full_like(torch.as_tensor(scale), 2 ** (bits - 1), dtype=torch.int64)


def _span(bits: torch.Tensor) -> str:
    low, high = int(bits.min()), int(bits.max())
    return f"{low}" if low == high else f"{low}..{high}"
