"""The clips of the least squared error, against integration over every level and dense search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxq.errors import CalibrationError
from fxq.numerics.histogram import Histogram
from fxq.numerics.learned_clip import least_error_clip, normal_clip
from fxq.numerics.levels import LevelSet, levels_of, magnitudes
from fxq.numerics.lloyd import lloyd_levels, normal_lloyd_levels


def errors_of(values: Tensor, mass: Tensor, levels: Tensor, clips: Tensor) -> Tensor:
    """[clips]: the mean squared error, each value at its nearest level."""
    units = (clips / int(levels[-1])).reshape(-1, 1, 1)
    distance = (values.double().reshape(1, -1, 1) - levels * units).abs().amin(2)
    return distance.square() @ mass.double() / mass.sum()


@pytest.mark.parametrize(
    ("bits", "clip", "error"),
    [(2, 1.22, 0.1902), (3, 2.07, None), (4, 2.63, 0.0121), (5, 3.36, 0.0060)],
)
def test_known_clips_of_normal_weights(bits: int, clip: float, error: float | None) -> None:
    """2 bits: Max 1960, Table I, 3 levels; the others integrated once by other code."""
    levels = levels_of(LevelSet.APOT, bits)
    assert normal_clip(levels) == pytest.approx(clip, abs=0.006)
    grid = torch.linspace(0, 8, 8001)
    found = errors_of(grid, torch.exp(-0.5 * grid.double().square()), levels, torch.tensor([clip]))
    if error is not None:
        assert found.item() == pytest.approx(error, rel=5e-3)


@pytest.mark.parametrize(
    "levels",
    [
        magnitudes(LevelSet.UNIFORM, 3),
        magnitudes(LevelSet.POT, 3),
        magnitudes(LevelSet.APOT, 4),
        magnitudes(LevelSet.UNIFORM, 6),
    ],
    ids=["uniform-3", "pot-3", "apot-4", "uniform-6"],
)
def test_no_other_clip_suits_normal_values_better(levels: Tensor) -> None:
    grid = torch.linspace(0, 8, 801)
    mass = torch.exp(-0.5 * grid.double().square())
    clips = torch.linspace(0.5, 7, 200).double()
    every = errors_of(grid, mass, levels, clips)
    ours = errors_of(grid, mass, levels, torch.tensor([normal_clip(levels)]).double())
    assert ours.item() <= float(every.min()) * (1 + 2e-3)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", [LevelSet.UNIFORM, LevelSet.APOT, LevelSet.POT])
def test_least_error_over_a_histogram(kind: LevelSet, signed: bool) -> None:
    sample = torch.randn(10_000, generator=torch.Generator().manual_seed(4)) ** 3
    seen = Histogram()
    seen.update(sample)
    edges, mass = seen.edges()[0], seen.counts[0]
    levels = magnitudes(kind, 4)
    clip = least_error_clip((edges[1:] + edges[:-1]) / 2, mass, levels, signed=signed)
    values = sample.abs() if signed else sample.clamp(min=0)
    clips = torch.linspace(0.02, 1, 50).double() * float(values.max())
    every = errors_of(values, torch.ones(10_000), levels, clips)
    ours = errors_of(values, torch.ones(10_000), levels, torch.tensor([clip]).double())
    assert ours.item() <= float(every.min()) * 1.005


def test_lloyd_levels_bring_their_clip() -> None:
    found = normal_lloyd_levels(8)
    assert normal_clip(found.levels) == pytest.approx(found.alpha, rel=0.01)
    values = torch.rand(4000, generator=torch.Generator().manual_seed(4))
    own = lloyd_levels(values, torch.ones(4000), 8)
    clip = least_error_clip(values, torch.ones(4000), own.levels, signed=False)
    assert clip == pytest.approx(own.alpha, rel=0.01)


def test_one_value_is_met_exactly() -> None:
    clip = least_error_clip(torch.tensor([3.0]), torch.ones(1), torch.tensor([0, 1]), signed=True)
    assert clip == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize(
    ("values", "mass", "signed"),
    [([], [], True), ([0.0], [5], True), ([1.0, -2.0], [0, 3], False), ([torch.nan], [1], True)],
)
def test_values_without_a_clip(values: list[float], mass: list[int], signed: bool) -> None:
    with pytest.raises(CalibrationError):
        least_error_clip(
            torch.tensor(values), torch.tensor(mass), torch.tensor([0, 1]), signed=signed
        )
