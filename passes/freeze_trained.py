"""freeze-trained: what was trained becomes fixed integers, ready to be lowered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fxq.contracts import Contract
from fxq.graph.program import Program
from fxq.graph.rewrite import Editor
from fxq.graph.verify import verify
from fxq.integer.bias_rounding import round_biases
from fxq.pipeline import Pass
from fxq.quant.learned import Learned

from .settling import settle_sums


@dataclass(frozen=True)
class FreezeTrained(Pass):
    """Trained layers hold integer weights, their batch norms folded; clips have become scales.

    `fxq.lower` runs it on a copy of a training module. The numbers change by rounding alone: scales
    keep 16 significant bits, batch norms are folded in float64, and biases become whole numbers of
    what kernels add up.
    """

    name: ClassVar[str] = "freeze-trained"
    contract: ClassVar[Contract] = Contract.CHANGES_NUMBERS

    def apply(self, program: Program, edit: Editor) -> None:
        """Every module that was trained is frozen, once, wherever it is called.

        Raises:
            VerifyError: Something is NaN or infinite, as training that diverged leaves it.
        """
        verify(program)
        frozen: dict[str, nn.Module] = {}
        for node in edit.visit():
            module, target = program.submodule(node), str(node.target)
            if isinstance(module, Learned):
                frozen[target] = frozen[target] if target in frozen else module.frozen()
                edit.hit(node)
        for target, module in frozen.items():
            program.module.set_submodule(target, module)
        settle_sums(program, edit)
        round_biases(program)
