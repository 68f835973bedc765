"""Pools, concatenations, paddings and reshapes of codes as ONNX operators."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from fxq.integer.program import Instruction
from fxq.integer.reference import reshape as reshape_codes
from fxq.integer.shapes import BATCHES

from .emitter import Emitter, UnexportableError

_INT32 = 6  # onnx.TensorProto's
Operator = Callable[[list[str], str], str]


def max_pool(emit: Emitter, step: Instruction) -> None:
    """A max pool; of codes, whose order is that of their values."""
    attributes = step.attributes

    def pool(tensors: list[str], output: str) -> str:
        return emit.graph.node(
            "MaxPool",
            tensors,
            output,
            kernel_shape=list(attributes["kernel_size"]),
            strides=list(attributes["stride"]),
            pads=list(attributes["padding"]) * 2,
            dilations=list(attributes["dilation"]),
            ceil_mode=int(attributes["ceil_mode"]),
        )

    emit.move(step, pool)


def cat(emit: Emitter, step: Instruction) -> None:
    """A concatenation of registers that share a grid."""
    dim = step.attributes["dim"]
    emit.move(step, lambda tensors, output: emit.graph.node("Concat", tensors, output, axis=dim))


def pad(emit: Emitter, step: Instruction) -> None:
    """A padding with zeros, whose code is the zero point."""
    amounts = step.attributes["pad"]
    rank = len(emit.shape(step.inputs[0]))
    begins, ends = [0] * rank, [0] * rank
    for index in range(len(amounts) // 2):
        begins[rank - 1 - index], ends[rank - 1 - index] = amounts[2 * index : 2 * index + 2]
    pads, zero_point = [*begins, *ends], emit.grid(step.name).zero_point
    emit.move(step, lambda tensors, output: emit.pad(output, tensors[0], pads, zero_point))


def relu(emit: Emitter, step: Instruction) -> None:
    """A ReLU that stands alone, perhaps bounded from above."""
    low, top = emit.grid(step.name).zero_point, step.attributes["top"]
    emit.move(step, lambda tensors, output: emit.clip(output, tensors[0], low, top))


def lookup(emit: Emitter, step: Instruction) -> None:
    """Codes from a table of bytes, as rows: ONNX Runtime's Gather takes nine times as long."""
    table = emit.program.tensor(step, "table").reshape(1, -1).numpy()
    shape = emit.dims(step.name)

    def look_up(tensors: list[str], output: str) -> str:
        row = _node(emit, "Reshape", tensors[0], [1, -1], f"{output}.row")
        index = emit.graph.node("Cast", [row], f"{output}.index", to=_INT32)
        inputs = [emit.graph.constant(f"{step.name}.table", table), index]
        found = emit.graph.node("GatherElements", inputs, f"{output}.found", axis=1)
        return _node(emit, "Reshape", found, shape, output)

    emit.move(step, look_up)


def reshape(emit: Emitter, step: Instruction) -> None:
    """Codes in another shape or order; nothing is computed."""
    source, call = step.inputs[0], step.attributes["call"]
    if emit.values[source].items is not None:
        index = step.attributes["arguments"][0]
        if call != "getitem" or not isinstance(index, int):
            raise UnexportableError(f"{call} of a tuple")
        emit.codes[step.name] = emit.codes[source][index]
    elif emit.values[step.name].items is not None:
        _split(emit, step)
    else:
        emit.move(step, _OPERATORS.get(call, _reshaped)(emit, step))


def _reshaped(emit: Emitter, step: Instruction) -> Operator:
    shape = emit.dims(step.name)
    return lambda tensors, output: _node(emit, "Reshape", tensors[0], shape, output)


def _node(emit: Emitter, op: str, tensor: str, shape: list[int], output: str) -> str:
    return emit.graph.node(op, [tensor, emit.graph.shape(shape)], output)


def _transposed(emit: Emitter, step: Instruction) -> Operator:
    """A permutation of dimensions, found by permuting one whose sizes tell them apart."""
    rank = len(emit.shape(step.inputs[0]))
    marked = torch.empty(tuple(range(2, rank + 2)), device="meta")
    order = [int(size) - 2 for size in _at_example(emit, step, marked).shape]
    return lambda tensors, output: emit.graph.node("Transpose", tensors, output, perm=order)


