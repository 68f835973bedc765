"""The backends fxq brings along."""

from __future__ import annotations

from .eager import EagerBackend

EAGER = EagerBackend()

CATALOG = (EAGER,)

__all__ = ["CATALOG", "EagerBackend"]
