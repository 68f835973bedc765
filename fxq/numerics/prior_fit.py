"""Which of ACIQ's laws observed values follow, from two statistics of them."""

from __future__ import annotations

import math

from torch import Tensor

from fxq.errors import SpecError
from fxq.numerics.aciq import Prior

EQUALLY_LIKELY = math.sqrt(math.pi / (2 * math.e))
"""The ratio of mean absolute to standard deviation at which both laws explain the values alike."""


def fitted_prior(prior: Prior, b: Tensor, sigma: Tensor) -> Prior:
    """The prior itself, or for FIT the law under which the observed values are likelier.

    With the law's scale set to what was observed, the mean log-likelihood is -1 - log(2 b) for
    Laplace and -1/2 - log(sigma sqrt(2 pi)) for Gauss, whatever the values: Laplace is likelier
    exactly where b / sigma < sqrt(pi / (2 e)) = 0.760 (it is 0.707 for Laplace data and 0.798 for
    Gaussian data). Over channels the log-likelihoods are added up; constant ones do not count.

    Args:
        prior: What was asked for.
        b: [C] or []; mean|x - mean(x)|, in units of the tensor.
        sigma: Like `b`; the standard deviation.

    Raises:
        SpecError: A statistic is NaN, infinite or negative.

    Example:
        >>> import torch
        >>> fitted_prior(Prior.FIT, torch.tensor(0.798), torch.tensor(1.0)).value
        'gauss'
    """
    if prior is not Prior.FIT:
        return prior
    if not bool((b.isfinite() & sigma.isfinite() & (b >= 0) & (sigma >= 0)).all()):
        raise SpecError("a spread is NaN, infinite or negative", hint="was the observer fed?")
    spread, deviation = b.reshape(-1).double(), sigma.reshape(-1).double()
    varies = (spread > 0) & (deviation > 0)
    excess = (spread[varies] / deviation[varies]).log() - math.log(EQUALLY_LIKELY)
    return Prior.LAPLACE if float(excess.sum()) < 0 else Prior.GAUSS
