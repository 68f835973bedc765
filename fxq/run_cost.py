"""What a saved run costs, from the integers it holds; `fxq.cost` says how that is counted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxq.artifact import Artifact
from fxq.cost import FLOAT, FLOAT_BITS, Cost, LayerCost, noted_levels, powers_of_two
from fxq.errors import ArtifactError
from fxq.integer.ledger import LedgerEntry
from fxq.integer.program import Instruction, IntegerProgram
from fxq.integer.shapes import register_values
from fxq.trail.journal import Journal

_MOVES = frozenset({"relu", "max_pool", "pad", "reshape", "cat"})
"""Instructions that move codes."""

_CALLS = frozenset({"conv", "linear", "float", "module"})
"""Instructions that a layer becomes."""


def cost_of_run(artifact: Artifact) -> Cost:
    """What a run costs. It does not hold its float network, so sizes are those deployed.

    Raises:
        ArtifactError: It does not tell the shapes or bits of what a layer reads.
    """
    program = artifact.integers
    images = max(1, next((x.shape[0] for x in program.examples if len(x.shape) > 1), 1))
    shapes = {
        name: tuple(size.constant for size in value.shape)
        for name, value in register_values(program, dynamic=False).items()
        if value.shape is not None
    }
    steps = {step.name: step for step in program}
    calls = {source: step for step in program if step.op in _CALLS for source in step.sources}
    levels = _level_sets(artifact.journal)
    layers = [
        _layer_cost(program, steps, entry, calls.get(entry.node), shapes, levels, images)
        for entry in artifact.ledger.entries
        if entry.layer
    ]
    return Cost(tuple(layers), deployed_bytes=artifact.size_after)


def _layer_cost(
    program: IntegerProgram,
    steps: dict[str, Instruction],
    entry: LedgerEntry,
    step: Instruction | None,
    shapes: dict[str, tuple[int, ...]],
    levels: dict[str, str],
    images: int,
) -> LayerCost:
    if step is None:
        raise _untold(entry, "which instruction computes a layer")
    read, made = shapes.get(step.inputs[0]), shapes.get(step.name)
    if read is None or made is None or "weight" not in step.tensors:
        raise _untold(entry, "the shapes of a layer")
    weight = program.tensor(step, "weight")
    if entry.op.startswith("ConvTranspose"):  # each input element meets one input channel's weights
        macs = math.prod(read) * weight[0].numel()
    else:
        macs = math.prod(made) * weight[0].numel()
    bits = values = powers = torch.tensor([FLOAT_BITS])
    kind = FLOAT
    if "bits" in step.tensors:
        kind = levels.get(entry.node, "uniform")
        bits, values = program.tensor(step, "bits"), _value_bits(program, steps, entry, step)
        powers = torch.tensor([powers_of_two(kind, int(width)) for width in bits])
    return LayerCost.counted(
        entry.path or entry.node,
        "linear" if entry.op == "Linear" else "conv",
        made[1:] if len(made) > 1 else made,
        macs // images,
        levels=kind,
        bits=bits,
        powers=powers,
        values=values,
        groups=int(step.attributes.get("groups", 1)),
        weights=weight.numel(),
    )


def _value_bits(
    program: IntegerProgram, steps: dict[str, Instruction], entry: LedgerEntry, step: Instruction
) -> Tensor:
    """``[1]``: the bits of the codes that a layer reads."""
    source = steps.get(step.inputs[0])
    while source is not None and source.op in _MOVES:
        source = steps.get(source.inputs[0])
    if source is None or source.grid is None:
        raise _untold(entry, "the bits of a value that is computed in float")
    if source.op == "lookup":  # its codes are levels, of which there are fewer than codes
        return torch.tensor([_bits_for(program.tensor(source, "table"))])
    return torch.tensor([source.grid.bits])


def _bits_for(table: Tensor) -> int:
    """The bits that tell the levels of a table apart."""
    return (len(set(table.tolist())) - 1).bit_length()


def _level_sets(journal: Journal | None) -> dict[str, str]:
    """What the weights of layers are chosen from, as a quantize pass noted last; by node."""
    found: dict[str, str] = {}
    for step in journal or ():
        for record in step.after.nodes:
            noted = [levels for word in record.facts if (levels := noted_levels(word))]
            found |= {record.name: noted[-1]} if noted else {}
    return found


def _untold(entry: LedgerEntry, what: str) -> ArtifactError:
    return ArtifactError(
        f"the run does not tell {what}",
        where=entry.path or entry.node,
        hint="count the network instead: fxq cost MODEL -r RECIPE",
    )
