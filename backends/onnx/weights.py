"""Weights as ONNX tensors: int8 or packed into fewer bits, dequantized to the same floats."""

from __future__ import annotations

import numpy as np

from fxq.integer.program import Instruction

from .emitter import Container, Emitter, Flavor
from .graph import Array
from .levels import Levels, Table


def weight(emit: Emitter, step: Instruction) -> str:
    """The tensor with the dequantized weights of a layer, ``[out, in/groups, ...]``."""
    packed = emit.packed(step)
    if isinstance(packed.form, Levels) and emit.flavor is Flavor.COMPACT:
        return _levels_in_float(emit, step, packed.bits, packed.form)
    if isinstance(packed.form, Levels):
        codes = _levels_in_integers(emit, step, packed.bits, packed.form)
    elif isinstance(packed.form, Table):
        codes = _looked_up(emit, step, packed.bits, packed.form)
    else:
        codes = emit.graph.constant(f"{step.name}.weight", emit.weight_codes(step))
    scale = emit.program.tensor(step, "scale").numpy()
    return _dequantized(emit, step, codes, scale, np.zeros(len(scale), np.int8))


def _dequantized(
    emit: Emitter,
    step: Instruction,
    codes: str,
    scale: Array,
    zero_point: Array,
    end: str = "float",
) -> str:
    name, graph = f"{step.name}.weight", emit.graph
    parameters = [
        graph.constant(f"{name}_scale", scale.astype(np.float32)),
        graph.constant(f"{name}_zero_point", zero_point),
    ]
    return graph.node("DequantizeLinear", [codes, *parameters], f"{name}.{end}", axis=0)


def _levels_in_float(emit: Emitter, step: Instruction, bits: int, levels: Levels) -> str:
    """``level * (factor * scale) + shift * scale``: what runtimes know as 4-bit weights."""
    name, graph = f"{step.name}.weight", emit.graph
    scale = emit.program.tensor(step, "scale").numpy()
    stored = levels.level.astype(Container.of(bits, signed=True).dtype)
    codes = graph.constant(name, stored)
    zero_point, end = np.zeros(len(scale), stored.dtype), "unshifted" if levels.shifts else "float"
    value = _dequantized(emit, step, codes, scale * levels.factor, zero_point, end)
    if not levels.shifts:
        return value
    shift = graph.constant(f"{name}_shift", _column((scale * levels.shift), levels, np.float32))
    return graph.node("Add", [value, shift], f"{name}.float")


def _levels_in_integers(emit: Emitter, step: Instruction, bits: int, levels: Levels) -> str:
    """``level * factor + shift`` as int8, which runtimes compute once, when they load the model."""
    name, graph = f"{step.name}.weight", emit.graph
    stored = levels.level.astype(Container.of(bits, signed=True).dtype)
    value = graph.node("Cast", [graph.constant(name, stored)], f"{name}.level", to=_INT32)
    factor = graph.constant(f"{name}_factor", _column(levels.factor, levels, np.int32))
    value = graph.node("Mul", [value, factor], f"{name}.spread")
    if levels.shifts:
        shift = graph.constant(f"{name}_shift", _column(levels.shift, levels, np.int32))
        value = graph.node("Add", [value, shift], f"{name}.shifted")
    return graph.node("Cast", [value], f"{name}.codes", to=_INT8)


def _looked_up(emit: Emitter, step: Instruction, bits: int, table: Table) -> str:
    """``values[index]`` as int8, which runtimes compute once, when they load the model."""
    name, graph = f"{step.name}.weight", emit.graph
    stored = graph.constant(name, table.index.astype(Container.of(bits).dtype))
    index = graph.node("Cast", [stored], f"{name}.index", to=_INT32)
    values = graph.constant(f"{name}_values", table.values)
    return graph.node("Gather", [values, index], f"{name}.codes")


_INT8, _INT32 = 3, 6  # onnx.TensorProto's


def _column(values: Array, levels: Levels, dtype: type) -> Array:
    """``[out]`` values shaped to broadcast along the weights."""
    return values.astype(dtype).reshape(-1, *[1] * (levels.level.ndim - 1))
