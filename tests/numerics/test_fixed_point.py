"""Fixed-point numbers against exact fractions and plain loops over Python integers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq.errors import SpecError
from fxq.numerics.fixed_point import (
    MIN_EXPONENT,
    fixed_point,
    fixed_point_codes,
    from_limbs,
    largest_code,
    limbs,
    resolution_exponent,
)

LARGEST_FLOAT = torch.finfo(torch.float32).max
widths = st.integers(2, 24)


def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


# ---- the resolution --------------------------------------------------------------------------


@given(st.floats(1e-30, 1e30), widths)
def test_the_largest_value_never_clips_and_would_at_half_the_resolution(
    largest: float, bits: int
) -> None:
    exponent = resolution_exponent(largest, bits)
    assert Fraction(largest) <= largest_code(bits) * power(exponent)
    assert Fraction(largest) > largest_code(bits) * power(exponent - 1)


@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16, 24])
@pytest.mark.parametrize("exponent", [-90, -1, 0, 1, 37])
def test_the_resolution_changes_exactly_at_a_full_range(bits: int, exponent: int) -> None:
    full = largest_code(bits) * 2.0**exponent
    assert resolution_exponent(full, bits) == exponent
    assert resolution_exponent(math.nextafter(full, math.inf), bits) == exponent + 1


@pytest.mark.parametrize("bits", [2, 3, 8, 16, 24])
@pytest.mark.parametrize("largest", [0.0, 5e-324, 1e-45, 2.0**-126, LARGEST_FLOAT, 1e300])
def test_any_resolution_and_every_code_is_a_normal_float32(bits: int, largest: float) -> None:
    exponent = resolution_exponent(largest, bits)
    x = torch.tensor([largest, -largest]).clamp(-LARGEST_FLOAT, LARGEST_FLOAT)
    for value in (2.0**exponent, 2.0**-exponent):
        assert torch.finfo(torch.float32).tiny <= value <= LARGEST_FLOAT
    assert fixed_point(x, exponent, bits).isfinite().all()


def test_zeros_get_the_smallest_resolution() -> None:
    assert resolution_exponent(0.0, 8) == MIN_EXPONENT


@pytest.mark.parametrize("largest", [math.nan, math.inf, -1.0])
def test_a_range_that_is_none_is_refused(largest: float) -> None:
    with pytest.raises(SpecError, match="largest absolute value"):
        resolution_exponent(largest, 8)


@pytest.mark.parametrize("bits", [0, 1, 25, 32, True, 8.0])
def test_impossible_widths_are_refused(bits: int) -> None:
    for call in (
        lambda: largest_code(bits),
        lambda: fixed_point_codes(torch.ones(1), 0, bits),
        lambda: limbs(torch.ones(1, dtype=torch.int32), bits),
    ):
        with pytest.raises(SpecError, match="not a fixed-point width"):
            call()


@pytest.mark.parametrize("exponent", [-127, 127])
def test_impossible_exponents_are_refused(exponent: int) -> None:
    with pytest.raises(SpecError, match="beyond float32"):
        fixed_point(torch.ones(1), exponent, 8)


# ---- the codes -------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), st.integers(-20, 20), widths
)
def test_codes_are_those_of_exact_rounding(values: list[float], exponent: int, bits: int) -> None:
    top = largest_code(bits)
    low = -top - 1 if bits <= 8 else -top
    # Python rounds a Fraction to the nearest whole number, halves to even.
    exact = [min(top, max(low, round(Fraction(v) / power(exponent)))) for v in values]
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(values, dtype=dtype)
        codes = fixed_point_codes(x, exponent, bits)
        assert codes.dtype == torch.int32
        assert codes.tolist() == exact
        found = fixed_point(x, exponent, bits)
        assert found.dtype == dtype
        assert [Fraction(v) for v in found.tolist()] == [code * power(exponent) for code in exact]


def test_halves_go_to_even_and_ends_are_clamped() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 1e9, -1e9])
    assert fixed_point_codes(x, 0, 8).tolist() == [0, 2, 2, 0, -2, -2, 127, -128]
    assert fixed_point_codes(x, 0, 16).tolist()[-2:] == [32639, -32639]
    assert fixed_point_codes(x, 0, 24).tolist()[-2:] == [8355711, -8355711]
    assert fixed_point_codes(x, 0, 12).tolist()[-2:] == [2047, -2047]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    exponent = resolution_exponent(x.abs().max().item(), 8)
    assert torch.equal(fixed_point_codes(x, exponent, 8), fixed_point_codes(x.float(), exponent, 8))
    found = fixed_point(x, exponent, 8)
    assert found.dtype == dtype
    assert torch.equal(found.float(), fixed_point(x.float(), exponent, 8))
    ends = torch.tensor([1.0, -1.0], dtype=dtype)  # 32639 is a number of neither dtype
    assert fixed_point_codes(ends, -15, 16).tolist() == [32639, -32639]


@pytest.mark.parametrize("bits", [8, 16, 24])
def test_what_is_fixed_point_already_stays(bits: int) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    exponent = resolution_exponent(x.abs().max().item(), bits)
    once = fixed_point(x, exponent, bits)
    assert torch.equal(fixed_point(once, exponent, bits), once)
    assert (once - x).abs().max() <= 2.0 ** (exponent - 1)


def test_nan_stays_visible_in_values() -> None:
    assert fixed_point(torch.tensor([math.nan, 1.0]), 0, 8).isnan().tolist() == [True, False]


# ---- the limbs -------------------------------------------------------------------------------


@given(widths, st.data())
def test_limbs_recompose_and_fit_int8(bits: int, data: st.DataObject) -> None:
    top = largest_code(bits)
    low = -top - 1 if bits <= 8 else -top
    drawn = data.draw(st.lists(st.integers(low, top), max_size=20))
    worst = [low, low + 1, -1, 0, 1, top - 1, top]
    edges = [v for v in (-32768, -32641, -129, -128, 127, 128, 32639, 32640) if low <= v <= top]
    codes = torch.tensor([*worst, *edges, *drawn], dtype=torch.int32)
    parts = limbs(codes, bits)
    assert len(parts) == 1 + (bits > 8) + (bits > 16)
    assert all(part.dtype == torch.int8 for part in parts)
    assert torch.equal(from_limbs(parts), codes)
    digits = [[int(part[i]) for part in parts] for i in range(len(codes))]
    by_hand = [sum(d * 256**k for k, d in enumerate(reversed(row))) for row in digits]
    assert by_hand == codes.tolist()


@pytest.mark.parametrize("bits", [16, 24])
def test_one_code_more_would_not_fit(bits: int) -> None:
    over = torch.tensor([largest_code(bits) + 1], dtype=torch.int32)
    assert not torch.equal(from_limbs(limbs(over, bits)), over)


def test_every_16_bit_code_recomposes() -> None:
    codes = torch.arange(-32639, 32640, dtype=torch.int32)
    assert torch.equal(from_limbs(limbs(codes, 16)), codes)


@pytest.mark.parametrize("bits", [8, 16, 24])
def test_products_of_limbs_add_up_to_the_product_of_codes(bits: int) -> None:
    draw = torch.Generator().manual_seed(2)
    top = largest_code(bits)
    a = torch.randint(-top, top + 1, (7, 31), generator=draw, dtype=torch.int32)
    b = torch.randint(-127, 128, (31, 5), generator=draw)
    total = torch.zeros(7, 5, dtype=torch.int64)
    for part in limbs(a, bits):
        total = total * 256 + part.to(torch.int64) @ b
    assert torch.equal(total, a.to(torch.int64) @ b)
