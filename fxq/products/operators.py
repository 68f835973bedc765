"""The products of a training step as torch operators: nodes of a traced backward graph.

Operands are codes: ``[limbs, …]`` int8, balanced digits of base 256, the most significant first. A
product of operands of several limbs is the sum of the products of their limbs, each exact; the sum
is formed in float64, exact for operands of 24 and 8 bits, and rounded to float32 once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from fxq.numerics.fixed_point import from_limbs
from fxq.products.elementwise import channel_sum, combined, fixed_point_limbs
from fxq.products.geometry import Geometry, Pair
from fxq.products.gradients import (
    float_input_gradient,
    float_weight_gradient,
    input_gradient,
    weight_gradient,
)
from fxq.products.kernels import EXACT_FLOAT32, convolution, product, scaled_convolution

CACHED = 2**20
"""How many whole numbers of a product are made at a time."""

SMALL = 2**18
"""Multiplications in a matrix product below which a call costs more than the product."""


@custom_op("fxq::quantize", mutates_args=())
def quantize(
    x: Tensor, bits: int, exponent: int, mask: Tensor | None = None, is_image: bool = False
) -> Tensor:
    """``[limbs, *x.shape]`` int8: the nearest fixed-point codes.

    Args:
        x: ``[...]`` float32.
        bits: 2 to 24.
        exponent: Codes count ``2**exponent``.
        mask: Of the same shape: where it is not above zero, codes are zero.
        is_image: Whether channels are to lie side by side in memory, where there are two axes.

    Raises:
        TrainingError: A value is NaN or infinite.
    """
    codes = fixed_point_limbs(x, exponent, bits, mask)
    if not is_image or x.dim() != 4:
        return codes
    return codes.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


@quantize.register_fake
def _(
    x: Tensor, bits: int, exponent: int, mask: Tensor | None = None, is_image: bool = False
) -> Tensor:
    return x.new_empty(((bits + 7) // 8, *x.shape), dtype=torch.int8)


# ---- convolutions ----------------------------------------------------------------------------


@custom_op("fxq::conv_fprop", mutates_args=())
def conv_fprop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    exponent: int,
    relu: bool = False,
) -> Tensor:
    """``[N, out, …]`` float32: a convolution of codes, times ``2**exponent``, plus the bias.

    Args:
        x: ``[limbs, N, in, …]`` int8.
        weight: ``[limbs, out, in/groups, …]`` int8.
        bias: ``[out]`` float32.
        stride: Per spatial axis, as padding and dilation.
        padding: Zeros on both sides.
        dilation: Distance of taps.
        groups: Number of groups.
        exponent: Of a unit of the product.
        relu: Whether what is below zero becomes zero.
    """
    geometry = _geometry(stride, padding, dilation, groups)
    if geometry is None:
        run = _CONV[len(stride)]
        found = run(_whole(x), _whole(weight), None, stride, padding, dilation, groups)
        return _finished(_rounded(found, exponent), bias, relu)
    if len(x) == len(weight) == 1:
        done = scaled_convolution(x[0], weight[0], bias, geometry, exponent, relu)
        if done is not None:
            return done
    found = _summed(x, weight, exponent, lambda a, b: convolution(a, b, geometry))
    return _finished(found, bias, relu)


@conv_fprop.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    exponent: int,
    relu: bool = False,
) -> Tensor:
    one, kernel = x[0].float(), weight[0].float()
    return _CONV[len(stride)](one, kernel, bias, stride, padding, dilation, groups)


@custom_op("fxq::conv_bprop", mutates_args=())
def conv_bprop(
    gradient: Tensor,
    weight: Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    exponent: int,
) -> Tensor:
    """``[N, in, *size]`` float32: what the input of a convolution gets, times ``2**exponent``.

    Args:
        gradient: ``[limbs, N, out, …]`` int8.
        weight: ``[limbs, out, in/groups, …]`` int8.
        size: Spatial size of the input.
        stride: Of the convolution, as the others; see `conv_fprop`.
        padding: Zeros on both sides.
        dilation: Distance of taps.
        groups: Number of groups.
        exponent: Of a unit of the product.
    """
    geometry = _geometry(stride, padding, dilation, groups)
    if geometry is None:
        windows = (stride, padding, dilation, groups)
        found = float_input_gradient(_whole(gradient), _whole(weight), size, windows)
        return _rounded(found, exponent)
    pair = (size[0], size[1])
    return _summed(gradient, weight, exponent, lambda a, b: input_gradient(a, b, pair, geometry))


@conv_bprop.register_fake
def _(
    gradient: Tensor,
    weight: Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    exponent: int,
) -> Tensor:
    shape = (gradient.shape[1], weight.shape[2] * groups, *size)
    return gradient.new_empty(shape, dtype=torch.float32)


@custom_op("fxq::conv_wtgrad", mutates_args=())
def conv_wtgrad(
    x: Tensor,
    gradient: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    exponent: int,
) -> Tensor:
    """``[out, in/groups, *kernel]`` float32: what the weights get, times ``2**exponent``.

    Args:
        x: ``[limbs, N, in, …]`` int8.
        gradient: ``[limbs, N, out, …]`` int8.
        kernel: Spatial size of the weights.
        stride: Of the convolution, as the others; see `conv_fprop`.
        padding: Zeros on both sides.
        dilation: Distance of taps.
        groups: Number of groups.
        exponent: Of a unit of the product.
    """
    geometry = _geometry(stride, padding, dilation, groups)
    if geometry is None:
        windows = (stride, padding, dilation, groups)
        found = float_weight_gradient(_whole(x), _whole(gradient), kernel, windows)
        return _rounded(found, exponent)
    taps = (kernel[0], kernel[1])
    return _sum_of([weight_gradient(limb, gradient, taps, geometry) for limb in x], exponent)


@conv_wtgrad.register_fake
def _(
    x: Tensor,
    gradient: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    exponent: int,
) -> Tensor:
    shape = (gradient.shape[2], x.shape[2] // groups, *kernel)
    return x.new_empty(shape, dtype=torch.float32)


# ---- matrices --------------------------------------------------------------------------------


@custom_op("fxq::matmul", mutates_args=())
def matmul(
    left: Tensor, right: Tensor, bias: Tensor | None, exponent: int, relu: bool = False
) -> Tensor:
    """``[…, m, n]`` float32: a product of matrices of codes, times ``2**exponent``, plus a bias.

    Args:
        left: ``[limbs, …, m, k]`` int8.
        right: ``[limbs, …, k, n]`` int8, with the same leading sizes.
        bias: ``[n]`` float32.
        exponent: Of a unit of the product.
        relu: Whether what is below zero becomes zero.
    """
    if left.dim() > 3:
        found = _summed(left, right, exponent, _batched_product)
    else:
        found = _by_rows(left, right, exponent)
    return _finished(found, bias, relu, -1)


@matmul.register_fake
def _(
    left: Tensor, right: Tensor, bias: Tensor | None, exponent: int, relu: bool = False
) -> Tensor:
    return left.new_empty((*left.shape[1:-1], right.shape[-1]), dtype=torch.float32)


def _by_rows(left: Tensor, right: Tensor, exponent: int) -> Tensor:
    """``[m, n]``, as many rows at a time as fit a cache: whole numbers never go to memory."""
    rows, columns = left.shape[1], right.shape[2]
    step = max(1, CACHED // max(1, columns))
    if rows <= step:
        return _summed(left, right, exponent, product)
    result = left.new_empty((rows, columns), dtype=torch.float32)
    for at in range(0, rows, step):
        result[at : at + step] = _summed(left[:, at : at + step], right, exponent, product)
    return result


def _batched_product(left: Tensor, right: Tensor) -> Tensor:
    """Exact whole numbers; of small matrices all at once, in floating point."""
    *_, rows, length = left.shape
    if rows * length * right.shape[-1] < SMALL:
        proven = left.device.type == "cpu" and length * 2**14 < EXACT_FLOAT32
        dtype = torch.float32 if proven else torch.float64
        return left.to(dtype) @ right.to(dtype)
    flat = zip(left.flatten(0, -3), right.flatten(0, -3), strict=True)
    found = torch.stack([product(one, other) for one, other in flat])
    return found.view(*left.shape[:-1], right.shape[-1])


# ---- biases ----------------------------------------------------------------------------------


@custom_op("fxq::channel_sum", mutates_args=())
def bias_gradient(gradient: Tensor, mask: Tensor | None) -> Tensor:
    """``[channels]`` float32: the sum over all but dimension 1.

    Args:
        gradient: ``[N, channels, …]`` float32.
        mask: Of the same shape: where it is not above zero, the gradient counts as zero.
    """
    return channel_sum(gradient, mask)


@bias_gradient.register_fake
def _(gradient: Tensor, mask: Tensor | None) -> Tensor:
    return gradient.new_empty(gradient.shape[1])


# ---- sums over limbs -------------------------------------------------------------------------


def _summed(
    left: Tensor, right: Tensor, exponent: int, multiply: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The product of operands of several limbs, rounded once."""
    return _sum_of([[multiply(one, other) for other in right] for one in left], exponent)


def _sum_of(parts: list[list[Tensor]], exponent: int) -> Tensor:
    """The sum of products by limbs, those of the left operand outside."""
    rows, columns = len(parts), len(parts[0])
    flat = [part for row in parts for part in row]
    powers = [rows - 1 - i + columns - 1 - j for i in range(rows) for j in range(columns)]
    return combined(flat, powers, exponent)


def _finished(value: Tensor, bias: Tensor | None, relu: bool, channel: int = 1) -> Tensor:
    if bias is not None:
        shape = [1] * value.dim()
        shape[channel] = -1
        value.add_(bias.view(shape))
    return value.relu_() if relu else value


def _geometry(
    stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Geometry | None:
    """Of a convolution over images; others have no integer kernel."""
    if len(stride) != 2:
        return None

    def pair(values: list[int]) -> Pair:
        return values[0], values[1]

    return Geometry(pair(stride), pair(padding), pair(dilation), groups)


_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _whole(codes: Tensor) -> Tensor:
    """The numbers that limbs stand for, in float64: exact, and so are sums of their products."""
    return from_limbs(codes.unbind()).double()


def _rounded(whole: Tensor, exponent: int) -> Tensor:
    return (whole * 2.0**exponent).float()
