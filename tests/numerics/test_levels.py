"""Integer levels, against the printed lists and the construction in the paper's own fractions."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fxq.errors import SpecError
from fxq.numerics.clipping import mse_weight_scale
from fxq.numerics.levels import (
    CODE_LIMIT,
    MOST_BITS,
    LevelSet,
    level_table,
    levels_of,
    magnitudes,
    mse_level_scale,
    nearest_level,
)

PRINTED = {
    2: [0, 1],
    3: [0, 1, 2, 4],
    4: [0, 1, 2, 3, 4, 6, 8, 10],
    5: [0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48],
    6: [
        *(0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 17, 20, 21),
        *(24, 28, 32, 34, 36, 38, 48, 52, 64, 65, 68, 69, 72, 76, 96, 100),
    ],
}
SETS = [(kind, bits) for kind, most in MOST_BITS.items() for bits in range(2, most + 1)]


@pytest.mark.parametrize("bits", PRINTED)
def test_apot_levels_are_the_published_ones(bits: int) -> None:
    assert levels_of(LevelSet.APOT, bits).tolist() == PRINTED[bits]


def paper_levels(bits: int, base: int) -> list[Fraction]:
    """Equations 5 and 6 as printed but for the last exponent, over the largest level."""
    n, odd = divmod(bits, base)
    if odd:
        steps = [0, n, 2 * n + 1]
        terms = [[Fraction(0), Fraction(1, 2 ** (2 * n))]]
    else:
        steps = [step * n for step in range(2**base - 1)]
        terms = []
    terms += [[Fraction(0), *(Fraction(1, 2 ** (i + step)) for step in steps)] for i in range(n)]
    sums = sorted(sum(choice, Fraction(0)) for choice in itertools.product(*terms))
    return [one / sums[-1] for one in sums]


DIVIDED = [(bits, base) for bits in range(1, 9) for base in range(1, 7) if bits % base == 0]
ODD = [(bits, 2) for bits in (1, 3, 5, 7)]


@pytest.mark.parametrize(("bits", "base"), DIVIDED + ODD)
def test_apot_magnitudes_are_equations_5_and_6(bits: int, base: int) -> None:
    found = magnitudes(LevelSet.APOT, bits, base).tolist()
    assert len(set(found)) == len(found) == 2**bits
    assert found[:2] == [0, 1]
    assert [Fraction(level, found[-1]) for level in found] == paper_levels(bits, base)


@pytest.mark.parametrize("bits", range(2, 7))
def test_levels_of_signed_weights_are_the_paper_s(bits: int) -> None:
    levels = levels_of(LevelSet.APOT, bits).tolist()
    assert [Fraction(level, levels[-1]) for level in levels] == paper_levels(bits - 1, 2)


def test_the_printed_examples_of_the_paper() -> None:
    """Sec. 2.2: with 4 bits gamma is 2/3, the smallest level 2**-4 / 3, 3 between 1/2 and 1."""
    levels = paper_levels(4, 2)
    assert levels == [Fraction(one, 48) for one in magnitudes(LevelSet.APOT, 4).tolist()]
    assert levels[1] == Fraction(1, 48)
    assert sum(Fraction(1, 2) < one < 1 for one in levels) == 3


@pytest.mark.parametrize("bits", range(1, 9))
def test_bases_between_uniform_and_powers_of_two(bits: int) -> None:
    uniform = magnitudes(LevelSet.UNIFORM, bits)
    assert uniform.tolist() == list(range(2**bits))
    assert torch.equal(magnitudes(LevelSet.APOT, bits, 1), uniform)
    if bits > 6:
        with pytest.raises(SpecError, match="int64"):
            magnitudes(LevelSet.POT, bits)
        return
    powers = magnitudes(LevelSet.POT, bits).tolist()
    assert powers == [0, *(2**exponent for exponent in range(2**bits - 1))]
    assert magnitudes(LevelSet.APOT, bits, bits).tolist() == powers


def test_how_far_sets_reach() -> None:
    assert [int(magnitudes(LevelSet.APOT, bits)[-1]) for bits in range(2, 7)] == [
        *(4, 10, 48, 100, 448)
    ]
    assert int(magnitudes(LevelSet.POT, 4)[-1]) == 2**14


@pytest.mark.parametrize(
    ("bits", "base", "says"),
    [
        (4, 3, "choose base 1 or 2 or 4"),
        (5, 4, "choose base 1 or 2 or 5"),
        (8, 0, "choose base 1 or 2 or 4, or"),
        (4, -2, "terms of -2 bits"),
        (0, 2, "use 1 to 8"),
        (9, 2, "use 1 to 8"),
    ],
)
def test_impossible_terms(bits: int, base: int, says: str) -> None:
    with pytest.raises(SpecError) as raised:
        magnitudes(LevelSet.APOT, bits, base)
    assert says in str(raised.value)


@pytest.mark.parametrize("kind", [LevelSet.LLOYD, LevelSet.AUTO])
def test_sets_that_need_data(kind: LevelSet) -> None:
    with pytest.raises(SpecError, match=r"fxq\.numerics\.lloyd"):
        magnitudes(kind, 3)


TABLES = [magnitudes(LevelSet.APOT, bits) for bits in range(1, 9)]
TABLES += [magnitudes(LevelSet.POT, 4), magnitudes(LevelSet.UNIFORM, 3), torch.tensor([0, 7, 127])]


@pytest.mark.parametrize("levels", TABLES, ids=lambda levels: f"up-to-{levels[-1]}")
def test_one_look_up_is_the_projection(levels: Tensor) -> None:
    top = int(levels[-1])
    values = torch.linspace(0, top, 3001).double()
    halves = torch.arange(2 * top + 1) / 2
    for magnitude in (values, halves):
        expected = nearest_level(magnitude, levels)
        assert torch.equal(level_table(levels)[(2 * magnitude).long()], expected)
        for sign in (-1, 1):
            index = (2 * sign * magnitude).long() + 2 * top
            assert torch.equal(level_table(levels, signed=True)[index], sign * expected)


def test_a_table_too_large_is_refused() -> None:
    with pytest.raises(SpecError, match="too many to tabulate"):
        level_table(magnitudes(LevelSet.POT, 5))


@pytest.mark.parametrize(("kind", "bits"), SETS)
def test_every_set_has_its_levels_and_fits(kind: LevelSet, bits: int) -> None:
    levels = levels_of(kind, bits).tolist()
    assert len(set(levels)) == len(levels) == 2 ** (bits - 1)
    assert levels == sorted(levels)
    assert levels[:2] == [0, 1]
    assert levels[-1] <= CODE_LIMIT
    if bits == 2:
        assert levels == [0, 1]


@pytest.mark.parametrize("kind", list(LevelSet))
@pytest.mark.parametrize("bits", [1, 9])
def test_levels_that_do_not_exist(kind: LevelSet, bits: int) -> None:
    with pytest.raises(SpecError):
        levels_of(kind, bits)
    with pytest.raises(SpecError, match="fit int8"):
        levels_of(kind, MOST_BITS.get(kind, 3) + 1)


@pytest.mark.parametrize(("kind", "bits"), SETS)
def test_nearest_is_nearest_and_ties_go_up_in_magnitude(kind: LevelSet, bits: int) -> None:
    levels = levels_of(kind, bits)
    values = torch.linspace(-1.2, 1.2, 4001).double() * float(levels[-1])
    every = torch.cat((-levels.flip(0), levels[1:]))
    distance = (values.unsqueeze(1) - every).abs()
    found = nearest_level(values, levels)
    assert torch.equal((values - found).abs(), distance.amin(1))
    middles = (levels[1:] + levels[:-1]) / 2
    assert torch.equal(nearest_level(middles, levels), levels[1:])
    assert torch.equal(nearest_level(-middles, levels), -levels[1:])


@pytest.mark.parametrize(("kind", "bits"), [one for one in SETS if one[1] < 7])
def test_the_scale_is_near_the_best_of_a_dense_search(kind: LevelSet, bits: int) -> None:
    weight = torch.randn(3, 200, generator=torch.Generator().manual_seed(2)) ** 3
    weight[1] = 0
    levels = levels_of(kind, bits)
    scale = mse_level_scale(weight.reshape(3, 8, 5, 5), levels)
    assert scale.shape == (3,)
    for row in (0, 2):
        dense = torch.linspace(0.02, 2.0, 2000).unsqueeze(1) * weight[row].abs().max() / levels[-1]
        errors = (nearest_level(weight[row] / dense, levels) * dense - weight[row]).square().sum(1)
        unit = scale[row]
        ours = (nearest_level(weight[row] / unit, levels) * unit - weight[row]).square().sum()
        assert float(ours) <= float(errors.min()) * 1.03


def test_uniform_levels_have_the_scale_of_uniform_weights() -> None:
    weight = torch.randn(4, 64)
    found = mse_level_scale(weight, levels_of(LevelSet.UNIFORM, 4))
    expected = mse_weight_scale(weight, 4)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=0.06)


def test_which_set_suits_which_law() -> None:
    """APoT beats uniform at 4 bits, and loses on Gaussian weights at 5."""
    gauss = torch.randn(1, 100_000)
    errors = {}
    for kind in (LevelSet.UNIFORM, LevelSet.APOT):
        for bits in (4, 5):
            levels = levels_of(kind, bits)
            unit = mse_level_scale(gauss, levels)
            codes = nearest_level(gauss / unit, levels)
            errors[kind, bits] = float((codes * unit - gauss).square().mean())
    assert errors[LevelSet.APOT, 4] == pytest.approx(0.0121, rel=0.03)
    assert errors[LevelSet.APOT, 4] < errors[LevelSet.UNIFORM, 4]
    assert errors[LevelSet.APOT, 5] == pytest.approx(0.0060, rel=0.03)
    assert errors[LevelSet.APOT, 5] > errors[LevelSet.UNIFORM, 5] * 1.5


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(SpecError):
        mse_level_scale(torch.tensor([[torch.nan]]), levels_of(LevelSet.APOT, 3))
