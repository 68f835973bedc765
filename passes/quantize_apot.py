"""quantize-apot: layers and values round to learned levels, ready to be trained.

Every convolution and linear rounds its weights in each forward, and what it reads is rounded to
levels below a clip that is learned with the weights (RCF). The first layer and the last, and values
that only adds and pools read, keep uniform 8-bit grids: weights up to each channel's largest,
values over a range that follows the batches.

Paper: Li, Dong, Wang, "Additive Powers-of-Two Quantization: An Efficient Non-uniform Discretization
for Neural Networks", ICLR 2020, arXiv:1909.13144. It leaves the inputs of the first and last layer
and residual sums in float; here they have 8 bits, because integer kernels read nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fxq.errors import CalibrationError, SpecError
from fxq.numerics.learned_clip import ClipGradient, least_error_clip, normal_clip
from fxq.numerics.levels import CODE_LIMIT, LevelSet, magnitudes
from fxq.numerics.lloyd import LloydLevels, lloyd_levels, normal_lloyd_levels
from fxq.quant.learned_layers import AbsmaxWeights, LearnedLayer, LevelWeights, WeightNorm
from fxq.quant.learned_values import LEAST_CLIP, LearnedLevels, MovingRange
from fxq.quant.normalized import NormalizedLayer
from fxq.quant.observers import Observer
from fxq.quant.quantizers import LARGEST_LEVEL, LARGEST_SIGNED_LEVEL

from .insert_observers import Placement
from .places import Place
from .quantization import Quantization, histogram_of

PAPER_CLIPS = {"weights": 3.0, "values": 8.0}
"""Where the authors' CIFAR code starts: in deviations of the weights, and in the values' units."""


class ClipInit(StrEnum):
    """Where clips start: at the least squared error, or at the authors' constants."""

    ANALYTIC = "analytic"
    PAPER = "paper"


