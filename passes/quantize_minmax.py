"""quantize-minmax: uniform quantization of the whole observed range, every paper's baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fxq.numerics.affine import short_scale
from fxq.quant.observers import Observer

from .quantization import Place, Quantization, WeightCodes, nearest_codes


@dataclass(frozen=True)
class QuantizeMinmax(Quantization):
    """Values are quantized over the calibrated range, weights over their largest magnitude.

    Weights are symmetric. A moving average of the range is an option of insert-observers
    (``momentum``), and per-channel ranges of activations are, too (``per_channel``).

    Args:
        symmetric: Whether signed activations have their zero point in the middle of the codes.
        per_channel_weights: Whether each output channel has its own scale.

    Reference:
        Jacob et al., "Quantization and training of neural networks for efficient
        integer-arithmetic-only inference", CVPR 2018, arXiv:1712.05877.
    """

    name: ClassVar[str] = "quantize-minmax"

    symmetric: bool = False
    per_channel_weights: bool = True

    def activation_range(self, observer: Observer, place: Place) -> tuple[Any, Any]:
        """The extremes the observer saw."""
        return observer.range()

    def weight_codes(self, weight: torch.Tensor, bits: int) -> WeightCodes:
        """``round(w / s)`` with ``s = max|w| / (2**(bits-1) - 1)``."""
        return absmax_codes(weight, bits, per_channel=self.per_channel_weights)

    def symmetric_activations(self) -> bool:
        """As the option says."""
        return self.symmetric


def absmax_codes(weight: torch.Tensor, bits: int, *, per_channel: bool = True) -> WeightCodes:
    """Symmetric codes whose largest is the largest weight of the channel, or of the tensor.

    Args:
        weight: ``[out, in/groups * k]`` float64.
        bits: Bits per weight, 2 to 8.
        per_channel: Whether each output channel has its own scale.
    """
    top = 2 ** (bits - 1) - 1
    largest = weight.abs().amax(1)
    if not per_channel:
        largest = largest.max().expand_as(largest)
    scale = short_scale(largest / top)
    codes = nearest_codes(weight, scale, top)
    return WeightCodes(codes, scale, torch.full_like(scale, bits, dtype=torch.int64))
