"""Layers whose three products, forward and backward, take adaptive fixed-point operands.

Paper: Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from fxq.errors import TrainingError
from fxq.numerics.adaptive import FLOAT_BITS, AdaptationOptions
from fxq.numerics.fixed_point import fixed_point, fixed_point_codes, resolution_exponent
from fxq.numerics.levels import CODE_LIMIT
from fxq.quant.controller import Controller
from fxq.quant.fixed_point_products import (
    Controllers,
    FixedPointConvolution,
    FixedPointLinear,
    FixedPointMatmul,
    FixedPointTransposed,
    Windows,
)
from fxq.quant.normalized import quantized
from fxq.quant.quantizers import output_channels
from fxq.quant.uncompiled import uncompiled


class FixedPointModule(nn.Module):
    """What the layers share: three controllers.

    Args:
        weights: How the widths of weights are chosen; of a product, those of its right operand.
        values: Those of what it reads.
        gradients: Those of the gradients of its outputs.
    """

    def __init__(
        self, weights: AdaptationOptions, values: AdaptationOptions, gradients: AdaptationOptions
    ) -> None:
        super().__init__()
        self.weights = Controller(weights)
        self.values = Controller(values)
        self.gradients = Controller(gradients)

    def controllers(self) -> Controllers:
        """The three."""
        return Controllers(self.weights, self.values, self.gradients)

    def begin_training(self, steps_per_epoch: int) -> None:
        """A tenth of the first epoch chooses anew in every step, as the paper says."""
        for controller in (self.weights, self.values, self.gradients):
            controller.begin(steps_per_epoch // 10)

    def describe(self) -> str:
        """The current widths, for listings."""
        widths = [
            f"{name}{controller.adaptation().bits}"
            for name, controller in zip(
                "wxg", (self.weights, self.values, self.gradients), strict=True
            )
        ]
        return " ".join(widths)

    def extra_repr(self) -> str:
        """Shown in the module's repr."""
        return self.describe()


