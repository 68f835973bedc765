"""The values a quantize pass quantizes: what was observed, and what is known of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import fx

from fxq.graph.ops import PASS_THROUGH, Kind
from fxq.graph.program import Program, facts
from fxq.graph.regions import Regions
from fxq.quant.observers import Observer


@dataclass(frozen=True)
class Place:
    """A value to be quantized.

    Attributes:
        observer: Node of the observer that watched it.
        carrier: The node whose value was watched.
        bits: Bits of its codes; the average where channels have bits of their own.
        relu: Whether a fused ReLU follows the watched value.
        upper: The bound of that ReLU, where it has one.
        edge: Whether it is the input of the first layer or of the last; their output, in a
            placement where values have bits of their own.
        addend: Whether no layer's bits apply to it: only adds and pools read it, or a pool made it.
        floor: A bound below which values make no difference: a sum that ends in a ReLU is zero
            wherever one addend is below minus the largest value of the other.
        sharing: The carriers of all values that have its scale.
    """

    observer: fx.Node
    carrier: fx.Node
    bits: int
    relu: bool
    upper: float | None
    edge: bool
    addend: bool
    floor: float = -math.inf
    sharing: tuple[fx.Node, ...] = ()

    @property
    def keeps_range(self) -> bool:
        """Whether nothing is clipped: 8 bits, at the network's ends or where no layer reads it."""
        return (self.edge or self.addend) and self.bits == 8


def observed_places(
    program: Program,
    regions: Regions,
    edges: set[fx.Node],
    bits_for: Callable[[list[fx.Node]], int],
) -> list[list[Place]]:
    """The observed values, those that share an observer together.

    Args:
        program: The program.
        regions: What of it runs on integers.
        edges: The first layers and the last.
        bits_for: The bits of a value that has those of these layers; of no layer, where there are
            none.
    """
    groups: dict[str, list[Place]] = {}
    for node in regions.ops:
        if regions.kind(node) is not Kind.OBSERVER or facts(node).observes is None:
            continue
        carrier = program.node(str(facts(node).observes))
        relu = facts(carrier).fused_relu
        upper = facts(program.node(relu)).upper if relu else facts(carrier).upper
        layers = _layers_deciding(program, regions, node)
        place = Place(
            observer=node,
            carrier=carrier,
            bits=bits_for(layers),
            relu=relu is not None or facts(carrier).nonneg,
            upper=upper,
            edge=bool(layers) and all(layer in edges for layer in layers),
            addend=not layers,
            floor=_floor(program, regions, node),
        )
        groups.setdefault(str(node.target), []).append(place)
    return [_agree(group) for group in groups.values()]


def _layers_deciding(program: Program, regions: Regions, node: fx.Node) -> list[fx.Node]:
    """The layers whose bits a value has: those that multiply it, or the one that made it."""
    own = facts(node).bits_of
    if own is None:
        return layers_reading(regions, node)
    return [program.node(own)] if regions.is_anchor(program.node(own)) else []


def layers_reading(regions: Regions, node: fx.Node) -> list[fx.Node]:
    """The layers that multiply a value, also through concatenations that share its scale."""
    found: list[fx.Node] = []
    for user in regions.consumers(node):
        if regions.is_anchor(user):
            found.append(user)
        elif regions.kind(user) is Kind.CAT:
            found += layers_reading(regions, user)
    return found


def _floor(program: Program, regions: Regions, node: fx.Node) -> float:
    """Minus the largest value that is ever added to this one before a ReLU."""
    users = list(node.users)
    if len(users) != 1 or regions.kind(users[0]) is not Kind.ADD:
        return -math.inf
    if facts(users[0]).fused_relu is None or facts(node).bits_of is not None:
        return -math.inf
    others = [other for other in regions.ops[users[0]].inputs if other is not node]
    watched = _observer_behind(regions, others[0]) if others else None
    observer = program.submodule(watched) if watched is not None else None
    if not isinstance(observer, Observer) or observer.is_empty:
        return -math.inf
    return -float(observer.range()[1].max())


def _agree(group: list[Place]) -> list[Place]:
    """Values that share a scale share bits; they have a ReLU's range only if all do."""
    bits = min(place.bits for place in group)
    relu = all(place.relu for place in group)
    uppers = [place.upper for place in group]
    upper = None if None in uppers else max(u for u in uppers if u is not None)
    floor = min(place.floor for place in group)
    sharing = tuple(place.carrier for place in group)
    return [
        replace(place, bits=bits, relu=relu, upper=upper, floor=floor, sharing=sharing)
        for place in group
    ]


def _observer_behind(regions: Regions, node: fx.Node) -> fx.Node | None:
    """The observer whose value a node passes on, if any."""
    while regions.kind(node) in PASS_THROUGH:
        node = regions.ops[node].inputs[0]
    return node if regions.kind(node) is Kind.OBSERVER else None
