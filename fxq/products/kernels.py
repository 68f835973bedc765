"""The integer kernels that training uses, and whether they are exact on this machine.

Everything that touches ``torch.ops.onednn`` or ``torch._int_mm`` is here. Both add up products of
bytes in 32 bits, exactly where the CPU has VNNI instructions; without, ``_int_mm`` is wrong. So
they are tried once on the worst operands, and where they fail the same whole numbers are computed
in floating point, which is exact as long as no sum reaches 2**24 in float32 or 2**53 in float64.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from fxq.products.elementwise import SAFE_EXPONENT
from fxq.products.geometry import Geometry

EXACT_FLOAT32 = 2.0**24
"""Whole numbers below it are float32 numbers, and so are their sums."""

INT32_SUM = 2.0**31
"""What sums of onednn's kernels stay below."""

LONGEST_SUM = 2**31 // 2**14 - 1
"""How many products of two bytes fit an int32, whatever their signs."""

_log = logging.getLogger(__name__)


def scaled_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    exponent: int,
    relu: bool,
) -> Tensor | None:
    """``2**exponent * convolution + bias``, and a ReLU; None where one kernel cannot give it.

    The sum is exact, and rounded once where the bias is added.
    """
    fits = abs(exponent) <= SAFE_EXPONENT and largest_sum(weight) < EXACT_FLOAT32
    if not fits or not _onednn_can(x, weight, geometry):
        return None
    return _onednn_convolution(x, weight, geometry, 2.0**exponent, bias, "relu" if relu else "none")


def convolution(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """``[N, out, height, width]``: exact whole numbers, float32 or float64, channels last.

    Args:
        x: ``[N, in, height, width]`` int8.
        weight: ``[out, in/groups, kh, kw]`` int8.
        geometry: Where windows lie.
    """
    most = largest_sum(weight)
    if most >= INT32_SUM or not _onednn_can(x, weight, geometry):
        return float_convolution(x, weight, geometry)
    found = _onednn_convolution(x, weight, geometry)
    if most < EXACT_FLOAT32 or _is_below_limit(found):
        return found
    return float_convolution(x, weight, geometry)


def float_convolution(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """As `convolution`, in float32 where no sum can reach 2**24, else in float64."""
    proven = x.device.type == "cpu" and largest_sum(weight) < EXACT_FLOAT32
    dtype = torch.float32 if proven else torch.float64
    return F.conv2d(
        x.to(dtype),
        weight.to(dtype),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
    ).contiguous(memory_format=torch.channels_last)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``[m, n]``: ``left @ right``, exact whole numbers in int32 or float64.

    Args:
        left: ``[m, k]`` int8; any strides that do not overlap.
        right: ``[k, n]`` int8.
    """
    if left.device.type != "cpu" or not int_mm_is_exact():
        return left.double() @ right.double()
    left, right = _unmistakable(left), _unmistakable(right)
    length = left.shape[1]
    if length <= LONGEST_SUM:
        return torch._int_mm(left, right)
    total = left.new_zeros((left.shape[0], right.shape[1]), dtype=torch.float64)
    for at in range(0, length, LONGEST_SUM):
        total += torch._int_mm(left[:, at : at + LONGEST_SUM], right[at : at + LONGEST_SUM])
    return total


def largest_sum(weight: Tensor) -> float:
    """What no sum of products of bytes with the weights of an output channel exceeds."""
    magnitudes = weight.flatten(1).abs().view(torch.uint8)  # as int8 that of -128 is -128
    return 128.0 * float(magnitudes.sum(1, dtype=torch.int64).max())


def _unmistakable(matrix: Tensor) -> Tensor:
    """The matrix; a single row with strides that `torch._int_mm` does not take for a column."""
    return matrix.flatten().unsqueeze(0) if len(matrix) == 1 else matrix


def _onednn_convolution(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    scale: float = 1.0,
    bias: Tensor | None = None,
    then: str = "none",
) -> Tensor:
    onednn = torch.ops.onednn
    stride, padding = list(geometry.stride), list(geometry.padding)
    dilation = [
        step if size > 1 else 1
        for step, size in zip(geometry.dilation, weight.shape[2:], strict=True)
    ]
    scales = torch.full((len(weight),), scale)
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    shifted = (x.contiguous(memory_format=torch.channels_last) ^ -128).view(torch.uint8)
    packed = onednn.qconv_prepack(
        weight.contiguous(),
        scales,
        1.0,
        128,
        stride,
        padding,
        dilation,
        geometry.groups,
        list(x.shape),
    )
    found: Tensor = onednn.qconv2d_pointwise(
        shifted,
        1.0,
        128,
        packed,
        scales,
        zeros,
        bias,
        stride,
        padding,
        dilation,
        geometry.groups,
        1.0,
        0,
        torch.float32,
        then,
        [],
        "",
    )
    return found


def _onednn_can(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether onednn's kernel is there and computes this: some shapes it gets wrong."""
    if x.device.type != "cpu" or not onednn_is_exact():
        return False
    kernel = (weight.shape[2], weight.shape[3])
    reaches = geometry.reach(kernel)
    only_padding = any(p > r for p, r in zip(geometry.padding, reaches, strict=True))
    ragged = any(p % d for p, d in zip(geometry.padding, geometry.dilation, strict=True))
    width = geometry.output_size((x.shape[2], x.shape[3]), kernel)[1]
    is_narrow = width == 1 and (geometry.stride[1] > 1 or kernel[1] > 1)
    return not (only_padding or ragged or is_narrow)


def _is_below_limit(whole: Tensor) -> bool:
    """Whether all magnitudes are below 2**24, so that none of them was rounded."""
    low, high = torch.aminmax(whole)
    return max(-float(low), float(high)) < EXACT_FLOAT32


# ---- self-test -------------------------------------------------------------------------------


@functools.cache
def int_mm_is_exact() -> bool:
    """Whether `torch._int_mm` gives the right integers on this CPU; told where it does not."""
    return _told("torch._int_mm", all(_int_mm_is_right(*pair) for pair in _operands((37, 256))))


@functools.cache
def onednn_is_exact() -> bool:
    """Whether onednn's convolution gives the right integers on this CPU; told where not."""
    pairs = _operands((2, 32, 9, 11))
    return _told("onednn", all(_onednn_is_right(*pair) for pair in pairs))


def _operands(shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Operands with the largest codes, and random ones; the second has 64 rows."""
    generator = torch.Generator().manual_seed(0)
    other = (64, shape[1], *(3 for _ in shape[2:]))

    def random(size: tuple[int, ...]) -> Tensor:
        return torch.randint(-128, 128, size, dtype=torch.int8, generator=generator)

    def full(size: tuple[int, ...], value: int) -> Tensor:
        return torch.full(size, value, dtype=torch.int8)

    ends = ((127, 127), (127, -127), (-128, 127), (-128, -127))
    return [(random(shape), random(other))] + [
        (full(shape, one), full(other, two)) for one, two in ends
    ]


def _int_mm_is_right(left: Tensor, right: Tensor) -> bool:
    try:
        found = torch._int_mm(left, right.t())
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(found.double(), left.double() @ right.double().t())


def _onednn_is_right(x: Tensor, weight: Tensor) -> bool:
    geometry = Geometry(padding=(1, 1))
    try:
        found = _onednn_convolution(x, weight, geometry)
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(found.double(), F.conv2d(x.double(), weight.double(), padding=1))


def _told(name: str, is_exact: bool) -> bool:
    if not is_exact:
        _log.warning("%s is not exact on this CPU; floating point computes the same, slower", name)
    return is_exact
