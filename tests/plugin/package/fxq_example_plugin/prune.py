"""prune-weights: the smallest weights of every convolution and linear are zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fxq.contracts import Contract
from fxq.errors import SpecError
from fxq.graph.ops import ANCHORS, describe
from fxq.graph.program import Program
from fxq.graph.rewrite import Editor
from fxq.pipeline import Pass


@dataclass(frozen=True)
class PruneWeights(Pass):
    """The smallest weights of every convolution and linear are zero.

    Args:
        share: How many of a layer's weights, 0 to 1.
    """

    name: ClassVar[str] = "prune-weights"
    contract: ClassVar[Contract] = Contract.CHANGES_NUMBERS

    share: float = 0.25

    def apply(self, program: Program, edit: Editor) -> None:
        """Each layer's weights below its own quantile are zero."""
        if not 0 <= self.share <= 1:
            raise SpecError(f"share must be 0 to 1, not {self.share}")
        for node in edit.visit():
            op = describe(node, program.module)
            layer: Any = op.module
            if op.kind not in ANCHORS:
                continue
            if layer.weight.numel() < 10:
                edit.miss(node, "it has fewer than 10 weights")
                continue
            smallest = layer.weight.abs().flatten().sort().values
            limit = smallest[min(int(self.share * len(smallest)), len(smallest) - 1)]
            layer.weight[layer.weight.abs() < limit] = 0
            edit.hit(node)
