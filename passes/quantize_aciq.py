"""quantize-aciq: analytic clipping of activations, per-channel weights with bias correction.

Papers: Banner, Nahshan, Soudry, "Post training 4-bit quantization of convolutional networks for
rapid-deployment", NeurIPS 2019, arXiv:1810.05723: clipping (Sec. 2, Eq. 5; fused ReLU: supplement
A.18), bit allocation (Sec. 3, Eq. 11), bias correction (Sec. 4). Where the paper and its authors'
code differ, each is an option of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fxq.errors import SpecError
from fxq.graph.program import facts
from fxq.numerics.aciq import Prior, aciq_range
from fxq.numerics.allocation import Allocation, channel_bits
from fxq.numerics.clipping import least_error_range
from fxq.numerics.prior_fit import fitted_prior
from fxq.quant.dynamic import DynamicAciqQuantizer
from fxq.quant.observers import Observer

from .places import Place
from .post_training import PostTrainingQuantization
from .quantization import histogram_of
from .weights import BiasCorrection

ALLOCATED_BITS = 4
"""Channels of values of more bits all have the same, as in the authors' code."""


@dataclass(frozen=True)
class QuantizeAciq(PostTrainingQuantization):
    """Activations are clipped where rounding and clipping noise balance; weights keep their mean.

    The statistics are those of the value *before* a fused ReLU. Values of 8 bits keep their whole
    range at the network's input, before its last layer, and where only adds and pools read them.

    Args:
        clip: Whether values are clipped at all; if not, the observed range is kept (for ablations).
        prior: The law activations are taken to follow; ``fit`` chooses for each value between
            Laplace and Gauss.
        mean_aware: Whether the clip of a fused ReLU accounts for the mean in closed form; the
            authors' code adds the mean to the zero-mean clip.
        guard: Whether the whole range is kept where it has the smaller error on the observed
            distribution, which is never quite the assumed one.
        activation_allocation: How bits are spread over the channels of values of at most 4 bits,
            by their standard deviation; 0 to 8 each. Not at the network's ends. Observers must be
            per channel, so the result is a simulation.
        dynamic: Whether values are clipped by the statistics of each batch at run time instead of
            those of calibration; what keeps its whole range keeps the calibrated one. A simulation.

    Raises:
        SpecError: The observers hold no distribution.
    """

    name: ClassVar[str] = "quantize-aciq"

    weight_bits: int = 4
    activation_bits: int = 4
    prior: Prior = Prior.LAPLACE
    clip: bool = True
    mean_aware: bool = True
    guard: bool = True
    bias_correction: BiasCorrection = BiasCorrection.MEAN
    activation_allocation: Allocation = Allocation.NONE
    dynamic: bool = False

    def check_options(self, where: str = "") -> None:
        """As every quantize pass; and what is fitted is fitted to calibrated values."""
        super().check_options(where)
        if self.dynamic and not self.clip:
            raise SpecError(
                "ranges found at run time are clipped ones",
                where=where or self.name,
                hint="set clip = true, or dynamic = false",
            )
        if self.dynamic and self.prior is Prior.FIT:
            raise SpecError(
                "a law cannot be fitted to values that are first seen at run time",
                where=where or self.name,
                hint="set prior to laplace or gauss, or dynamic = false",
            )

    def quantizer(self, observer: Observer, place: Place) -> nn.Module:
        """A quantizer with the calibrated range; one that finds it in each batch if dynamic."""
        if not self.dynamic or place.keeps_range:
            return super().quantizer(observer, place)
        allocates = self._allocates(observer, place)
        return DynamicAciqQuantizer(
            place.bits,
            self.prior,
            per_channel=observer.channels is not None,
            fused_relu=place.relu,
            mean_aware=self.mean_aware,
            upper=place.upper,
            allocation=self.activation_allocation if allocates else Allocation.NONE,
        )

    def channel_bits(self, observer: Observer, place: Place) -> torch.Tensor | None:
        """Bits allocated by the standard deviation of channels, as the authors do by default."""
        if not self._allocates(observer, place):
            return None
        return channel_bits(self.activation_allocation, observer.std(), place.bits)

    def _allocates(self, observer: Observer, place: Place) -> bool:
        is_inner = not place.edge and not place.addend and place.bits <= ALLOCATED_BITS
        if self.activation_allocation is Allocation.NONE or not is_inner:
            return False
        if observer.channels is None and len(facts(place.carrier).shape or ()) == 4:
            raise SpecError(
                "bits of channels need the statistics of channels",
                hint="set per_channel = true on insert-observers, or activation_allocation = none",
            )
        return observer.channels is not None

    def activation_range(self, observer: Observer, place: Place) -> tuple[Any, Any]:
        """ACIQ's range; the whole one at 8 bits for the network's ends and for addends."""
        low, high = (end.double() for end in observer.range())
        if place.keeps_range or not self.clip:
            return low, high
        seen = histogram_of(observer, "ACIQ")
        bits = self.channel_bits(observer, place)
        prior = fitted_prior(self.prior, seen.abs_deviation(), seen.std())
        spread = seen.abs_deviation() if prior is Prior.LAPLACE else seen.std()
        clipped = aciq_range(
            seen.mean(),
            spread,
            low,
            high,
            steps=2**place.bits - 1 if bits is None else (2**bits - 1).clamp(min=1),
            prior=prior,
            fused_relu=place.relu,
            mean_aware=self.mean_aware,
        )
        if not self.guard or observer.channels is not None:
            return clipped
        if place.relu:
            low, high = torch.zeros_like(low), high.clamp(min=0)
        lows, highs = (torch.stack(ends) for ends in zip((low, high), clipped, strict=True))
        return least_error_range(seen, lows, highs, place.bits, fused_relu=place.relu)
