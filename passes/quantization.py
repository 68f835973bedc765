"""What quantize passes share: observers become quantizers, layers round their weights.

Placement, stated once. The bits of a pass apply to what convolutions and linears multiply: their
weights and their inputs. The first layer and the last keep ``first_last_bits`` for both. Values
that only residual adds and pools read are sums on their way to the next quantizer, and keep
``addend_bits``; so a 4-bit network has 4-bit multiplications and 8-bit residual sums.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import fx, nn

from fxq.errors import SpecError
from fxq.graph.ops import ANCHORS, PASS_THROUGH, Kind
from fxq.graph.program import Program, facts, layer_path
from fxq.graph.regions import Regions
from fxq.graph.rewrite import Editor
from fxq.numerics.histogram import Histogram
from fxq.pipeline import Pass
from fxq.quant.dynamic import DynamicAciqQuantizer
from fxq.quant.observers import HistogramObserver, Observer

from .placement import describe_placement
from .places import Place, observed_places


@dataclass(frozen=True)
class Quantization(Pass):
    """Observers have become quantizers, and layers round their weights.

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
    def quantizer(self, observer: Observer, place: Place) -> nn.Module:
        """What rounds a value, from what its observer saw."""

    @abstractmethod
    def quantized_layer(self, layer: nn.Module, options: Self) -> tuple[nn.Module, str]:
        """A layer that rounds its weights as the options say, and a note on how."""

    def finish(self, program: Program, edit: Editor) -> None:
        """What is left to do when all quantizers are in place is done."""

    def apply(self, program: Program, edit: Editor) -> None:
        """Quantizers are in place and layers hold integers."""
        regions = Regions(program)
        first, last = regions.first_and_last()
        edges = first | last
        places = observed_places(
            program, regions, edges, lambda layers: self._bits_for(program, layers, edges)
        )
        self._quantize_layers(program, edit, regions, edges)
        self._quantize_values(program, edit, regions, places)
        self.finish(program, edit)
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
        alone = [group[0] for group in places if len(group) == 1]
        # Asked before anything is inserted: the regions are those of the observed graph.
        feeding = {place.observer for place in alone if self._feeds_adds(regions, place)}
        for group in places:
            edit.current = group[0].observer
            observer = program.submodule(group[0].observer)
            assert isinstance(observer, Observer)
            quantizer = self.quantizer(observer, group[0])
            if group[0].observer in feeding and not _is_dynamic(quantizer):
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

    def _replace_observer(
        self, program: Program, edit: Editor, place: Place, quantizer: nn.Module
    ) -> fx.Node:
        """The observer is gone; the quantizer stands behind the fused ReLU, where there is one.

        One that finds its range at run time needs what comes before the ReLU, and takes its place.
        """
        relu = facts(place.carrier).fused_relu
        if relu is not None and _is_dynamic(quantizer):
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
        layer = program.submodule(node)
        assert layer is not None
        module, note = self.quantized_layer(layer, options)
        edit.replace_module(node, module)
        edit.write_facts(node, note=note)


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


def _is_dynamic(quantizer: nn.Module) -> bool:
    """Whether a quantizer finds its range at run time."""
    return isinstance(quantizer, DynamicAciqQuantizer)
