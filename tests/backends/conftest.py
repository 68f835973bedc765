"""Compiling a network and counting where a backend leaves the integer reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxq
from fxq.backends.eager import EagerModule
from fxq.compiler import Result
from fxq.graph.program import LayerOverride
from fxq.integer.program import IntegerProgram
from fxq.integer.reference import Reference
from fxq.recipe import Recipe


@pytest.fixture(scope="module", autouse=True)
def small_networks(one_thread: None) -> None:
    """Every test here runs on one thread."""


@pytest.fixture(scope="session")
def integers() -> Callable[..., Result]:
    """Call it as ``integers(model, inputs, recipe, settings)``; see `_compiled`."""
    return _compiled


@pytest.fixture(scope="session")
def mismatches() -> Callable[..., dict[str, int]]:
    """Call it as ``mismatches(program, *inputs)``; see `_mismatches`."""
    return _mismatches


def _compiled(
    model: nn.Module,
    inputs: torch.Tensor | tuple[torch.Tensor, ...],
    recipe: str = "minmax-int8",
    settings: tuple[str, ...] = (),
    *,
    engine: str = "fbgemm",
    layers: dict[str, dict[str, Any]] | None = None,
    check: bool = False,
    **options: Any,
) -> Result:
    """The model compiled on these inputs, which are also its calibration data."""
    chosen = Recipe.load(recipe)
    if layers:
        overrides = tuple(LayerOverride(*item) for item in layers.items())
        chosen = Recipe(chosen.name, chosen.passes, layers=overrides)
    return fxq.compile(
        model.eval(),
        inputs,
        chosen,
        calibration=[inputs],
        settings=settings,
        engine=engine,
        check=check,
        **options,
    )


def _mismatches(
    program: IntegerProgram, *inputs: torch.Tensor, engine: str = "fbgemm"
) -> dict[str, int]:
    """In how many elements each register differs from the reference; only those that do."""
    program.check()
    _, expected = Reference(program).run(*inputs)
    found = EagerModule(program, engine).registers(*inputs)
    assert found.keys() == expected.keys()
    counts = {name: _differing(found[name], expected[name]) for name in expected}
    return {name: count for name, count in counts.items() if count}


def _differing(found: Any, expected: Any) -> int:
    if isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        return sum(_differing(a, b) for a, b in zip(found, expected, strict=True))
    if not isinstance(expected, torch.Tensor):
        return int(found != expected)
    assert found.shape == expected.shape
    return int((found.to(expected.dtype) != expected).sum())
