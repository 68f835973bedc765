"""Integer weights in fewer than 8 bits, where a channel, or a layer, has few levels.

The codes of a channel of few bits are ``factor * level + shift`` (`fxq.passes.quantize_aciq`
spreads them so that a bias correction has somewhere to go). Four bits are enough for the level,
and ``level * (factor * scale) + shift * scale`` is exact in float32: scales have 16 significant
bits, codes 8. So the packed weights dequantize to the very floats that the int8 codes do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Levels:
    """Weights as ``(level * factor + shift) * scale``.

    Attributes:
        level: ``[out, ...]`` int8, within ``-2**(bits-1) .. 2**(bits-1) - 1``.
        factor: ``[out]`` integers, at least 1.
        shift: ``[out]`` integers.
    """

    level: Array
    factor: Array
    shift: Array

    @property
    def shifts(self) -> bool:
        """Whether any channel is shifted."""
        return bool(self.shift.any())


def levels_of(codes: Array, bits: int) -> Levels | None:
    """The levels of integer weights; None where a channel has more of them than the bits hold.

    Args:
        codes: ``[out, ...]`` int8.
        bits: Bits per level.

    Example:
        >>> found = levels_of(np.array([[-9, 0, 18], [1, 5, 9]], np.int8), 4)
        >>> found.level.tolist(), found.factor.tolist(), found.shift.tolist()
        ([[-1, 0, 2], [-1, 0, 1]], [9, 4], [0, 5])
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows = codes.reshape(len(codes), -1).astype(np.int64)
    smallest = rows.min(1)
    steps = rows - smallest[:, None]
    factor = np.maximum(np.gcd.reduce(steps, axis=1), 1)
    count = steps.max(1) // factor
    if bool((count > high - low).any()):
        return None
    start = smallest // factor
    natural = (smallest % factor == 0) & (start >= low) & (start + count <= high)
    start = np.where(natural, start, np.maximum(low, -((count + 1) // 2)))
    level = steps // factor[:, None] + start[:, None]
    return Levels(level.reshape(codes.shape).astype(np.int8), factor, smallest - start * factor)


@dataclass(frozen=True)
class Table:
    """Weights as ``values[index] * scale``: levels at no equal distances, as APoT's.

    Attributes:
        index: ``[out, ...]`` uint8, below the number of values.
        values: ``[levels]`` int8.
    """

    index: Array
    values: Array


def table_of(codes: Array, bits: int) -> Table | None:
    """The table of integer weights; None where a layer has more values than the bits count.

    Args:
        codes: ``[out, ...]`` int8.
        bits: Bits per index.

    Example:
        >>> table_of(np.array([[-48, 0, 9], [9, -48, 1]], np.int8), 2).values.tolist()
        [-48, 0, 1, 9]
    """
    values, index = np.unique(codes, return_inverse=True)
    if len(values) > 2**bits:
        return None
    return Table(index.reshape(codes.shape).astype(np.uint8), values)
