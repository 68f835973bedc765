"""quantize-aciq: analytic clipping of activations, per-channel weights with bias correction.

Papers: Banner, Nahshan, Soudry, "Post training 4-bit quantization of convolutional networks for
rapid-deployment", NeurIPS 2019, arXiv:1810.05723: clipping (Sec. 2, Eq. 5; fused ReLU: supplement
A.18), bit allocation (Sec. 3, Eq. 11), bias correction (Sec. 4). Where the paper and its authors'
code differ, each is an option of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch

from fxq.errors import SpecError
from fxq.numerics.aciq import Prior, aciq_range
from fxq.numerics.affine import short_scale
from fxq.numerics.allocation import allocate_bins, allocate_mean_bits
from fxq.numerics.clipping import least_error_range, mse_weight_scale
from fxq.quant.observers import HistogramObserver, Observer

from .quantization import Place, Quantization, WeightCodes, nearest_codes
from .quantize_minmax import absmax_codes

CODE_LIMIT = 127


class WeightRange(StrEnum):
    """How the range of a channel's weights is chosen."""

    ABSMAX = "absmax"
    MSE = "mse"


class BiasCorrection(StrEnum):
    """What is restored of each channel's weights after rounding."""

    NONE = "none"
    MEAN = "mean"


class Allocation(StrEnum):
    """How bits are spread over the channels of a layer's weights."""

    NONE = "none"
    BINS = "bins"
    MEAN_BITS = "mean-bits"


@dataclass(frozen=True)
class QuantizeAciq(Quantization):
    """Activations are clipped where rounding and clipping noise balance; weights keep their mean.

    The statistics are those of the value *before* a fused ReLU. Values of 8 bits keep their whole
    range at the network's input, before its last layer, and where only adds and pools read them.

    Bias correction shifts every code of a channel by the same amount. To be exact on integer
    kernels, low-bit levels are spread over the int8 container: codes are ``factor * level + shift``
    with an integer factor, so the shift has a resolution of ``1 / factor`` of a level.

    Args:
        prior: The law activations are taken to follow.
        mean_aware: Whether the clip of a fused ReLU accounts for the mean in closed form; the
            authors' code adds the mean to the zero-mean clip.
        guard: Whether the whole range is kept where it has the smaller error on the observed
            distribution, which is never quite the assumed one.
        weight_range: How each channel's weight range is chosen.
        bias_correction: What is restored of each channel's weights.
        allocation: How bits are spread over the channels of a layer.

    Raises:
        SpecError: The observers hold no distribution.
    """

    name: ClassVar[str] = "quantize-aciq"

    weight_bits: int = 4
    activation_bits: int = 4
    prior: Prior = Prior.LAPLACE
    mean_aware: bool = True
    guard: bool = True
    weight_range: WeightRange = WeightRange.ABSMAX
    bias_correction: BiasCorrection = BiasCorrection.MEAN
    allocation: Allocation = Allocation.NONE

    def activation_range(self, observer: Observer, place: Place) -> tuple[Any, Any]:
        """ACIQ's range; the whole one at 8 bits for the network's ends and for addends."""
        low, high = (end.double() for end in observer.range())
        if (place.edge or place.addend) and place.bits == 8:
            return low, high
        if not isinstance(observer, HistogramObserver):
            raise SpecError(
                "ACIQ needs the distribution of the activations, not only their range",
                hint='set statistics = "histogram" on insert-observers',
            )
        laplace = self.prior is Prior.LAPLACE
        spread = observer.abs_deviation() if laplace else observer.std()
        clipped = aciq_range(
            observer.mean(),
            spread,
            low,
            high,
            steps=2**place.bits - 1,
            prior=self.prior,
            fused_relu=place.relu,
            mean_aware=self.mean_aware,
        )
        if not self.guard or observer.channels is not None:
            return clipped
        bottom = torch.zeros_like(low) if place.relu else low
        lows, highs = (torch.stack(ends) for ends in zip((bottom, high), clipped, strict=True))
        return least_error_range(observer.histogram, lows, highs, place.bits, fused_relu=place.relu)

    def weight_codes(self, weight: torch.Tensor, bits: int) -> WeightCodes:
        """Codes of each channel at its bits, with the channel's mean restored."""
        if bits == 8:
            return absmax_codes(weight, bits)
        widths = self._widths(weight, bits)
        codes, scale = torch.zeros_like(weight), torch.ones(len(weight), dtype=torch.float64)
        for width in sorted(set(widths.tolist())):
            chosen = widths == width
            codes[chosen], scale[chosen] = self._channel_codes(weight[chosen], int(width))
        return WeightCodes(codes.to(torch.int32), scale, widths)

    def _widths(self, weight: torch.Tensor, bits: int) -> torch.Tensor:
        if self.allocation is Allocation.NONE:
            return torch.full((len(weight),), bits, dtype=torch.int64)
        spread = weight.std(1, correction=0)
        if not bool(spread.any()):  # every channel is constant, so there is nothing to share out
            return torch.full((len(weight),), bits, dtype=torch.int64)
        if self.allocation is Allocation.BINS:
            return allocate_bins(spread, len(weight) * 2.0**bits).clamp(2, 8).to(torch.int64)
        return allocate_mean_bits(spread, bits, low=2).to(torch.int64)

    def _channel_codes(self, weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scale of channels that share a width."""
        top = 2 ** (bits - 1) - 1
        if self.weight_range is WeightRange.MSE:
            level = mse_weight_scale(weight, bits, axis=0).double()
        else:
            level = weight.abs().amax(1) / top
        factor = CODE_LIMIT // (top + 1)
        if self.bias_correction is BiasCorrection.NONE or factor < 2:
            scale = short_scale(level)
            return nearest_codes(weight, scale, top).double(), scale
        scale = short_scale(level / factor)
        levels = nearest_codes(weight, scale * factor, top).double()
        shift = torch.round((weight / scale.unsqueeze(1) - factor * levels).mean(1))
        codes = (factor * levels + shift.unsqueeze(1)).clamp(-CODE_LIMIT, CODE_LIMIT)
        return codes, scale
