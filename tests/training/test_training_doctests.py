"""Every example in a docstring of the training runs and gives the printed answer."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["checkpoint", "data", "log", "loop", "optimizer", "options", "schedule"]
)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"fxq.training.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
