from __future__ import annotations

import math

import pytest
import torch

from fxq.errors import SpecError
from fxq.numerics.allocation import allocate_bins, allocate_mean_bits


def lognormal(spread: float, channels: int = 100_000) -> torch.Tensor:
    noise = torch.randn(channels, generator=torch.Generator().manual_seed(0))
    return (noise * spread).exp()


def quota_share(bits: torch.Tensor, goal: float) -> float:
    return float((2.0**bits).sum() / (len(bits) * 2**goal))


def test_papers_rule_on_a_lognormal_spread() -> None:
    alpha = lognormal(1.0)
    bits = allocate_bins(alpha, len(alpha) * 16)
    assert float(bits.double().mean()) == pytest.approx(3.18, abs=0.1)
    assert quota_share(bits, 4) == pytest.approx(0.73, abs=0.02)


@pytest.mark.parametrize(("spread", "share"), [(1.0, 1.37), (2.0, 2.34)])
def test_authors_code_hits_mean_bits_and_overspends_the_quota(spread: float, share: float) -> None:
    bits = allocate_mean_bits(lognormal(spread), 4)
    assert float(bits.double().mean()) == pytest.approx(4.0, abs=0.011)
    # The shares of the notes come from one small draw; 100 000 channels give 1.27 and 2.22.
    assert quota_share(bits, 4) == pytest.approx(share, rel=0.08)


def test_papers_rule_is_the_printed_formula() -> None:
    alpha = torch.tensor([0.3, 1.0, 2.5, 7.0], dtype=torch.float64)
    share = [a ** (2 / 3) for a in alpha.tolist()]
    expected = [math.floor(math.log2(64 * s / sum(share))) for s in share]
    assert allocate_bins(alpha, 64).tolist() == expected
    assert allocate_bins(alpha * 1e-200, 64).tolist() == expected


@pytest.mark.parametrize("channels", [1, 3, 64])
def test_equal_channels_get_equal_bits(channels: int) -> None:
    alpha = torch.full((channels,), 0.7)
    assert allocate_mean_bits(alpha, 4).tolist() == [4] * channels


def test_limits() -> None:
    alpha = torch.tensor([0.0, 1e-9, 1.0, 1e9])
    bits = allocate_bins(alpha, 4 * 16)
    assert bits.tolist()[0] == 0
    assert int(bits.max()) <= 8
    clamped = allocate_mean_bits(alpha, 4, low=2, high=6)
    assert int(clamped.min()) >= 2
    assert int(clamped.max()) <= 6


def test_misuse() -> None:
    for bad in ([], [1.0, math.nan], [-1.0, 1.0], [0.0, 0.0]):
        with pytest.raises(SpecError):
            allocate_bins(torch.tensor(bad), 32)
        with pytest.raises(SpecError):
            allocate_mean_bits(torch.tensor(bad), 4)
    with pytest.raises(SpecError):
        allocate_bins(torch.ones(2), 0)
    with pytest.raises(SpecError):
        allocate_mean_bits(torch.ones(2), 9)
