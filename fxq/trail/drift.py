"""`Drift`: how far an output is from that of the captured model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Drift:
    """How far the output on the probe batch is from that of the captured model.

    Attributes:
        sqnr: Signal-to-noise ratio in dB; infinite where the two are equal, ``-inf`` where the
            output is not finite.
        largest: The largest absolute difference of an element.
        flips: Argmaxes that name another class.
        decisions: Argmaxes compared: one per image, or per pixel of a map; 0 where the output has
            no classes to choose from.

    Example:
        >>> Drift(20.0, 0.5, 1, 4).error
        0.01
    """

    sqnr: float
    largest: float
    flips: int = 0
    decisions: int = 0

    @property
    def error(self) -> float:
        """The squared error over the squared magnitude of the captured model's output."""
        return 10 ** (-self.sqnr / 10) if self.sqnr > -math.inf else math.inf

    def to_json(self) -> dict[str, Any]:
        """The drift as JSON-ready data; a ratio or difference that is infinite is a word."""
        return {
            "sqnr": finite(self.sqnr),
            "largest": finite(self.largest),
            "flips": self.flips,
            "decisions": self.decisions,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Drift | None:
        """The drift that `to_json` wrote; None where none was measured."""
        if data is None:
            return None
        ends = _known(data["sqnr"]), _known(data["largest"])
        return cls(*ends, int(data["flips"]), int(data["decisions"]))

    def short(self) -> list[float | str | None]:
        """The ratio and the largest difference, of four digits, as JSON has them.

        Example:
            >>> Drift(127.93648, 2.1457e-06).short()
            [127.9, 2.146e-06]
        """
        return [finite(float(f"{one:.4g}")) for one in (self.sqnr, self.largest)]

    @classmethod
    def of_short(cls, data: Sequence[float | str]) -> Drift:
        """The drift that `short` wrote."""
        sqnr, largest = data
        return cls(_known(sqnr), _known(largest))


INFINITIES = {math.inf: "exact", -math.inf: "not finite"}  # JSON has no infinity


def finite(value: float | None) -> float | str | None:
    """A number as JSON has it."""
    return INFINITIES.get(value, value) if value is not None else None


def number(value: float | str | None) -> float | None:
    """The number that `finite` wrote."""
    for infinity, word in INFINITIES.items():
        if value == word:
            return infinity
    return None if value is None else float(value)


def _known(value: float | str | None) -> float:
    """A number that must be there.

    Raises:
        ValueError: It is not.
    """
    found = number(value)
    if found is None:
        raise ValueError("a drift has a ratio and a largest difference")
    return found
