"""insert-observers: one observer at every value that will get a scale.

Two placements. In ``integer``, everything a kernel reads has a scale, and integers flow from one
convolution or linear to the next. A value gets a scale of its own where it is computed
(convolution, linear, add, average pool) or enters from float; pools, reshapes and paddings share
it. Branches that are concatenated share one observer, so that the concatenation moves bytes and
computes nothing; a branch that is also read elsewhere is requantized for it. Where channels have
scales of their own, branches keep theirs.

``paper`` is what ACIQ's authors quantize: the outputs of convolutions, linears and pools; never the
network's input, nor residual sums. The first layer's output and those of pools have one scale per
tensor. What reads a sum then has no integer kernel, so the result is a simulation.

Observers sit *before* a fused ReLU, because ACIQ's statistics are those of the value before it.

Papers: Banner, Nahshan, Soudry, "Post training 4-bit quantization of convolutional networks for
rapid-deployment", NeurIPS 2019, arXiv:1810.05723, and its code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from torch import fx

from fxq.contracts import Contract
from fxq.graph.ops import Kind
from fxq.graph.program import Program, facts
from fxq.graph.regions import Regions
from fxq.graph.rewrite import Editor
from fxq.pipeline import Pass
from fxq.quant.observers import HistogramObserver, Observer, RangeObserver

_POOLS = frozenset({Kind.MAX_POOL, Kind.AVG_POOL, Kind.GLOBAL_AVG_POOL})
_OWN_SCALE = frozenset({Kind.CONV, Kind.LINEAR, Kind.ADD, Kind.AVG_POOL, Kind.GLOBAL_AVG_POOL})


class Statistics(StrEnum):
    """What observers remember."""

    RANGE = "range"
    HISTOGRAM = "histogram"


class Placement(StrEnum):
    """Which values are quantized."""

    INTEGER = "integer"
    PAPER = "paper"


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Every value that will be quantized has an observer; nothing is computed differently.

    Args:
        statistics: ``range`` remembers extremes; ``histogram`` also the distribution.
        per_channel: Whether observers keep statistics per channel of four-dimensional values.
        momentum: For ``range``: weight of the old value in a moving average over batches; 0 keeps
            the extremes of all batches.
        placement: ``integer``: all that integer kernels read. ``paper``: the outputs of layers and
            pools alone.
    """

    name: ClassVar[str] = "insert-observers"
    contract: ClassVar[Contract] = Contract.OBSERVES_ONLY

    statistics: Statistics = Statistics.RANGE
    per_channel: bool = False
    momentum: float = 0.0
    placement: Placement = Placement.INTEGER

    def apply(self, program: Program, edit: Editor) -> None:
        """The observers are in place, and what stays in float says why."""
        regions = Regions(program)
        for node, why in regions.reasons.items():
            edit.write_facts(node, skip=why)
            edit.miss(node, f"stays in float: {why}")
        if self.placement is Placement.PAPER:
            self._observe_outputs(edit, regions)
        else:
            self._observe_integers(edit, regions)

    def _observe_outputs(self, edit: Editor, regions: Regions) -> None:
        """The outputs of layers and pools are watched, with bits of their own."""
        first, _ = regions.first_and_last()
        for node in edit.visit():
            is_pool = regions.kind(node) in _POOLS and regions.is_integer(node)
            if is_pool or regions.is_anchor(node):
                channels = None if is_pool or node in first else self._channels(node)
                inserted = self._observe(edit, node, self._watching(channels))
                edit.write_facts(inserted, bits_of=node.name)

    def _observe_integers(self, edit: Editor, regions: Regions) -> None:
        """All that integer kernels read is watched."""
        shared = _SharedScales(regions, self._channels)
        for node in edit.visit():
            if regions.is_integer(node) and regions.kind(node) in _OWN_SCALE:
                self._observe(edit, node, shared.observer(node, self._observer))
            elif shared.needs_one_scale(node):
                self._observe_branches(edit, regions, shared, node)
            elif not regions.is_integer(node) and _enters(regions, node):
                self._observe(edit, node, self._observer(node), _integer_user(regions))

    def _observe_branches(
        self, edit: Editor, regions: Regions, shared: _SharedScales, cat: fx.Node
    ) -> None:
        """Branches that keep another scale are requantized to the concatenation's."""
        for source in dict.fromkeys(regions.ops[cat].inputs):
            if not shared.shares(regions.carrier(source), cat):
                observer = shared.observer(cat, self._observer)
                point = _read_by(cat, source)
                self._observe(edit, source, observer, lambda user: user is cat, point)

    def _observe(
        self,
        edit: Editor,
        node: fx.Node,
        observer: Observer,
        where: Callable[[fx.Node], bool] | None = None,
        point: fx.Node | None = None,
    ) -> fx.Node:
        point = point or node
        inserted = edit.insert_module(f"{node.name}_observer", observer, after=point)
        edit.write_facts(inserted, observes=node.name)
        edit.reroute(point, inserted, where)
        edit.hit(node)
        return inserted

    def _channels(self, node: fx.Node) -> int | None:
        """How many channels of a value have statistics of their own; None where none have."""
        shape = facts(node).shape or ()
        return shape[1] if self.per_channel and len(shape) == 4 else None

    def _observer(self, node: fx.Node) -> Observer:
        return self._watching(self._channels(node))

    def _watching(self, channels: int | None) -> Observer:
        histogram = self.statistics is Statistics.HISTOGRAM
        observer: Observer = (
            HistogramObserver(channels)
            if histogram
            else RangeObserver(channels, self.momentum or None)
        )
        observer.enabled = False  # until calibrate; what probes a contract is no calibration data
        return observer


