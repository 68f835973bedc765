"""Every example in a numerics docstring runs and gives the printed answer."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    "affine",
    "clipping",
    "aciq",
    "allocation",
    "bias_correction",
    "metrics",
    "histogram",
    "residual",
    "levels",
    "learned_clip",
    "lloyd",
    "fixed_point",
    "adaptive",
    "quantization_error",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"fxq.numerics.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
