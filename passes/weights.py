"""How the weights of a layer become integer codes: the options that every quantize pass has.

Codes are int8 and a weight is its code times the scale of its output channel, whatever the options.

To be exact on integer kernels, a correction of a channel's mean is a shift of its codes. Levels of
few bits leave room in int8, so they are spread: codes are ``factor * level + shift`` with integers
for both, and the mean is restored to within half a code, ``1 / (2 * factor)`` of a level. Levels
that leave no room for a factor of 2 (7 and 8 bits, APoT with 6, PoT with 4) stay uncorrected: a
shift by whole levels would do more harm than the error.

Papers: Banner, Nahshan, Soudry, "Post training 4-bit quantization of convolutional networks for
rapid-deployment", NeurIPS 2019, arXiv:1810.05723, Sec. 3 (bits per channel) and 4 (bias
correction), and its authors' code; Li, Dong, Wang, "Additive powers-of-two quantization", ICLR
2020, arXiv:1909.13144 (levels).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from fxq.errors import SpecError
from fxq.numerics.affine import short_scale
from fxq.numerics.allocation import Allocation, channel_bits
from fxq.numerics.bias_correction import spread_ratio
from fxq.numerics.clipping import mse_weight_scale
from fxq.numerics.levels import (
    CODE_LIMIT,
    MOST_BITS,
    LevelSet,
    levels_of,
    mse_level_scale,
    nearest_level,
)
from fxq.numerics.saturation import largest_pair_sum, pair_limit


class WeightRange(StrEnum):
    """How the range of a channel's weights is chosen: all of them, or the least squared error."""

    ABSMAX = "absmax"
    MSE = "mse"


class BiasCorrection(StrEnum):
    """What is restored of each channel's weights after rounding."""

    NONE = "none"
    MEAN = "mean"
    MEAN_VARIANCE = "mean-variance"


