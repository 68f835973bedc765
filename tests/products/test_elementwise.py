"""Rounding, splitting and adding up, against exact fractions and plain formulas."""

from __future__ import annotations

import logging
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxq.errors import TrainingError
from fxq.numerics.fixed_point import fixed_point, fixed_point_codes, from_limbs, limbs
from fxq.products import elementwise
from fxq.products.elementwise import (
    channel_sum,
    combined,
    fixed_point_limbs,
    rounded_sum,
    scaled,
    statistics,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "with holes": lambda x: torch.stack((x, x), -1)[..., 0],
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "from the middle": lambda x: torch.cat((x, x, x), 3)[..., 4:8],
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def values() -> Tensor:
    return torch.randn(3, 5, 6, 4)


# ---- codes -----------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("bits", [2, 4, 8, 9, 16, 17, 24])
def test_limbs_are_those_of_the_formulas(layout: Any, bits: int) -> None:
    x = layout(values())
    found = fixed_point_limbs(x, 2 - bits, bits)
    wanted = torch.stack(limbs(fixed_point_codes(x, 2 - bits, bits), bits))
    assert found.dtype == torch.int8
    assert torch.equal(found, wanted)


def test_limbs_lie_as_the_tensor_does() -> None:
    for layout in ("contiguous", "channels-last", "transposed"):
        x = LAYOUTS[layout](values())
        assert all(limb.stride() == x.stride() for limb in fixed_point_limbs(x, -8, 16))


@given(
    st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=8),
    st.integers(2, 24),
    st.integers(-20, 9),
)
def test_codes_are_the_nearest_halves_to_even(
    numbers: list[float], bits: int, exponent: int
) -> None:
    codes = from_limbs(list(fixed_point_limbs(torch.tensor(numbers), exponent, bits)))
    top = {16: 32639, 24: 8355711}.get(bits, 2 ** (bits - 1) - 1)
    low = -top - 1 if bits <= 8 else -top
    wanted = [round(Fraction(x) / Fraction(2) ** exponent) for x in numbers]
    assert codes.tolist() == [max(low, min(top, code)) for code in wanted]


