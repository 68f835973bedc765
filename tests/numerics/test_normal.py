"""Ranges of normal values and what a ReLU makes of them, against quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from fxq.errors import SpecError
from fxq.numerics.normal import normal_range, rectified_normal


@pytest.mark.parametrize("mean", [-5.0, -0.7, 0.0, 0.3, 4.0])
@pytest.mark.parametrize("std", [0.1, 1.0, 3.0])
def test_rectified_normal_against_integrals(mean: float, std: float) -> None:
    law = stats.norm(mean, std)
    span = (max(0.0, mean - 12 * std), max(0.0, mean) + 12 * std)
    first = integrate.quad(lambda x: x * law.pdf(x), *span)[0]
    second = integrate.quad(lambda x: x * x * law.pdf(x), *span)[0]
    found = rectified_normal(torch.tensor(mean), torch.tensor(std))
    assert float(found[0]) == pytest.approx(first, rel=1e-5, abs=1e-9)
    assert float(found[1]) == pytest.approx(math.sqrt(second - first**2), rel=1e-5, abs=1e-8)


def test_a_constant_channel() -> None:
    mean, std = rectified_normal(torch.tensor([-2.0, 0.0, 3.0]), torch.zeros(3))
    assert mean.tolist() == [0, 0, 3]
    assert std.tolist() == [0, 0, 0]


def test_the_range_is_that_of_the_widest_channels() -> None:
    mean, std = torch.tensor([0.0, 5.0, -1.0]), torch.tensor([2.0, 0.0, 0.5])
    assert [end.item() for end in normal_range(mean, std, 2.0)] == [-4.0, 5.0]
    for deviations in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(SpecError):
            normal_range(mean, std, deviations)
