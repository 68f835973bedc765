"""The eager backend: an ``nn.Module`` that runs an integer program on torch's int8 kernels.

Values of 1 to 8 bits live in bytes. A byte saturates at 255 for free, so the codes ``0 .. top`` of
fewer than 8 bits are kept at the upper end, ``255 - top .. 255``, wherever a fused ReLU bounds them
from below; elsewhere one clamp bounds them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from fxq.backend import Obstacle
from fxq.errors import FxqError, LoweringError, UnknownNameError
from fxq.integer.layers import accumulator_scale
from fxq.integer.lowering import lower_to_integers, obstacles
from fxq.integer.program import Instruction, IntegerProgram, registers_in, substitute
from fxq.integer.reference import average_multiplier, call_float, float_callable, reshape
from fxq.numerics.saturation import largest_pair_sum, pair_limit

from . import _kernels as kernels

if TYPE_CHECKING:
    from fxq.artifact import Artifact
    from fxq.graph.program import Program

Run = Callable[[dict[str, Any]], Any]

_BOUNDED_BY_RELU = frozenset({"conv", "linear", "add"})
_MOVES = frozenset({"max_pool", "pad", "reshape", "relu", "cat"})


class EagerModule(nn.Module):
    """Runs an integer program on integer kernels.

    Args:
        program: The program.
        engine: ``x86`` (the faster of the two for each layer), ``fbgemm`` (equal to the integer
            reference in every element) or ``onednn``.

    Raises:
        UnknownNameError: There is no such engine.
        LoweringError: This build of torch does not have the engine.
    """

    def __init__(self, program: IntegerProgram, engine: str = "x86") -> None:
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
        self._steps = _Builder(self).steps()

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The output of the program.

        Raises:
            FxqError: An input has the wrong number of dimensions or of channels.
        """
        values: dict[str, Any] = dict(zip(self.program.inputs, inputs, strict=True))
        with torch.no_grad():
            for name, run, finished in self._steps:
                values[name] = run(values)
                for other in finished:
                    del values[other]
        return substitute(self.program.output, values)

    def registers(self, *inputs: torch.Tensor) -> dict[str, Any]:
        """Every register, codes as uint8 tensors ``0 .. top``, to compare with the reference."""
        values: dict[str, Any] = dict(zip(self.program.inputs, inputs, strict=True))
        with torch.no_grad():
            for name, run, _ in self._steps:
                values[name] = run(values)
        grids = self.program.grids()
        offsets = _Builder(self).offsets
        return {
            name: value if grids.get(name) is None else _codes(value, offsets[name])
            for name, value in values.items()
        }

    def extra_repr(self) -> str:
        """Engine and number of instructions."""
        return f"engine={self.engine}, {len(self.program.instructions)} instructions"

    def __deepcopy__(self, memo: dict[int, Any]) -> EagerModule:
        return EagerModule(copy.deepcopy(self.program, memo), self.engine)

    def __reduce__(self) -> Any:
        return EagerModule, (self.program, self.engine)


def _codes(value: Any, offset: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_codes(item, offset) for item in value)
    return kernels.unwrap(value) - offset


