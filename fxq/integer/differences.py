"""What a comparison with the integer reference counts: per layer, per kind of layer, per output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from fxq.integer.program import Grid, Instruction


class Kind(StrEnum):
    """What a layer does, as far as its exactness is concerned."""

    CONV = "conv"
    LINEAR = "linear"
    LINEAR_TO_FLOAT = "linear to float"
    ADD = "add"
    MOVE = "pools and moves"
    QUANTIZE = "quantize"
    FLOAT = "float"


_KINDS = {
    "conv": Kind.CONV,
    "linear": Kind.LINEAR,
    "add": Kind.ADD,
    "quantize": Kind.QUANTIZE,
    "requantize": Kind.QUANTIZE,
    "lookup": Kind.QUANTIZE,
    "dequantize": Kind.QUANTIZE,
    "fake_quantize": Kind.QUANTIZE,
    "dynamic_quantize": Kind.FLOAT,
    "float": Kind.FLOAT,
    "module": Kind.FLOAT,
    "constant": Kind.FLOAT,
}


def kind_of(step: Instruction, grids: Mapping[str, Grid | None]) -> Kind:
    """The kind of an instruction.

    Args:
        step: The instruction.
        grids: What registers hold; inputs of the program may be missing.
    """
    if step.op in ("conv", "linear") and grids.get(step.inputs[0]) is None:
        return Kind.FLOAT
    if step.op == "linear" and step.grid is None:
        return Kind.LINEAR_TO_FLOAT
    return _KINDS.get(step.op, Kind.MOVE)


@dataclass(frozen=True)
class Layer:
    """How the output of one layer compares, over all inputs so far.

    Attributes:
        name: The register it writes.
        op: What it does.
        kind: Its kind.
        sources: The nodes of the captured graph it computes.
        quantized: Whether it writes codes; differences are then in codes, else in floats.
        seen: Whether the runtime shows this register; nothing else is known where it does not.
        elements: Elements compared.
        differing: Elements that differ from the reference.
        introduced: Elements that differ from what the reference computes from the runtime's own
            inputs of this layer.
        inherited: Elements that differ from the reference and were not introduced here.
        largest: The largest difference from the reference.
        largest_introduced: The largest difference that was introduced.
        magnitude: The largest code, or absolute float, of the reference.
    """

    name: str
    op: str
    kind: Kind
    sources: tuple[str, ...] = ()
    quantized: bool = True
    seen: bool = True
    elements: int = 0
    differing: int = 0
    introduced: int = 0
    inherited: int = 0
    largest: float = 0.0
    largest_introduced: float = 0.0
    magnitude: float = 0.0

    @property
    def relative(self) -> float:
        """The largest difference in units of the register's largest magnitude."""
        return _ratio(self.largest, self.magnitude)

    def merged(self, other: Layer) -> Layer:
        """The same layer over the inputs of both."""
        return replace(
            self,
            seen=self.seen and other.seen,
            elements=self.elements + other.elements,
            differing=self.differing + other.differing,
            introduced=self.introduced + other.introduced,
            inherited=self.inherited + other.inherited,
            largest=max(self.largest, other.largest),
            largest_introduced=max(self.largest_introduced, other.largest_introduced),
            magnitude=max(self.magnitude, other.magnitude),
        )

    def to_json(self) -> dict[str, Any]:
        """The record as JSON-ready data; differences that are not finite are null."""
        return _plain({**asdict(self), "relative": self.relative})


@dataclass(frozen=True)
class Summary:
    """All layers of a kind together.

    Attributes:
        kind: The kind.
        layers: How many there are.
        seen: How many of them the runtime shows.
        elements: Elements compared.
        differing: Elements that differ from the reference.
        introduced: Elements whose difference arose in these layers.
        inherited: Elements whose difference came with the inputs of these layers.
        largest: The largest difference in codes.
        relative: The largest relative difference of a float.
    """

    kind: Kind
    layers: int
    seen: int
    elements: int
    differing: int
    introduced: int
    inherited: int
    largest: float
    relative: float

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON-ready data."""
        return _plain(asdict(self))


def summaries(layers: Iterable[Layer]) -> list[Summary]:
    """One summary per kind that occurs, in the order of `Kind`."""
    known = list(layers)
    groups = ((kind, [one for one in known if one.kind is kind]) for kind in Kind)
    return [_summary(kind, group) for kind, group in groups if group]


def _summary(kind: Kind, layers: list[Layer]) -> Summary:
    return Summary(
        kind=kind,
        layers=len(layers),
        seen=sum(one.seen for one in layers),
        elements=sum(one.elements for one in layers),
        differing=sum(one.differing for one in layers),
        introduced=sum(one.introduced for one in layers),
        inherited=sum(one.inherited for one in layers),
        largest=max((one.largest for one in layers if one.quantized), default=0.0),
        relative=max((one.relative for one in layers if not one.quantized), default=0.0),
    )


@dataclass(frozen=True)
class Agreement:
    """How two outputs compare, over all images so far.

    Attributes:
        images: Images compared.
        decisions: Argmaxes compared: one per image, or per pixel of a map; 0 where the output has
            no classes to choose from.
        agreeing: How many of them are equal.
        largest: The largest difference of an element.
        magnitude: The largest absolute element of the first output.
    """

    images: int = 0
    decisions: int = 0
    agreeing: int = 0
    largest: float = 0.0
    magnitude: float = 0.0

    @property
    def share(self) -> float | None:
        """The share of decisions that agree; None where there are none."""
        return self.agreeing / self.decisions if self.decisions else None

    @property
    def relative(self) -> float:
        """The largest difference in units of the largest magnitude."""
        return _ratio(self.largest, self.magnitude)

    def merged(self, other: Agreement) -> Agreement:
        """The comparison over the images of both."""
        return Agreement(
            self.images + other.images,
            self.decisions + other.decisions,
            self.agreeing + other.agreeing,
            max(self.largest, other.largest),
            max(self.magnitude, other.magnitude),
        )

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON-ready data."""
        return _plain({**asdict(self), "share": self.share, "relative": self.relative})


def _ratio(difference: float, magnitude: float) -> float:
    if not difference:
        return 0.0
    return difference / magnitude if magnitude else math.inf


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    finite = {
        name: None if isinstance(item, float) and item in (math.inf, -math.inf) else item
        for name, item in data.items()
    }
    return {name: list(item) if isinstance(item, tuple) else item for name, item in finite.items()}
