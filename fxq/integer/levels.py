"""How codes become levels: the grids that kernels write for a `LevelQuantizer`, and its tables.

A kernel rounds to equal steps. It writes codes on a grid that is finer than the levels, and a table
of 256 entries has the level of each. Every threshold between two integer levels is a multiple of
half a level. On a grid of halves, `level_layer` (`fxq.integer.thresholds`) makes rounding round
down, which is exact. What has no bias to do that with is written on the finest grid there is, and
its thresholds are off by half a step of that grid at most.
"""

from __future__ import annotations

import torch

from fxq.integer.program import Grid
from fxq.numerics.affine import dequantize, short_scale
from fxq.quant.quantizers import LevelQuantizer

TABLE_SIZE = 256
"""Entries of a table: one for every byte."""

_MIDDLE = 128


def level_grid(module: LevelQuantizer) -> Grid:
    """The grid of the codes ``level + zero_point``."""
    return Grid(float(module.scale), module.zero_point, module.grid_bits)


def half_level_grid(module: LevelQuantizer) -> Grid:
    """Steps of half a level, in 8 bits."""
    return Grid(float(module.scale) / 2, _MIDDLE if module.signed else 0, 8)


def finest_grid(module: LevelQuantizer) -> Grid:
    """As many steps to half a level as 8 bits allow up to the outermost threshold."""
    half_levels = int(module.levels[-2:].sum())
    codes = TABLE_SIZE - 1 - _MIDDLE if module.signed else TABLE_SIZE - 1
    step = short_scale(float(module.scale) / (2 * (codes // half_levels)))
    return Grid(step, _MIDDLE if module.signed else 0, 8)


def level_table(
    module: LevelQuantizer, grid: Grid, *, floors: bool = False, upper: float | None = None
) -> torch.Tensor:
    """``[256]`` uint8: for every code, that of its level.

    Args:
        module: Which levels.
        grid: What the codes stand for.
        floors: Whether a code stands for the whole step above it, not for the nearest values.
        upper: Where a ReLU ends the values; None where none does.

    Example:
        >>> module = LevelQuantizer(torch.tensor(0.5), torch.tensor([0, 1, 2, 4]), False, 2)
        >>> level_table(module, half_level_grid(module), floors=True)[:8].tolist()
        [0, 1, 1, 2, 2, 2, 4, 4]
    """
    values = dequantize(torch.arange(TABLE_SIZE), grid.scale, grid.zero_point)
    if floors:
        values = values + grid.scale / 2  # inside the step, where no threshold is
    if upper is not None:
        values = values.clamp(max=upper)
    return (module.level_of(values) + module.zero_point).to(torch.uint8)
