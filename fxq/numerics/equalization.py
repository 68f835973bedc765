"""Scales per channel that move range between the two sides of an activation.

A positive factor commutes with everything positively homogeneous (ReLU, pooling, zero padding,
addition), so dividing output channel ``c`` of one layer by ``t[c]`` and multiplying input channel
``c`` of the next by it changes no output. What changes is how well the three tensors quantize.

Papers:
    Nagel, van Baalen, Blankevoort, Welling, "Data-free quantization through weight equalization and
    bias correction", ICCV 2019, arXiv:1906.04721, Sec. 4.1.
    Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant", ICML 2023, arXiv:2211.10438, Sec. 4, Eq. 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.errors import SpecError

_SILENT = 2.0**-16
"""A channel of less than this share of the largest range says nothing about its scale."""


def row_ranges(weight: Tensor) -> Tensor:
    """The largest magnitude of each output channel.

    Args:
        weight: ``[out, in/groups, ...]``.

    Returns:
        ``[out]`` float64.

    Example:
        >>> row_ranges(torch.tensor([[1.0, -3.0], [2.0, 0.5]])).tolist()
        [3.0, 2.0]
    """
    return weight.detach().flatten(1).abs().amax(1).double()


def column_ranges(weight: Tensor, groups: int = 1) -> Tensor:
    """The largest magnitude of each input channel.

    Args:
        weight: ``[out, in/groups, ...]``.
        groups: The convolution's groups.

    Returns:
        ``[in]`` float64.

    Example:
        >>> column_ranges(torch.tensor([[1.0, -3.0], [2.0, 0.5]])).tolist()
        [2.0, 3.0]
    """
    return _by_group(weight.detach(), groups).abs().amax((1, 3)).flatten().double()


def scale_columns(weight: Tensor, scale: Tensor, groups: int = 1) -> Tensor:
    """The weight with each input channel multiplied by its scale.

    Args:
        weight: ``[out, in/groups, ...]``.
        scale: ``[in]``.
        groups: The convolution's groups.

    Returns:
        ``[out, in/groups, ...]`` float64.

    Example:
        >>> scale_columns(torch.tensor([[1.0, -3.0]]), torch.tensor([2.0, 0.5])).tolist()
        [[2.0, -1.5]]
    """
    factors = scale.double().reshape(groups, 1, weight.shape[1], 1)
    scaled = _by_group(weight.detach().double(), groups) * factors
    return scaled.reshape(weight.shape)


def cross_layer_scale(rows: Tensor, columns: Tensor) -> Tensor:
    """What to divide rows by and multiply columns by, so that each row is as large as its column.

    ``t = sqrt(rows * columns) / columns`` (DFQ, Eq. 11); 1 where either is zero.

    Args:
        rows: ``[channels]``; range of each output channel of the layer before.
        columns: ``[channels]``; range of each input channel of the layer after.

    Returns:
        ``[channels]`` float64.

    Example:
        >>> cross_layer_scale(torch.tensor([8.0, 0.0]), torch.tensor([2.0, 1.0])).tolist()
        [2.0, 1.0]
    """
    rows, columns = rows.double(), columns.double()
    alive = (rows > 0) & (columns > 0)
    return torch.where(alive, rows / columns, 1.0).sqrt()


def activation_scale(ranges: Tensor, columns: Tensor, strength: float) -> Tensor:
    """How far each channel's activations are divided, the largest factor being 1.

    ``t = ranges**strength / columns**(1 - strength)`` (SmoothQuant, Eq. 4), over its largest value.
    At strength 1 every channel gets the same range. A channel that is silent gets 1.

    Args:
        ranges: ``[channels]``; largest magnitude of each channel's activations.
        columns: ``[channels]``; range of each input channel of the layers after.
        strength: 0 (weights get equal columns) to 1 (activations get equal channels).

    Returns:
        ``[channels]`` float64, in ``(0, 1]``.

    Raises:
        SpecError: Strength outside 0 to 1, or a range that is negative or not finite.

    Example:
        >>> activation_scale(torch.tensor([4.0, 1.0, 0.0]), torch.ones(3), 1.0).tolist()
        [1.0, 0.25, 1.0]
        >>> activation_scale(torch.tensor([4.0, 1.0, 0.0]), torch.ones(3), 0.5).tolist()
        [1.0, 0.5, 1.0]
    """
    check_strength(strength)
    ranges, columns = ranges.double(), columns.double()
    if not bool((ranges.isfinite() & columns.isfinite() & (ranges >= 0) & (columns >= 0)).all()):
        raise SpecError("ranges must be finite and not negative")
    heard = _heard(ranges)
    if not bool(heard.any()):
        return torch.ones_like(ranges)
    tiny = torch.finfo(torch.float64).tiny
    columns = torch.where(_heard(columns), columns, columns.max().clamp(min=tiny))
    scale = ranges**strength / columns ** (1 - strength)
    return torch.where(heard, scale / scale[heard].max(), 1.0)


def keep_within(scale: Tensor, ranges: Tensor, upper: float) -> Tensor:
    """The scales, raised where the channel would otherwise be cut by a ReLU bounded at ``upper``.

    The bound stays as it is while the channel is divided by ``t <= 1``, so it cuts the channel at
    ``upper * t`` of the old units; ``t >= ranges / upper`` keeps that no lower than what was seen.

    Args:
        scale: ``[channels]`` in ``(0, 1]``.
        ranges: ``[channels]``; largest magnitude of each channel's activations.
        upper: The bound, in the units of the activations.

    Returns:
        ``[channels]`` float64, in ``(0, 1]``.

    Example:
        >>> keep_within(torch.tensor([0.5, 0.5]), torch.tensor([6.0, 1.5]), 6.0).tolist()
        [1.0, 0.5]
    """
    return torch.maximum(scale.double(), ranges.double() / upper).clamp(max=1.0)


def check_strength(strength: float) -> None:
    """The strength is a share.

    Raises:
        SpecError: It is not between 0 and 1.
    """
    if not 0 <= strength <= 1:
        raise SpecError(f"strength must be 0 to 1, not {strength!r}")


def _heard(ranges: Tensor) -> Tensor:
    return ranges > _SILENT * ranges.max()


def _by_group(weight: Tensor, groups: int) -> Tensor:
    """``[groups, out/groups, in/groups, taps]``."""
    if groups < 1 or weight.dim() < 2 or weight.shape[0] % groups:
        raise SpecError(f"a weight {list(weight.shape)} does not split into {groups} groups")
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
