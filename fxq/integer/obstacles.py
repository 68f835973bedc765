"""What stands between a program and integers: the nodes no backend can lower."""

from __future__ import annotations

from fxq.backend import Obstacle
from fxq.graph.program import Program
from fxq.quant.observers import Observer
from fxq.quant.quantizers import ActivationQuantizer


def obstacles(program: Program, *, per_channel: bool = False) -> list[Obstacle]:
    """What in a program has no integer form and is not float either: a simulation only.

    Args:
        program: The program.
        per_channel: Whether the backend computes in float what is quantized per channel.
    """
    found = []
    for node in program.nodes():
        module = program.submodule(node)
        if isinstance(module, Observer):
            found.append(Obstacle(node.name, "is an observer; run a quantize pass first"))
        elif isinstance(module, ActivationQuantizer) and module.per_channel and not per_channel:
            found.append(
                Obstacle(
                    node.name,
                    "quantizes activations per channel, which integer kernels cannot multiply; "
                    "set per_channel = false on insert-observers, or compile for the onnx backend, "
                    "which computes such layers in float",
                )
            )
    return found
