"""Layers whose outputs become levels: thresholds placed exactly where the quantizer has them.

A kernel computes ``rint((acc + bias) * m)`` with an integer bias. Lowering the bias by half a step
makes that a floor, but for the rounding of the bias to a whole accumulator unit: an accumulator
within half a unit of a threshold can fall on the wrong side. So

- weights are multiplied by what int8 has to spare, and their scale divided by it: accumulators then
  lie that many units apart, and half a unit matters less;
- of the biases and short scales nearby, those are taken with which the fewest thresholds lie
  between another pair of neighbouring accumulators than in exact arithmetic. Where that is none,
  the codes of the channel are exact for every input.

The scale moves by 2**-11 at most, and nothing but these thresholds depends on it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fxq.integer.layers import (
    BIAS_LIMIT,
    IntegerLayer,
    accumulator_scale,
    float_bias,
    integer_bias,
    room_for_bias,
)
from fxq.integer.program import Grid
from fxq.numerics.affine import SCALE_BITS, short_scale
from fxq.numerics.levels import CODE_LIMIT
from fxq.numerics.saturation import pair_limit
from fxq.quant.quantizers import LevelQuantizer, QuantizedLayer

_SCALE_STEPS, _BIAS_STEPS = 16, 2
_CANDIDATES = torch.tensor(
    sorted(
        itertools.product(
            range(-_SCALE_STEPS, _SCALE_STEPS + 1), range(-_BIAS_STEPS, _BIAS_STEPS + 1)
        ),
        key=lambda steps: (abs(steps[0]) + abs(steps[1]), steps),
    )
)
"""``[n, 2]``: steps of the scale's last bit and of the bias, the nearest first."""

_AT_ONCE = 2**22
"""Comparisons in memory at a time."""


def level_layer(
    module: QuantizedLayer, source: Grid, levels: LevelQuantizer, grid: Grid
) -> IntegerLayer:
    """The integers of a layer that writes, rounded down, the halves of levels its output is above.

    Args:
        module: The layer.
        source: The grid of its input.
        levels: The quantizer of its output.
        grid: What the layer writes, `half_level_grid` of the quantizer.
    """
    thresholds = thresholds_of(module, source, levels, grid)
    scale, bias, _ = thresholds.placed()
    return IntegerLayer(thresholds.codes, scale, bias, module.bits.to(torch.uint8))


def thresholds_of(
    module: QuantizedLayer, source: Grid, levels: LevelQuantizer, grid: Grid
) -> Thresholds:
    """What a layer's weights become, and where its thresholds have to be; as for `level_layer`."""
    spare = spare_factor(module, source)
    codes, scale = module.codes * spare, short_scale(module.scale.double() / spare).float()
    codes, short = room_for_bias(module.layer, codes, scale, module.bias - grid.scale / 2, source)
    is_multiple = short == scale  # the others have codes of their own, rounded
    sums = (levels.levels[1:] + levels.levels[:-1]).double()
    return Thresholds(
        codes=codes.contiguous(),
        scale=short,
        bias=module.bias.detach().double(),
        step=torch.where(is_multiple, spare, 1),
        unit=source.scale * torch.where(is_multiple, module.scale, short).double(),
        source=source,
        grid=grid,
        halves=torch.cat((-sums.flip(0), sums)) if levels.signed else sums,
    )


