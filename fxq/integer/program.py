"""`IntegerProgram`: a flat list of instructions on integer codes and float islands, as plain data.

Every quantized register holds codes ``0 .. 2**bits - 1`` with ``value = scale * (code - zero_point)``.
The instructions and what they compute exactly (``f32`` is rounding to float32, ``rint`` rounds half
to even, ``clamp`` is to the codes of the grid, from the zero point up where a ReLU is fused):

===============  ===============================================================================
quantize         ``clamp(rint(f32(x / scale + zero_point)))`` with ``1 / scale`` in float32
dequantize       ``scale * (q - zero_point)``, exact in float32
requantize       ``quantize(dequantize(q))``
conv, linear     ``clamp(rint(f32(f32(acc + bias) * m)) + zero_point)``, ``m = f32(f32(sx * sw) / sy)``
linear to float  ``f32(acc * f32(sx * sw) + f32(bias * f32(sx * sw)))``, one rounding
add              ``clamp(rint(f32(f32(a + b) * f32(1 / scale))) + zero_point)``, dequantized a, b
global_avg_pool  ``clamp(rint(f32(f32(sum(q - zx)) * f32(sx / (n * sy)))) + zero_point)``
max_pool, pad,   codes are moved, not computed with
cat, reshape,
relu
float, module    a PyTorch operator or module in float
===============  ===============================================================================

``acc`` is the exact integer ``sum((q - zx) * w)``, ``bias`` an int32. Scales have 16 significant bits,
which is what makes ``scale * (q - zero_point)`` exact. An average pool is a depthwise conv of ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxq.errors import ArtifactError

FORMAT = 1

OPS = frozenset(
    "quantize dequantize requantize conv linear add cat max_pool global_avg_pool relu pad reshape "
    "float module constant".split()
)


@dataclass(frozen=True)
class Grid:
    """The numbers that codes stand for: ``scale * (code - zero_point)``, codes ``0 .. 2**bits-1``."""

    scale: float
    zero_point: int
    bits: int

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)


@dataclass(frozen=True)
class Register:
    """A reference to the value of an instruction or input, inside an argument list."""

    name: str


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
    """

    inputs: tuple[str, ...]
    instructions: list[Instruction]
    output: Any
    tensors: dict[str, torch.Tensor]
    foreign: dict[str, Callable[..., Any]] = field(default_factory=dict)

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
            for name in step.inputs:
                found[name].append(step)
        return found

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
            ArtifactError: It calls code of the user's own, which an artifact never holds.
        """
        if self.foreign:
            raise ArtifactError(
                f"{', '.join(sorted(self.foreign))} is code of your own, which an artifact "
                "never holds",
                hint="use the module in this process, or keep such layers outside the model",
            )
        return {
            "format": FORMAT,
            "inputs": list(self.inputs),
            "output": encode(self.output),
            "instructions": [_step_to_json(step) for step in self.instructions],
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
            program = cls(tuple(data["inputs"]), steps, decode(data["output"]), tensors)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
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
        known = set(self.inputs)
        for step in self.instructions:
            if step.op not in OPS:
                raise ArtifactError(f"there is no instruction {step.op!r}", where=f"%{step.name}")
            for name in (*step.inputs, *registers_in(step.attributes)):
                if name not in known:
                    raise ArtifactError(f"%{name} is read before it is written", where=step.name)
            for role, name in step.tensors.items():
                if name not in self.tensors:
                    raise ArtifactError(f"the {role} tensor {name!r} is missing", where=step.name)
            known.add(step.name)
        for name in registers_in(self.output):
            if name not in known:
                raise ArtifactError(f"the output reads %{name}, which nothing writes")


def _is_stored(name: str) -> bool:
    return not name.endswith(".bits")


def registers_in(value: Any) -> Iterator[str]:
    """The registers named anywhere inside an argument."""
    if isinstance(value, Register):
        yield value.name
    elif isinstance(value, dict):
        for item in value.values():
            yield from registers_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from registers_in(item)
    elif isinstance(value, slice):
        yield from registers_in((value.start, value.stop, value.step))


def substitute(value: Any, environment: dict[str, Any]) -> Any:
    """An argument with every register replaced by its value."""
    if isinstance(value, Register):
        return environment[value.name]
    if isinstance(value, dict):
        return {key: substitute(item, environment) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(substitute(item, environment) for item in value)
    if isinstance(value, slice):
        return slice(*substitute((value.start, value.stop, value.step), environment))
    return value


def rename(value: Any, names: dict[str, str]) -> Any:
    """An argument with registers renamed."""
    return substitute(value, {old: Register(new) for old, new in names.items()})


# ---- JSON ------------------------------------------------------------------------------------

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "preserve_format": torch.preserve_format,
}


def encode(value: Any) -> Any:
    """An argument as JSON-ready data.

    Raises:
        TypeError: It is of a kind that cannot be stored.

    Example:
        >>> encode((Register("x"), slice(0, 2), torch.float32))
        {'tuple': [{'register': 'x'}, {'slice': [0, 2, None]}, {'dtype': 'float32'}]}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else {"float": str(value)}
    for kind, test in _ENCODERS:
        if isinstance(value, kind):
            return test(value)
    raise TypeError(f"a {type(value).__name__} cannot be stored")


def _encode_dict(value: dict[Any, Any]) -> Any:
    return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}


_ENCODERS: tuple[tuple[Any, Any], ...] = (
    (Register, lambda value: {"register": value.name}),
    (torch.Size, lambda value: {"tuple": [int(item) for item in value]}),
    (tuple, lambda value: {"tuple": [encode(item) for item in value]}),
    (list, lambda value: [encode(item) for item in value]),
    (dict, _encode_dict),
    (slice, lambda value: {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}),
    (torch.dtype, lambda value: {"dtype": str(value).removeprefix("torch.")}),
    (torch.device, lambda value: {"device": str(value)}),
    (torch.memory_format, lambda value: {"memory_format": str(value).removeprefix("torch.")}),
    (type(Ellipsis), lambda value: {"ellipsis": True}),
)


def decode(value: Any) -> Any:
    """The argument that `encode` wrote.

    Raises:
        ValueError: The data is not an encoded argument.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"not an encoded argument: {value!r}")
    ((kind, content),) = value.items()
    if kind not in _DECODERS:
        raise ValueError(f"not an encoded argument: {kind!r}")
    return _DECODERS[kind](content)


_DECODERS: dict[str, Any] = {
    "register": lambda content: Register(str(content)),
    "float": float,
    "tuple": lambda content: tuple(decode(item) for item in content),
    "dict": lambda content: {decode(key): decode(item) for key, item in content},
    "slice": lambda content: slice(*(decode(item) for item in content)),
    "dtype": lambda content: _DTYPES[content],
    "device": torch.device,
    "memory_format": lambda content: _FORMATS[content],
    "ellipsis": lambda content: Ellipsis,
}


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


def with_name(step: Instruction, name: str) -> Instruction:
    """The same instruction writing another register."""
    return replace(step, name=name)