def _read_by(cat: fx.Node, source: fx.Node) -> fx.Node:
    """What a concatenation reads now where it read ``source``: that node, or its observer."""
    reads = [node for node in cat.all_input_nodes if node is source]
    reads += [node for node in cat.all_input_nodes if facts(node).observes == source.name]
    return reads[0]


def _enters(regions: Regions, node: fx.Node) -> bool:
    """Whether a float value is read by something that runs on integers."""
    return any(_integer_user(regions)(user) for user in node.users)


def _integer_user(regions: Regions) -> Callable[[fx.Node], bool]:
    return lambda user: user in regions.ops and regions.is_anchor(user)


class _SharedScales:
    """Which carriers share one observer because they meet in concatenations."""

    def __init__(self, regions: Regions, channels: Callable[[fx.Node], int | None]) -> None:
        self._regions = regions
        self._channels = channels
        self._parent: dict[fx.Node, fx.Node] = {}
        self._observers: dict[fx.Node, Observer] = {}
        for node in regions.ops:
            if self.needs_one_scale(node):
                for source in regions.ops[node].inputs:
                    carrier = regions.carrier(source)
                    if self._only_concatenated(carrier) and not self.shares(carrier, node):
                        self._parent[self._root(carrier)] = self._root(node)

    def needs_one_scale(self, node: fx.Node) -> bool:
        """Whether a node concatenates integers; channels with own scales keep them."""
        is_cat = self._regions.kind(node) is Kind.CAT and self._regions.is_integer(node)
        return is_cat and self._channels(node) is None

    def shares(self, carrier: fx.Node, cat: fx.Node) -> bool:
        """Whether a carrier has the scale of a concatenation."""
        return self._root(carrier) is self._root(cat)

    def observer(self, node: fx.Node, make: Callable[[fx.Node], Observer]) -> Observer:
        """The observer of a carrier; one for all that share a scale."""
        root = self._root(node)
        if root not in self._observers:
            self._observers[root] = make(node)
        return self._observers[root]

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self._parent:
            node = self._parent[node]
        return node

    def _only_concatenated(self, carrier: fx.Node) -> bool:
        kinds = [self._regions.kind(user) for user in self._regions.consumers(carrier)]
        return bool(kinds) and all(kind is Kind.CAT for kind in kinds)
