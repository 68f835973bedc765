"""From a quantized layer and the grids around it to the integers a kernel multiplies and adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxq.integer.program import Grid
from fxq.numerics.affine import short_scale
from fxq.quant.quantizers import QuantizedLayer, channel_view, is_transposed

BIAS_LIMIT = 2**23
"""Integer biases stay below this, so that adding one to an accumulator is exact in float32."""


@dataclass(frozen=True)
class IntegerLayer:
    """What the kernel of a layer is given.

    Attributes:
        weight: ``[out, in/groups, ...]`` int8.
        scale: ``[out]`` float32.
        bias: ``[out]`` int32, in units of ``input scale * scale``.
        bits: ``[out]`` uint8; nominal bits per weight.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    bits: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by role."""
        return {
            "weight": self.weight,
            "scale": self.scale,
            "bias": self.bias,
            "bits": self.bits,
        }


def integer_layer(module: QuantizedLayer, grid: Grid) -> IntegerLayer:
    """The integers of a layer whose input is on a grid.

    Args:
        module: The quantized layer.
        grid: The grid of its input.
    """
    layer: Any = module.layer
    codes, scale = module.codes, module.scale
    bias = module.bias
    codes, scale = room_for_bias(layer, codes, scale, bias, grid)
    return IntegerLayer(
        weight=codes.contiguous(),
        scale=scale,
        bias=integer_bias(bias, accumulator_scale(grid.scale, scale)),
        bits=module.bits.to(torch.uint8),
    )


def dequantized_layer(module: QuantizedLayer) -> dict[str, torch.Tensor]:
    """What a layer is given that computes with its dequantized weights in float, by role.

    As in `IntegerLayer`, but for the bias: ``[out]`` float32, in the units of the output.
    """
    return {
        "weight": module.codes.contiguous(),
        "scale": module.scale.clone(),
        "bias": module.bias.detach().float().clone(),
        "bits": module.bits.to(torch.uint8),
    }


def accumulator_scale(input_scale: float, weight_scale: torch.Tensor) -> torch.Tensor:
    """``[out]`` float32: the value of one unit of the accumulator."""
    return torch.tensor(input_scale, dtype=torch.float32) * weight_scale.to(torch.float32)


def integer_bias(bias: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """``[out]`` int32: the bias in accumulator units, at integers a float bias can express exactly.

    Kernels that take a float bias divide it by the unit; not every integer is the float32 quotient
    of some float by the unit. The nearest one that is, is a few units away at most, which is
    thousandths of an output code.

    Args:
        bias: ``[out]``; in the units of the output.
        unit: ``[out]`` float32; value of one accumulator unit.
    """
    wanted = torch.round(bias.double() / unit.double()).clamp(-BIAS_LIMIT, BIAS_LIMIT)
    result = wanted.clone()
    found = torch.zeros_like(wanted, dtype=torch.bool)
    for step in (0, 1, -1, 2, -2, 3, -3, 4, -4):
        candidate = wanted + step
        _, exact = float_bias(candidate, unit)
        result = torch.where(exact & ~found, candidate, result)
        found |= exact
    return result.to(torch.int32)


def float_bias(bias: torch.Tensor, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[out]`` float32, ``[out]`` bool: a float whose float32 quotient by the unit is the integer.

    Args:
        bias: ``[out]``; integers.
        unit: ``[out]`` float32; value of one accumulator unit.
    """
    target = bias.to(torch.float32)
    value = (bias.double() * unit.double()).to(torch.float32)
    best = value
    exact = value / unit == target
    for direction in (float("inf"), float("-inf")):
        neighbour = torch.nextafter(value, torch.tensor(direction))
        hits = (neighbour / unit == target) & ~exact
        best = torch.where(hits, neighbour, best)
        exact = exact | hits
    return best, exact


def room_for_bias(
    layer: nn.Module, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales with which every bias fits its limit.

    Channels whose bias dwarfs their weights (dead ones above all) get a larger scale.
    """
    needed = bias.double().abs() / (grid.scale * (BIAS_LIMIT - 8))
    small = scale.double() < needed
    if not bool(small.any()):
        return codes, scale
    wider = torch.where(small, short_scale(needed.clamp(min=2.0**-126)), scale.double())
    ratio = channel_view(layer, scale.double() / wider)
    return torch.round(codes.double() * ratio).to(torch.int8), wider.to(torch.float32)


def average_layer(channels: int, pool: dict[str, Any]) -> tuple[IntegerLayer, dict[str, Any]]:
    """An average pool as a depthwise convolution: weights of one, scaled by their number.

    Args:
        channels: Number of channels.
        pool: Kernel size, stride and padding, as pairs.
    """
    kernel = pool["kernel_size"]
    count = kernel[0] * kernel[1]
    layer = IntegerLayer(
        weight=torch.ones(channels, 1, *kernel, dtype=torch.int8),
        scale=torch.full((channels,), 1.0 / count),
        bias=torch.zeros(channels, dtype=torch.int32),
        bits=torch.full((channels,), 8, dtype=torch.uint8),
    )
    geometry = {
        "relu": False,
        "stride": pool["stride"],
        "padding": pool["padding"],
        "dilation": (1, 1),
        "groups": channels,
    }
    return layer, geometry


def conv_geometry(layer: nn.Module) -> dict[str, Any]:
    """Stride, dilation, groups and padding of a convolution, as tuples of ints.

    Where the padding differs between the two ends of a dimension it is given as ``pad_before``, to
    be applied first, in the order of ``torch.nn.functional.pad``.
    """
    conv: Any = layer
    padding = conv.padding
    before: tuple[int, ...] = ()
    if padding == "valid":
        padding = (0,) * len(conv.kernel_size)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        padding = tuple(size // 2 for size in total)
        extra = [size % 2 for size in total]
        before = tuple(v for odd in reversed(extra) for v in (0, odd)) if any(extra) else ()
    return {
        "stride": tuple(conv.stride),
        "padding": tuple(padding),
        "dilation": tuple(conv.dilation),
        "groups": int(conv.groups),
        "pad_before": before,
    }


def could_overflow(module: QuantizedLayer, source: Grid, target: Grid | None) -> bool:
    """Whether some input's products and bias, or the code they become, could leave 32 bits.

    Args:
        module: The layer.
        source: The grid of its input.
        target: The grid of its output; None where it writes floats.
    """
    codes, scale = room_for_bias(module.layer, module.codes, module.scale, module.bias, source)
    sums = codes.flatten(1).double().abs().sum(1) * 255 + BIAS_LIMIT
    unit = accumulator_scale(source.scale, scale).double()
    largest = sums if target is None else sums * (unit / target.scale).clamp(min=1.0)
    return bool((largest >= 2**31).any())


def is_supported(module: nn.Module) -> bool:
    """Whether a layer has integers to lower."""
    return isinstance(module, QuantizedLayer) and not is_transposed(module.layer)
