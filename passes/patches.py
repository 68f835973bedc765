"""A layer as a matrix product: what each output value multiplies, and statistics of that.

A convolution multiplies each of its weights' rows with *patches* of its input, one per position of
the output, with zeros where a patch reaches beyond the image. Every group has patches of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxq.integer.layers import conv_geometry

from .side_by_side import Meeting

PIECE_ELEMENTS = 2**23
"""Elements of patches at a time: 32 MB."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of the patches a layer reads and of what the float layer computes.

    Attributes:
        samples: How many patches were seen.
        inputs: ``[groups, n]``: the mean patch of the quantized network.
        outputs: ``[groups, out/groups]``: the mean output of the float layer, without its bias.
        gram: ``[groups, n, n]``: the mean of ``xq xq^T``.
        correlation: ``[groups, out/groups, n]``: the mean of ``(W x) xq^T``.
    """

    samples: int
    inputs: torch.Tensor
    outputs: torch.Tensor
    gram: torch.Tensor
    correlation: torch.Tensor

    def centred(self) -> Moments:
        """The moments about the means: of what a free bias cannot make up for."""
        row = self.inputs.unsqueeze(1)
        return Moments(
            self.samples,
            self.inputs,
            self.outputs,
            self.gram - row.mT @ row,
            self.correlation - self.outputs.unsqueeze(2) @ row,
        )


def moments(at: Meeting) -> Moments:
    """The moments over all images: products of some images in float32, summed in float64."""
    count = 0
    sums: tuple[Any, ...] = (0.0,) * 4
    for chunk, reference in zip(at.inputs, at.references, strict=True):
        step = max(1, PIECE_ELEMENTS // patches(at.layer.layer, chunk[:1]).numel())
        for x, y in zip(_cut(chunk, step), _cut(reference, step), strict=True):
            inputs, outputs = patches(at.layer.layer, x), products(at.layer.layer, y)
            count += inputs.shape[1]
            found = inputs.sum(1), outputs.sum(1), inputs.mT @ inputs, outputs.mT @ inputs
            sums = tuple(a + b.double() for a, b in zip(sums, found, strict=True))
    return Moments(count, *(one / count for one in sums))


def samples(at: Meeting, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """About so many patches, as many from every image, and the float outputs at their positions.

    Returns:
        ``[groups, samples, n]`` and ``[groups, samples, out/groups]``.
    """
    draw = torch.Generator().manual_seed(seed)
    images = sum(len(chunk) for chunk in at.inputs)
    each = -(-count // images)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for chunk, reference in zip(at.inputs, at.references, strict=True):
        for x, y in zip(_cut(chunk, 1), _cut(reference, 1), strict=True):
            inputs, outputs = patches(at.layer.layer, x), products(at.layer.layer, y)
            chosen = torch.randperm(inputs.shape[1], generator=draw)[:each]
            kept.append((inputs[:, chosen], outputs[:, chosen]))
    inputs, outputs = (torch.cat(column, 1) for column in zip(*kept, strict=True))
    return inputs, outputs


def _cut(x: torch.Tensor, images: int) -> Sequence[torch.Tensor]:
    return torch.split(x, images)


def patches(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """``[groups, positions, n]``: what each output value multiplies, in the order of the weights.

    Args:
        layer: A linear, or a convolution of any number of dimensions that is not transposed.
        x: ``[images, ..., in]`` for a linear, ``[images, in, ...]`` for a convolution.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    geometry = conv_geometry(layer)
    both = [size for size in reversed(geometry["padding"]) for _ in range(2)]
    before = geometry["pad_before"] or (0,) * len(both)
    x = F.pad(x, [a + b for a, b in zip(both, before, strict=True)])
    x = torch.unflatten(x, 1, (geometry["groups"], -1))
    sizes = zip(layer.kernel_size, geometry["stride"], geometry["dilation"], strict=True)
    for dim, (kernel, stride, dilation) in enumerate(sizes, 3):
        x = x.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    taps = len(layer.kernel_size)
    x = x.movedim(2, 2 + taps)  # [images, groups, positions, in/groups, taps]
    return x.transpose(0, 1).flatten(3 + taps - 1).flatten(1, 1 + taps)


def products(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """``[groups, positions, out/groups]``: the output of a float layer, without its bias."""
    y: torch.Tensor = layer(x)
    if isinstance(layer, nn.Linear):
        y = y.reshape(1, -1, y.shape[-1])
    else:
        y = torch.unflatten(y, 1, (layer.groups, -1)).transpose(0, 1).flatten(3)
        y = y.transpose(2, 3).flatten(1, 2)
    if layer.bias is None:
        return y
    bias: torch.Tensor = layer.bias
    return y - bias.detach().reshape(y.shape[0], 1, -1)
