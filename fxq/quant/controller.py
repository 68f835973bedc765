"""`Controller`: which fixed-point numbers a tensor of a training step is rounded to.

Paper: Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020, algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxq.errors import SpecError, TrainingError
from fxq.numerics.adaptive import (
    Adaptation,
    AdaptationOptions,
    adjusted,
    advance,
    is_due,
    is_within,
)
from fxq.products.elementwise import rounded_sum, statistics

NO_RANGE = -1e30
"""Stands in the state for a range of nothing, -inf: checkpoints hold finite numbers."""


class Controller(nn.Module):
    """Chooses bits and resolution of a tensor, and when to choose again.

    In training each call is a step. A value that the resolution of now would clip makes a step one
    that chooses: in the paper it stays clipped until the next one, and where a range grows fast,
    as in the first steps of a training, that is enough to make a network diverge. In eval mode
    nothing is learned; before the first step of a training it chooses for each tensor anew. Under a
    process group of torch.distributed, all processes decide by the statistics of all.

    Args:
        options: How to choose.

    Attributes:
        state: ``[7]`` float64: an `Adaptation` as numbers.
    """

    state: Tensor

    def __init__(self, options: AdaptationOptions) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("state", _encoded(Adaptation.start(options)))
        self.is_watching = True

    def adaptation(self) -> Adaptation:
        """What is known of the tensor."""
        numbers = self.state.tolist()
        return Adaptation.from_numbers([-math.inf if n == NO_RANGE else n for n in numbers])

    def choose(self, x: Tensor, mask: Tensor | None = None) -> tuple[int, int]:
        """Bits and exponent for a tensor; 32 bits where it is to stay in float.

        Args:
            x: ``[...]`` float32.
            mask: Of the same shape: where it is not above zero, ``x`` counts as zero.

        Raises:
            TrainingError: It holds NaN or infinite values.
        """
        known = self.adaptation()
        if not self.is_watching or (not self.training and known.adjustments) or x.numel() == 0:
            return known.bits, known.exponent
        shared = self.training and dist.is_available() and dist.is_initialized()
        largest, total = statistics(x, mask)
        if shared:
            largest, total = _over_processes(largest, dist.ReduceOp.MAX), _over_processes(total)
        if not is_due(known) and is_within(known, largest):
            state = advance(known)
        else:
            state = self._adjusted(known, x, mask, largest, total, shared)
        if self.training:
            self.state.copy_(_encoded(state))
        return state.bits, state.exponent

    def _adjusted(
        self,
        known: Adaptation,
        x: Tensor,
        mask: Tensor | None,
        largest: float,
        total: float,
        shared: bool,
    ) -> Adaptation:
        def rounded(bits: int, exponent: int) -> float:
            own = rounded_sum(x, exponent, bits, mask)
            return _over_processes(own) if shared else own

        try:
            return adjusted(known, self.options, largest, total, rounded)
        except SpecError as error:
            raise TrainingError(
                f"a tensor to be quantized holds NaN or infinite values (largest: {largest})"
            ) from error

    def begin(self, initial_steps: int) -> None:
        """So many first steps all choose anew."""
        self.options = replace(self.options, initial_steps=initial_steps)

    def extra_repr(self) -> str:
        """Shown in the module's repr."""
        known = self.adaptation()
        return f"{known.bits} bits of 2**{known.exponent}, chosen {known.adjustments} times"


def _encoded(state: Adaptation) -> Tensor:
    numbers = [max(number, NO_RANGE) for number in state.to_numbers()]
    return torch.tensor(numbers, dtype=torch.float64)


def _over_processes(value: float, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> float:
    shared = torch.tensor(value, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        shared = shared.cuda()
    dist.all_reduce(shared, operation)
    return float(shared)