@dataclass(frozen=True)
class WeightCodes:
    """The integer weights of a layer.

    Attributes:
        codes: ``[out, in/groups * k]`` integers, at most 127 in magnitude.
        scale: ``[out]``; a weight is ``codes * scale``.
        bits: ``[out]``; bits per weight.
        level_set: What the codes are a choice from, up to a factor and a shift per channel.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bits: torch.Tensor
    level_set: LevelSet = LevelSet.UNIFORM


@dataclass(frozen=True)
class WeightScheme:
    """A way to turn weights into codes.

    Args:
        weight_range: How the range is chosen.
        per_channel: Whether each output channel has a range of its own.
        bias_correction: What is restored of each channel.
        allocation: How bits are spread over channels; not in layers of 8 bits.
        level_set: What codes are chosen from; uniform where a set's levels do not fit int8, and in
            layers of 8 bits.

    Raises:
        SpecError: Lloyd levels, which only `quantize-apot` has.
    """

    weight_range: WeightRange = WeightRange.ABSMAX
    per_channel: bool = True
    bias_correction: BiasCorrection = BiasCorrection.NONE
    allocation: Allocation = Allocation.NONE
    level_set: LevelSet = LevelSet.UNIFORM

    def __post_init__(self) -> None:
        if self.level_set is LevelSet.LLOYD:
            raise SpecError(
                "lloyd levels are for training, not for weights quantized after it",
                hint="set level_set = uniform, apot, pot or auto; or use quantize-apot",
            )

    def codes(self, weight: torch.Tensor, bits: int) -> WeightCodes:
        """Codes for ``weight: [out, in/groups * k]`` float64 of 2 to 8 bits.

        Raises:
            SpecError: A weight is not finite.
        """
        if self.level_set is LevelSet.AUTO:
            sets = [kind for kind, most in MOST_BITS.items() if bits <= most]
            every = [replace(self, level_set=kind).codes(weight, bits) for kind in sets]
            return min(every, key=lambda found: _squared_error(weight, found))
        allocation = Allocation.NONE if bits == 8 else self.allocation
        widths = channel_bits(allocation, weight.std(1, correction=0), bits, low=2)
        codes, scale = torch.zeros_like(weight), torch.ones(len(weight), dtype=torch.float64)
        for width in sorted(set(widths.tolist())):
            chosen = widths == width
            codes[chosen], scale[chosen] = self._of_one_width(weight[chosen], width)
        kind = _fitting(self.level_set, int(widths.min()))
        return WeightCodes(codes.to(torch.int32), scale, widths, kind)

    def _of_one_width(self, weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scale of channels that share a width."""
        kind = _fitting(self.level_set, bits)
        levels = levels_of(kind, bits)
        top = int(levels[-1])
        factor = CODE_LIMIT // (top + 1)
        unit = self._size_of_a_level(weight, bits, kind)
        if self.bias_correction is BiasCorrection.NONE or factor < 2:
            scale = short_scale(unit)
            return _nearest(weight, scale, levels, kind), scale
        unit = short_scale(unit / factor) * factor
        found = _nearest(weight, unit, levels, kind)
        if self.bias_correction is BiasCorrection.MEAN_VARIANCE:
            unit = unit * spread_ratio(weight, found * unit.unsqueeze(1))
        offset = (weight / unit.unsqueeze(1) - found).mean(1, keepdim=True)
        room = (CODE_LIMIT - 0.5) / (found + offset).abs().amax(1)
        factors = room.floor().clamp(1, factor)  # fewer where the mean moved the codes far
        scale = short_scale(unit / factors)
        spread = factors.unsqueeze(1) * found
        shift = torch.round((weight / scale.unsqueeze(1) - spread).mean(1, keepdim=True))
        return (spread + shift).clamp(-CODE_LIMIT, CODE_LIMIT), scale

    def _size_of_a_level(self, weight: torch.Tensor, bits: int, kind: LevelSet) -> torch.Tensor:
        """``[out]`` float64: what a level of 1 stands for."""
        rows = weight if self.per_channel else weight.reshape(1, -1)
        levels = levels_of(kind, bits)
        if self.weight_range is WeightRange.ABSMAX:
            size = rows.abs().amax(1) / int(levels[-1])
        elif kind is LevelSet.UNIFORM:
            size = mse_weight_scale(rows, bits).double()
        else:
            size = mse_level_scale(rows, levels).double()
        return size.expand(len(weight))


def unsaturated(weight: torch.Tensor, found: WeightCodes) -> WeightCodes:
    """Codes a depthwise kernel computes exactly: channels that could saturate get a wider scale.

    A channel of fewer than 8 bits keeps its levels, rounded to the wider scale: it gets no more.
    """
    limit = pair_limit(255)
    codes, scale = found.codes, found.scale.double()
    levels = codes * scale.unsqueeze(1)
    values = torch.where((found.bits < 8).unsqueeze(1), levels, weight)
    while bool((over := (worst := largest_pair_sum(codes)) > limit).any()):
        scale = torch.where(over, short_scale(scale * worst / (limit - 0.5)), scale)
        wider = torch.round(values / scale.unsqueeze(1)).clamp(-CODE_LIMIT, CODE_LIMIT)
        codes = torch.where(over.unsqueeze(1), wider.to(codes.dtype), codes)
    return replace(found, codes=codes, scale=scale)


def _fitting(kind: LevelSet, bits: int) -> LevelSet:
    """The set itself where its levels of so many bits fit int8, else the uniform one."""
    return kind if bits <= MOST_BITS[kind] else LevelSet.UNIFORM


def _nearest(
    weight: torch.Tensor, unit: torch.Tensor, levels: torch.Tensor, kind: LevelSet
) -> torch.Tensor:
    """``[out, n]`` float64: the nearest levels; uniform ones tie to even, as kernels round."""
    values = weight / unit.unsqueeze(1)
    if kind is LevelSet.UNIFORM:
        return values.round().clamp(-int(levels[-1]), int(levels[-1]))
    return nearest_level(values, levels).to(values.dtype)


def _squared_error(weight: torch.Tensor, found: WeightCodes) -> float:
    return float((found.codes * found.scale.unsqueeze(1) - weight).square().sum())
