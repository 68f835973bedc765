"""What post-training quantize passes share: ranges of values, and integer weights by rounding.

The scales of residual sums are settled last (`fxq.passes.settling`): moved by a few parts in
100,000 to where the codes of a sum do not depend on the kernel that adds.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from fxq.errors import CalibrationError, SpecError
from fxq.graph.program import Program
from fxq.graph.rewrite import Editor
from fxq.numerics.affine import channel_grids, grid_from_range
from fxq.numerics.allocation import Allocation
from fxq.numerics.levels import LevelSet
from fxq.quant.normalized import NormalizedLayer
from fxq.quant.observers import Observer
from fxq.quant.quantizers import ActivationQuantizer, QuantizedLayer, from_rows, rows

from .places import Place
from .quantization import Quantization
from .settling import settle_sums
from .weights import BiasCorrection, WeightCodes, WeightRange, WeightScheme, unsaturated


@dataclass(frozen=True)
class PostTrainingQuantization(Quantization):
    """Observers have become quantizers, and layers hold integer weights.

    Args:
        weight_range: ``absmax`` covers all weights of a channel; ``mse`` has the least error.
        per_channel_weights: Whether each output channel has a range of its own.
        bias_correction: What of each channel's weights is restored after rounding: nothing, the
            mean, or mean and variance. See `fxq.passes.weights` for how exactly.
        allocation: How bits are spread over the channels of a layer of fewer than 8 bits: evenly,
            within a quota of bins (the ACIQ paper), or to a mean number of bits (its code).
        level_set: ``uniform``, sums of powers of two (``apot``), powers of two (``pot``), or for
            each layer the one of the smallest error (``auto``). Layers of 8 bits are uniform, and
            those where a set has levels beyond int8: more than 6 bits with apot, than 4 with pot.
    """

    weight_range: WeightRange = WeightRange.ABSMAX
    per_channel_weights: bool = True
    bias_correction: BiasCorrection = BiasCorrection.NONE
    allocation: Allocation = Allocation.NONE
    level_set: LevelSet = LevelSet.UNIFORM

    @abstractmethod
    def activation_range(self, observer: Observer, place: Place) -> tuple[Any, Any]:
        """The ends of the range to quantize, from what the observer saw."""

    def needs_data(self, place: Place) -> bool:
        """Whether a value's range is taken from what its observer saw."""
        return True

    def channel_bits(self, observer: Observer, place: Place) -> torch.Tensor | None:
        """``[channels]``: the bits of every channel of a value; None where all have the same."""
        return None

    def weight_codes(self, weight: torch.Tensor, bits: int) -> WeightCodes:
        """Integer codes for ``weight: [out, in/groups * k]`` float64, as the options say."""
        scheme = WeightScheme(
            self.weight_range,
            self.per_channel_weights,
            self.bias_correction,
            self.allocation,
            self.level_set,
        )
        return scheme.codes(weight, bits)

    def symmetric_activations(self) -> bool:
        """Whether the zero point of signed values is in the middle of the codes."""
        return False

    def check_options(self, where: str = "") -> None:
        """As every quantize pass; and bits of channels come with ranges of channels."""
        super().check_options(where)
        if self.allocation is not Allocation.NONE and not self.per_channel_weights:
            raise SpecError(
                "channels cannot have bits of their own without ranges of their own",
                where=where or self.name,
                hint="set per_channel_weights = true, or allocation = none",
            )

    def finish(self, program: Program, edit: Editor) -> None:
        """The scales of residual sums are settled."""
        settle_sums(program, edit)

    def quantizer(self, observer: Observer, place: Place) -> nn.Module:
        """What rounds a value.

        Raises:
            CalibrationError: Its observer has seen no data.
        """
        if observer.is_empty and self.needs_data(place):
            raise CalibrationError(
                f"the observer of %{place.carrier.name} has seen no data",
                hint="run calibrate before; it must run the whole network",
            )
        low, high = self.activation_range(observer, place)
        low, high = (torch.as_tensor(end, dtype=torch.float64) for end in (low, high))
        if place.relu:
            low = torch.zeros_like(high)
        low = torch.minimum(low.clamp(min=place.floor), high)
        if place.upper is not None:
            high = high.clamp(max=place.upper)
        bits = self.channel_bits(observer, place)
        if bits is not None:
            return ActivationQuantizer(*channel_grids(low, high, bits), bits)
        if self.symmetric_activations() and not place.relu:
            scale, zero_point = _centred(low, high, place.bits)
        else:
            scale, zero_point = grid_from_range(low, high, place.bits)
        return ActivationQuantizer(scale, zero_point, place.bits)

    def quantized_layer(self, layer: nn.Module, options: Self) -> tuple[nn.Module, str]:
        """The layer with integer weights.

        Raises:
            SpecError: The layer holds a batch norm that is meant to be trained.
        """
        if isinstance(layer, NormalizedLayer):
            raise SpecError(
                "the layer holds a batch norm, as layers that are trained do",
                hint=f"use fold-batch-norm instead of join-batch-norm before {self.name}",
            )
        module: Any = layer
        weight = rows(layer, module.weight.detach()).double()
        found = options.weight_codes(weight, options.weight_bits)
        if is_depthwise(layer):
            found = unsaturated(weight, found)
        codes = from_rows(layer, found.codes.to(torch.int8), module.weight.shape)
        kind = "" if options.level_set is LevelSet.UNIFORM else f" {found.level_set}"
        note = f"w{_span(found.bits)}{kind}"
        return QuantizedLayer(layer, codes, found.scale, found.bits), note


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each output channel of a convolution reads one input channel."""
    groups = int(getattr(layer, "groups", 1))
    return groups > 1 and groups == int(getattr(layer, "in_channels", 0))


def _centred(low: Any, high: Any, bits: int) -> tuple[Any, Any]:
    """A grid with its zero point in the middle of the codes."""
    top = torch.maximum(-low, high)
    scale, _ = grid_from_range(-top, top, bits, symmetric=True)
    return scale, torch.full_like(torch.as_tensor(scale), 2 ** (bits - 1), dtype=torch.int64)


def _span(bits: torch.Tensor) -> str:
    low, high = int(bits.min()), int(bits.max())
    return f"{low}" if low == high else f"{low}..{high}"
