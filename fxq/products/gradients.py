"""The two products of a convolution's backward pass, exact on integers.

Paper: Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020: BPROP and WTGRAD.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple, replace

import torch
from torch import Tensor

from fxq.products.geometry import Geometry, Pair
from fxq.products.kernels import LONGEST_SUM, convolution, product

FEW_CHANNELS = 64
"""Up to so many channels in all phases of a stride are multiplied at once, unused taps and all."""

Windows = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Stride, padding and dilation, each per spatial axis, and the number of groups."""


def input_gradient(gradient: Tensor, weight: Tensor, size: Pair, geometry: Geometry) -> Tensor:
    """``[N, in, *size]``: what a convolution's output gradient gives its input, whole numbers.

    It is a convolution of the gradient with the flipped weights. With a stride, each phase of the
    input has one of its own, with those taps that reach it.

    Args:
        gradient: ``[N, out, height, width]`` int8.
        weight: ``[out, in/groups, kh, kw]`` int8.
        size: Height and width of the input.
        geometry: Of the convolution.
    """
    turned = _turned(weight, geometry.groups)
    kernel = (weight.shape[2], weight.shape[3])
    reach = geometry.reach(kernel)
    own = Geometry(dilation=geometry.dilation, groups=geometry.groups)
    if geometry.stride == (1, 1) and all(
        p <= r for p, r in zip(geometry.padding, reach, strict=True)
    ):
        padding = (reach[0] - geometry.padding[0], reach[1] - geometry.padding[1])
        return convolution(gradient, turned, replace(own, padding=padding))
    if geometry.dilation != (1, 1):
        operands = (gradient.double(), weight.double())
        found = float_input_gradient(*operands, size, astuple(geometry))
        return found.contiguous(memory_format=torch.channels_last)
    return _by_phases(gradient, turned, size, geometry)


def _by_phases(gradient: Tensor, turned: Tensor, size: Pair, geometry: Geometry) -> Tensor:
    parts = []
    for phase in itertools.product(*(range(s) for s in geometry.stride)):
        axes = [
            _Axis.of(i, phase[i], turned.shape[2 + i], size[i], gradient.shape[2 + i], geometry)
            for i in (0, 1)
        ]
        if all(axis.taps and axis.count for axis in axes):
            parts.append((axes, turned[:, :, axes[0].kernel, axes[1].kernel].contiguous()))
    shape = (len(gradient), *size, len(turned))
    result = gradient.new_zeros(shape, dtype=torch.float32).permute(0, 3, 1, 2)
    for (rows, columns), kernel in parts:
        own = Geometry(padding=(rows.taps - 1, columns.taps - 1), groups=geometry.groups)
        found = convolution(gradient, kernel, own)
        result = result.double() if found.dtype == torch.float64 else result
        target = result[:, :, rows.target, columns.target]
        target.copy_(found[:, :, rows.source, columns.source])
    return result