@dataclass(frozen=True)
class QuantizeApot(Quantization):
    """Layers and values round to learned levels; the program is to be trained, then lowered.

    Batch norms are best joined with their layers before (join-batch-norm), not folded: they learn.
    Bits count the sign of weights and of values that have one. Options of single layers are those
    of their weights, but for the bits of what they read.

    Args:
        level_set: ``apot``, ``uniform`` (which makes RCF the learned step size of LSQ), ``pot``, or
            ``lloyd``: those of the least squared error for normal weights and observed values.
        base: For ``apot``: bits per power of two, k in the paper's Eq. 5.
        gradient: Of the clips: ``rcf`` (Eq. 8), ``pact`` (none from inside), or ``none``.
        weight_norm: Whether weights are normalized first, and whether mean and deviation pass
            gradients (the authors' ImageNet code) or not (their CIFAR code).
        straight: Whether weights beyond the clip get gradients (their CIFAR code).
        clip_init: Where clips start.
        placement: ``integer``: all that integer kernels read. ``paper``: what the authors quantize,
            which leaves sums and the inputs of the first and last layer in float.

    Raises:
        SpecError: The levels do not fit integer kernels, or observers hold no distribution.
    """

    name: ClassVar[str] = "quantize-apot"

    weight_bits: int = 4
    activation_bits: int = 4
    level_set: LevelSet = LevelSet.APOT
    base: int = 2
    gradient: ClipGradient = ClipGradient.RCF
    weight_norm: WeightNorm = WeightNorm.DETACHED
    straight: bool = True
    clip_init: ClipInit = ClipInit.ANALYTIC
    placement: Placement = Placement.INTEGER

    def check_options(self, where: str = "") -> None:
        """As every quantize pass; and the levels fit integer kernels."""
        super().check_options(where)
        try:
            if self.weight_bits < 8:
                self._weight_levels()
            if self.activation_bits < 8:
                self._value_levels(self.activation_bits, signed=False)
        except SpecError as error:
            error.where = where or self.name
            raise

    # ---- values ------------------------------------------------------------------------------

    def quantizer(self, observer: Observer, place: Place) -> nn.Module:
        """Learned levels for what layers multiply, a moving range for the rest.

        Raises:
            SpecError: The observer is per channel or holds no distribution, or one bit is to hold
                values of both signs.
        """
        if observer.channels is not None:
            raise SpecError(
                "learned levels have one clip per tensor",
                hint="set per_channel = false on insert-observers",
            )
        if self.placement is Placement.PAPER and (place.edge or place.addend):
            return nn.Identity()
        if place.bits == 8 or place.addend:
            low, high = (float(end) for end in observer.range())
            low = 0.0 if place.relu else low
            high = high if place.upper is None else min(high, place.upper)
            return MovingRange(low, max(low, high), place.bits)
        levels, clip = self._levels_and_clip(observer, place)
        if self.clip_init is ClipInit.PAPER:
            clip = PAPER_CLIPS["values"]
        return LearnedLevels(
            clip,
            levels,
            signed=not place.relu,
            bits=place.bits,
            gradient=self.gradient,
            level_set=self.level_set.value,
        )

    def _levels_and_clip(self, observer: Observer, place: Place) -> tuple[Tensor, float]:
        """``[count]`` magnitudes for values, and their clip.

        Where all values were zero, the clip is the authors'; where they were too few for levels of
        their own, the levels are those of a normal law.
        """
        signed, seen = not place.relu, histogram_of(observer, self.name)
        levels = self._value_levels(place.bits, signed=signed)
        low, high = (float(end) for end in observer.range())
        if max(high, -low if signed else 0) < LEAST_CLIP:
            return levels, PAPER_CLIPS["values"]
        edges, mass = seen.edges()[0], seen.counts[0]
        values = (edges[1:] + edges[:-1]) / 2  # before the ReLU
        values = values.clamp(min=-math.inf if signed else 0, max=place.upper)
        if self.level_set is LevelSet.LLOYD:
            with contextlib.suppress(CalibrationError):
                found = lloyd_levels(values, mass, len(levels), limit=_limit(signed=signed))
                return found.levels, found.alpha
        return levels, least_error_clip(values, mass, levels, signed=signed)

    def _value_levels(self, bits: int, *, signed: bool) -> Tensor:
        """``[count]``: the magnitudes of values of so many bits, for lloyd those of a normal law.

        Powers of two beyond what int8 holds are left out, the smallest first.
        """
        bits, limit = bits - signed, _limit(signed=signed)
        if bits == 0:
            raise SpecError("one bit cannot hold values of both signs", hint="use 2 bits or more")
        if self.level_set is LevelSet.LLOYD:
            return _normal_lloyd(2**bits, limit).levels
        levels = magnitudes(self.level_set, bits, self.base)
        if self.level_set is LevelSet.POT:
            unit = max(1, int(levels[-1]) * 2 // (limit + 1))
            levels = torch.cat((torch.zeros(1, dtype=torch.int64), levels[levels >= unit] // unit))
        if int(levels[-1]) > limit:
            raise SpecError(
                f"{self.level_set} levels of {bits} bits go up to {int(levels[-1])}, beyond int8",
                hint="use at most 5 bits with apot, 7 with uniform",
            )
        return levels

    # ---- layers ------------------------------------------------------------------------------

    def quantized_layer(self, layer: nn.Module, options: Self) -> tuple[nn.Module, str]:
        """The layer with weights that are rounded in every forward."""
        inner: Any = layer.layer if isinstance(layer, NormalizedLayer) else layer
        norm = layer.norm if isinstance(layer, NormalizedLayer) else None
        if options.weight_bits == 8:
            as_published = options.placement is Placement.PAPER
            weights = AbsmaxWeights(8, as_published=as_published)
            return LearnedLayer(inner, norm, weights), "w8"
        levels, clip = options._weight_levels()
        if options.clip_init is ClipInit.PAPER:
            clip = PAPER_CLIPS["weights"]
        levelled = LevelWeights(
            inner.weight,
            clip,
            levels,
            bits=options.weight_bits,
            norm=options.weight_norm,
            gradient=options.gradient,
            straight=options.straight,
            level_set=options.level_set.value,
        )
        return LearnedLayer(inner, norm, levelled), f"w{options.weight_bits} {options.level_set}"

    def _weight_levels(self) -> tuple[Tensor, float]:
        """``[count]`` magnitudes of weights, and the clip in deviations of normal weights."""
        count = 2 ** (self.weight_bits - 1)
        if self.level_set is LevelSet.LLOYD:
            found = _normal_lloyd(count)
            return found.levels, found.alpha
        levels = magnitudes(self.level_set, self.weight_bits - 1, self.base)
        if int(levels[-1]) > LARGEST_LEVEL:
            raise SpecError(
                f"{self.level_set} weights of {self.weight_bits} bits have levels up to "
                f"{int(levels[-1])}, beyond int8",
                hint="use at most 6 bits with apot, 4 with pot",
            )
        return levels, normal_clip(levels)


@functools.cache
def _normal_lloyd(count: int, limit: int = CODE_LIMIT) -> LloydLevels:
    return normal_lloyd_levels(count, limit=limit)


def _limit(*, signed: bool) -> int:
    return LARGEST_SIGNED_LEVEL if signed else LARGEST_LEVEL
