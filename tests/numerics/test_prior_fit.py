"""The fitted law, against scipy's likelihoods of the samples themselves."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from fxq.errors import SpecError
from fxq.numerics.aciq import Prior
from fxq.numerics.histogram import Histogram
from fxq.numerics.prior_fit import fitted_prior

LAWS = {
    "laplace": (stats.laplace, Prior.LAPLACE),
    "normal": (stats.norm, Prior.GAUSS),
    "uniform": (stats.uniform, Prior.GAUSS),
    "student": (stats.t(3), Prior.LAPLACE),
}


def sample(law: str, count: int = 4000, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(LAWS[law][0].rvs(size=count, random_state=seed)).float()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_the_likelier_law_is_chosen(law: str, scale: float) -> None:
    x = sample(law) * scale + 3 * scale
    histogram = Histogram()
    histogram.update(x)
    b, sigma = histogram.abs_deviation(), histogram.std()
    mean = float(histogram.mean())
    laplace = stats.laplace(mean, float(b)).logpdf(x.double()).mean()
    gauss = stats.norm(mean, float(sigma)).logpdf(x.double()).mean()
    likelier = Prior.LAPLACE if laplace > gauss else Prior.GAUSS
    assert fitted_prior(Prior.FIT, b, sigma) is likelier is LAWS[law][1]


def test_channels_vote_by_their_likelihoods() -> None:
    ratio = {"laplace": math.sqrt(0.5), "normal": math.sqrt(2 / math.pi)}
    sigma = torch.tensor([1.0, 5.0, 0.0])
    for first, second in (("laplace", "laplace"), ("normal", "normal"), ("laplace", "normal")):
        b = torch.tensor([ratio[first], 5 * ratio[second], 0.0])
        found = fitted_prior(Prior.FIT, b, sigma)
        assert found is (Prior.GAUSS if first == "normal" else Prior.LAPLACE)


def test_what_is_not_to_be_fitted_stays() -> None:
    b, sigma = torch.tensor(0.7), torch.tensor(1.0)
    assert fitted_prior(Prior.GAUSS, b, sigma) is Prior.GAUSS
    assert fitted_prior(Prior.FIT, b * 0, sigma * 0) in (Prior.LAPLACE, Prior.GAUSS)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_bad_statistics_are_refused(bad: float) -> None:
    with pytest.raises(SpecError):
        fitted_prior(Prior.FIT, torch.tensor(bad), torch.tensor(1.0))