@layouts
def test_a_mask_makes_zeros(layout: Any) -> None:
    """Whatever the layouts of the two; NaN of a mask is not above zero."""
    x, mask = layout(values()), values()
    mask[0, 0, 0, :3] = torch.tensor([0.0, -0.0, math.nan])
    for own in (mask, mask.contiguous(memory_format=torch.channels_last)):
        kept = torch.where(own > 0, x, 0)
        assert torch.equal(
            from_limbs(list(fixed_point_limbs(x, -9, 16, own))), fixed_point_codes(kept, -9, 16)
        )
        assert statistics(x, own) == pytest.approx(statistics(kept), rel=1e-12)
        assert rounded_sum(x, -4, 8, own) == rounded_sum(kept, -4, 8)
        torch.testing.assert_close(channel_sum(x, own), kept.sum((0, 2, 3)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", [8, 16, 24])
def test_values_without_a_code(bad: float, bits: int) -> None:
    x = values()
    x[1, 2, 3, 0] = bad
    with pytest.raises(TrainingError, match=r"holds (nan|inf)"):
        fixed_point_limbs(x, 0, bits)


def test_a_mask_hides_values_without_a_code() -> None:
    x, mask = values(), torch.ones(3, 5, 6, 4)
    x[1, 2, 3, 0], mask[1, 2, 3, 0] = math.nan, 0
    wanted = fixed_point_codes(torch.where(mask > 0, x, 0), -4, 8)
    assert torch.equal(fixed_point_limbs(x, -4, 8, mask)[0].int(), wanted)


# ---- sums ------------------------------------------------------------------------------------


@layouts
def test_statistics_of_a_tensor(layout: Any) -> None:
    x = layout(values())
    largest, total = statistics(x)
    assert largest == float(x.abs().max())
    assert total == pytest.approx(math.fsum(x.abs().flatten().tolist()), rel=1e-14)
    rounded = fixed_point(x, -4, 8).abs().flatten().tolist()
    assert rounded_sum(x, -4, 8) == math.fsum(rounded)
    torch.testing.assert_close(channel_sum(x), x.sum((0, 2, 3)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_statistics_tell_of_values_that_are_no_numbers(bad: float) -> None:
    x = torch.ones(5)
    x[3] = bad
    assert not any(math.isfinite(number) for number in statistics(x))


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3), (7, 5, 3, 2), (7, 5, 3, 2, 2)])
def test_channels_of_any_number_of_axes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(channel_sum(x), x.transpose(0, 1).flatten(1).sum(1))


# ---- combining -------------------------------------------------------------------------------

whole = st.integers(-(2**31) + 1, 2**31 - 1)


@given(
    st.lists(st.lists(whole, min_size=3, max_size=3), min_size=1, max_size=3),
    st.sampled_from([-140, -126, -40, 0, 60]),
)
def test_combining_rounds_once(parts: list[list[int]], exponent: int) -> None:
    """Up to 24 bits times 8: all of the sum fits a float64, which is then rounded."""
    powers = list(range(len(parts)))[::-1]
    found = combined([torch.tensor(part, dtype=torch.int32) for part in parts], powers, exponent)
    for at, have in enumerate(found.tolist()):
        exact = sum(
            Fraction(part[at]) * 256**power for part, power in zip(parts, powers, strict=True)
        )
        assert have == nearest_float32(exact * Fraction(2) ** exponent)


def nearest_float32(exact: Fraction) -> float:
    """By comparing with the neighbours."""
    near = torch.tensor(float(exact)).float()
    around = [near, near.nextafter(torch.tensor(math.inf)), near.nextafter(torch.tensor(-math.inf))]
    return min((float(one) for one in around), key=lambda one: abs(Fraction(one) - exact))


@layouts
def test_parts_of_any_layout(layout: Any) -> None:
    first = layout(torch.randint(-(2**30), 2**30, (3, 5, 6, 4)))
    other = torch.randint(-(2**30), 2**30, (3, 5, 6, 4)).expand(first.shape)
    wanted = ((first * 256 + other).double() * 2.0**-9).float()
    assert torch.equal(combined([first.int(), other.int()], [1, 0], -9), wanted)
    assert torch.equal(combined([first, other.double()], [1, 0], -9), wanted)
    assert torch.equal(combined([other.int()], [2], -9), (other.double() * 2.0**7).float())


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-149, -130, 0, 100, 110])
def test_scaling(dtype: torch.dtype, exponent: int) -> None:
    numbers = torch.tensor([0, 1, -3, 2**23 + 1, -(2**24) + 1], dtype=dtype)
    wanted = (numbers.double() * 2.0**exponent).float()
    assert torch.equal(scaled(numbers, exponent), wanted)


# ---- compiled --------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> None:
    """A working one; torch's own parts warn of each other."""
    elementwise.compiler_works.cache_clear()
    if not elementwise.compiler_works():
        pytest.skip("torch.compile does not work on this machine")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("compiler")
def test_compiled_chains_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 64, 64, 33).contiguous(memory_format=torch.channels_last)
    mask = torch.randn(2, 64, 64, 33)
    assert x.numel() >= elementwise.WORTH_COMPILING
    parts = [torch.randint(-(2**30), 2**30, x.shape, dtype=torch.int32) for _ in range(2)]

    def all_of_it() -> list[Any]:
        return [
            *statistics(x, mask),
            rounded_sum(x, -4, 8, mask),
            fixed_point_limbs(x, -13, 16, mask),
            fixed_point_limbs(x, -21, 24),
            combined(parts, [1, 0], -20),
        ]

    compiled = all_of_it()
    monkeypatch.setattr(elementwise, "WORTH_COMPILING", 2**40)
    eager = all_of_it()
    for one, other in zip(compiled, eager, strict=True):
        if isinstance(one, Tensor):
            assert one.stride() == other.stride()
            assert torch.equal(one, other)
        else:
            assert one == pytest.approx(other, rel=1e-12)


def test_without_a_compiler_it_is_told_once_and_computed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand so on")

    elementwise.compiler_works.cache_clear()
    monkeypatch.setattr(elementwise, "_compiled", broken)
    x = torch.randn(elementwise.WORTH_COMPILING)
    with caplog.at_level(logging.WARNING):
        found = [fixed_point_limbs(x, -4, 8) for _ in range(2)]
    elementwise.compiler_works.cache_clear()
    assert torch.equal(found[0][0].int(), fixed_point_codes(x, -4, 8))
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile does not work here; training is slower: no C++ compiler"
    ]
