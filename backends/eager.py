"""The eager backend: an ``nn.Module`` that runs an integer program on torch's int8 kernels.

Values of 1 to 8 bits live in bytes; `_offsets` says where in the byte, so that most of them need no
clamp. `_builder` chooses kernels, and `_kernels` holds everything that touches quantized
tensors.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxq.backend import Obstacle
from fxq.errors import FxqError, LoweringError, UnknownNameError
from fxq.integer.arguments import substitute
from fxq.integer.lowering import lower_to_integers
from fxq.integer.obstacles import obstacles
from fxq.integer.program import IntegerProgram

from . import _kernels as kernels
from ._builder import Builder

if TYPE_CHECKING:
    from fxq.artifact import Artifact
    from fxq.graph.program import Program


class EagerModule(nn.Module):
    """Runs an integer program on integer kernels.

    Args:
        program: The program.
        engine: ``fbgemm`` (equal to the integer reference in every element), ``x86`` (the faster
            of fbgemm and onednn for each layer, residual adds inside convolutions; rounds ties the
            other way a few times in a million, and once less per add) or ``onednn``.

    Raises:
        UnknownNameError: There is no such engine.
        LoweringError: This build of torch does not have the engine.
    """

    def __init__(self, program: IntegerProgram, engine: str = kernels.DEFAULT_ENGINE) -> None:
        super().__init__()
        if engine not in kernels.ENGINES:
            raise UnknownNameError("engine", engine, kernels.ENGINES)
        if engine not in kernels.supported_engines():
            raise LoweringError(
                f"this build of torch has no {engine} kernels",
                hint=f"it has: {', '.join(kernels.supported_engines()) or 'none'}",
            )
        self.program = program
        self.engine = engine
        builder = Builder(program, engine)
        self._steps = builder.steps()
        self._offsets = builder.offsets

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The output of the program.

        Raises:
            FxqError: An integer instruction cannot run on these inputs: their number, dtype, number
                of dimensions or number of channels is wrong.
        """
        values = self._inputs(inputs)
        name = ""
        try:
            with torch.no_grad():
                for name, run, finished in self._steps:
                    values[name] = run(values)
                    for other in finished:
                        del values[other]
        except (RuntimeError, IndexError) as error:
            self._explain(error, name, inputs)
            raise
        return substitute(self.program.output, values)

    def registers(self, *inputs: torch.Tensor) -> dict[str, Any]:
        """Every register, codes as uint8 tensors ``0 .. top``, to compare with the reference."""
        values = self._inputs(inputs)
        codes = dict(values)
        with torch.no_grad():
            for name, run, _ in self._steps:
                value = values[name] = run(values)
                # Copied at once: a later step may write over this register's memory.
                quantized = name in self._offsets
                codes[name] = _codes(value, self._offsets[name]) if quantized else value
        return codes

    def _inputs(self, inputs: tuple[torch.Tensor, ...]) -> dict[str, Any]:
        names = self.program.inputs
        if len(inputs) != len(names):
            raise FxqError(f"the network takes {len(names)} inputs, not {len(inputs)}")
        return dict(zip(names, inputs, strict=True))

    def _explain(self, error: Exception, name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        """Raise what a user can act on, where a kernel failed; errors of float code stay theirs."""
        step = next(one for one in self.program if one.name == name)
        if step.op in ("float", "module"):
            return
        first = str(error).splitlines()[0]
        raise FxqError(
            f"%{name} cannot run on these inputs: {first}",
            where=f"inputs {_shapes(inputs)}",
            hint="inputs are float32 and, batch size and image size apart, of the example's shape",
        ) from error

    def extra_repr(self) -> str:
        """Engine and number of instructions."""
        return f"engine={self.engine}, {len(self.program.instructions)} instructions"

    def __deepcopy__(self, memo: dict[int, Any]) -> EagerModule:
        return EagerModule(copy.deepcopy(self.program, memo), self.engine)

    def __reduce__(self) -> Any:
        return EagerModule, (self.program, self.engine)


def _shapes(inputs: tuple[torch.Tensor, ...]) -> str:
    shown = [
        f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, torch.Tensor)
        else type(value).__name__
        for value in inputs
    ]
    return ", ".join(shown)


def _codes(value: Any, offset: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_codes(item, offset) for item in value)
    return kernels.unwrap(value) - offset


class EagerBackend:
    """An ``nn.Module`` on torch's own int8 kernels."""

    name = "eager"
    summary = "An nn.Module on torch's int8 kernels (engines fbgemm, x86, onednn)"

    def obstacles(self, program: Program) -> list[Obstacle]:
        """Everything in the program that has no integer form and is not float either."""
        return obstacles(program)

    def lower(self, program: Program, **options: Any) -> Artifact:
        """The program as an `EagerModule` with its ledger.

        Args:
            program: A program after a quantize pass.
            options: ``engine``, and ``journal`` for the ledger.

        Raises:
            LoweringError: There are obstacles.
        """
        from fxq.artifact import Artifact

        journal = options.pop("journal", None)
        engine = options.pop("engine", kernels.DEFAULT_ENGINE)
        if options:
            raise FxqError(
                f"the eager backend has no option {next(iter(options))!r}", hint="it has: engine"
            )
        found = self.obstacles(program)
        if found:
            raise LoweringError(
                f"the eager backend cannot run {len(found)} nodes on integers", found
            )
        integers, ledger = lower_to_integers(program, journal)
        return Artifact(
            integers=integers,
            ledger=ledger,
            module=EagerModule(integers, engine),
            backend=self.name,
            journal=journal,
            metadata={"engine": engine},
        )

    def load(self, integers: IntegerProgram, **options: Any) -> nn.Module:
        """The module of a stored program."""
        return EagerModule(integers, options.get("engine", kernels.DEFAULT_ENGINE))
