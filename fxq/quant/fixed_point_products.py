"""The three products of a linear layer in a training step, on fixed-point operands.

Weights, inputs and the gradients of outputs are rounded once each; FPROP takes the first two, BPROP
gradients and weights, WTGRAD inputs and gradients. Bias gradients are summed in float. An operand
that no fixed-point width was enough for stays in float, and so do the products it takes part in.

Paper: Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020, section 4 and Fig. 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxq.errors import TrainingError
from fxq.numerics.adaptive import FLOAT_BITS
from fxq.products import operators
from fxq.quant.controller import Controller


@dataclass(frozen=True)
class Operand:
    """A tensor of a product: codes, or float where its controller says so.

    Attributes:
        tensor: ``[limbs, …]`` int8 codes, or float32.
        exponent: Codes count ``2**exponent``; None in float.
    """

    tensor: Tensor
    exponent: int | None

    @classmethod
    def of(
        cls,
        x: Tensor,
        controller: Controller,
        what: str,
        mask: Tensor | None = None,
        *,
        is_image: bool = False,
    ) -> Operand:
        """A tensor rounded as its controller chooses; zero where a mask is not above zero.

        Raises:
            TrainingError: It holds NaN or infinite values, or is no float32 tensor.
        """
        if x.dtype != torch.float32:
            raise TrainingError(
                f"{what} are {x.dtype}, and fixed-point training rounds float32",
                hint="convert the network and its inputs to float32",
            )
        try:
            bits, exponent = controller.choose(x, mask)
            if bits == FLOAT_BITS:
                return cls(x if mask is None else x * (mask > 0), None)
            return cls(operators.quantize(x, bits, exponent, mask, is_image), exponent)
        except TrainingError as error:
            raise TrainingError(
                f"{what} hold NaN or infinite values, which have no fixed-point numbers",
                hint="lower the learning rate, or look for a division by zero",
            ) from error

    def value(self) -> Tensor:
        """``[...]`` float32: the numbers the codes stand for."""
        if self.exponent is None:
            return self.tensor
        total = self.tensor[0].double()
        for limb in self.tensor[1:]:
            total = total * 256 + limb
        return (total * 2.0**self.exponent).float()


@dataclass(frozen=True)
class Controllers:
    """Those of a layer's weights, its inputs, and the gradients of its outputs."""

    weights: Controller
    values: Controller
    gradients: Controller


@dataclass(frozen=True)
class Windows:
    """Geometry of a convolution: per spatial axis, and the number of groups."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def arguments(self) -> tuple[list[int], list[int], list[int], int]:
        """As operators take them."""
        return self.stride, self.padding, self.dilation, self.groups


def conv_forward(
    x: Operand, weight: Operand, bias: Tensor | None, windows: Windows, *, relu: bool = False
) -> Tensor:
    """A convolution of two operands, and a ReLU where asked for."""
    if x.exponent is None or weight.exponent is None:
        run = (F.conv1d, F.conv2d, F.conv3d)[len(windows.stride) - 1]
        found = run(x.value(), weight.value(), bias, *windows.arguments())
        return found.relu_() if relu else found
    exponent = x.exponent + weight.exponent
    result: Tensor = operators.conv_fprop(
        x.tensor, weight.tensor, bias, *windows.arguments(), exponent, relu
    )
    return result


def conv_input(gradient: Operand, weight: Operand, size: list[int], windows: Windows) -> Tensor:
    """What a convolution's input gets; ``size`` is its spatial size."""
    if gradient.exponent is None or weight.exponent is None:
        kernel, flow = weight.value(), gradient.value()
        shape = (len(flow), kernel.shape[1] * windows.groups, *size)
        return _float_backward(flow, flow.new_zeros(1).expand(shape), kernel, windows, 0)
    exponent = gradient.exponent + weight.exponent
    result: Tensor = operators.conv_bprop(
        gradient.tensor, weight.tensor, size, *windows.arguments(), exponent
    )
    return result


def conv_weight(x: Operand, gradient: Operand, kernel: list[int], windows: Windows) -> Tensor:
    """What a convolution's weights get; ``kernel`` is their spatial size."""
    if x.exponent is None or gradient.exponent is None:
        source, flow = x.value(), gradient.value()
        shape = (flow.shape[1], source.shape[1] // windows.groups, *kernel)
        return _float_backward(flow, source, source.new_zeros(1).expand(shape), windows, 1)
    exponent = x.exponent + gradient.exponent
    result: Tensor = operators.conv_wtgrad(
        x.tensor, gradient.tensor, kernel, *windows.arguments(), exponent
    )
    return result


def _float_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, windows: Windows, which: int
) -> Tensor:
    mask = [which == 0, which == 1, False]
    axes = len(windows.stride)
    arguments = (windows.stride, windows.padding, windows.dilation, False, [0] * axes)
    found = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, *arguments, windows.groups, mask
    )
    result: Tensor = found[which]
    return result


