"""Layers that are trained with the rounding of their weights, and what they freeze to.

A layer keeps its float weights and batch norm as parameters and rounds its weights in every
forward, as the deployed integers will be. `frozen` gives the layer with fixed integers that
lowering knows.

Paper: Li, Dong, Wang, "Additive Powers-of-Two Quantization", ICLR 2020, arXiv:1909.13144, Eq. 7 to
9, and its code.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq.errors import SpecError
from fxq.numerics.learned_clip import LEAST_STD, ClipGradient, normalized_weight, project
from fxq.numerics.levels import CODE_LIMIT, level_table
from fxq.quant.learned_values import LEAST_CLIP
from fxq.quant.normalized import quantized
from fxq.quant.quantizers import QuantizedLayer, channel_view, output_channels, rows


class WeightNorm(StrEnum):
    """Whether weights are centred and scaled to a deviation of one, and who gets gradients."""

    NONE = "none"
    DETACHED = "detached"
    ATTACHED = "attached"


class LevelWeights(nn.Module):
    """Rounds a layer's weights to ``gain * alpha * level / largest level``.

    With weight normalization the levels are those of ``(weight - mean) / std`` over the layer, and
    ``gain`` is the deviation the layer started with, so that a layer without a batch norm keeps its
    scale; a batch norm makes it meaningless. Without, the levels are those of ``weight / gain``.
    Weights that start (nearly) all alike are not normalized: that would leave nothing of them.

    Args:
        weight: The weights it starts with.
        alpha: The clip to start with: in units of ``gain``.
        levels: ``[count]`` integer magnitudes, ascending from 0, up to 127.
        bits: Bits per weight, the sign included.
        norm: Whether weights are normalized.
        gradient: Which gradient the clip gets.
        straight: Whether weights beyond the clip get gradients, as in the authors' CIFAR code.
        level_set: The name of the levels.

    Attributes:
        alpha: ``[]``; the clip.
        gain: ``[]``.
    """

    levels: Tensor
    table: Tensor
    gain: Tensor

    def __init__(
        self,
        weight: Tensor,
        alpha: float,
        levels: Tensor,
        *,
        bits: int,
        norm: WeightNorm = WeightNorm.DETACHED,
        gradient: ClipGradient = ClipGradient.RCF,
        straight: bool = False,
        level_set: str = "apot",
    ) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(max(float(alpha), LEAST_CLIP)))
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("table", level_table(levels, signed=True).float(), persistent=False)
        self.norm, gain = _norm_and_gain(weight.detach().double(), norm)
        self.register_buffer("gain", torch.tensor(gain))
        self._magnitudes = tuple(levels.tolist())
        self.bits = bits
        self.gradient = gradient
        self.straight = straight
        self.level_set = level_set

    def forward(self, layer: nn.Module) -> Tensor:
        """The layer's rounded weights."""
        return self.gain * self._rounded(self._normalized(layer))

    def effective(self, layer: nn.Module) -> Tensor:
        """What is rounded: the layer's weights, normalized and back in their own units."""
        return (self.gain * self._normalized(layer)).detach()

    def codes(self, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of the weight's shape, ``[out]`` scales and ``[out]`` bits."""
        unit = self.alpha.detach().clamp(min=LEAST_CLIP) / int(self.levels[-1])
        codes = torch.round(self._rounded(self._normalized(layer)).detach() / unit)
        count = output_channels(layer)
        return codes, (unit * self.gain).expand(count), torch.full((count,), self.bits)

    def _normalized(self, layer: nn.Module) -> Tensor:
        weight: Any = layer.weight
        if self.norm is WeightNorm.NONE:
            return weight / self.gain  # type: ignore[no-any-return]
        return normalized_weight(weight, detached=self.norm is WeightNorm.DETACHED)

    def _rounded(self, values: Tensor) -> Tensor:
        return project(
            values,
            self.alpha,
            self.table,
            signed=True,
            gradient=self.gradient,
            straight=self.straight,
            levels=self._magnitudes,
        )

    def describe(self) -> str:
        """Bits, levels and clip, for listings."""
        return f"{self.bits}-bit {self.level_set} weights clip {self.alpha.item():.4g}"


def _norm_and_gain(weight: Tensor, wanted: WeightNorm) -> tuple[WeightNorm, float]:
    """How weights are normalized, and their deviation; from zero, where they keep their mean."""
    deviation = float(weight.std()) if weight.numel() > 1 else 0.0
    if wanted is not WeightNorm.NONE and deviation > LEAST_STD:
        return wanted, deviation
    size = float(weight.square().mean().sqrt())
    return WeightNorm.NONE, size if size > 0 else 1.0


class AbsmaxWeights(nn.Module):
    """Rounds each output channel of a layer's weights to a uniform grid up to its largest weight.

    Args:
        bits: Bits per weight, 2 to 8.
        as_published: One grid for the layer, up to its largest *signed* weight and without an end
            below, as in the authors' code; more negative weights then do not fit 8 bits.
    """

    level_set = "uniform"

    def __init__(self, bits: int, *, as_published: bool = False) -> None:
        super().__init__()
        self.bits = bits
        self.as_published = as_published

    def forward(self, layer: nn.Module) -> Tensor:
        """The layer's rounded weights; their gradient is passed straight through."""
        weight: Any = layer.weight
        codes, scale, _ = self.codes(layer)
        rounded = codes * channel_view(layer, scale)
        return weight + (rounded - weight).detach()  # type: ignore[no-any-return]

    def effective(self, layer: nn.Module) -> Tensor:
        """What is rounded: the layer's weights."""
        weight: Any = layer.weight
        return weight.detach()  # type: ignore[no-any-return]

    def codes(self, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of the weight's shape, ``[out]`` scales and ``[out]`` bits."""
        weight = self.effective(layer)
        flat = rows(layer, weight)
        largest = flat.amax().expand(len(flat)) if self.as_published else flat.abs().amax(1)
        scale = largest.clamp(min=LEAST_CLIP) / (2 ** (self.bits - 1) - 1)
        codes = torch.round(weight / channel_view(layer, scale))
        return codes, scale, torch.full((len(scale),), self.bits)

    def describe(self) -> str:
        """Bits, for listings."""
        return f"{self.bits}-bit weights"


class LearnedLayer(nn.Module):
    """A convolution or linear that rounds its weights in every forward, and its batch norm.

    Args:
        layer: The float layer, whose weights are trained.
        norm: The batch norm behind it, where there is one.
        weights: What rounds the weights.

    Attributes:
        bits: ``[out]``; bits per weight.
    """

    bits: Tensor

    def __init__(
        self, layer: nn.Module, norm: nn.Module | None, weights: LevelWeights | AbsmaxWeights
    ) -> None:
        super().__init__()
        self.fxq_kind = "linear" if isinstance(layer, nn.Linear) else "conv"
        self.layer = layer
        self.norm = norm
        self.weights = weights
        bits = torch.full((output_channels(layer),), weights.bits)
        self.register_buffer("bits", bits, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes with rounded weights, and then the norm."""
        layer: Any = self.layer
        weight = self.weights(layer)
        if isinstance(layer, nn.Linear):
            result = F.linear(x, weight, layer.bias)
        else:
            result = layer._conv_forward(x, weight, layer.bias)
        return result if self.norm is None else self.norm(result)

    @property
    def level_set(self) -> str:
        """The name of the levels of the weights."""
        return str(self.weights.level_set)

    @property
    def operator(self) -> str:
        """The operator's name in listings."""
        norm = "" if self.norm is None else f"+{type(self.norm).__name__}"
        return f"Learned{type(self.layer).__name__}{norm}"

    def describe(self) -> str:
        """How weights are rounded, for listings."""
        return self.weights.describe()

    def extra_repr(self) -> str:
        """Shown in the module's repr."""
        return self.describe()

    def frozen(self) -> QuantizedLayer:
        """The layer with fixed integer weights, the norm folded into their scales and signs.

        Raises:
            SpecError: A weight does not fit int8, as can happen with weights as published.
        """
        codes, scale, bits = self.weights.codes(self.layer)
        if int(codes.abs().max()) > CODE_LIMIT:
            raise SpecError(
                f"a weight is {int(codes.abs().max())} steps large, and int8 holds {CODE_LIMIT}",
                hint="set placement = integer on quantize-apot",
            )
        exact = self.weights.effective(self.layer)
        return quantized(self.layer, self.norm, exact, codes, scale, bits)
