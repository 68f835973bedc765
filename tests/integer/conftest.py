"""Compiling small networks to integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fxq
from fxq.compiler import Result
from fxq.graph.program import LayerOverride
from fxq.recipe import Recipe


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks are quicker on one thread, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
