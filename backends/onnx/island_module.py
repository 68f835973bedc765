"""Float instructions as one ``nn.Module`` that torch.export can trace.

Its arguments are the tensors that the instructions read from elsewhere, its results every tensor
they write. Sizes of quantized registers are computed from the batch size of the program's input,
so that no register is dequantized for its shape alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxq.integer.program import Instruction, IntegerProgram
from fxq.integer.reference import call_float, float_callable
from fxq.integer.shapes import BATCHES, Size, Value

if TYPE_CHECKING:
    from torch.export import Dim

ISLANDS = frozenset(["float", "module", "constant"])
"""Instructions of float islands, and of computations with sizes."""


@dataclass
class Trail:
    """What a run of an `IslandModule` found. No attribute of it: torch.export takes these back.

    Attributes:
        results: Names of the results: registers, or ``NAME.INDEX`` for the items of a tuple.
        failed: Why instructions could not run, by register; something of the same shape stood in.
    """

    results: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class IslandModule(nn.Module):
    """Runs float instructions; see the module's docstring.

    Args:
        program: The program.
        values: What each register holds.
        steps: The instructions, in order.

    Attributes:
        arguments: Names of its arguments: registers, or ``NAME.INDEX`` for the items of a tuple.
        tensors: By the name in this module, the name of the program's tensor.
        trail: What the last run found.
    """

    def __init__(
        self, program: IntegerProgram, values: Mapping[str, Value], steps: Sequence[Instruction]
    ) -> None:
        super().__init__()
        self.program = program
        self.values = values
        self.steps = steps
        self.batch = _batch_input(program, values)
        self.grids = program.grids()
        self.functions = nn.ModuleList(_function(program, step) for step in steps)
        self.tensors = {
            f"functions.{index}.{path}": name
            for index, step in enumerate(steps)
            for path, name in _tensor_paths(program, step).items()
        }
        written = {step.name for step in steps}
        read = dict.fromkeys(name for step in steps for name in step.reads)
        self.read = [name for name in read if name not in written]
        given = [name for name in self.read if self._is_given(name)]
        arguments = [one for name in given for one, _ in leaves(name, values[name])]
        first = [] if self.batch is None else [self.batch]
        self.arguments = list(dict.fromkeys([*first, *arguments]))
        self.trail = Trail()

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every tensor the instructions write."""
        self.trail.failed.clear()
        given = dict(zip(self.arguments, args, strict=True))
        batch = None if self.batch is None else given[self.batch].shape[0]
        registers = {
            name: self._outside(name, self.values[name], given, batch) for name in self.read
        }
        for step, function in zip(self.steps, self.functions, strict=True):
            registers[step.name] = self._call(step, function, registers, batch)
        found = dict(
            one for step in self.steps for one in _tensors(step.name, registers[step.name])
        )
        self.trail.results = list(found)
        return tuple(found.values())

    def _call(self, step: Instruction, function: Any, registers: dict[str, Any], batch: Any) -> Any:
        """What an instruction computes; where it cannot, a stand-in, and `failed` says why."""
        try:
            return function(registers)
        except Exception as error:  # whatever a function may raise when its inputs are symbolic
            if self.trail.failed.keys().isdisjoint(step.reads):
                self.trail.failed[step.name] = reason(error)
            return self._stand_in(self.values[step.name], batch)

    def _is_given(self, name: str) -> bool:
        """Whether tensors of a register are passed in; else only its shape is read."""
        return self.grids.get(name) is None

    def _outside(self, name: str, value: Value, given: dict[str, torch.Tensor], batch: Any) -> Any:
        """A register that is written elsewhere."""
        if name in given:
            return given[name]
        if value.items is not None and self._is_given(name.partition(".")[0]):
            items = enumerate(value.items)
            return tuple(self._outside(f"{name}.{i}", one, given, batch) for i, one in items)
        return self._stand_in(value, batch)

    def _stand_in(self, value: Value, batch: Any) -> Any:
        """Something of the right shape."""
        if value.items is not None:
            return tuple(self._stand_in(one, batch) for one in value.items)
        if value.shape is not None:
            shape = [_size(one, batch) for one in value.shape]
            return torch.zeros((), dtype=value.dtype).expand(shape)
        return None if value.size is None else _size(value.size, batch)

    # ---- tracing -----------------------------------------------------------------------------

    def trace(self) -> torch.export.ExportedProgram:
        """The module as aten operators, for any batch size where shapes depend on it."""
        given = [self._argument(name) for name in self.arguments]
        dim = torch.export.Dim("batch")
        dims = [_dims(shape, dim) for shape in map(self.shape, self.arguments)]
        with torch.no_grad():
            return torch.export.export(
                self, tuple(given), dynamic_shapes={"args": tuple(dims)}, strict=False
            )

    def _argument(self, name: str) -> torch.Tensor:
        """An example of an argument; its memory is never touched."""
        shape = [size.at(BATCHES[0]) for size in self.shape(name)]
        return torch.empty(shape, dtype=self._leaf(name).dtype)

    def shape(self, name: str) -> tuple[Size, ...]:
        """The shape of an argument or a result."""
        return self._leaf(name).shape or ()

    def _leaf(self, name: str) -> Value:
        register = name.partition(".")[0]
        return dict(leaves(register, self.values[register]))[name]


