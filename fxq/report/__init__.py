"""One self-contained page about a run: its passes, its graph step by step, and every node."""

from fxq.report.page import write

__all__ = ["write"]
