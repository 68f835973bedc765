"""A layer and its batch norm as one module: training keeps them apart, kernels see one layer.

In eval mode a batch norm is the affine map ``y = s * x + t`` per channel, with
``s = gamma / sqrt(var + eps)`` and ``t = beta - s * mean``; so the layer computes
``(s W) x + (s b + t)``. ``gamma`` may be zero or negative.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fxq.numerics.affine import short_scale
from fxq.quant.quantizers import QuantizedLayer, channel_view, output_channels


class NormalizedLayer(nn.Module):
    """A convolution or linear with the batch norm that alone reads it.

    Args:
        layer: The float layer.
        norm: The batch norm; it keeps its own statistics and, in training, uses the batch's.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.fxq_kind = "linear" if isinstance(layer, nn.Linear) else "conv"
        self.layer = layer
        self.norm = norm
        self.train(norm.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer and then the norm compute."""
        result: torch.Tensor = self.norm(self.layer(x))
        return result

    @property
    def operator(self) -> str:
        """The operator's name in listings."""
        return f"{type(self.layer).__name__}+{type(self.norm).__name__}"

    def frozen(self) -> nn.Module:
        """The layer with the norm folded in, as eval mode computes."""
        layer = copy.deepcopy(self.layer)
        set_weights(layer, *folded(self.layer, self.norm))
        return layer


def affine_of(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """``scale: [channels]``, ``shift: [channels]`` float64: what a batch norm does in eval mode."""
    module: Any = norm
    mean, variance = module.running_mean.double(), module.running_var.double()
    weight, bias = gamma_and_beta(norm)
    scale = weight / torch.sqrt(variance + module.eps)
    return scale.detach(), (bias - scale * mean).detach()


def gamma_and_beta(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """``[channels]`` float64, twice; 1 and 0 where a batch norm has none."""
    module: Any = norm
    mean = module.running_mean.double()
    weight = torch.ones_like(mean) if module.weight is None else module.weight.double()
    bias = torch.zeros_like(mean) if module.bias is None else module.bias.double()
    return weight.detach(), bias.detach()


def folded(layer: nn.Module, norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight of the layer's shape and bias ``[out]``, float64, with a batch norm behind it."""
    module: Any = layer
    return _mapped(layer, module.weight.detach(), *affine_of(norm))


def quantized(
    layer: nn.Module,
    norm: nn.Module | None,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bits: torch.Tensor,
) -> QuantizedLayer:
    """A layer with integer weights, a batch norm behind it folded into their scales and signs.

    Args:
        layer: The float layer.
        norm: The batch norm, where there is one.
        weight: What is rounded, of the layer's shape.
        codes: ``weight / scale``, rounded; up to 127.
        scale: ``[]`` or ``[out]``.
        bits: ``[out]``; bits per weight.
    """
    ones = weight.new_ones(output_channels(layer), dtype=torch.float64)
    gamma, shift = (ones, torch.zeros_like(ones)) if norm is None else affine_of(norm)
    exact = copy.deepcopy(layer)
    set_weights(exact, *_mapped(layer, weight, gamma, shift))
    signed = codes * channel_view(layer, torch.where(gamma < 0, -1, 1))
    return QuantizedLayer(
        exact, signed.to(torch.int8), short_scale(scale.double() * gamma.abs()), bits
    )


def _mapped(
    layer: nn.Module, weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias, float64, of a layer with an affine map behind it."""
    own: Any = layer.bias
    bias = torch.zeros_like(shift) if own is None else own.detach().double()
    return weight.double() * channel_view(layer, scale), scale * bias + shift


def set_weights(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """A layer has these weights, of its own dtype."""
    module: Any = layer
    dtype, trained = module.weight.dtype, module.weight.requires_grad
    module.weight = nn.Parameter(weight.to(dtype), requires_grad=trained)
    module.bias = nn.Parameter(bias.to(dtype), requires_grad=trained)