class FixedPointLayer(FixedPointModule):
    """A convolution or linear on fixed-point operands, and its batch norm in float.

    Args:
        layer: The float layer, whose weights are trained.
        norm: The batch norm behind it, where there is one.
        weights: How the widths of weights are chosen.
        values: Those of inputs.
        gradients: Those of the gradients of outputs.
        relu: Whether it ends in a ReLU, which its kernels compute; never behind a norm.
        is_deployed: Whether it is lowered to integers afterwards; if not, it stays a float layer.

    Attributes:
        bits: ``[out]``; bits per weight when it is deployed.
    """

    bits: Tensor

    def __init__(
        self,
        layer: nn.Module,
        norm: nn.Module | None,
        weights: AdaptationOptions,
        values: AdaptationOptions,
        gradients: AdaptationOptions,
        *,
        relu: bool = False,
        is_deployed: bool = True,
    ) -> None:
        super().__init__(weights, values, gradients)
        self.fxq_kind = "linear" if isinstance(layer, nn.Linear) else "conv"
        self.layer = layer
        self.norm = norm
        self.relu = relu
        self.is_deployed = is_deployed
        width = min(8, weights.start_bits)
        bits = torch.full((output_channels(layer),), width)
        self.register_buffer("bits", bits, persistent=False)

    @uncompiled
    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes with rounded operands, and then the norm.

        Raises:
            TrainingError: Operands are NaN or infinite, no float32, or autocast is on.
        """
        _refuse_autocast(x)
        result = self._product(x)
        return result if self.norm is None else self.norm(result)

    def _product(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        if isinstance(layer, nn.Linear):
            flat = x.reshape(-1, x.shape[-1])
            operands = (flat, layer.weight, layer.bias)
            found = _apply(FixedPointLinear, *operands, self.controllers(), self.relu)
            return found.view(*x.shape[:-1], len(layer.weight))
        if isinstance(layer, _ConvTransposeNd):
            return self._transposed(x, layer)
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            around = layer._reversed_padding_repeated_twice
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x, padding = F.pad(x, around, mode), [0] * len(layer.stride)
        else:
            padding = list(layer.padding)
        windows = _windows(layer, padding)
        return self._convolved(x, layer.weight, layer.bias, windows)

    def _convolved(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows
    ) -> Tensor:
        own, relu = self.controllers(), self.relu
        if x.dim() != 3:
            return _apply(FixedPointConvolution, x, weight, bias, windows, own, relu)
        operands = (x.unsqueeze(2), weight.unsqueeze(2), bias)
        return _apply(FixedPointConvolution, *operands, _as_image(windows), own, relu).squeeze(2)

    def _transposed(self, x: Tensor, layer: Any) -> Tensor:
        windows = _windows(layer, list(layer.padding))
        spans = zip(
            x.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True
        )
        size = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in spans]
        size = [n + extra for n, extra in zip(size, layer.output_padding, strict=True)]
        weight, bias, own = layer.weight, layer.bias, self.controllers()
        if x.dim() != 3:
            return _apply(FixedPointTransposed, x, weight, bias, windows, size, own)
        arguments = (x.unsqueeze(2), weight.unsqueeze(2), bias, _as_image(windows), [1, *size])
        return _apply(FixedPointTransposed, *arguments, own).squeeze(2)

    @property
    def level_set(self) -> str:
        """The name of the levels of the weights."""
        return "uniform"

    @property
    def operator(self) -> str:
        """The operator's name in listings."""
        norm = "" if self.norm is None else f"+{type(self.norm).__name__}"
        return f"FixedPoint{type(self.layer).__name__}{norm}"

    def frozen(self) -> nn.Module:
        """The layer with fixed integer weights, the norm folded into their scales and signs.

        The codes are those it was trained with; wider ones are rounded to 8 bits anew.
        """
        if not self.is_deployed:
            return self._float_layer()
        weight: Any = self.layer.weight
        exact = weight.detach().float()
        exponent, bits = self._deployed_grid(exact)
        codes = fixed_point_codes(exact, exponent, bits).clamp(-CODE_LIMIT, CODE_LIMIT)
        scale, widths = torch.tensor(2.0**exponent), torch.full_like(self.bits, bits)
        return quantized(self.layer, self.norm, exact, codes, scale, widths)

    def _deployed_grid(self, weight: Tensor) -> tuple[int, int]:
        known = self.weights.adaptation()
        if known.bits <= 8 and known.adjustments:
            return known.exponent, known.bits
        return resolution_exponent(float(weight.abs().max()), 8), 8

    def _float_layer(self) -> nn.Module:
        """The layer, its weights those it was trained with."""
        layer: Any = copy.deepcopy(self.layer)
        known = self.weights.adaptation()
        if known.bits != FLOAT_BITS and known.adjustments:
            exact = layer.weight.detach()
            layer.weight = nn.Parameter(fixed_point(exact, known.exponent, known.bits))
        return layer if self.norm is None else nn.Sequential(layer, copy.deepcopy(self.norm))


class FusedRelu(nn.Module):
    """The identity: the layer before it has computed the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """The very same tensor."""
        return x

    def frozen(self) -> nn.Module:
        """The ReLU, which lowering fuses in its own way."""
        return nn.ReLU()


class FixedPointProduct(FixedPointModule):
    """``left @ right`` on fixed-point operands, as attention computes."""

    @uncompiled
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """``[…, m, n]`` from ``[…, m, k]`` and ``[…, k, n]``.

        Raises:
            TrainingError: As a layer's.
        """
        _refuse_autocast(left)
        shape = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])  # type: ignore[no-untyped-call]
        one, other = left.expand(*shape, *left.shape[-2:]), right.expand(*shape, *right.shape[-2:])
        return _apply(FixedPointMatmul, one, other, self.controllers())

    def frozen(self) -> nn.Module:
        """The product in float: no kernel multiplies two values."""
        return Product()


class Product(nn.Module):
    """``left @ right``."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """``[…, m, n]`` from ``[…, m, k]`` and ``[…, k, n]``."""
        return left @ right


def _apply(function: Any, *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)
    return result


def _windows(layer: Any, padding: list[int]) -> Windows:
    return Windows(list(layer.stride), padding, list(layer.dilation), layer.groups)


def _as_image(windows: Windows) -> Windows:
    """The same over images one value high."""
    return Windows(
        [1, *windows.stride], [0, *windows.padding], [1, *windows.dilation], windows.groups
    )


def _refuse_autocast(x: Tensor) -> None:
    if torch.is_autocast_enabled(x.device.type):
        raise TrainingError(
            "fixed-point training chooses its own widths and does not run under autocast",
            hint="leave autocast (--amp) off",
        )
