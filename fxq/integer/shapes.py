"""The shape of every register, as a function of the batch size, found without computing values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxq.errors import ArtifactError, FxqError
from fxq.integer.arguments import substitute
from fxq.integer.program import IntegerProgram
from fxq.integer.reference import Reference

BATCHES = (2, 3)
"""Two batch sizes; what differs between them depends on the batch. Not 1, which broadcasts."""

ANOTHER = 6
"""A batch size at which everything must be what the two predict, where integers depend on it."""


@dataclass(frozen=True)
class Size:
    """An integer that may depend on the batch size: ``per_image * batch + constant``."""

    per_image: int
    constant: int

    @property
    def is_dynamic(self) -> bool:
        """Whether it depends on the batch size."""
        return self.per_image != 0

    def at(self, batch: int) -> int:
        """Its value for a batch size."""
        return self.per_image * batch + self.constant


@dataclass(frozen=True)
class Value:
    """What a register holds: a tensor, an integer, or a sequence of such.

    Attributes:
        shape: The shape, where it is a tensor.
        dtype: The dtype, where it is a tensor.
        size: The integer, where it is one.
        items: The items, where it is a tuple or list.
    """

    shape: tuple[Size, ...] | None = None
    dtype: torch.dtype | None = None
    size: Size | None = None
    items: tuple[Value, ...] | None = None


def register_values(program: IntegerProgram, *, dynamic: bool = True) -> dict[str, Value]:
    """What each register of a program holds, inputs included, for any batch size.

    Of a register whose sizes are no ``per_image * batch + constant`` nothing is known.

    Args:
        program: The program; it must know what its inputs looked like.
        dynamic: Whether the first dimension of every input is a batch of any size.

    Raises:
        ArtifactError: The program does not know its inputs.
        FxqError: It does not run at two batch sizes.
    """
    if len(program.examples) != len(program.inputs):
        raise ArtifactError(
            "the program does not know the shapes of its inputs",
            hint="compile it from example inputs that are tensors",
        )
    first, second = (_run(program, batch if dynamic else None) for batch in BATCHES)
    values = {name: _compare(name, first[name], second[name]) for name in first}
    if any(value.size is not None and value.size.is_dynamic for value in values.values()):
        third = _run(program, ANOTHER)
        values = {name: _predicted(value, third[name]) for name, value in values.items()}
    return values


def _predicted(value: Value, found: Any) -> Value:
    """The value, if it is what it should be at another batch size; ``batch // 2`` is not."""
    if value.size is not None:
        return value if value.size.at(ANOTHER) == int(found) else Value()
    if value.shape is not None:
        sizes = tuple(size.at(ANOTHER) for size in value.shape)
        return value if sizes == tuple(found.shape) else Value()
    return value


def _run(program: IntegerProgram, batch: int | None) -> dict[str, Any]:
    """Every register at a batch size, as fake tensors: shapes without values."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = []
        for example in program.examples:
            shape = list(example.shape)
            if batch is not None and shape:
                shape[0] = batch
            inputs.append(torch.empty(shape, dtype=getattr(torch, example.dtype)))
        try:
            _, values = Reference(program).run(*inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise FxqError(
                f"the program does not run on a batch of {batch}: {str(error).splitlines()[0]}",
                hint="its batch size was fixed when it was captured; export with a static batch",
            ) from error
    del mode
    return values


def _compare(name: str, first: Any, second: Any) -> Value:
    """One value at two batch sizes, as a function of the batch size."""
    if isinstance(first, torch.Tensor):
        pairs = zip(first.shape, second.shape, strict=True)
        return Value(shape=tuple(_size(int(a), int(b)) for a, b in pairs), dtype=first.dtype)
    if isinstance(first, (tuple, list)):
        items = zip(first, second, strict=True)
        return Value(items=tuple(_compare(name, a, b) for a, b in items))
    if isinstance(first, int) and not isinstance(first, bool):
        return Value(size=_size(first, int(second)))
    return Value()


def _size(first: int, second: int) -> Size:
    low, high = BATCHES
    per_image = (second - first) // (high - low)
    return Size(per_image, first - per_image * low)


def resolved(value: Any, values: dict[str, Value]) -> Any:
    """Arguments with integer registers replaced by their `Size`s."""
    return substitute(value, {name: one.size for name, one in values.items()})
