"""Trainable stand-ins of quantizers and quantized layers, for passes that optimize by gradients.

Rounding is passed straight through (STE), and a clip passes no gradient to what it cuts. Each
stand-in starts at exactly the numbers of what it stands for, and `frozen` gives such a module back.

Papers:
    Bengio, Leonard, Courville, "Estimating or propagating gradients through stochastic neurons for
        conditional computation", arXiv:1308.3432 (the straight-through estimator).
    Esser, McKinstry, Bablani, Appuswamy, Modha, "Learned step size quantization", ICLR 2020,
        arXiv:1902.08153, Eq. 3 (the gradient of a scale).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxq.numerics.affine import short_scale
from fxq.quant.quantizers import (
    ActivationQuantizer,
    QuantizedLayer,
    along_channels,
    channel_view,
)

_MARGIN = 0.4  # how far from its code a weight may start: rounding must give that code back


class _RoundOnGrid(torch.autograd.Function):
    """``scale * clamp(round(x / scale), low, high)``, with the gradients of LSQ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        """The values on the grid."""
        steps = x / scale
        codes = steps.clamp(low, high).round_()
        ctx.save_for_backward(steps, codes, scale)
        ctx.ends = (low, high)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Through to x inside the range; to the scale, code minus position, or the end's code."""
        steps, codes, scale = ctx.saved_tensors
        inside = grad * (steps.clamp(*ctx.ends) == steps)
        to_scale = (grad * codes).sub_(inside * steps)
        return inside, to_scale.sum_to_size(scale.shape), None, None


class TrainableQuantizer(nn.Module):
    """An activation quantizer whose scale is a parameter; its zero point stays.

    Args:
        quantizer: What it starts as; one zero point per tensor.

    Attributes:
        log_scale: ``[]``; the natural logarithm of the scale over the one it started with.
    """

    fxq_kind = "quantizer"
    start: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.bits = int(quantizer.bits)
        self.zero_point = int(quantizer.zero_point)
        self.register_buffer("start", quantizer.scale)
        self.log_scale = nn.Parameter(torch.zeros_like(quantizer.scale))

    def forward(self, x: Tensor) -> Tensor:
        """``x: [...]``, rounded to the grid."""
        low, high = -self.zero_point, 2**self.bits - 1 - self.zero_point
        scale = self.start * self.log_scale.exp()
        result: Tensor = _RoundOnGrid.apply(x, scale, low, high)  # type: ignore[no-untyped-call]
        return result

    def frozen(self) -> ActivationQuantizer:
        """The quantizer it has become, with a short scale."""
        scale = short_scale(self.start * self.log_scale.detach().exp())
        return ActivationQuantizer(scale, torch.tensor(self.zero_point), self.bits)


class TrainableLayer(nn.Module):
    """A quantized layer whose weights, scales and bias are parameters.

    Args:
        layer: What it starts as; its codes round its weights to a uniform grid.
        unit: ``[out]``; in the units of the output: by how much a step of the bias moves it.

    Attributes:
        steps: Of the weight's shape: the weights in units of their scale, before rounding.
        log_scale: ``[out]``; the natural logarithm of the scales over those it started with.
        shift: ``[out]``; what is added to the bias, in units of ``unit``.
    """

    unit: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, layer: QuantizedLayer, unit: Tensor) -> None:
        super().__init__()
        self.source = layer.requires_grad_(False)
        self.register_buffer("unit", unit)
        for name, end in zip(("low", "high"), code_ends(layer), strict=True):
            self.register_buffer(name, channel_view(layer.layer, end))
        codes = layer.codes.float()
        weight: Any = layer.layer.weight
        exact = weight.detach() / channel_view(layer.layer, layer.scale)
        near = torch.minimum(torch.maximum(exact, codes - _MARGIN), codes + _MARGIN)
        self.steps = nn.Parameter(near)
        self.log_scale = nn.Parameter(torch.zeros_like(layer.scale))
        self.shift = nn.Parameter(torch.zeros_like(layer.scale))

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes with rounded weights."""
        layer = self.source.layer
        inside = self.steps.clamp(self.low, self.high)
        codes = inside + (inside.round() - inside).detach()
        weight = codes * channel_view(layer, self.source.scale * self.log_scale.exp())
        bias = self.source.bias + self.unit * self.shift
        if layer.bias is not None:
            both = {"weight": weight, "bias": bias}
            result: Tensor = torch.func.functional_call(layer, both, (x,))
            return result
        result = torch.func.functional_call(layer, {"weight": weight}, (x,))
        return result + along_channels(self.source, bias, result)

    def codes(self) -> Tensor:
        """Of the weight's shape, int8: the weights as they are rounded now."""
        return self.steps.detach().clamp(self.low, self.high).round().to(torch.int8)

    def frozen(self) -> QuantizedLayer:
        """The layer it stood for, with what was learned."""
        layer = self.source
        layer.codes = self.codes()
        layer.scale = short_scale(layer.scale * self.log_scale.detach().exp())
        layer.bias_shift = layer.bias_shift + self.unit * self.shift.detach()
        return layer


def code_ends(layer: QuantizedLayer) -> tuple[Tensor, Tensor]:
    """``[out]``: the smallest and largest codes: all that its bits can tell apart below 8 bits.

    The lowest code of 8 bits is left out, because ``-128`` does not fit where signs are flipped.
    """
    top = 2.0 ** (layer.bits - 1) - 1
    return torch.where(layer.bits < 8, -top - 1, -top), top