def reason(error: BaseException) -> str:
    """Why something failed, in one line: the first cause of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    if "Constraints violated" in text or "specialized" in text:
        return "it works for one batch size only; a static batch may do"
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text)
    if missing:
        return f"torch.onnx has no form of {missing[1]}"
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}".rstrip(": ")


class _Constant(nn.Module):
    """A tensor of the program."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, registers: dict[str, Any]) -> Any:
        return self.value


class _Call(nn.Module):
    """A float instruction; a module that it calls is its child."""

    def __init__(self, step: Instruction, function: Any) -> None:
        super().__init__()
        self.step = step
        self.function = function

    def forward(self, registers: dict[str, Any]) -> Any:
        if _is_adaptive_pool(self.step):
            # Of a permuted tensor it becomes a Gather with strides, else a ReduceMean.
            dense = {name: registers[name].contiguous() for name in self.step.inputs}
            registers = {**registers, **dense}
        return call_float(self.step, self.function, registers)


def _is_adaptive_pool(step: Instruction) -> bool:
    kind = step.attributes.get("module", {}).get("class", step.attributes.get("target", ""))
    return str(kind).endswith(("AdaptiveAvgPool2d", "adaptive_avg_pool2d"))


def _function(program: IntegerProgram, step: Instruction) -> nn.Module:
    if step.op == "constant":
        return _Constant(program.tensor(step, "value"))
    return _Call(step, float_callable(program, step))


def _tensor_paths(program: IntegerProgram, step: Instruction) -> dict[str, str]:
    """The names of an instruction's tensors, by where its module has them."""
    if step.op == "constant":
        return {role: name for role, name in step.tensors.items() if role == "value"}
    foreign = program.foreign.get(step.attributes.get("foreign", ""))
    if isinstance(foreign, nn.Module):
        state = foreign.state_dict(keep_vars=True)
        return {f"function.{path}": f"{step.name}.{path}" for path in state}
    return {f"function.{role}": name for role, name in step.tensors.items()}


def _batch_input(program: IntegerProgram, values: Mapping[str, Value]) -> str | None:
    """The input whose first dimension is the batch; None where shapes are fixed."""
    for name in program.inputs:
        shape = values[name].shape
        if shape and shape[0] == Size(1, 0):
            return name
    return None


def leaves(name: str, value: Value) -> Iterator[tuple[str, Value]]:
    """The tensors a register holds, named ``NAME``, or ``NAME.INDEX`` for items."""
    if value.shape is not None:
        yield name, value
    for index, item in enumerate(value.items or ()):
        yield from leaves(f"{name}.{index}", item)


def _tensors(name: str, found: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a result, named likewise; but complex ones, which ONNX has as pairs."""
    if isinstance(found, torch.Tensor):
        if not found.is_complex():
            yield name, found
    elif isinstance(found, (tuple, list)):
        for index, item in enumerate(found):
            yield from _tensors(f"{name}.{index}", item)


def _size(size: Size, batch: Any) -> Any:
    return size.per_image * batch + size.constant if size.is_dynamic else size.constant


def _dims(shape: Sequence[Size], batch: Dim) -> dict[int, Any]:
    """The dimensions that depend on the batch, as torch.export takes them."""
    found: dict[int, Any] = {}
    for axis, size in enumerate(shape):
        if size.is_dynamic:
            scaled = batch if size.per_image == 1 else size.per_image * batch
            found[axis] = scaled + size.constant if size.constant else scaled
    return found