def _shuffled(emit: Emitter, step: Instruction) -> Operator:
    """Pixels moved between channels and space: a reshape, a permutation, a reshape."""
    batch, channels, height, width = _plain(emit, step.inputs[0])
    ratio = int(step.attributes["arguments"][0])
    if step.attributes["call"] == "pixel_shuffle":
        split = [batch, channels // ratio**2, ratio, ratio, height, width]
        order = [0, 1, 4, 2, 5, 3]
    else:
        split = [batch, channels, height // ratio, ratio, width // ratio, ratio]
        order = [0, 1, 3, 5, 2, 4]
    target = emit.dims(step.name)

    def shuffled(tensors: list[str], output: str) -> str:
        value = _node(emit, "Reshape", tensors[0], split, f"{output}.split")
        value = emit.graph.node("Transpose", [value], f"{output}.order", perm=order)
        return _node(emit, "Reshape", value, target, output)

    return shuffled


def _plain(emit: Emitter, name: str) -> list[int]:
    """The dimensions of a register, -1 for the batch; no other depends on it."""
    dims = emit.dims(name)
    if -1 in dims[1:]:
        raise UnexportableError("a dimension other than the first depends on the batch size")
    return dims


def _selected(emit: Emitter, step: Instruction) -> Operator:
    """Part of a tensor: an index, a slice."""
    return _selection(emit, step, lambda value: _at_example(emit, step, value), step.name)


def _split(emit: Emitter, step: Instruction) -> None:
    """Parts of a tensor, as a list of registers of codes."""
    items = emit.values[step.name].items or ()
    source = emit.codes[step.inputs[0]]
    parts = []
    for index in range(len(items)):
        name = f"{step.name}.{index}"
        emit.values[name] = items[index]
        take = _selection(emit, step, functools.partial(_part, emit, step, index), name)
        parts.append(take([source], f"{name}.codes"))
    emit.codes[step.name] = parts


def _part(emit: Emitter, step: Instruction, index: int, value: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _at_example(emit, step, value)[index]
    return found


def _selection(
    emit: Emitter, step: Instruction, call: Callable[[torch.Tensor], torch.Tensor], name: str
) -> Operator:
    """Slices along each dimension, and a reshape: what ``call`` takes of a tensor.

    Which indices it takes along a dimension is read off the coordinates that it lets through.
    """
    shape = [size.at(BATCHES[0]) for size in emit.shape(step.inputs[0])]
    slices: list[tuple[int, int, int, int]] = []
    for axis, size in enumerate(shape):
        view = [-1 if one == axis else 1 for one in range(len(shape))]
        kept = sorted(set(call(torch.arange(size).reshape(view).expand(shape)).flatten().tolist()))
        if kept != list(range(size)):
            slices.append((axis, *_bounds(kept)))
    expected = torch.arange(math.prod(shape)).reshape(shape)
    part = expected
    for axis, start, end, stride in slices:
        part = part[(slice(None),) * axis + (slice(start, end, stride),)]
    result = call(expected)
    is_batch = any(emit.shape(step.inputs[0])[axis].is_dynamic for axis, *_ in slices)
    if is_batch or not torch.equal(part.reshape(result.shape), result):
        raise UnexportableError(f"{step.attributes['call']} of these indices")
    target = emit.dims(name)

    def sliced(tensors: list[str], output: str) -> str:
        columns = zip(*slices, strict=True) if slices else ((),) * 4
        axes, starts, ends, strides = (emit.graph.shape(list(one)) for one in columns)
        value = tensors[0]
        if slices:
            inputs = [value, starts, ends, axes, strides]
            value = emit.graph.node("Slice", inputs, f"{output}.slice")
        return _node(emit, "Reshape", value, target, output)

    return sliced


def _bounds(kept: list[int]) -> tuple[int, int, int]:
    """Start, end and stride of indices at equal distances."""
    stride = kept[1] - kept[0] if len(kept) > 1 else 1
    return kept[0], kept[-1] + 1, stride


def _at_example(emit: Emitter, step: Instruction, value: torch.Tensor) -> Any:
    """What a reshape makes of a tensor, with computed sizes as they are at an example's batch."""
    sizes = {
        name: found.size.at(BATCHES[0])
        for name, found in emit.values.items()
        if found.size is not None
    }
    try:
        return reshape_codes(step, value, sizes)
    except KeyError as error:
        raise UnexportableError(
            "it reads an integer that is no multiple of the batch size"
        ) from error


_OPERATORS: dict[str, Callable[[Emitter, Instruction], Operator]] = {
    **dict.fromkeys(("permute", "transpose", "movedim", "swapaxes"), _transposed),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _shuffled),
    **dict.fromkeys(("getitem", "select", "narrow"), _selected),
}
