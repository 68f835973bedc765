"""The backends fxq brings along."""

from __future__ import annotations

from .eager import EagerBackend
from .onnx import OnnxBackend

EAGER = EagerBackend()
ONNX = OnnxBackend()

CATALOG = (EAGER, ONNX)

__all__ = ["CATALOG", "EagerBackend", "OnnxBackend"]
