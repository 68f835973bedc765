"""Biases of the simulation rounded to whole accumulator units, as kernels add them.

An 8-bit value near the middle between two codes can depend on the half unit that rounding a bias
moves it by, and what few bits make of such values grows from layer to layer. A simulation with the
biases that kernels have differs from them by the float rounding of its sums alone.
"""

from __future__ import annotations

from collections import Counter

from fxq.graph.program import Program
from fxq.integer.layers import accumulator_scale
from fxq.integer.lowering import lower_to_integers
from fxq.quant.quantizers import QuantizedLayer


def round_biases(program: Program) -> None:
    """Layers that run on integers have biases that are whole numbers of accumulator units.

    Not those whose output becomes levels (`fxq.integer.thresholds`): their thresholds are placed
    where the exact bias has them.

    Args:
        program: A program after a quantize pass; its biases are edited in place.
    """
    integers, _ = lower_to_integers(program)
    grids = integers.grids()
    calls = Counter(node.target for node in program.nodes() if node.op == "call_module")
    nodes = {node.name: node for node in program.nodes()}
    for step in integers:
        node = nodes.get(step.name)
        source = grids.get(step.inputs[0]) if step.inputs else None
        if node is None or source is None or calls[node.target] > 1:  # on scales of their own
            continue
        module = program.submodule(node)
        if not isinstance(module, QuantizedLayer):
            continue
        unit = accumulator_scale(source.scale, integers.tensor(step, "scale")).double()
        whole = integers.tensor(step, "bias").double() * unit
        module.bias_shift += (whole - module.bias.double()).float()
