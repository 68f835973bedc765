"""What to add back after quantizing weights, in two different senses.

`correct_mean` and `correct_mean_and_variance` change the *weights*, so that each output channel
keeps its mean (and spread); no data is needed. `bias_shift` changes the *bias*, so that the mean
output survives for inputs of a known mean. They overlap: do not apply both.

Papers:
    Banner, Nahshan, Soudry, "Post training 4-bit quantization of convolutional networks for
        rapid-deployment", NeurIPS 2019, arXiv:1810.05723, section 4. Eq. 13 as printed,
        xi * (w + mu), leaves a mean of xi * E[w]; the authors' code, followed here, scales around
        the mean instead.
    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV
        2019, arXiv:1906.04721, section 4.2 (the bias shift).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.errors import SpecError

_EPSILON = 1e-8  # the authors' guard for channels that became constant


def correct_mean(weight: Tensor, quantized: Tensor) -> Tensor:
    """The quantized weight, shifted so that every output channel has its original mean.

    The result is off the integer grid by that shift: its zero point is not a whole number.

    Args:
        weight: [out, ...] before quantization.
        quantized: [out, ...] after, as real values.

    Returns:
        [out, ...].

    Raises:
        SpecError: The shapes differ or a value is not finite.

    Example:
        >>> correct_mean(torch.tensor([[0.2, 0.6]]), torch.tensor([[0.0, 1.0]]))
        tensor([[-0.1000,  0.9000]])
    """
    before, after = _channels(weight, quantized)
    corrected = after - after.mean(dim=1, keepdim=True) + before.mean(dim=1, keepdim=True)
    return corrected.view_as(quantized).to(quantized.dtype)


def correct_mean_and_variance(weight: Tensor, quantized: Tensor) -> Tensor:
    """The quantized weight, scaled and shifted so that every channel has its mean and spread back.

    w = (wq - E[wq]) * std(w) / (std(wq) + 1e-8) + E[w], per output channel.

    Args:
        weight: [out, ...] before quantization.
        quantized: [out, ...] after, as real values.

    Returns:
        [out, ...]. A channel that is constant after quantization becomes its mean.

    Raises:
        SpecError: The shapes differ or a value is not finite.

    Example:
        >>> correct_mean_and_variance(torch.tensor([[0.2, 0.6]]), torch.tensor([[0.0, 1.0]]))
        tensor([[0.2000, 0.6000]])

    Reference:
        The authors' code, both flags (`-vcw -bcw`); not Eq. 13.
    """
    before, after = _channels(weight, quantized)
    scale = spread_ratio(weight, quantized).unsqueeze(1)
    centred = (after - after.mean(dim=1, keepdim=True)) * scale
    corrected = centred + before.mean(dim=1, keepdim=True)
    return corrected.view_as(quantized).to(quantized.dtype)


def spread_ratio(weight: Tensor, quantized: Tensor) -> Tensor:
    """What brings each output channel's spread back: std(w) / (std(wq) + 1e-8), the paper's xi.

    Args:
        weight: [out, ...] before quantization.
        quantized: [out, ...] after, as real values.

    Returns:
        [out] float64; 1 for a channel that is constant after quantization, a single weight too.

    Raises:
        SpecError: The shapes differ or a value is not finite.

    Example:
        >>> round(spread_ratio(torch.tensor([[0.2, 0.6]]), torch.tensor([[0.0, 1.0]])).item(), 4)
        0.4
    """
    before, after = _channels(weight, quantized)
    unbiased = min(1, before.shape[1] - 1)
    wanted, found = (rows.std(dim=1, correction=unbiased) for rows in (before, after))
    return torch.where(found > 0, wanted / (found + _EPSILON), torch.ones_like(found))


def bias_shift(
    weight: Tensor, quantized: Tensor, input_mean: Tensor | float, groups: int = 1
) -> Tensor:
    """What to add to the bias so that the mean output is as before: sum of (W - Wq) * E[x].

    Exact for a linear layer and inside an image; at zero-padded borders fewer taps see the input,
    so there it is only approximate.

    Args:
        weight: [out, in/groups, ...] before quantization; a linear or convolution weight.
        quantized: [out, in/groups, ...] after, as real values.
        input_mean: [in], [] or a float; the mean of each input channel.
        groups: The convolution's groups.

    Returns:
        [out] in the units of the output, dtype of `weight`.

    Raises:
        SpecError: Shapes or groups do not fit, or a value is not finite.

    Example:
        >>> weight, quantized = torch.tensor([[1.25, 2.0]]), torch.tensor([[1.0, 2.5]])
        >>> bias_shift(weight, quantized, torch.tensor([4.0, 1.0]))
        tensor([0.5000])
    """
    before, after = _channels(weight, quantized)
    out, width = weight.shape[0], weight.shape[1]
    if groups < 1 or out % groups:
        raise SpecError(f"{out} output channels do not split into {groups} groups")
    mean = torch.as_tensor(input_mean, dtype=torch.float64)
    if mean.numel() == 1:
        mean = mean.reshape(1).expand(width * groups)
    if mean.shape != (width * groups,) or not bool(mean.isfinite().all()):
        raise SpecError(
            f"input_mean is {list(mean.shape)}, or not finite; wanted [{width * groups}]",
            hint="give the mean of every input channel",
        )
    taps = (before - after).view(groups, out // groups, width, -1).sum(dim=3)
    shift = torch.einsum("goi,gi->go", taps, mean.view(groups, width))
    return shift.reshape(out).to(weight.dtype)


def _channels(weight: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """[out, n] float64, twice."""
    if weight.shape != quantized.shape or weight.dim() < 2 or weight.numel() == 0:
        raise SpecError(
            f"weight {list(weight.shape)} and quantized {list(quantized.shape)} must be equal "
            "shapes [out, in, ...]"
        )
    before = weight.detach().to(torch.float64).flatten(1)
    after = quantized.detach().to(torch.float64).flatten(1)
    if not bool(before.isfinite().all() & after.isfinite().all()):
        raise SpecError("a weight is NaN or infinite")
    return before, after
