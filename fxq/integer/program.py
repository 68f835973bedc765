"""`IntegerProgram`: a flat list of instructions on integer codes and float islands, as plain data.

Every quantized register holds codes ``0 .. 2**bits - 1``; ``value = scale * (code - zero_point)``.
The instructions and what they compute exactly (``f32`` is rounding to float32, ``rint`` rounds half
to even, ``clamp`` is to the codes of the grid, from the zero point up where a ReLU is fused):

===============  ===============================================================================
quantize         ``clamp(rint(f32(x / scale)) + zero_point)``, as ONNX's QuantizeLinear
dequantize       ``scale * (q - zero_point)``, exact in float32
requantize       ``quantize(dequantize(q))``
lookup           ``table[q]``, from a table of 256 codes
fake_quantize    ``dequantize(quantize(x))`` with a scale and a zero point per channel, and a
                 largest code per channel where channels have bits of their own; a float
dynamic_quantize ``DynamicAciqQuantizer``: the same on the range of this very batch; a float
conv, linear     ``clamp(rint(f32(f32(f32(acc) + bias) * m)) + zero_point)``
linear to float  ``f32(f32(acc + bias) * f32(sx * sw))``, then the ReLU
conv, linear     the float operator on ``f32(w * sw)`` and a float32 bias, then the ReLU; a float
of floats
add              ``clamp(rint(f32(f32(a + b) * f32(1 / scale))) + zero_point)``, dequantized a, b
global_avg_pool  ``clamp(rint(f32(f32(sum(q - zx)) * f32(sx / (n * sy)))) + zero_point)``
max_pool, pad,   codes are moved, not computed with
cat, reshape,
relu
float, module    a PyTorch operator or module in float
===============  ===============================================================================

``acc`` is the exact integer ``sum((q - zx) * w)``, ``bias`` an int32, and ``m`` is
``f32(sx * sw) / sy``. Scales have 16 significant bits, which is what makes
``scale * (q - zero_point)`` exact. Channels are along dimension 1. An average pool is a depthwise
conv of ones. An add whose scale was settled gives the same in other orders of rounding
(`fxq.numerics.residual`). Only the float operators may round differently from runtime to runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fxq.errors import ArtifactError
from fxq.integer.arguments import decode, encode, registers_in

FORMAT = 2

_DAMAGE = (
    LookupError,
    ArithmeticError,
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
)
"""What reading JSON that is no program raises."""

OPS = frozenset(
    [
        "quantize",
        "dequantize",
        "requantize",
        "lookup",
        "fake_quantize",
        "dynamic_quantize",
        "conv",
        "linear",
        "add",
        "cat",
        "max_pool",
        "global_avg_pool",
        "relu",
        "pad",
        "reshape",
        "float",
        "module",
        "constant",
    ]
)


@dataclass(frozen=True)
class Grid:
    """What codes ``0 .. 2**bits - 1`` stand for: ``scale * (code - zero_point)``."""

    scale: float
    zero_point: int
    bits: int

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def code_of(self, value: float) -> int:
        """The code nearest to a value from above zero."""
        return min(self.top, round(value / self.scale) + self.zero_point)


@dataclass(frozen=True)
class Example:
    """What an input looked like when the model was captured.

    Attributes:
        shape: Its shape; the first dimension is the batch.
        dtype: Its dtype, as in ``float32``.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Instruction:
    """One step of an integer program.

    Attributes:
        name: The register it writes.
        op: What it does, one of `OPS`.
        inputs: The registers it reads.
        attributes: Strides, dims, arguments, … as plain data and `Register`s.
        tensors: Names of the tensors it uses, by role (``weight``, ``scale``, ``bias``).
        grid: What its codes stand for; None where it writes a float.
        sources: The nodes of the captured graph it computes.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    grid: Grid | None = None
    sources: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Every register it reads: its inputs, and sizes among its attributes."""
        return (*self.inputs, *registers_in(self.attributes))


