"""Where in its byte each register keeps its codes.

Codes ``0 .. top`` of fewer than 8 bits need an upper bound, and a byte has one at 255 for free.
Kept at ``255 - top .. 255``, codes that a fused ReLU bounds from below need no clamp at all. The
price is a zero point that is not zero, which not every kernel reads at full speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fxq.integer.program import Instruction, IntegerProgram

MOVES = frozenset({"max_pool", "pad", "reshape", "relu", "cat"})
"""Instructions that move bytes and keep their offset."""

_BOUNDED_BY_RELU = frozenset({"conv", "conv_add", "linear", "add"})


def byte_offsets(
    program: IntegerProgram, tolerates: Callable[[Instruction], bool]
) -> dict[str, int]:
    """By how much the byte of each quantized register exceeds its code.

    Args:
        program: The program.
        tolerates: Whether an instruction reads bytes with any zero point at full speed.
    """
    grids = program.grids()
    readers = program.readers()
    offsets = {
        step.name: _shifted(step)
        if all(tolerates(reader) for reader in _final_readers(step, readers))
        else 0
        for step in program
    }
    while True:
        for step in program:
            if step.op in MOVES:
                offsets[step.name] = offsets.get(step.inputs[0], 0)
        clash = _clash(program, offsets)
        if clash is None:
            return {name: offset for name, offset in offsets.items() if grids[name] is not None}
        for name in clash:
            offsets[name] = 0


def _shifted(step: Instruction) -> int:
    bounded = step.op in _BOUNDED_BY_RELU and step.attributes.get("relu")
    if step.grid is None or not bounded or step.grid.zero_point != 0:
        return 0
    return 255 - step.grid.top


def _final_readers(
    step: Instruction, readers: dict[str, list[Instruction]]
) -> Iterator[Instruction]:
    """The instructions that compute with a register, looking through those that move it."""
    for reader in readers[step.name]:
        if reader.op in MOVES:
            yield from _final_readers(reader, readers)
        else:
            yield reader


def _clash(program: IntegerProgram, offsets: dict[str, int]) -> list[str] | None:
    """The computing registers behind a concatenation whose branches differ in offset."""
    producers = {step.name: step for step in program}
    for step in program:
        if step.op == "cat" and len({offsets[name] for name in step.inputs}) > 1:
            pending, found = list(step.inputs), []
            while pending:
                source = producers[pending.pop()]
                if source.op in MOVES:
                    pending += source.inputs
                else:
                    found.append(source.name)
            return found
    return None
