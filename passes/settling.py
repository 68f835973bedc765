"""Scales of residual sums, settled so that every way to compute the sums gives the same codes.

What decides is in `fxq.numerics.residual`. A sum's own scale is what moves, by a few parts in
100,000; the scales of its addends are given. A sum may be an addend of a later one, so sums are
settled in the order they are computed, and what took part in a settled sum does not move again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxq.graph.ops import PASS_THROUGH, Kind, describe
from fxq.graph.program import Program, facts
from fxq.graph.rewrite import Editor
from fxq.numerics.residual import Codes, agreeing_scale
from fxq.quant.quantizers import ActivationQuantizer

_KEEPS_SCALE = PASS_THROUGH | {Kind.CAT}
"""What gives its output the scale of its inputs."""


@dataclass(frozen=True)
class _Sum:
    """A residual add on integers.

    Attributes:
        addends: The quantizers of what is added.
        total: The quantizer of the sum.
        relu: Whether a fused ReLU comes before it.
    """

    addends: tuple[ActivationQuantizer, ActivationQuantizer]
    total: ActivationQuantizer
    relu: bool

    def agreeing_scale(self) -> float | None:
        """The nearest scale of the sum at which its codes do not depend on the kernel."""
        left, right = (_codes(one) for one in self.addends)
        return agreeing_scale(left, right, _codes(self.total, self.relu))


def settle_sums(program: Program, edit: Editor) -> None:
    """Every residual sum between per-tensor quantizers has codes that all kernels agree on.

    One for which no such scale is near, or whose scale is needed as it is by an earlier sum, keeps
    its scale and is named as a miss.
    """
    settled: set[ActivationQuantizer] = set()
    for node in edit.visit():
        found = _sum_at(program, node)
        if found is None:
            continue
        scale = found.agreeing_scale()
        fixed = found.total in settled or found.total in found.addends
        if scale is None:
            edit.miss(node, "no scale nearby makes its codes the same in every kernel")
        elif fixed and scale != float(found.total.scale):
            edit.miss(node, "its scale is needed by another sum, so kernels may differ in ties")
        else:
            found.total.scale = torch.full_like(found.total.scale, scale)
            settled |= {found.total, *found.addends}


def _sum_at(program: Program, node: fx.Node) -> _Sum | None:
    """The residual add a node computes, where all its scales are per tensor."""
    op = describe(node, program.module)
    if op.kind is not Kind.ADD:
        return None
    left, right = (_quantizer_of(program, source) for source in op.inputs)
    relu = facts(node).fused_relu
    point = program.node(relu) if relu is not None else node
    readers = list(point.users)
    total = _per_tensor(program, readers[0]) if len(readers) == 1 else None
    if left is None or right is None or total is None:
        return None
    return _Sum((left, right), total, relu is not None)


def _quantizer_of(program: Program, node: fx.Node) -> ActivationQuantizer | None:
    """The quantizer whose codes a node's value consists of."""
    op = describe(node, program.module)
    while op.kind in _KEEPS_SCALE and op.inputs:
        node = op.inputs[0]
        op = describe(node, program.module)
    return _per_tensor(program, node)


def _per_tensor(program: Program, node: fx.Node) -> ActivationQuantizer | None:
    module = program.submodule(node)
    return module if isinstance(module, ActivationQuantizer) and not module.per_channel else None


def _codes(quantizer: ActivationQuantizer, relu: bool = False) -> Codes:
    return Codes(float(quantizer.scale), int(quantizer.zero_point), quantizer.bits, relu)