class _Axis:
    """One phase of a strided axis: which taps reach it, and where its values come from and go."""

    def __init__(self, taps: int, kernel: slice, first: int, last: int, start: int, step: int):
        self.taps = taps
        self.kernel = kernel
        self.count = last - first + 1
        self.source = slice(first, last + 1)
        self.target = slice(start, start + step * (self.count - 1) + 1, step)

    @classmethod
    def of(
        cls, axis: int, phase: int, kernel: int, size: int, length: int, geometry: Geometry
    ) -> _Axis:
        """Of an axis: input index ``u = stride * y + tap - padding``, taps of one residue."""
        stride, padding = geometry.stride[axis], geometry.padding[axis]
        taps = len(range(phase, kernel, stride))
        first = max(0, -((phase - padding) // stride))  # smallest i with u >= 0
        last = min(length + taps - 2, (size - 1 + padding - phase) // stride)
        start = first * stride + phase - padding
        # The kernel is turned: tap t of the convolution is entry kernel - 1 - t.
        offset = kernel - 1 - (phase + stride * (taps - 1))
        return cls(taps, slice(offset, kernel, stride), first, last, start, stride)


def _turned(weight: Tensor, groups: int) -> Tensor:
    """``[in, out/groups, kh, kw]``: inputs and outputs exchanged, both axes reversed."""
    out, inner, *kernel = weight.shape
    grouped = weight.view(groups, out // groups, inner, *kernel).transpose(1, 2)
    return grouped.reshape(groups * inner, out // groups, *kernel).flip(2, 3)


# ---- weights ---------------------------------------------------------------------------------


def weight_gradient(x: Tensor, gradient: Tensor, kernel: Pair, geometry: Geometry) -> list[Tensor]:
    """``[out, in/groups, kh, kw]``, one per limb of the gradient: whole numbers, int32 or float64.

    Input and gradient are laid out as rows of channels, one row per place, the input with its
    padding and the gradient with zeros in as many places. A tap of the kernel is then one product
    of two contiguous slices of rows, shifted against each other; nothing is copied per tap. A
    stride makes the input a grid of ``stride x stride`` phases, whose channels lie side by side.

    Args:
        x: ``[N, in, height, width]`` int8.
        gradient: ``[limbs, N, out, height, width]`` int8.
        kernel: Its height and width.
        geometry: Of the convolution.
    """
    grid = _Grid(x, gradient, kernel, geometry)
    images = max(1, LONGEST_SUM // (grid.height * grid.width))
    total: Tensor | None = None
    for at in range(0, len(x), images):
        part = grid.taps(x[at : at + images], gradient[:, at : at + images])
        total = part if total is None else total.double() + part.double()
    assert total is not None
    return list(total)


class _Grid:
    """The places of one image: rows of ``width`` places, of which gradients fill a part."""

    def __init__(self, x: Tensor, gradient: Tensor, kernel: Pair, geometry: Geometry) -> None:
        self.kernel, self.geometry = kernel, geometry
        self.stride = geometry.stride
        reach = geometry.reach(kernel)
        self.shift = (reach[0] // self.stride[0], reach[1] // self.stride[1])
        self.output = (gradient.shape[3], gradient.shape[4])
        sizes = []
        for i in (0, 1):
            size = self.output[i] + self.shift[i]
            if self.stride[i] == 1:  # padding after a row is that before the next one
                size -= min(geometry.padding[i], self.shift[i])
            sizes.append(size)
        self.height, self.width = sizes

    def taps(self, x: Tensor, gradient: Tensor) -> Tensor:
        """``[limbs, out, in/groups, kh, kw]`` of some images."""
        rows, columns = self._input_rows(x), self._gradient_rows(gradient)
        groups, inner = self.geometry.groups, x.shape[1] // self.geometry.groups
        limbs, out = len(gradient), gradient.shape[2]
        if groups == x.shape[1] == out and groups > 1:
            return self._depthwise(rows, columns, limbs)
        per_group = out // groups
        found = []
        for group in range(groups):
            chosen = columns.view(-1, limbs, out)[:, :, group * per_group :][:, :, :per_group]
            left = columns if groups == 1 else chosen.reshape(len(columns), -1)
            taps = self._tap_products(rows, left, group * inner, inner, x.shape[1])
            found.append(taps.view(limbs, per_group, inner, *self.kernel))
        return found[0] if groups == 1 else torch.cat(found, 1)

    def _tap_products(
        self, rows: Tensor, columns: Tensor, first: int, count: int, channels: int
    ) -> Tensor:
        """``[limbs * out, in, kh, kw]``."""
        left, length = columns.t(), len(columns)
        phases = self.stride[0] * self.stride[1]
        if phases > 1 and phases * channels <= FEW_CHANNELS and count == channels:
            return self._all_phases(rows, left, length, channels)
        result = []
        for dy, dx in itertools.product(range(self.kernel[0]), range(self.kernel[1])):
            at, phase = self._place(dy * self.geometry.dilation[0], dx * self.geometry.dilation[1])
            start = phase * channels + first
            result.append(product(left, rows[at : at + length, start : start + count]))
        return torch.stack(result, -1).view(len(left), count, *self.kernel)

    def _all_phases(self, rows: Tensor, left: Tensor, length: int, channels: int) -> Tensor:
        """The same, with all phases of a shift in one product."""
        (step_y, step_x), (last_y, last_x) = self.stride, self.shift
        shifts = list(itertools.product(range(last_y + 1), range(last_x + 1)))
        places = [at_y * self.width + at_x for at_y, at_x in shifts]
        found = torch.stack([product(left, rows[at : at + length]) for at in places])
        # [shift_y, shift_x, out, phase_y, phase_x, in] -> [out, in, kernel_y, kernel_x]
        shape = (last_y + 1, last_x + 1, len(left), step_y, step_x, channels)
        ordered = found.view(shape).permute(2, 5, 0, 3, 1, 4)
        merged = ordered.reshape(len(left), channels, (last_y + 1) * step_y, (last_x + 1) * step_x)
        steps = self.geometry.dilation
        return merged[:, :, :: steps[0], :: steps[1]][:, :, : self.kernel[0], : self.kernel[1]]

    def _place(self, dy: int, dx: int) -> Pair:
        """The row a tap starts at, and its phase."""
        step_y, step_x = self.stride
        return (dy // step_y) * self.width + dx // step_x, (dy % step_y) * step_x + dx % step_x

    def _depthwise(self, rows: Tensor, columns: Tensor, limbs: int) -> Tensor:
        """``[limbs, channels, 1, kh, kw]``: products of each channel with itself."""
        length, channels = len(columns), columns.shape[1] // limbs
        wide = columns.view(length, limbs, channels)
        dtype = torch.int32 if length <= LONGEST_SUM else torch.float64
        result = []
        for dy, dx in itertools.product(range(self.kernel[0]), range(self.kernel[1])):
            at, phase = self._place(dy * self.geometry.dilation[0], dx * self.geometry.dilation[1])
            own = rows[at : at + length, phase * channels : (phase + 1) * channels]
            result.append((wide * own.unsqueeze(1).int()).sum(0, dtype=dtype))
        return torch.stack(result, -1).view(limbs, channels, 1, *self.kernel)

    def _input_rows(self, x: Tensor) -> Tensor:
        """``[rows, phases * channels]``: the padded input, and as many zeros as shifts reach."""
        (step_y, step_x), (pad_y, pad_x) = self.stride, self.geometry.padding
        count, channels = x.shape[:2]
        tail = self.shift[0] * self.width + self.shift[1]
        rows = count * self.height * self.width
        result = x.new_zeros((rows + tail, step_y * step_x * channels))
        grid = result[:rows].view(count, self.height, self.width, step_y, step_x * channels)
        ordered = self._padded_columns(x.permute(0, 2, 3, 1), pad_x, step_x)
        for phase in range(step_y):
            first = (phase - pad_y) % step_y  # of the rows u with (u + padding) % stride == phase
            start = (first + pad_y) // step_y
            found = ordered[:, first::step_y][:, : max(0, self.height - start)]
            grid[:, start : start + found.shape[1], :, phase] = found
        return result

    def _padded_columns(self, x: Tensor, padding: int, step: int) -> Tensor:
        """``[N, height, places, step * channels]`` from ``[N, height, width, channels]``."""
        count, height, width, channels = x.shape
        result = x.new_zeros((count, height, self.width * step, channels))
        kept = min(width, self.width * step - padding)
        result[:, :, padding : padding + kept] = x[:, :, :kept]
        return result.view(count, height, self.width, step * channels)

    def _gradient_rows(self, gradient: Tensor) -> Tensor:
        """``[rows, limbs * out]``: zero where the gradient has no place."""
        limbs, count, out = gradient.shape[:3]
        result = gradient.new_zeros((count, self.height, self.width, limbs, out))
        inside = result[:, : self.output[0], : self.output[1]]
        inside.copy_(gradient.permute(1, 3, 4, 0, 2))
        return result.view(-1, limbs * out)


# ---- floating point --------------------------------------------------------------------------


def float_input_gradient(
    gradient: Tensor, weight: Tensor, size: Sequence[int], windows: Windows
) -> Tensor:
    """``[N, in, *size]``: as `input_gradient`, in floating point and over any number of axes."""
    x = weight.new_zeros(1).expand(len(gradient), weight.shape[1] * windows[-1], *size)
    return _float_backward(gradient, x, weight, windows, 0)


def float_weight_gradient(
    x: Tensor, gradient: Tensor, kernel: Sequence[int], windows: Windows
) -> Tensor:
    """``[out, in/groups, *kernel]``: what the weights get, in floating point, likewise."""
    weight = x.new_zeros(1).expand(gradient.shape[1], x.shape[1] // windows[-1], *kernel)
    return _float_backward(gradient, x, weight, windows, 1)


def _float_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, windows: Windows, which: int
) -> Tensor:
    *places, groups = windows
    no_extra = [0] * (x.dim() - 2)
    mask = [which == 0, which == 1, False]
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, *places, False, no_extra, groups, mask
    )[which]
    return found