@dataclass
class IntegerProgram:
    """Inputs, instructions, output and tensors.

    Attributes:
        inputs: Names of the input registers, in order.
        instructions: In execution order.
        output: The output: a `Register`, or containers of them.
        tensors: All weights, by name.
        foreign: Modules and functions of the user's own that float instructions call, by name; a
            program with any can run but not be stored.
        examples: What each input looked like at capture; empty where that is not known.
    """

    inputs: tuple[str, ...]
    instructions: list[Instruction]
    output: Any
    tensors: dict[str, torch.Tensor]
    foreign: dict[str, Callable[..., Any]] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    def tensor(self, step: Instruction, role: str) -> torch.Tensor:
        """The tensor an instruction uses in a role."""
        return self.tensors[step.tensors[role]]

    def grids(self) -> dict[str, Grid | None]:
        """What each register holds."""
        return {step.name: step.grid for step in self.instructions}

    def readers(self) -> dict[str, list[Instruction]]:
        """Who reads each register."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.inputs}
        for step in self.instructions:
            found[step.name] = []
            for name in dict.fromkeys(step.reads):
                found[name].append(step)
        return found

    def drop_unused(self) -> None:
        """Every instruction and tensor that does not reach the output is gone."""
        needed = set(registers_in(self.output))
        kept: list[Instruction] = []
        for step in reversed(self.instructions):
            if step.name in needed:
                kept.append(step)
                needed.update(step.reads)
        self.instructions = kept[::-1]
        used = {name for step in kept for name in step.tensors.values()}
        self.tensors = {name: value for name, value in self.tensors.items() if name in used}
        called = {step.attributes.get("foreign") for step in kept}
        self.foreign = {name: code for name, code in self.foreign.items() if name in called}

    def weight_bytes(self) -> int:
        """Bytes of all weights, with each integer weight at its nominal number of bits."""
        total = 0
        bits_of = {step.tensors["weight"]: step for step in self if "bits" in step.tensors}
        for name, tensor in self.tensors.items():
            step = bits_of.get(name)
            if step is None:
                total += tensor.numel() * tensor.element_size() if _is_stored(name) else 0
            else:
                per_channel = tensor.numel() // max(1, len(self.tensor(step, "bits")))
                total += int(self.tensor(step, "bits").sum()) * per_channel // 8
        return total

    # ---- plain data --------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The structure as JSON-ready data; tensors are stored apart.

        Raises:
            ArtifactError: It calls code of the user's own, or with an argument that is no plain
                data; an artifact holds neither.
        """
        if self.foreign:
            raise ArtifactError(
                f"{', '.join(sorted(self.foreign))} is code of your own, which an artifact "
                "never holds",
                hint="use the module in this process, or keep such layers outside the model",
            )
        try:
            output = encode(self.output)
            steps = [_step_to_json(step) for step in self.instructions]
        except TypeError as error:
            raise ArtifactError(f"the program cannot be stored: {error}") from error
        return {
            "format": FORMAT,
            "inputs": list(self.inputs),
            "examples": [[list(one.shape), one.dtype] for one in self.examples],
            "output": output,
            "instructions": steps,
        }

    @classmethod
    def from_json(cls, data: Any, tensors: dict[str, torch.Tensor]) -> IntegerProgram:
        """The program that `to_json` wrote, checked.

        Raises:
            ArtifactError: The data is not a program this fxq can run.
        """
        try:
            if data["format"] != FORMAT:
                raise ArtifactError(
                    f"structure format {data['format']!r} is not the {FORMAT} this fxq reads",
                    hint="compile again with this version, or load with the one that saved it",
                )
            steps = [_step_from_json(entry) for entry in data["instructions"]]
            examples = tuple(_example(entry) for entry in data["examples"])
            program = cls(
                tuple(data["inputs"]), steps, decode(data["output"]), tensors, examples=examples
            )
        except _DAMAGE as error:
            raise ArtifactError(
                f"the structure is damaged: {type(error).__name__} {error}",
                hint="compile again; the file was changed or cut short",
            ) from error
        program.check()
        return program

    def check(self) -> None:
        """Every instruction is known and reads what exists.

        Raises:
            ArtifactError: One does not.
        """
        from fxq.integer.checks import check_step

        known: dict[str, Grid | None] = dict.fromkeys(self.inputs)
        for step in self.instructions:
            self._check_names(step, known)
            check_step(self, step, known)
            known[step.name] = step.grid
        for name in registers_in(self.output):
            if name not in known:
                raise ArtifactError(f"the output reads %{name}, which nothing writes")

    def _check_names(self, step: Instruction, known: Container[str]) -> None:
        if step.op not in OPS:
            raise ArtifactError(f"there is no instruction {step.op!r}", where=f"%{step.name}")
        if step.name in known:
            raise ArtifactError(f"%{step.name} is written twice")
        for name in step.reads:
            if name not in known:
                raise ArtifactError(f"%{name} is read before it is written", where=step.name)
        for role, name in step.tensors.items():
            if name not in self.tensors:
                raise ArtifactError(f"the {role} tensor {name!r} is missing", where=step.name)


def examples_of(inputs: tuple[Any, ...], count: int) -> tuple[Example, ...]:
    """What example inputs look like; nothing where they are not ``count`` tensors."""
    if len(inputs) != count or not all(isinstance(value, torch.Tensor) for value in inputs):
        return ()
    return tuple(
        Example(tuple(value.shape), str(value.dtype).removeprefix("torch.")) for value in inputs
    )


def _example(entry: Any) -> Example:
    shape, dtype = entry
    return Example(tuple(int(size) for size in shape), str(dtype))


def _is_stored(name: str) -> bool:
    return not name.endswith(".bits")


def _step_to_json(step: Instruction) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": step.name, "op": step.op, "inputs": list(step.inputs)}
    if step.attributes:
        entry["attributes"] = {name: encode(item) for name, item in step.attributes.items()}
    if step.tensors:
        entry["tensors"] = dict(step.tensors)
    if step.grid is not None:
        entry["grid"] = [step.grid.scale, step.grid.zero_point, step.grid.bits]
    entry["sources"] = list(step.sources)
    return entry


def _step_from_json(entry: dict[str, Any]) -> Instruction:
    grid = entry.get("grid")
    return Instruction(
        name=str(entry["name"]),
        op=str(entry["op"]),
        inputs=tuple(str(name) for name in entry["inputs"]),
        attributes={name: decode(item) for name, item in entry.get("attributes", {}).items()},
        tensors={str(role): str(name) for role, name in entry.get("tensors", {}).items()},
        grid=None if grid is None else Grid(float(grid[0]), int(grid[1]), int(grid[2])),
        sources=tuple(entry.get("sources", ())),
    )
