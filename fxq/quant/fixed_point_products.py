"""The three products of a linear layer in a training step, on fixed-point operands.

Weights, inputs and the gradients of outputs are rounded once each; FPROP takes the first two, BPROP
gradients and weights, WTGRAD inputs and gradients. Bias gradients are summed in float. An operand
that no fixed-point width was enough for stays in float, and so do the products it takes part in.

Paper: Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020, section 4 and Fig. 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxq.errors import TrainingError
from fxq.numerics.adaptive import FLOAT_BITS
from fxq.numerics.fixed_point import from_limbs
from fxq.products import operators
from fxq.products.gradients import float_input_gradient, float_weight_gradient
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
        codes = from_limbs(self.tensor.unbind())
        return (codes.double() * 2.0**self.exponent).float()


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

    def sizes(self, operand: Operand) -> list[int]:
        """Those of an operand's spatial axes."""
        return list(operand.tensor.shape[-len(self.stride) :])


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
        return float_input_gradient(gradient.value(), weight.value(), size, windows.arguments())
    exponent = gradient.exponent + weight.exponent
    result: Tensor = operators.conv_bprop(
        gradient.tensor, weight.tensor, size, *windows.arguments(), exponent
    )
    return result


def conv_weight(x: Operand, gradient: Operand, kernel: list[int], windows: Windows) -> Tensor:
    """What a convolution's weights get; ``kernel`` is their spatial size."""
    if x.exponent is None or gradient.exponent is None:
        return float_weight_gradient(x.value(), gradient.value(), kernel, windows.arguments())
    exponent = x.exponent + gradient.exponent
    result: Tensor = operators.conv_wtgrad(
        x.tensor, gradient.tensor, kernel, *windows.arguments(), exponent
    )
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


# ---- training --------------------------------------------------------------------------------

Gradient = Callable[[Operand, Operand, Operand], Tensor]
"""(gradients, inputs, weights) -> what the inputs or the weights get."""


def _operands(
    ctx: Any,
    x: Tensor,
    weight: Tensor,
    controllers: Controllers,
    windows: Windows | None = None,
    what: str = "weights",
) -> tuple[Operand, Operand]:
    """Inputs and weights, rounded; over windows they are images."""
    kernel = Operand.of(weight, controllers.weights, what)
    source = Operand.of(x, controllers.values, "inputs", is_image=windows is not None)
    ctx.exponents = source.exponent, kernel.exponent
    ctx.controller, ctx.windows = controllers.gradients, windows
    return source, kernel


def _gradients(
    ctx: Any, gradient: Tensor, to_input: Gradient, to_weight: Gradient
) -> tuple[Tensor | None, ...]:
    """What input, weights and bias get, as far as asked for; None for all other arguments."""
    *operands, mask = ctx.saved_tensors
    source, kernel = map(Operand, operands, ctx.exponents)
    is_image = ctx.windows is not None
    flow = Operand.of(gradient, ctx.controller, "gradients", mask, is_image=is_image)
    wants_input, wants_weight, wants_bias, *others = ctx.needs_input_grad
    return (
        to_input(flow, source, kernel) if wants_input else None,
        to_weight(flow, source, kernel) if wants_weight else None,
        operators.bias_gradient(gradient, mask) if wants_bias else None,
        *(None for _ in others),
    )


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
        source, kernel = _operands(ctx, x, weight, controllers, windows)
        result = conv_forward(source, kernel, bias, windows, relu=relu)
        ctx.save_for_backward(source.tensor, kernel.tensor, result if relu else None)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the input, the weights and the bias."""
        windows: Windows = ctx.windows
        return _gradients(
            ctx,
            gradient,
            lambda flow, x, weight: conv_input(flow, weight, windows.sizes(x), windows),
            lambda flow, x, weight: conv_weight(x, flow, windows.sizes(weight), windows),
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
        source, kernel = _operands(ctx, x, weight, controllers, windows)
        ctx.save_for_backward(source.tensor, kernel.tensor, None)
        found = conv_input(source, kernel, size, windows)
        return found if bias is None else found.add_(bias.view(-1, *(1 for _ in size)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the input, the weights and the bias."""
        windows: Windows = ctx.windows
        return _gradients(
            ctx,
            gradient,
            lambda flow, _, weight: conv_forward(flow, weight, None, windows),
            lambda flow, x, weight: conv_weight(flow, x, windows.sizes(weight), windows),
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
        source, kernel = _operands(ctx, x, weight, controllers)
        result = matrices(source, _swapped(kernel), bias, relu=relu)
        ctx.save_for_backward(source.tensor, kernel.tensor, result if relu else None)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the input, the weights and the bias."""
        return _gradients(
            ctx,
            gradient,
            lambda flow, _, weight: matrices(flow, weight),
            lambda flow, x, _: matrices(_swapped(flow), x),
        )


class FixedPointMatmul(torch.autograd.Function):
    """A product of two stacks of matrices, neither of them weights."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, controllers: Controllers) -> Tensor:
        """``[…, m, n]``; the controller of weights is that of the right operand."""
        one, other = _operands(ctx, left, right, controllers, what="inputs")
        ctx.save_for_backward(one.tensor, other.tensor, None)
        return matrices(one, other)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of both operands."""
        return _gradients(
            ctx,
            gradient,
            lambda flow, _, right: matrices(flow, _swapped(right)),
            lambda flow, left, _: matrices(_swapped(left), flow),
        )
