"""What a quantize pass says it did: which values and weights have how many bits.

Placement explains much of the difference between published scores, so it is always stated, and
from the graph that came out rather than from the options that went in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import fx, nn

from fxq.graph.ops import ANCHORS, PASS_THROUGH, Kind, Op, describe
from fxq.graph.program import Program
from fxq.quant.fixed_point_layers import FixedPointLayer
from fxq.quant.learned_layers import LearnedLayer
from fxq.quant.quantizers import QuantizedLayer

_NAMES = {
    Kind.ADD: "sum",
    Kind.MAX_POOL: "pool",
    Kind.AVG_POOL: "pool",
    Kind.GLOBAL_AVG_POOL: "pool",
    Kind.INPUT: "network input",
}
_MOVES = PASS_THROUGH | {Kind.CAT}

_Ops = dict[fx.Node, Op]


def describe_placement(program: Program, first: set[fx.Node], last: set[fx.Node]) -> str:
    """The bits of layers, and of values by what made them, in one line.

    Args:
        program: A program after a quantize pass.
        first: The layers with none before them.
        last: The layers with none after them.
    """
    ops = {node: describe(node, program.module) for node in program.nodes()}
    groups: dict[tuple[str, bool], list[fx.Node]] = {}
    for node, op in ops.items():
        if isinstance(op.module, (QuantizedLayer, LearnedLayer, FixedPointLayer)):
            key = (_operands(ops, node, op.module), node in first | last)
            groups.setdefault(key, []).append(node)
    ends = {"first": first, "last": last}
    parts = [f"{text} of {_layers(nodes, ends)}" for (text, _), nodes in groups.items()]
    values: dict[str, Counter[str]] = {}
    for what, where in _values(ops):
        values.setdefault(where, Counter())[what] += 1
    parts += [f"{_counted(found)} {where}" for where, found in values.items()]
    vary = any(_vary(_bits_of(op.module)) for op in ops.values() if op.module is not None)
    return "; ".join([*parts, *(["means, where channels have bits of their own"] if vary else [])])


# ---- layers ------------------------------------------------------------------------------------


def _operands(ops: _Ops, node: fx.Node, module: nn.Module) -> str:
    source = ops[node].inputs[0]
    while ops[source].kind in _MOVES:
        source = ops[source].inputs[0]
    weights, inputs = f"{_mean(module)}-bit", "float"
    if ops[source].kind is Kind.QUANTIZER:
        inputs = f"{_mean(ops[source].module)}-bit"
    return f"{weights} weights and " + ("inputs" if inputs == weights else f"{inputs} inputs")


def _layers(nodes: list[fx.Node], ends: dict[str, set[fx.Node]]) -> str:
    """How many layers, or which, where they are at an end of the network."""
    names = [name for name, known in ends.items() if not known.isdisjoint(nodes)]
    if not names:
        return f"{len(nodes)} layers" if len(nodes) > 1 else "1 layer"
    return f"the {' and '.join(names)} layer" + "s" * (len(nodes) > len(names))


# ---- values ------------------------------------------------------------------------------------


def _values(ops: _Ops) -> Iterator[tuple[str, str]]:
    """What no layer made, and what no layer multiplies, and its bits; in order."""
    quantized = {_origin(ops, n): op.module for n, op in ops.items() if op.kind is Kind.QUANTIZER}
    for node, op in ops.items():
        module = quantized.get(node)
        shares = op.kind is Kind.MAX_POOL and module is None  # the scale of what it reads
        if op.kind in _NAMES and not shares:
            yield _NAMES[op.kind], "in float" if module is None else f"at {_mean(module)} bits"
        elif op.kind in ANCHORS and module is not None:
            readers = _readers(ops, node)
            if readers.isdisjoint(ANCHORS):
                is_output = Kind.OUTPUT in readers
                what = "network output" if is_output else "summed or pooled output"
                yield what, f"at {_mean(module)} bits"


def _origin(ops: _Ops, node: fx.Node) -> fx.Node:
    """What made the value that a quantizer rounds; a ReLU only ends it at zero."""
    source = ops[node].inputs[0]
    while ops[source].kind is Kind.RELU:
        source = ops[source].inputs[0]
    return source


def _readers(ops: _Ops, node: fx.Node) -> set[Kind]:
    """What reads a value, looking through what moves it."""
    found: set[Kind] = set()
    for user in node.users:
        kind = ops[user].kind
        found |= _readers(ops, user) if kind in _MOVES | {Kind.QUANTIZER} else {kind}
    return found


def _counted(found: Counter[str]) -> str:
    *rest, last = [f"{count} {what}s" if count > 1 else _one(what) for what, count in found.items()]
    return f"{', '.join(rest)} and {last}" if rest else last


def _one(what: str) -> str:
    return f"the {what}" if what.startswith("network") else f"1 {what}"


# ---- bits --------------------------------------------------------------------------------------


def _bits_of(module: nn.Module) -> torch.Tensor:
    """The bits of a layer's weights or of a quantizer, by channel; empty of other modules."""
    each = getattr(module, "channel_bits", None)
    bits = getattr(module, "bits", []) if each is None else each
    return torch.as_tensor(bits).reshape(-1)


def _vary(bits: torch.Tensor) -> bool:
    return bits.numel() > 0 and int(bits.min()) < int(bits.max())


def _mean(module: nn.Module | None) -> int:
    assert module is not None
    return round(float(_bits_of(module).double().mean()))
