"""Compiling small networks to integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import fxq
from fxq.compiler import Result
from fxq.graph.program import LayerOverride
from fxq.recipe import Recipe


@pytest.fixture(scope="module", autouse=True)
def small_networks(one_thread: None) -> None:
    """Every test here runs on one thread."""


@pytest.fixture(scope="session")
def compiled() -> Callable[..., Result]:
    """Call it as ``compiled(model, inputs, recipe, layers=…)``; see `_compiled`."""
    return _compiled


def _compiled(
    model: nn.Module,
    inputs: Any,
    recipe: str = "minmax-int8",
    *,
    layers: dict[str, dict[str, Any]] | None = None,
    **options: Any,
) -> Result:
    """The model on engine fbgemm, calibrated on these inputs."""
    chosen = Recipe.load(recipe)
    overrides = tuple(LayerOverride(*item) for item in (layers or {}).items())
    chosen = Recipe(chosen.name, chosen.passes, layers=overrides)
    options.setdefault("engine", "fbgemm")
    return fxq.compile(model.eval(), inputs, chosen, calibration=[inputs], check=False, **options)
