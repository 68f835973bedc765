"""Which layers of an integer program are exact on kernels that sum pairs of products in 16 bits."""

from __future__ import annotations

from fxq.integer.program import Grid, Instruction, IntegerProgram
from fxq.numerics.saturation import largest_pair_sum, largest_two_sum, pair_limit


def is_depthwise(program: IntegerProgram, step: Instruction) -> bool:
    """Whether every output channel of a layer reads one input channel of its own."""
    return (
        step.op != "linear" and step.attributes["groups"] == len(program.tensor(step, "weight")) > 1
    )


def is_proven(program: IntegerProgram, step: Instruction, source: Grid | None) -> bool:
    """Whether no pair of products of a layer leaves 16 bits, whatever its input is.

    Where kernels saturate bytes are not shifted, so that they are no larger than codes.

    Args:
        program: The program.
        step: The layer.
        source: The grid of its input; None for floats.
    """
    if source is None:
        return True
    largest, limit = _pair(program, step, source)
    return largest <= limit


def _pair(program: IntegerProgram, step: Instruction, source: Grid) -> tuple[int, int]:
    """The largest sum of two weights of one sign that a kernel may pair, and the largest exact."""
    weight = program.tensor(step, "weight").flatten(1)
    if is_depthwise(program, step):
        return int(largest_pair_sum(weight).max()), pair_limit(255)
    return int(largest_two_sum(weight).max()), pair_limit(source.top)


def unproven(program: IntegerProgram) -> dict[str, str]:
    """The layers that kernels without VNNI could get wrong, and why; they compute in float64 there.

    All others are proven exact on every CPU, by their weights alone (`fxq.numerics.saturation`).
    """
    grids = program.grids()
    found = {}
    for step in program:
        source = grids.get(step.inputs[0]) if step.op in ("conv", "linear") else None
        if source is None or is_proven(program, step, source):
            continue
        largest, limit = _pair(program, step, source)
        found[step.name] = (
            f"two weights add up to {largest}, and {limit} is exact without VNNI; "
            "weight_bits = 7 for this layer would be"
        )
    return found