class _Builder:
    """Chooses kernels and byte offsets, and packs weights."""

    def __init__(self, module: EagerModule) -> None:
        self.module = module
        self.program = module.program
        self.grids = self.program.grids()
        self.offsets = byte_offsets(self.program, shift=self._may_shift())

    def steps(self) -> list[tuple[str, Run, tuple[str, ...]]]:
        """Each instruction as a function of the registers, and the registers it is the last to read."""
        finished = _last_reads(self.program)
        return [
            (step.name, _BUILDERS[step.op](self, step), finished[step.name])
            for step in self.program
        ]

    def label(self, name: str) -> tuple[float, int]:
        """Scale and zero point of a register's bytes."""
        grid = self.grids[name]
        assert grid is not None
        return grid.scale, grid.zero_point + self.offsets[name]

    def bounded(self, step: Instruction, run: Run) -> Run:
        """The same, with bytes clamped to the codes of the grid where saturation does not do it."""
        grid, offset = self.grids[step.name], self.offsets[step.name]
        assert grid is not None
        if grid.bits == 8 or offset == 255 - grid.top:
            return run
        low, high = offset, offset + grid.top

        def clamped(values: dict[str, Any]) -> torch.Tensor:
            result: torch.Tensor = run(values)
            kernels.unwrap(result).clamp_(low, high)
            return result

        return clamped

    def engine_for(self, step: Instruction) -> str:
        """The kernel library of a layer."""
        if self.module.engine == "onednn":
            return "onednn"
        weight = self.program.tensor(step, "weight")
        depthwise = step.op == "conv" and step.attributes["groups"] == weight.shape[0] > 1
        if depthwise and int(largest_pair_sum(weight.flatten(1)).max()) > pair_limit(255):
            return "onednn"  # fbgemm's depthwise kernels would saturate
        if self.module.engine == "fbgemm" or "onednn" not in kernels.supported_engines():
            return "fbgemm"
        return "onednn" if kernels.is_exact("onednn") else "fbgemm"

    def _may_shift(self) -> bool:
        """Whether this engine multiplies bytes up to 255 exactly, so that codes may be kept there."""
        engines = ("fbgemm", "onednn") if self.module.engine == "x86" else (self.module.engine,)
        return all(kernels.is_exact(e) for e in engines if e in kernels.supported_engines())

    # ---- one builder per instruction ---------------------------------------------------------

    def quantize(self, step: Instruction) -> Run:
        source = step.inputs[0]
        scale, zero_point = self.label(step.name)
        return self.bounded(
            step, lambda values: kernels.quantize(values[source], scale, zero_point)
        )

    def dequantize(self, step: Instruction) -> Run:
        source = step.inputs[0]
        return lambda values: _dequantize(values[source])

    def requantize(self, step: Instruction) -> Run:
        source = step.inputs[0]
        scale, zero_point = self.label(step.name)
        return self.bounded(
            step,
            lambda values: torch.quantize_per_tensor(
                values[source].dequantize(), scale, zero_point, torch.quint8
            ),
        )

    def _layer_tensors(self, step: Instruction) -> dict[str, torch.Tensor]:
        source = self.grids[step.inputs[0]]
        assert source is not None
        scale = self.program.tensor(step, "scale")
        return {
            "weight": self.program.tensor(step, "weight"),
            "scale": scale,
            "bias": self.program.tensor(step, "bias"),
            "unit": accumulator_scale(source.scale, scale),
        }

    def conv(self, step: Instruction) -> Run:
        kernel = kernels.Conv(
            **self._layer_tensors(step),
            geometry=step.attributes,
            relu=step.attributes["relu"],
            engine=self.engine_for(step),
        )
        source = step.inputs[0]
        scale, zero_point = self.label(step.name)
        return self.bounded(step, lambda values: kernel(values[source], scale, zero_point))

    def linear(self, step: Instruction) -> Run:
        source = step.inputs[0]
        engine = "fbgemm" if step.grid is None else self.engine_for(step)
        kernel = kernels.Linear(
            **self._layer_tensors(step), relu=step.attributes["relu"], engine=engine
        )
        if step.grid is None:
            return lambda values: kernel.to_float(values[source])
        scale, zero_point = self.label(step.name)
        return self.bounded(step, lambda values: kernel(values[source], scale, zero_point))

    def add(self, step: Instruction) -> Run:
        left, right = step.inputs
        scale, zero_point = self.label(step.name)
        relu = step.attributes["relu"]
        return self.bounded(
            step, lambda values: kernels.add(values[left], values[right], scale, zero_point, relu)
        )

    def global_avg_pool(self, step: Instruction) -> Run:
        source = step.inputs[0]
        grid, input_grid = self.grids[step.name], self.grids[source]
        assert grid is not None and input_grid is not None
        centre = input_grid.zero_point + self.offsets[source]
        scale, zero_point = self.label(step.name)
        keep, low = step.attributes["keepdim"], self.offsets[step.name]
        top = grid.top + low

        def run(values: dict[str, Any]) -> torch.Tensor:
            codes = kernels.unwrap(values[source])
            count = codes.shape[2] * codes.shape[3]
            total = codes.sum((2, 3), keepdim=keep, dtype=torch.int32) - count * centre
            mean = total.float() * average_multiplier(input_grid, grid, count)
            rounded = mean.round_().add_(zero_point).clamp_(low, top)
            return kernels.wrap(rounded.to(torch.uint8), scale, zero_point)

        return run

    def max_pool(self, step: Instruction) -> Run:
        source, attributes = step.inputs[0], step.attributes
        return lambda values: F.max_pool2d(values[source], **attributes)

    def cat(self, step: Instruction) -> Run:
        scale, zero_point = self.label(step.name)
        inputs, dim = step.inputs, step.attributes["dim"]
        return lambda values: kernels.wrap(
            torch.cat([kernels.unwrap(values[name]) for name in inputs], dim), scale, zero_point
        )

    def relu(self, step: Instruction) -> Run:
        scale, zero_point = self.label(step.name)
        source, top = step.inputs[0], step.attributes["top"] + self.offsets[step.name]
        return lambda values: kernels.wrap(
            kernels.unwrap(values[source]).clamp(zero_point, top), scale, zero_point
        )

    def pad(self, step: Instruction) -> Run:
        scale, zero_point = self.label(step.name)
        source, pad = step.inputs[0], step.attributes["pad"]
        return lambda values: kernels.wrap(
            _channels_last(F.pad(kernels.unwrap(values[source]), pad, value=zero_point)),
            scale,
            zero_point,
        )

    def reshape(self, step: Instruction) -> Run:
        source = step.inputs[0]
        scale, zero_point = self.label(step.name)

        def run(values: dict[str, Any]) -> Any:
            value = values[source]
            bytes_: Any = (
                value if isinstance(value, (tuple, list)) else kernels.unwrap(value)
            )
            return _wrap_all(reshape(step, bytes_, values), scale, zero_point)

        return run

    def constant(self, step: Instruction) -> Run:
        value = self.program.tensor(step, "value")
        return lambda values: value

    def float(self, step: Instruction) -> Run:
        function = float_callable(self.program, step)
        return lambda values: call_float(step, function, values)