def matrices(
    left: Operand, right: Operand, bias: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """``[…, m, n]``: the product of two matrices, or of stacks of them."""
    if left.exponent is None or right.exponent is None:
        found = left.value() @ right.value()
        found = found if bias is None else found + bias
        return found.relu_() if relu else found
    exponent = left.exponent + right.exponent
    result: Tensor = operators.matmul(left.tensor, right.tensor, bias, exponent, relu)
    return result


def _swapped(operand: Operand) -> Operand:
    return Operand(operand.tensor.transpose(-1, -2), operand.exponent)


def _keep(ctx: Any, *operands: Operand, mask: Tensor | None = None) -> None:
    ctx.save_for_backward(*(operand.tensor for operand in operands), mask)
    ctx.exponents = [operand.exponent for operand in operands]


def _restored(ctx: Any) -> tuple[Operand, Operand, Tensor | None]:
    one, other, mask = ctx.saved_tensors
    return Operand(one, ctx.exponents[0]), Operand(other, ctx.exponents[1]), mask


class FixedPointConvolution(torch.autograd.Function):
    """A convolution, and a ReLU where asked for, whose three products take fixed-point operands."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        windows: Windows,
        controllers: Controllers,
        relu: bool,
    ) -> Tensor:
        """``[N, out, …]``."""
        kernel = Operand.of(weight, controllers.weights, "weights")
        source = Operand.of(x, controllers.values, "inputs", is_image=True)
        result = conv_forward(source, kernel, bias, windows, relu=relu)
        _keep(ctx, source, kernel, mask=result if relu else None)
        ctx.windows, ctx.controllers = windows, controllers
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the input, the weights and the bias."""
        source, kernel, mask = _restored(ctx)
        own = ctx.controllers.gradients
        flow = Operand.of(gradient, own, "gradients", mask, is_image=True)
        size = list(source.tensor.shape[-len(ctx.windows.stride) :])
        taps = list(kernel.tensor.shape[-len(ctx.windows.stride) :])
        wants_input, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        return (
            conv_input(flow, kernel, size, ctx.windows) if wants_input else None,
            conv_weight(source, flow, taps, ctx.windows) if wants_weight else None,
            operators.bias_gradient(gradient, mask) if wants_bias else None,
            None,
            None,
            None,
        )


class FixedPointTransposed(torch.autograd.Function):
    """A transposed convolution: what a convolution does to gradients, and the reverse."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        windows: Windows,
        size: list[int],
        controllers: Controllers,
    ) -> Tensor:
        """``[N, out, *size]``; ``weight: [in, out/groups, …]``."""
        kernel = Operand.of(weight, controllers.weights, "weights")
        source = Operand.of(x, controllers.values, "inputs", is_image=True)
        _keep(ctx, source, kernel)
        ctx.windows, ctx.controllers = windows, controllers
        found = conv_input(source, kernel, size, windows)
        return found if bias is None else found.add_(bias.view(-1, *(1 for _ in size)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the input, the weights and the bias."""
        source, kernel, _ = _restored(ctx)
        flow = Operand.of(gradient, ctx.controllers.gradients, "gradients", is_image=True)
        taps = list(kernel.tensor.shape[-len(ctx.windows.stride) :])
        wants_input, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        return (
            conv_forward(flow, kernel, None, ctx.windows) if wants_input else None,
            conv_weight(flow, source, taps, ctx.windows) if wants_weight else None,
            operators.bias_gradient(gradient, None) if wants_bias else None,
            None,
            None,
            None,
        )


class FixedPointLinear(torch.autograd.Function):
    """A linear, and a ReLU where asked for, whose three products take fixed-point operands."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        controllers: Controllers,
        relu: bool,
    ) -> Tensor:
        """``[rows, out]``."""
        kernel = Operand.of(weight, controllers.weights, "weights")
        source = Operand.of(x, controllers.values, "inputs")
        result = matrices(source, _swapped(kernel), bias, relu=relu)
        _keep(ctx, source, kernel, mask=result if relu else None)
        ctx.controllers = controllers
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the input, the weights and the bias."""
        source, kernel, mask = _restored(ctx)
        flow = Operand.of(gradient, ctx.controllers.gradients, "gradients", mask)
        wants_input, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        return (
            matrices(flow, kernel) if wants_input else None,
            matrices(_swapped(flow), source) if wants_weight else None,
            operators.bias_gradient(gradient, mask) if wants_bias else None,
            None,
            None,
        )


class FixedPointMatmul(torch.autograd.Function):
    """A product of two stacks of matrices, neither of them weights."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, controllers: Controllers) -> Tensor:
        """``[…, m, n]``; the controller of weights is that of the right operand."""
        one = Operand.of(left, controllers.values, "inputs")
        other = Operand.of(right, controllers.weights, "inputs")
        _keep(ctx, one, other)
        ctx.controllers = controllers
        return matrices(one, other)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of both operands."""
        one, other, _ = _restored(ctx)
        flow = Operand.of(gradient, ctx.controllers.gradients, "gradients")
        wants_left, wants_right, _ = ctx.needs_input_grad
        return (
            matrices(flow, _swapped(other)) if wants_left else None,
            matrices(_swapped(one), flow) if wants_right else None,
            None,
        )
