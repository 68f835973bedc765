"""Which layers may lose a product on this CPU, and how they are computed there instead.

Kernels without VNNI instructions add pairs of products in a saturating int16. A layer whose weights
prove that no pair leaves it is given to them all the same; any other is computed in float64, as the
reference computes it: slow, and equal on every CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fxq.integer.program import Instruction, IntegerProgram
from fxq.integer.reference import Reference
from fxq.integer.saturation import is_depthwise
from fxq.numerics.saturation import largest_pair_sum, pair_limit

from . import _kernels as kernels


def may_saturate(engine: str) -> bool:
    """Whether a kernel that an engine gives a layer sums pairs of products in 16 bits here."""
    used = {"fbgemm", engine} & {"fbgemm", "onednn"}
    return not all(map(kernels.is_exact, used.intersection(kernels.supported_engines())))


def depthwise_saturates(program: IntegerProgram, step: Instruction) -> bool:
    """Whether fbgemm would take a depthwise kernel, and that could leave 16 bits on any CPU."""
    if not is_depthwise(program, step):
        return False
    weight = program.tensor(step, "weight")
    worst = int(largest_pair_sum(weight.flatten(1)).max())
    return worst > pair_limit(255) and not kernels.sees_only_padding(weight, step.attributes)


def exact_layer(
    program: IntegerProgram, step: Instruction
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What gives a layer's codes, or floats, from the codes of its input."""
    reference = Reference(program)
    return lambda codes: reference.step(step, {step.inputs[0]: codes})
