"""A squared error, split into parts that add up to it.

Papers:
    Shapley, "A value for n-person games", 1953 (the only symmetric split that adds up).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.errors import SpecError


def error_parts(stages: Sequence[Tensor]) -> list[float]:
    """Which step between the first stage and the last one made how much of the squared distance.

    With the steps ``d_i = s_i - s_(i-1)`` and their sum ``d``, part i is ``<d_i, d>``. The parts
    add up to ``|d|**2``, because the steps add up to ``d``. Each is the step's own square plus half
    of every cross term it takes part in, which is its Shapley value; it is negative where the step
    undoes more of the others than it adds.

    Args:
        stages: At least two tensors of one shape: the reference, then what it becomes step by step.

    Returns:
        One part per step, in the units of the tensors, squared; summed in float64.

    Raises:
        SpecError: Fewer than two stages, or their shapes differ.

    Example:
        >>> error_parts([torch.zeros(2), torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])])
        [9.0, 16.0]
        >>> error_parts([torch.zeros(1), torch.tensor([3.0]), torch.tensor([1.0])])
        [3.0, -2.0]
    """
    if len(stages) < 2 or any(one.shape != stages[0].shape for one in stages):
        shapes = ", ".join(str(list(one.shape)) for one in stages)
        raise SpecError(f"an error goes between stages of one shape, not {shapes or 'none'}")
    exact = [one.detach().to(torch.float64).flatten() for one in stages]
    total = exact[-1] - exact[0]
    return [float((after - before) @ total) for before, after in itertools.pairwise(exact)]
