"""Convolutions, linear layers and sums as ONNX operators on dequantized integers."""

from __future__ import annotations

import math

import numpy as np

from fxq.integer.layers import accumulator_scale
from fxq.integer.program import Instruction

from .emitter import ISLANDS, Emitter
from .weights import weight


def bias(emit: Emitter, step: Instruction) -> str:
    """The tensor with the float bias of a layer, ``[out]``.

    Dequantized from int32 in accumulator units; a constant where the layer reads a float.
    """
    name, graph = f"{step.name}.bias", emit.graph
    if emit.grids.get(step.inputs[0]) is None:
        return graph.constant(name, emit.program.tensor(step, "bias").numpy())
    source = emit.grid(step.inputs[0])
    unit = accumulator_scale(source.scale, emit.program.tensor(step, "scale")).numpy()
    inputs = [
        graph.constant(name, emit.program.tensor(step, "bias").numpy()),
        graph.constant(f"{name}_scale", unit),
        graph.constant(f"{name}_zero_point", np.zeros(len(unit), np.int32)),
    ]
    return graph.node("DequantizeLinear", inputs, f"{name}.float", axis=0)


def conv(emit: Emitter, step: Instruction) -> None:
    """A convolution, with its ReLU in the quantizer, or behind it where it computes in float."""
    attributes, is_float = step.attributes, step.grid is None
    value = _padded(emit, step) if emit.pads_channels(step) else _read(emit, step)
    total = emit.graph.node(
        "Conv",
        [value, weight(emit, step), bias(emit, step)],
        step.name if is_float and not attributes["relu"] else f"{step.name}.sum",
        kernel_shape=list(emit.program.tensor(step, "weight").shape[2:]),
        strides=list(attributes["stride"]),
        pads=list(attributes["padding"]) * 2,
        dilations=list(attributes["dilation"]),
        group=attributes["groups"],
    )
    if not is_float:
        emit.codes[step.name] = emit.quantize(step, total, relu=attributes["relu"])
        return
    if attributes["relu"]:
        total = emit.graph.node("Relu", [total], step.name)
    emit.floats[step.name] = total


def _padded(emit: Emitter, step: Instruction) -> str:
    """The input of a convolution of three channels with a fourth, as a float tensor."""
    source, output = step.inputs[0], f"{step.name}.padded"
    rank = len(emit.shape(source))
    pads = [0] * rank + [int(axis == 1) for axis in range(rank)]
    zero_point = emit.grid(source).zero_point
    codes = emit.pad(f"{output}.codes", emit.codes[source], pads, zero_point)
    return emit.dequantized(codes, source, output)


def linear(emit: Emitter, step: Instruction) -> None:
    """A linear layer as Gemm, the one matrix product with an integer bias: of rows, reshaped."""
    graph, relu = emit.graph, step.attributes["relu"]
    is_matrix = len(emit.shape(step.inputs[0])) == 2
    rows = _read(emit, step) if is_matrix else _rows(emit, step)
    operands = [rows, weight(emit, step), bias(emit, step)]
    if step.grid is None:
        _float_linear(emit, step, operands, is_matrix)
        return
    total = graph.node("Gemm", operands, f"{step.name}.sum", transB=1)
    if is_matrix:
        emit.codes[step.name] = emit.quantize(step, total, relu=relu)
        return
    codes = emit.quantize(step, total, relu=relu, output=f"{step.name}.rows_out")
    emit.codes[step.name] = _unflattened(emit, step, codes, f"{step.name}.codes")


def _float_linear(emit: Emitter, step: Instruction, operands: list[str], is_matrix: bool) -> None:
    """A linear layer whose result is a float: the tensor of its register's name."""
    relu = step.attributes["relu"]
    is_last = is_matrix and not relu
    value = emit.graph.node(
        "Gemm", operands, step.name if is_last else f"{step.name}.sum", transB=1
    )
    if relu:  # as a Max: a Relu would be fused with the Gemm, into a float kernel
        zero = emit.graph.scalar(0.0, np.float32)
        output = step.name if is_matrix else f"{step.name}.relu"
        value = emit.graph.node("Max", [value, zero], output)
    emit.floats[step.name] = value if is_matrix else _unflattened(emit, step, value, step.name)


def _rows(emit: Emitter, step: Instruction) -> str:
    """The input of a linear layer as a matrix of floats, ``[rows, in]``."""
    source, output = step.inputs[0], f"{step.name}.rows"
    shape = emit.graph.shape([-1, emit.shape(source)[-1].constant])
    if emit.grids.get(source) is None:
        return emit.graph.node("Reshape", [_read(emit, step), shape], output)
    codes = emit.graph.node("Reshape", [emit.codes[source], shape], f"{output}.codes")
    return emit.dequantized(codes, source, output)


