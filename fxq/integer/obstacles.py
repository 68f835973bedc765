"""What stands between a program and integers: the nodes no backend can lower."""

from __future__ import annotations

from torch import fx

from fxq.backend import Obstacle
from fxq.graph.ops import PASS_THROUGH, Kind, describe
from fxq.graph.program import Program
from fxq.quant.dynamic import DynamicAciqQuantizer
from fxq.quant.observers import Observer
from fxq.quant.quantizers import ActivationQuantizer, QuantizedLayer

_SIMULATE = "write simulation = true in the recipe to compute in float what has no kernel"
_PER_CHANNEL = (
    "quantizes activations per channel, which integer kernels cannot multiply; set per_channel = "
    "false on insert-observers, or compile for the onnx backend, which computes such layers in "
    f"float, or {_SIMULATE}"
)
_DYNAMIC = (
    "quantizes over a range found at run time, which integer kernels cannot; set dynamic = false "
    f"on quantize-aciq, or {_SIMULATE}"
)
_READS_FLOAT = (
    "multiplies its integers by an input that is not quantized; set placement = integer on "
    f"insert-observers, or {_SIMULATE}"
)


def obstacles(program: Program, *, per_channel: bool = False) -> list[Obstacle]:
    """What in a program has no integer form and is not float either: a simulation only.

    Args:
        program: The program; where it is a simulation by its recipe, only observers are left.
        per_channel: Whether the backend computes in float what is quantized per channel.
    """
    found = ((node, _obstacle(program, node)) for node in program.nodes())
    allowed = {"", *((_PER_CHANNEL,) if per_channel else ())}
    if program.simulation:
        allowed |= {_PER_CHANNEL, _DYNAMIC, _READS_FLOAT}
    return [Obstacle(node.name, why) for node, why in found if why not in allowed]


def _obstacle(program: Program, node: fx.Node) -> str:
    module = program.submodule(node)
    if isinstance(module, Observer):
        return "is an observer; run a quantize pass first"
    if isinstance(module, DynamicAciqQuantizer):
        return _DYNAMIC
    if isinstance(module, ActivationQuantizer) and module.per_channel:
        return _PER_CHANNEL
    if isinstance(module, QuantizedLayer) and not _reads_quantized(program, node):
        return _READS_FLOAT
    return ""


def _reads_quantized(program: Program, node: fx.Node) -> bool:
    """Whether what a node reads was quantized, directly or before it was moved."""
    op = describe(node.all_input_nodes[0], program.module)
    while op.kind in PASS_THROUGH | {Kind.CAT}:
        op = describe(op.inputs[0], program.module)
    return op.kind is Kind.QUANTIZER
