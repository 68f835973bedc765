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

from fxq.quant.quantizers import channel_view


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
        layer: Any = copy.deepcopy(self.layer)
        weight, bias = folded(self.layer, self.norm)
        set_weights(layer, weight, bias)
        return layer  # type: ignore[no-any-return]


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
    scale, shift = affine_of(norm)
    bias = torch.zeros_like(shift) if module.bias is None else module.bias.detach().double()
    weight = module.weight.detach().double() * channel_view(layer, scale)
    return weight, scale * bias + shift


def set_weights(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """A layer has these weights, of its own dtype."""
    module: Any = layer
    dtype, trained = module.weight.dtype, module.weight.requires_grad
    module.weight = nn.Parameter(weight.to(dtype), requires_grad=trained)
    module.bias = nn.Parameter(bias.to(dtype), requires_grad=trained)