def _unflattened(emit: Emitter, step: Instruction, rows: str, output: str) -> str:
    return emit.graph.node("Reshape", [rows, emit.graph.shape(emit.dims(step.name))], output)


def add(emit: Emitter, step: Instruction) -> None:
    """A sum of two registers, with its ReLU in the quantizer."""
    addends = [emit.float_of(name) for name in step.inputs]
    total = emit.graph.node("Add", addends, f"{step.name}.sum")
    emit.codes[step.name] = emit.quantize(step, total, relu=step.attributes["relu"])


def global_avg_pool(emit: Emitter, step: Instruction) -> None:
    """The mean of each channel."""
    mean = emit.graph.node(
        "GlobalAveragePool", [emit.float_of(step.inputs[0])], f"{step.name}.mean"
    )
    if step.attributes["keepdim"]:
        emit.codes[step.name] = emit.quantize(step, mean)
        return
    codes = emit.quantize(step, mean, output=f"{step.name}.pooled")
    emit.codes[step.name] = emit.graph.node("Flatten", [codes], f"{step.name}.codes", axis=1)


def quantize(emit: Emitter, step: Instruction) -> None:
    """The codes of a float register."""
    emit.codes[step.name] = emit.quantize(step, emit.float_of(step.inputs[0]))


def fake_quantize(emit: Emitter, step: Instruction) -> None:
    """A float rounded to codes with a scale per channel, in bytes, and back.

    Operators of float islands never stand directly between such nodes: ONNX Runtime takes those for
    its integer kernels, which have one scale, and then refuses the model. Layers are left alone
    unless the scale of their input is a single one.
    """
    name, graph = step.name, emit.graph
    is_single = emit.program.tensor(step, "scale").numel() == 1
    parameters = [
        graph.constant(f"{name}.{role}", emit.program.tensor(step, role).numpy())
        for role in ("scale", "zero_point")
    ]
    value, source = emit.float_of(step.inputs[0]), emit.writers.get(step.inputs[0])
    if source is not None and source.op in ISLANDS:
        value = apart(emit, value, f"{name}.input")
    top, output = 2 ** step.attributes["bits"] - 1, f"{name}.codes"
    is_whole = top == 255 and "top" not in step.tensors
    rounded = output if is_whole else f"{output}.unclipped"
    codes = graph.node("QuantizeLinear", [value, *parameters], rounded, axis=1)
    if "top" in step.tensors:
        tops = emit.program.tensor(step, "top").reshape(-1, *[1] * (len(emit.shape(name)) - 2))
        codes = graph.node("Min", [codes, graph.constant(f"{name}.top", tops.numpy())], output)
    elif not is_whole:
        codes = emit.clip(output, codes, None, top)
    guarded = is_single or any(reader.op in ISLANDS for reader in emit.readers[name])
    output = f"{name}.value" if guarded else name
    value = graph.node("DequantizeLinear", [codes, *parameters], output, axis=1)
    if guarded:
        apart(emit, value, name)
    emit.floats[name] = name if is_single else value


def _read(emit: Emitter, step: Instruction) -> str:
    """The input of a layer as a float tensor, from which a layer in float stands apart.

    ONNX Runtime would round its bias for an integer kernel, where the input has one scale.
    """
    source = step.inputs[0]
    value, writer = emit.float_of(source), emit.writers.get(source)
    if writer is None or step.grid is not None:
        return value
    before = [emit.writers.get(name) for name in writer.inputs]  # a padding that runtimes fold
    near = [writer, *before] if writer.op in ISLANDS else [writer]
    has_one_scale = any(one is not None and one.op == "dequantize" for one in near)
    return apart(emit, value, f"{step.name}.input") if has_one_scale else value


def apart(emit: Emitter, value: str, output: str) -> str:
    """The same float, behind an operator that no runtime leaves out."""
    lowest = emit.graph.scalar(-math.inf, np.float32)
    return emit.graph.node("Max", [value, lowest], output)


def requantize(emit: Emitter, step: Instruction) -> None:
    """Codes on another grid.

    The Clip changes nothing. It is there because ONNX Runtime makes one QuantizeLinear of two that
    follow each other, on a grid of its own.
    """
    source = step.inputs[0]
    kept = emit.clip(f"{step.name}.kept", emit.codes[source], 0, emit.grid(source).top)
    value = emit.dequantized(kept, source, f"{step.name}.value")
    emit.codes[step.name] = emit.quantize(step, value)


def dequantize(emit: Emitter, step: Instruction) -> None:
    """The float value of codes, for float operators and outputs."""
    source = step.inputs[0]
    parts = emit.codes[source]
    if isinstance(parts, str):
        emit.floats[step.name] = emit.dequantized(parts, source, step.name)
        return
    for index, part in enumerate(parts):  # a tuple that is read as a whole
        emit.dequantized(part, source, f"{step.name}.{index}")
