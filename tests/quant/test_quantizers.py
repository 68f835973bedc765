"""Quantizers: the values they can take, with bits per channel and with ranges found at run time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxq.errors import SpecError
from fxq.numerics.aciq import Prior
from fxq.numerics.affine import channel_grids
from fxq.numerics.allocation import Allocation, allocate_mean_bits
from fxq.quant.dynamic import DynamicAciqQuantizer
from fxq.quant.quantizers import ActivationQuantizer

TABLE = {False: {2: 2.83, 3: 3.89, 4: 5.03}, True: {2: 3.89, 3: 5.02, 4: 6.2}}
"""Clips of a Laplace law in units of b, without and with a ReLU behind, in the authors' code."""


def images(seed: int = 0, channels: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(channels, generator=generator) * 8
    return torch.randn(4, channels, 5, 5, generator=generator) * spread.view(1, -1, 1, 1)


def levels(values: Tensor) -> list[int]:
    """How many values each channel takes."""
    return [values[:, channel].unique().numel() for channel in range(values.shape[1])]


# ---- bits per channel --------------------------------------------------------------------------


def test_each_channel_has_the_codes_of_its_bits() -> None:
    scale, zero_point = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1, 1, 0])
    quantizer = ActivationQuantizer(scale, zero_point, torch.tensor([2, 0, 1]))
    x = torch.tensor([[-9.0, -9.0, -9.0], [0.6, 5.0, 1.2], [9.0, 9.0, 9.0]])
    assert quantizer(x).tolist() == [[-0.5, -1.0, 0.0], [0.5, -1.0, 2.0], [1.0, -1.0, 2.0]]
    assert quantizer.bits == 2
    assert quantizer.describe() == "0..2-bit per-channel scale 0.5..2"


@given(st.integers(0, 1000), st.lists(st.integers(0, 8), min_size=6, max_size=6))
@settings(max_examples=40, deadline=None)
def test_no_channel_takes_more_values_than_its_bits_allow(seed: int, widths: list[int]) -> None:
    x, bits = images(seed), torch.tensor([*widths[:5], max(1, widths[5])])
    low, high = x.amin((0, 2, 3)).double(), x.amax((0, 2, 3)).double()
    found = ActivationQuantizer(*channel_grids(low, high, bits), bits)(x)
    assert all(count <= 2**width for count, width in zip(levels(found), bits.tolist(), strict=True))
    for channel in (bits == 0).nonzero().flatten().tolist():
        assert float(found[0, channel, 0, 0]) == pytest.approx(float(low[channel]), rel=1e-4)


@pytest.mark.parametrize(
    ("bits", "zero_point"),
    [([2, 2], [0, 0, 0]), ([9, 2, 2], [0, 0, 0]), ([-1, 2, 2], [0, 0, 0]), ([0, 2, 2], [2, 0, 0])],
)
def test_impossible_bits_of_channels(bits: list[int], zero_point: list[int]) -> None:
    with pytest.raises(SpecError):
        ActivationQuantizer(torch.ones(3), torch.tensor(zero_point), torch.tensor(bits))


# ---- ranges found at run time ------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_batch_is_clipped_where_the_authors_table_says(bits: int, fused: bool) -> None:
    """Their factors are for 2**bits steps, ours for the 2**bits - 1 there are: a little less."""
    x = torch.distributions.Laplace(0.0, 1.0).sample((200_000,))
    found = DynamicAciqQuantizer(bits, fused_relu=fused)(x)
    table = TABLE[fused][bits] * float((x - x.mean()).abs().mean())
    wanted = table if fused else 2 * table
    assert 0.8 * wanted < float(found.max() - found.min()) < 1.02 * wanted
    assert (float(found.min()) == 0) is fused
    assert found.unique().numel() <= 2**bits


@given(st.integers(0, 1000), st.sampled_from(list(Allocation)), st.booleans())
@settings(max_examples=40, deadline=None)
def test_channels_of_a_batch_have_their_bits(seed: int, rule: Allocation, fused: bool) -> None:
    x = images(seed)
    found = DynamicAciqQuantizer(3, per_channel=True, fused_relu=fused, allocation=rule)(x)
    bits = torch.full((6,), 3)
    std = x.transpose(0, 1).flatten(1).std(1)
    if rule is Allocation.MEAN_BITS:
        bits = allocate_mean_bits(std, 3)
    if rule is Allocation.BINS:
        bits = torch.floor(torch.log2(6 * 8 * std ** (2 / 3) / (std ** (2 / 3)).sum())).clamp(0, 8)
    assert all(count <= 2**width for count, width in zip(levels(found), bits.tolist(), strict=True))
    if rule is Allocation.BINS:
        assert sum(levels(found)) <= 6 * 2**3


def test_a_law_is_fitted_to_each_batch() -> None:
    fit = DynamicAciqQuantizer(4, Prior.FIT)
    normal, heavy = torch.randn(9999), torch.distributions.Laplace(0.0, 1.0).sample((9999,))
    assert torch.equal(fit(normal), DynamicAciqQuantizer(4, Prior.GAUSS)(normal))
    assert torch.equal(fit(heavy), DynamicAciqQuantizer(4, Prior.LAPLACE)(heavy))


def test_the_batch_decides() -> None:
    x = images()
    quantizer = DynamicAciqQuantizer(4)
    torch.testing.assert_close(quantizer(x * 3), quantizer(x) * 3, rtol=1e-4, atol=0)
    assert not torch.equal(quantizer(torch.cat([x, x * 5]))[:4], quantizer(x))


def test_a_bounded_relu_bounds_the_range() -> None:
    found = DynamicAciqQuantizer(4, fused_relu=True, upper=6.0)(images() * 9)
    assert float(found.max()) == pytest.approx(6.0, rel=1e-4)


@pytest.mark.parametrize("rule", list(Allocation))
def test_awkward_batches(rule: Allocation) -> None:
    quantizer = DynamicAciqQuantizer(2, per_channel=True, allocation=rule)
    assert quantizer(torch.zeros(2, 3, 4, 4)).eq(0).all()
    assert quantizer(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert quantizer(torch.ones(1, 3)).isfinite().all()


def test_options_build_it_again() -> None:
    quantizer = DynamicAciqQuantizer(
        3, Prior.GAUSS, per_channel=True, allocation=Allocation.BINS, mean_aware=True, upper=2.0
    )
    again = DynamicAciqQuantizer(**quantizer.options())  # type: ignore[arg-type]
    assert torch.equal(again(images()), quantizer(images()))
    assert again.options() == quantizer.options()
    with pytest.raises(SpecError, match="bits must be 1 to 8"):
        DynamicAciqQuantizer(0)
