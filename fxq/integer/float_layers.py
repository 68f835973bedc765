"""Layers of integer weights on floats, and quantizers per channel: what is computed in float.

No integer kernel multiplies codes whose scale depends on the input channel. Such values are rounded
to their codes, and the layers that read them compute in float, as the simulation does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fxq.integer.program import Instruction, IntegerProgram
from fxq.numerics.affine import fake_quantize
from fxq.quant.dynamic import DynamicAciqQuantizer

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
"""By number of dimensions of the weight."""

Function = Callable[[torch.Tensor], torch.Tensor]


def fake_quantizer(program: IntegerProgram, step: Instruction) -> Function:
    """What a ``fake_quantize`` instruction computes of ``x: [n, channels, ...]``."""
    scale, zero_point = program.tensor(step, "scale"), program.tensor(step, "zero_point")
    top = program.tensor(step, "top") if "top" in step.tensors else 2 ** step.attributes["bits"] - 1
    axis = step.attributes["axis"]
    return lambda x: fake_quantize(x, scale, zero_point, 0, top, axis=axis)


def dynamic_quantizer(step: Instruction) -> Function:
    """What a ``dynamic_quantize`` instruction computes of a batch.

    Raises:
        SpecError: Its attributes are no options of a `DynamicAciqQuantizer`.
    """
    return DynamicAciqQuantizer(**step.attributes)


def dequantized_weight(program: IntegerProgram, step: Instruction) -> torch.Tensor:
    """``[out, in/groups, ...]`` float32: the weights of a layer, ``f32(w * sw)``."""
    codes, scale = program.tensor(step, "weight"), program.tensor(step, "scale")
    return codes.float() * scale.reshape(-1, *[1] * (codes.dim() - 1))


def float_layer(program: IntegerProgram, step: Instruction) -> Function:
    """What a ``conv`` or ``linear`` of a float computes, its ReLU included."""
    weight, bias = dequantized_weight(program, step), program.tensor(step, "bias")
    attributes = step.attributes

    def convolution(x: torch.Tensor) -> torch.Tensor:
        return CONVOLUTIONS[weight.dim()](
            x,
            weight,
            bias,
            attributes["stride"],
            attributes["padding"],
            attributes["dilation"],
            attributes["groups"],
        )

    def linear(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, bias)

    run = linear if step.op == "linear" else convolution
    return (lambda x: run(x).clamp_(min=0)) if attributes["relu"] else run
