"""Integer levels, against the printed lists and the construction in the paper's own fractions."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch

from fxq.errors import SpecError
from fxq.numerics.clipping import mse_weight_scale
from fxq.numerics.levels import (
    CODE_LIMIT,
    MOST_BITS,
    LevelSet,
    levels_of,
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


@pytest.mark.parametrize("terms", [1, 2])
def test_apot_levels_are_equation_5(terms: int) -> None:
    groups = [
        [Fraction(0), *(Fraction(1, 2 ** (i + step * terms)) for step in range(3))]
        for i in range(terms)
    ]
    sums = sorted(sum(choice) for choice in itertools.product(*groups))
    found = levels_of(LevelSet.APOT, 2 * terms + 1).tolist()
    assert [Fraction(level, found[-1]) for level in found] == [one / sums[-1] for one in sums]


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
