from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fxq.errors import SpecError
from fxq.numerics.metrics import (
    argmax_agreement,
    cosine_similarity,
    max_abs_error,
    mse,
    sqnr_db,
)


def test_against_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 10, generator=generator)
    b = a + 0.1 * torch.randn(50, 10, generator=generator)
    assert mse(a, b) == pytest.approx(float(F.mse_loss(b, a)), rel=1e-5)
    assert max_abs_error(a, b) == pytest.approx(float((a - b).abs().max()))
    assert cosine_similarity(a, b) == pytest.approx(
        float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)), abs=1e-6
    )
    assert sqnr_db(a, b) == pytest.approx(20, abs=1)
    assert argmax_agreement(a, b) == float((a.argmax(1) == b.argmax(1)).double().mean())
    assert argmax_agreement(a, b, dim=0) <= 1


def test_uniform_quantization_gains_six_decibels_a_bit() -> None:
    x = torch.linspace(-1, 1, 100_001)
    six, seven = ((x / 2**-n).round() * 2**-n for n in (6, 7))
    assert sqnr_db(x, seven) - sqnr_db(x, six) == pytest.approx(6.02, abs=0.05)


def test_degenerate_inputs() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert sqnr_db(one, one) == math.inf
    assert sqnr_db(zero, zero) == math.inf
    assert sqnr_db(zero, one) == -math.inf
    assert math.isnan(sqnr_db(one, one * math.nan))
    assert cosine_similarity(zero, zero) == 1
    assert cosine_similarity(zero, one) == 0
    assert cosine_similarity(one, -one) == -1
    assert cosine_similarity(one.double() * 1e-200, one.double() * 1e200) == pytest.approx(1)
    for metric in (mse, sqnr_db, max_abs_error, cosine_similarity, argmax_agreement):
        with pytest.raises(SpecError):
            metric(torch.zeros(2), torch.zeros(3))
        with pytest.raises(SpecError):
            metric(torch.zeros(0), torch.zeros(0))
