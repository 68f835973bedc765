"""Every example in a docstring of the command line runs and gives the printed answer."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "fxq.cli.options",
        "fxq.cli.show",
        "fxq.cli.score",
        "fxq.cli.bench",
        "fxq.cli.verify_runtimes",
        "fxq.model_file",
    ],
)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