def _wrap_all(value: Any, scale: float, zero_point: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_wrap_all(item, scale, zero_point) for item in value)
    if value.dtype is torch.quint8:
        return value
    return kernels.wrap(_channels_last(value), scale, zero_point)


def _channels_last(codes: torch.Tensor) -> torch.Tensor:
    return codes.contiguous(memory_format=torch.channels_last) if codes.dim() == 4 else codes


def _dequantize(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_dequantize(item) for item in value)
    return value.dequantize()


_BUILDERS: dict[str, Callable[[_Builder, Instruction], Run]] = {
    "quantize": _Builder.quantize,
    "dequantize": _Builder.dequantize,
    "requantize": _Builder.requantize,
    "conv": _Builder.conv,
    "linear": _Builder.linear,
    "add": _Builder.add,
    "global_avg_pool": _Builder.global_avg_pool,
    "max_pool": _Builder.max_pool,
    "cat": _Builder.cat,
    "relu": _Builder.relu,
    "pad": _Builder.pad,
    "reshape": _Builder.reshape,
    "constant": _Builder.constant,
    "float": _Builder.float,
    "module": _Builder.float,
}


def byte_offsets(program: IntegerProgram, shift: bool) -> dict[str, int]:
    """By how much the byte of each register exceeds its code.

    Args:
        program: The program.
        shift: Whether codes may be kept at the upper end of the byte. Kernels that saturate in 16
            bits must see small bytes instead.
    """
    grids = program.grids()
    offsets = {step.name: _own_offset(step, shift) for step in program}
    while True:
        for step in program:
            if step.op in _MOVES:
                offsets[step.name] = offsets[step.inputs[0]]
        clash = _clash(program, offsets)
        if clash is None:
            return {name: offset for name, offset in offsets.items() if grids[name] is not None}
        for name in clash:
            offsets[name] = 0


def _own_offset(step: Instruction, shift: bool) -> int:
    bounded = step.op in _BOUNDED_BY_RELU and step.attributes.get("relu")
    if step.grid is None or not shift or not bounded or step.grid.zero_point != 0:
        return 0
    return 255 - step.grid.top


def _clash(program: IntegerProgram, offsets: dict[str, int]) -> list[str] | None:
    """The computing registers behind a concatenation whose branches differ in offset."""
    producers = {step.name: step for step in program}
    for step in program:
        if step.op == "cat" and len({offsets[name] for name in step.inputs}) > 1:
            pending, found = list(step.inputs), []
            while pending:
                source = producers[pending.pop()]
                if source.op in _MOVES:
                    pending += source.inputs
                else:
                    found.append(source.name)
            return found
    return None


def _last_reads(program: IntegerProgram) -> dict[str, tuple[str, ...]]:
    """For each instruction, the registers nobody reads after it."""
    last: dict[str, str] = {}
    for step in program:
        for name in step.inputs:
            last[name] = step.name
    kept = set(registers_in(program.output))
    finished: dict[str, list[str]] = {step.name: [] for step in program}
    for name, reader in last.items():
        if name not in kept:
            finished[reader].append(name)
    return {name: tuple(names) for name, names in finished.items()}


class EagerBackend:
    """An ``nn.Module`` on torch's own int8 kernels."""

    name = "eager"
    summary = "An nn.Module on torch's int8 kernels (engines x86, fbgemm, onednn)"

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
        engine = options.pop("engine", "x86")
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
        return EagerModule(integers, options.get("engine", "x86"))
