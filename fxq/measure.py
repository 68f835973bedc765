"""How good a network is as one number: what sensitivities and bisections compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fxq.calibration import on_cpu
from fxq.contracts import output_sqnr
from fxq.errors import CalibrationError

Metric = Callable[[nn.Module], float]
"""How good a network is; more is better."""


class OutputSqnr:
    """A metric: the signal-to-noise ratio of a network's output over all batches together, in dB.

    Args:
        model: The float network.
        batches: Inputs: a tensor, or a tuple with one entry per argument.

    Raises:
        CalibrationError: There are no batches.

    Example:
        >>> metric = OutputSqnr(nn.Identity(), [torch.tensor([1.0, -1.0])])
        >>> round(metric(nn.Hardtanh(-0.9, 0.9)), 1), metric(nn.Identity())
        (20.0, inf)
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        self._batches = [
            tuple(on_cpu(batch if isinstance(batch, (tuple, list)) else (batch,)))
            for batch in batches
        ]
        if not self._batches:
            raise CalibrationError("there are no inputs to measure the SQNR on")
        with torch.no_grad():
            self._wanted = [model(*batch) for batch in self._batches]

    def __call__(self, module: nn.Module) -> float:
        """The ratio for a network."""
        with torch.no_grad():
            return output_sqnr(self._wanted, [module(*batch) for batch in self._batches])
