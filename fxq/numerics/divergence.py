"""Clipping ranges by what they do to a distribution instead of to the squared error.

Papers:
    Migacz, "8-bit Inference with TensorRT", GTC 2017: the threshold whose clipped and quantized
        histogram diverges least from the observed one; the baseline "KLD" of Banner et al., NeurIPS
        2019, arXiv:1810.05723, supplement section 6. Generalised here to two-sided ranges.
    Nagel et al., "A White Paper on Neural Network Quantization", 2021, arXiv:2106.08295, section
        3.1 (cross entropy, for logits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.errors import CalibrationError
from fxq.numerics.affine import code_range, fake_quantize, grid_from_range
from fxq.numerics.clipping import search_range
from fxq.numerics.histogram import Histogram

_TIE = 1e-9  # divergences closer than this are equal; the widest range wins


def kl_range(histogram: Histogram, bits: int, *, fused_relu: bool = False) -> tuple[Tensor, Tensor]:
    """The range whose quantized histogram has the smallest Kullback-Leibler divergence.

    Candidates end at bin edges: [-t, t] for every t, cut to the observed range. For each the
    reference P counts what lies outside in the outermost bins; Q has only what lies inside, shared
    out evenly over the bins of each of 2**bits equal cells that hold anything. Bins are used as
    they are, at least 1024 (256 per channel) on the longer side of 0, where TensorRT rebins to
    2048; a range of fewer bins than levels is kept whole.

    The bin at 0 of values that are never negative counts as its neighbour does, as in TensorRT:
    a ReLU piles zeros up there, which every grid represents exactly.

    Args:
        histogram: Of the values to quantize (before the ReLU when that is fused).
        bits: 1 to 8.
        fused_relu: Whether negative values become 0, so the range is [0, clip].

    Returns:
        low, high: [C] or [] float32, inside the observed range (extended to 0).

    Raises:
        SpecError: Impossible bits.
        CalibrationError: The histogram is empty.

    Example:
        >>> histogram = Histogram()
        >>> histogram.update(torch.cat([torch.linspace(0, 1, 10_000), torch.tensor([9.0])]))
        >>> low, high = kl_range(histogram, bits=4)
        >>> low.item(), round(high.item(), 2)
        (0.0, 1.0)
    """
    code_range(bits)
    seen = histogram.range()
    lows, highs = (end.reshape(-1).to(torch.float64) for end in seen)
    lows, highs = lows.clamp(max=0), highs.clamp(min=0)
    if fused_relu:
        lows = torch.zeros_like(lows)
    edges, ends = histogram.edges(), []
    for row, counts in enumerate(histogram.counts.to(torch.float64)):
        begin, end = _least_divergence(counts, 2**bits, one_sided=not bool(lows[row]))
        ends.append(torch.stack((edges[row, begin], edges[row, end])))
    found = torch.stack(ends)
    low, high = torch.maximum(found[:, 0], lows), torch.minimum(found[:, 1], highs)
    return low.to(torch.float32).view_as(seen[0]), high.to(torch.float32).view_as(seen[1])


def cross_entropy_range(logits: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The range of logits whose quantization has the smallest cross entropy to their softmax.

    Large logits matter more here than small ones, which squared errors do not see. The search moves
    one end after the other, so with few levels it may end in a neighbouring minimum. No pass of fxq
    uses it: the last layer's output stays in float.

    Args:
        logits: [n, classes].
        bits: 1 to 8; the grid is that of `grid_from_range`.

    Returns:
        low, high: [] float32, inside the range of the logits (extended to 0).

    Raises:
        SpecError: Impossible bits.
        CalibrationError: The logits are empty, not finite, or not two-dimensional.

    Example:
        >>> low, high = cross_entropy_range(torch.tensor([[-40.0, 1.0, 2.0, 3.0]]), bits=3)
        >>> bool(low > -10), round(high.item(), 1)
        (True, 3.0)
    """
    qmin, qmax = code_range(bits)
    if logits.dim() != 2 or logits.numel() == 0 or not bool(logits.isfinite().all()):
        raise CalibrationError(
            f"logits of shape {list(logits.shape)} are not finite values of shape [n, classes]",
            hint="give the network's outputs on calibration images",
        )
    wanted = logits.to(torch.float64).softmax(dim=1)

    def cost(lows: Tensor, highs: Tensor) -> Tensor:
        entropies = []
        for scale, zero_point in zip(*grid_from_range(lows, highs, bits), strict=True):
            found = fake_quantize(logits, scale, zero_point, qmin, qmax).to(torch.float64)
            entropies.append(-(wanted * found.log_softmax(dim=1)).sum())
        return torch.stack(entropies)

    low, high = (end.to(torch.float64) for end in logits.aminmax())
    ends = search_range(cost, low.clamp(max=0), high.clamp(min=0))
    return ends[0].to(torch.float32), ends[1].to(torch.float32)


def _least_divergence(counts: Tensor, levels: int, *, one_sided: bool) -> tuple[int, int]:
    """The bins [begin, end) to keep, of `counts: [bins]` float64 with 0 at bins / 2."""
    zero = len(counts) // 2
    if one_sided:
        counts = counts.clone()
        counts[:zero] = 0
        counts[zero] = torch.minimum(counts[zero], counts[zero + 1])
    held = counts.nonzero().flatten()
    if not len(held):
        return 0, len(counts)
    first, last = min(int(held[0]), zero), max(int(held[-1]) + 1, zero)
    reach = torch.arange(1, max(zero - first, last - zero) + 1)
    begins, ends = (zero - reach).clamp(min=first), (zero + reach).clamp(max=last)
    fine = ends - begins >= levels
    if not bool(fine.any()):
        return first, last
    divergences = _divergences(counts, begins[fine], ends[fine], levels)
    best = int((divergences <= divergences.min() + _TIE).nonzero()[-1])
    return int(begins[fine][best]), int(ends[fine][best])


def _divergences(counts: Tensor, begins: Tensor, ends: Tensor, levels: int) -> Tensor:
    """[candidates]: KL(P || Q) of each range of bins, from running sums over the bins.

    With C a cell's count inside, N its bins that hold anything and P its count with what lies
    outside, sum p log q is sum P log(C / N): no candidate's Q is ever written out.
    """
    mass, held, surprise = (
        torch.nn.functional.pad(values.cumsum(0), (1, 0))
        for values in (counts, (counts > 0).to(counts.dtype), torch.xlogy(counts, counts))
    )
    total = mass[-1]
    below, above = mass[begins], total - mass[ends]
    first, last = counts[begins], counts[ends - 1]
    entropy = surprise[ends] - surprise[begins]
    entropy += torch.xlogy(first + below, first + below) - torch.xlogy(first, first)
    entropy += torch.xlogy(last + above, last + above) - torch.xlogy(last, last)
    cell = torch.arange(levels + 1)
    edges = begins[:, None] - (-cell * (ends - begins)[:, None]) // levels  # rounded up
    inside = mass[edges].diff()
    reference = inside.clone()
    reference[:, 0] += below
    reference[:, -1] += above
    cross = torch.xlogy(reference, inside / held[edges].diff().clamp(min=1)).sum(1)
    divergences = (entropy - cross) / total + ((mass[ends] - mass[begins]) / total).log()
    impossible = ((below > 0) & (first == 0)) | ((above > 0) & (last == 0))
    return torch.where(impossible, torch.inf, divergences)
