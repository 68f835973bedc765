"""`ProbeValues`: every value of a program on its probe batch, and how far a pass moved each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxq.graph.mixture import reads_of, stand_ins
from fxq.graph.program import Program
from fxq.trail.drift import Drift

LARGEST = 2**20
"""Of a value with more elements, about so many are kept, evenly spaced."""


@dataclass(frozen=True)
class ProbeValues:
    """What a program computes on its probe batch, node by node.

    Attributes:
        reads: By node, the nodes it reads.
        values: By node, its value; only those that are one tensor of floating-point numbers.
        output: The output, whatever it is.
    """

    reads: Mapping[str, Sequence[str]]
    values: Mapping[str, Tensor]
    output: Any = None

    @classmethod
    def of(cls, program: Program) -> ProbeValues:
        """The values of a program as it is now."""
        run = _Kept(program.module)
        with torch.no_grad():
            output = run.run(*program.laid_out(program.probe))
        return cls(reads_of(program.graph), run.values, output)

    def moved_from(self, before: ProbeValues) -> dict[str, Drift]:
        """How far each value is from the one that its readers read before.

        A convolution that a batch norm was folded into is compared with that batch norm, an
        inserted quantizer with the value it rounds (`fxq.graph.mixture`).

        Returns:
            By node, in order; without values that are the same to the last bit, and without those
            that nothing before them of their shape stands for.

        Example:
            >>> reads = {"x": (), "y": ("x",)}
            >>> one, two = torch.ones(4), torch.full((4,), 1.125)
            >>> before = ProbeValues(reads, {"x": one, "y": one})
            >>> moved = ProbeValues(reads, {"x": one, "y": two}).moved_from(before)
            >>> {name: drift.short() for name, drift in moved.items()}
            {'y': [18.06, 0.125]}
        """
        found = {}
        for name, was in stand_ins(before.reads, self.reads).items():
            want, have = before.values.get(was), self.values.get(name)
            if want is None or have is None or want.shape != have.shape:
                continue
            if not torch.equal(want, have):
                found[name] = _drift(want, have)
        return found


class _Kept(fx.Interpreter):
    """A run that keeps the values of its nodes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        value = super().run_node(n)
        if n.op != "output" and isinstance(value, Tensor) and value.is_floating_point():
            self.values[n.name] = _thinned(value)
        return value


def _thinned(value: Tensor) -> Tensor:
    """The value, or some of its elements; their distance is odd, to meet every channel."""
    stride = value.numel() // LARGEST
    return value if stride == 0 else value.flatten()[:: stride | 1].clone()


def _drift(want: Tensor, have: Tensor) -> Drift:
    """How far two tensors that are not equal are apart; equal infinities are no difference."""
    error = have - want
    noise, signal = (float(one.norm()) for one in (error, want))
    if not (0 < noise < math.inf and 0 < signal < math.inf):
        error = torch.where(want == have, 0.0, have.double() - want.double())
        noise = float(error.norm())
        signal = float(want.double().where(want.isfinite(), 0.0).norm())
    if not math.isfinite(noise):
        return Drift(-math.inf, math.inf)
    sqnr = math.inf if noise == 0 else 20 * math.log10(signal / noise) if signal else -math.inf
    low, high = error.aminmax()
    return Drift(sqnr, max(-float(low), float(high)))
