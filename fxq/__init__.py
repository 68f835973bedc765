"""fxq: a graph-rewriting model compiler on torch.fx that quantizes neural networks.

Importing fxq is cheap: torch and the wings (passes, backends, models_zoo, cli) are loaded when
something that needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxq import plot, report
    from fxq.artifact import Artifact, load
    from fxq.attribution import attribute
    from fxq.compiler import Result, compile, lower
    from fxq.errors import FxqError
    from fxq.graph.capture import capture
    from fxq.graph.program import Program
    from fxq.parts.compilation import PartialResult, compile_parts
    from fxq.parts.folder import load_parts
    from fxq.parts.survey import find_parts
    from fxq.pipeline import Pass, Pipeline
    from fxq.recipe import Recipe
    from fxq.trail.journal import Journal

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "fxq.artifact",
    "load": "fxq.artifact",
    "attribute": "fxq.attribution",
    "Result": "fxq.compiler",
    "compile": "fxq.compiler",
    "lower": "fxq.compiler",
    "FxqError": "fxq.errors",
    "capture": "fxq.graph.capture",
    "Program": "fxq.graph.program",
    "PartialResult": "fxq.parts.compilation",
    "compile_parts": "fxq.parts.compilation",
    "load_parts": "fxq.parts.folder",
    "find_parts": "fxq.parts.survey",
    "Pass": "fxq.pipeline",
    "Pipeline": "fxq.pipeline",
    "Recipe": "fxq.recipe",
    "Journal": "fxq.trail.journal",
}
_MODULES = ("plot", "report")

__all__ = [
    "Artifact",
    "FxqError",
    "Journal",
    "PartialResult",
    "Pass",
    "Pipeline",
    "Program",
    "Recipe",
    "Result",
    "__version__",
    "attribute",
    "capture",
    "compile",
    "compile_parts",
    "find_parts",
    "load",
    "load_parts",
    "lower",
    "plot",
    "report",
]


def __getattr__(name: str) -> Any:
    """The public object or module of that name, imported on first use."""
    if name in _MODULES:
        return importlib.import_module(f"fxq.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fxq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