def spare_factor(module: QuantizedLayer, source: Grid) -> int:
    """What all weights can be multiplied by, within int8 and with what kernels can add up.

    Kernels that add pairs of products in 16 bits stay as exact as they are without.
    """
    codes = module.codes.flatten(1).to(torch.int64).abs()
    largest = max(1, int(codes.max()))
    depthwise = getattr(module.layer, "groups", 1) == len(codes) > 1  # whose bytes may be shifted
    pairs = pair_limit(255 if depthwise else source.top) // (2 * largest)
    sums = (2**31 - 1 - BIAS_LIMIT) // (255 * max(1, int(codes.sum(1).max())))
    return max(1, min(CODE_LIMIT // largest, pairs, sums))


@dataclass(frozen=True)
class Thresholds:
    """Where the output of a layer passes from one level to the next.

    Attributes:
        codes: ``[out, ...]`` int8; the weights.
        scale: ``[out]`` float32; the scale nearest to exact.
        bias: ``[out]`` float64; in the units of the output.
        step: ``[out]`` int64; accumulators are multiples of this.
        unit: ``[out]`` float64; the exact value of a step.
        source: The grid of the input.
        grid: The grid of the output.
        halves: ``[thresholds]`` float64; in steps of the grid, of either sign.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor
    step: Tensor
    unit: Tensor
    source: Grid
    grid: Grid
    halves: Tensor

    def placed(self) -> tuple[Tensor, Tensor, Tensor]:
        """``[out]`` float32 scale, ``[out]`` int32 bias, and ``[out]`` int64 misplaced thresholds.

        A threshold is misplaced where some input may come out a level off.
        """
        scales, biases = self._candidates()
        wrong = self._misplaced(scales, biases)
        unit = accumulator_scale(self.source.scale, scales)
        _, exact = float_bias(biases, unit)
        count = len(_CANDIDATES)
        cost = torch.where(exact, wrong, len(self.halves) + 1) * count + torch.arange(count)
        best = cost.argmin(1, keepdim=True)
        scale, bias = scales.gather(1, best).squeeze(1), biases.gather(1, best).squeeze(1)
        unit = accumulator_scale(self.source.scale, scale)
        whole = integer_bias(bias * unit.double(), unit)
        return scale, whole, wrong.gather(1, best).squeeze(1)

    def _candidates(self) -> tuple[Tensor, Tensor]:
        """``[out, n]`` float32 scales, and ``[out, n]`` float64 whole biases."""
        mantissa, exponent = torch.frexp(self.scale.double().unsqueeze(1))
        moved = mantissa * 2**SCALE_BITS + _CANDIDATES[:, 0]
        scales = torch.ldexp(moved, exponent - SCALE_BITS).float()
        unit = accumulator_scale(self.source.scale, scales).double()
        lowered = (self.bias - self.grid.scale / 2).unsqueeze(1) / unit
        biases = lowered.round() + _CANDIDATES[:, 1]
        return scales, biases.clamp(-BIAS_LIMIT, BIAS_LIMIT)

    def _misplaced(self, scales: Tensor, biases: Tensor) -> Tensor:
        """``[out, n]`` int64: how many thresholds lie between the wrong accumulators."""
        first, low, high = self._first_above()
        rows = max(1, _AT_ONCE // (len(_CANDIDATES) * len(self.halves)))
        found = []
        for start in range(0, len(scales), rows):
            some = slice(start, start + rows)
            parts = (scales, biases, first, low, high, self.step)
            found.append(self._count(*(part[some] for part in parts)))
        return torch.cat(found)

    def _count(
        self, scales: Tensor, biases: Tensor, first: Tensor, low: Tensor, high: Tensor, step: Tensor
    ) -> Tensor:
        below = first - 1
        is_above = self._written(scales, biases, torch.maximum(first, low), step) >= self.halves
        is_below = self._written(scales, biases, torch.minimum(below, high), step) < self.halves
        rises, falls = (first <= high).unsqueeze(1), (below >= low).unsqueeze(1)
        return ((rises & ~is_above) | (falls & ~is_below)).sum(-1)

    def _written(self, scales: Tensor, biases: Tensor, sums: Tensor, step: Tensor) -> Tensor:
        """``[out, n, thresholds]`` float32: what kernels make of sums, without the zero point."""
        accumulator = (sums * step.unsqueeze(1)).float().unsqueeze(1)
        unit = accumulator_scale(self.source.scale, scales)
        multiplier = unit / torch.tensor(self.grid.scale, dtype=torch.float32)
        total = accumulator + biases.float().unsqueeze(-1)
        return torch.round(total * multiplier.unsqueeze(-1))

    def _first_above(self) -> tuple[Tensor, Tensor, Tensor]:
        """The smallest sums beyond each threshold, and the smallest and largest sums there are.

        ``[out, thresholds]``, ``[out, 1]`` and ``[out, 1]`` float64, in steps. On a threshold a
        level has the larger magnitude.
        """
        quotient = (self.halves * self.grid.scale - self.bias.unsqueeze(1)) / self.unit.unsqueeze(1)
        first = torch.where(self.halves > 0, quotient.ceil(), quotient.floor() + 1)
        weight = self.codes.flatten(1).double() / self.step.unsqueeze(1)
        zero, top = self.source.zero_point, self.source.top
        ends = torch.stack((weight * -zero, weight * (top - zero)))
        low, high = (end.sum(1, keepdim=True) for end in (ends.amin(0), ends.amax(0)))
        return first, low, high
