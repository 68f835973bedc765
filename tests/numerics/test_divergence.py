"""KL and cross-entropy ranges, against plain loops over every candidate and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from fxq.errors import CalibrationError, SpecError
from fxq.numerics.affine import fake_quantize, grid_from_range
from fxq.numerics.divergence import cross_entropy_range, kl_range
from fxq.numerics.histogram import Histogram


def watched(x: torch.Tensor, bins: int | None = None, channels: int | None = None) -> Histogram:
    histogram = Histogram(channels, bins)
    histogram.update(x)
    return histogram


def drawn(law: str, count: int = 20_000) -> torch.Tensor:
    laws = {
        "laplace": stats.laplace(),
        "normal": stats.norm(),
        "student": stats.t(3),
        "shifted": stats.laplace(1.5),
        "positive": stats.expon(),
        "negative": stats.expon(-4),
    }
    x = torch.from_numpy(laws[law].rvs(size=count, random_state=1)).float()
    return -x - 5 if law == "negative" else x


def slow_kl_range(histogram: Histogram, bits: int, fused_relu: bool) -> tuple[float, float]:
    """What TensorRT's procedure does, candidate by candidate and bin by bin."""
    counts = histogram.counts[0].numpy().astype(float)
    edges = histogram.edges()[0].numpy()
    seen_low, seen_high = (float(end) for end in histogram.range())
    low, high, zero = min(seen_low, 0.0), max(seen_high, 0.0), len(counts) // 2
    if fused_relu or low == 0:
        low = 0.0
        counts[:zero] = 0
        counts[zero] = min(counts[zero], counts[zero + 1])
    filled = np.flatnonzero(counts)
    first, last = min(filled[0], zero), max(filled[-1] + 1, zero)
    best, kept = math.inf, (first, last)
    for reach in range(1, max(zero - first, last - zero) + 1):
        begin, end = max(first, zero - reach), min(last, zero + reach)
        size = end - begin
        if size < 2**bits:
            continue
        reference = counts[begin:end].copy()
        reference[0] += counts[:begin].sum()
        reference[-1] += counts[end:].sum()
        cells = [j * 2**bits // size for j in range(size)]
        quantized = np.zeros(size)
        for j in range(size):
            alike = [i for i in range(size) if cells[i] == cells[j] and counts[begin + i] > 0]
            if counts[begin + j] > 0:
                quantized[j] = sum(counts[begin + i] for i in alike) / len(alike)
        divergence = stats.entropy(reference, quantized)
        if divergence <= best + 1e-9:
            best, kept = min(best, divergence), (begin, end)
    return max(low, edges[kept[0]]), min(high, edges[kept[1]])


@pytest.mark.parametrize("law", ["laplace", "normal", "student", "shifted", "positive", "negative"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("fused", [False, True])
def test_equals_the_procedure_written_out(law: str, bits: int, fused: bool) -> None:
    histogram = watched(drawn(law), bins=64)
    low, high = kl_range(histogram, bits, fused_relu=fused)
    if law == "negative" and fused:
        assert float(low) == float(high) == 0
        return
    expected = slow_kl_range(histogram, bits, fused)
    assert (float(low), float(high)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_long_tails_are_clipped_and_even_values_kept(bits: int) -> None:
    x = drawn("student", 200_000)
    low, high = kl_range(watched(x), bits)
    assert float(x.min()) * 0.75 < float(low) < 0 < float(high) < float(x.max()) * 0.75
    inside = ((x >= low) & (x <= high)).float().mean()
    assert inside > 0.8
    even = torch.linspace(-1, 1, 400_001)
    assert [end.item() for end in kl_range(watched(even), bits)] == [-1.0, 1.0]
    _, top = kl_range(watched(even), bits, fused_relu=True)
    assert top.item() == 1.0


def test_more_bits_keep_more() -> None:
    histogram = watched(drawn("student", 200_000))
    tops = [float(kl_range(histogram, bits)[1]) for bits in (2, 4, 6, 8)]
    assert tops == sorted(tops)
    assert tops[0] < tops[-1]


def test_zeros_of_a_relu_do_not_count() -> None:
    x = drawn("laplace")
    before = kl_range(watched(x), 4, fused_relu=True)
    after = kl_range(watched(x.relu()), 4)
    assert float(after[0]) == 0
    assert float(after[1]) == pytest.approx(float(before[1]), rel=0.05)


def test_channels_are_searched_apart() -> None:
    x = drawn("student", 30_000).reshape(100, 3, 100) * torch.tensor([1.0, 8.0, 0.0]).view(1, 3, 1)
    low, high = kl_range(watched(x, channels=3), 4)
    for channel in range(2):
        alone = Histogram(1)
        alone.update(x[:, channel : channel + 1])
        assert float(kl_range(alone, 4)[1]) == float(high[channel])
    assert float(low[2]) == float(high[2]) == 0


@pytest.mark.parametrize("value", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("fused", [False, True])
def test_a_constant_is_kept(value: float, fused: bool) -> None:
    low, high = kl_range(watched(torch.full((9,), value)), 8, fused_relu=fused)
    assert (float(low), float(high)) == (0.0 if fused else min(value, 0.0), max(value, 0.0))


def test_misuse_of_kl() -> None:
    with pytest.raises(CalibrationError):
        kl_range(Histogram(), 4)
    with pytest.raises(SpecError):
        kl_range(watched(torch.ones(3)), 9)


# ---- cross entropy ---------------------------------------------------------------------------


def entropy(logits: torch.Tensor, low: float, high: float, bits: int) -> float:
    scale, zero_point = grid_from_range(low, high, bits)
    found = fake_quantize(logits, scale, zero_point, 0, 2**bits - 1)
    return float(-(logits.softmax(1) * found.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_cross_entropy_range_beats_a_brute_force_grid(bits: int) -> None:
    logits = drawn("student", 500).reshape(50, 10) * 3
    low, high = cross_entropy_range(logits, bits)
    bottom, top = float(logits.min()), float(logits.max())
    shares = [0.05 * i for i in range(1, 21)]
    brute = min(
        entropy(logits, bottom * a, top * b, bits) for a, b in itertools.product(shares, shares)
    )
    assert bottom <= float(low) <= 0 <= float(high) <= top
    assert entropy(logits, float(low), float(high), bits) <= brute * 1.01


def test_cross_entropy_gives_up_what_softmax_does_not_see() -> None:
    logits = torch.tensor([[-50.0, 0.0, 1.0, 2.0]]).expand(8, -1)
    low, high = cross_entropy_range(logits, 3)
    assert float(low) > -15
    assert float(high) == pytest.approx(2, rel=0.1)


def test_misuse_of_cross_entropy() -> None:
    for bad in (torch.zeros(3), torch.zeros(0, 3), torch.tensor([[math.nan]])):
        with pytest.raises(CalibrationError):
            cross_entropy_range(bad, 4)
    assert [end.item() for end in cross_entropy_range(torch.zeros(2, 3), 4)] == [0, 0]
