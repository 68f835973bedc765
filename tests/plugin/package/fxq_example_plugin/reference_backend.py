"""reference: a backend that runs the integers on fxq's own interpreter, slowly and exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxq.artifact import Artifact
from fxq.backend import Obstacle
from fxq.errors import LoweringError
from fxq.graph.program import Program
from fxq.integer.lowering import lower_to_integers
from fxq.integer.program import IntegerProgram
from fxq.integer.reference import Reference
from fxq.quant.quantizers import ActivationQuantizer


class ReferenceModule(nn.Module):
    """Runs an integer program by its definition."""

    def __init__(self, program: IntegerProgram) -> None:
        super().__init__()
        self.reference = Reference(program)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The output of the program."""
        return self.reference(*inputs)


class ReferenceBackend:
    """The integer reference interpreter as a backend."""

    name = "reference"
    summary = "fxq's integer reference interpreter, as a module"

    def obstacles(self, program: Program) -> list[Obstacle]:
        """A program without quantizers holds no integers."""
        modules = program.module.modules()
        if any(isinstance(module, ActivationQuantizer) for module in modules):
            return []
        return [Obstacle("output", "nothing in the program is quantized")]

    def lower(self, program: Program, **options: Any) -> Artifact:
        """The program on the interpreter."""
        found = self.obstacles(program)
        if found:
            raise LoweringError("the reference backend needs a quantized program", found)
        journal = options.pop("journal", None)
        integers, ledger = lower_to_integers(program, journal)
        module = ReferenceModule(integers)
        return Artifact(integers, ledger, module, backend=self.name, journal=journal)

    def load(self, integers: IntegerProgram, **options: Any) -> nn.Module:
        """The module of a stored program."""
        return ReferenceModule(integers)
