"""Residual adds that run inside the convolution before them, on engines that can.

onednn adds a second tensor to a convolution's accumulators before it rounds, which saves a pass
over both tensors (a fifth of a ResNet-50) and one rounding. The result therefore differs from the
integer reference, which rounds the addend to its own codes first, by at most that rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fxq.integer.arguments import registers_in
from fxq.integer.program import Instruction, IntegerProgram

_SHARES_MEMORY = frozenset({"reshape", "constant", "float", "module"})


def fuse_residual_adds(
    program: IntegerProgram, may_fuse: Callable[[Instruction], bool]
) -> IntegerProgram:
    """The program with ``conv_add`` instructions in place of convolutions and adds.

    Args:
        program: The program; it is not changed.
        may_fuse: Whether a convolution's kernel can add.
    """
    producers = {step.name: step for step in program}
    readers = program.readers()
    kept = set(registers_in(program.output))
    fused: dict[str, Instruction] = {}
    absorbed: set[str] = set()
    for step in program:
        conv = _absorbable(step, producers, readers, kept | absorbed, may_fuse)
        if conv is not None:
            other = next(name for name in step.inputs if name != conv.name)
            absorbed.add(conv.name)
            fused[step.name] = replace(
                conv,
                name=step.name,
                op="conv_add",
                inputs=(conv.inputs[0], other),
                attributes={**conv.attributes, "relu": step.attributes["relu"]},
                grid=step.grid,
                sources=(*conv.sources, *step.sources),
            )
    steps = [fused.get(step.name, step) for step in program if step.name not in absorbed]
    return replace(program, instructions=steps)


def may_overwrite(program: IntegerProgram, step: Instruction) -> bool:
    """Whether a ``conv_add`` is the last to need the memory of its addend."""
    source, addend = step.inputs
    if source == addend:  # a kernel may write sums before it has read all of its input
        return False
    producer = next((one for one in program if one.name == addend), None)
    if producer is None or producer.op in _SHARES_MEMORY:
        return False
    reading = [one for one in program if addend in one.inputs]
    if any(one.op == "reshape" for one in reading):
        return False
    return reading[-1] is step and addend not in set(registers_in(program.output))


def _absorbable(
    step: Instruction,
    producers: dict[str, Instruction],
    readers: dict[str, list[Instruction]],
    taken: set[str],
    may_fuse: Callable[[Instruction], bool],
) -> Instruction | None:
    """The convolution an add can run inside: the later one, read by nothing else."""
    if step.op != "add" or step.inputs[0] == step.inputs[1]:
        return None
    found = {name for name in step.inputs if name in producers}
    latest_first = [producers[name] for name in reversed(producers) if name in found]
    for conv in latest_first:
        alone = readers[conv.name] == [step] and conv.name not in taken
        if conv.op == "conv" and alone and not conv.attributes["relu"] and may_fuse(conv):
            return conv
    return None
