"""Convolutions, linear layers and sums as ONNX operators on dequantized integers."""

from __future__ import annotations

import numpy as np

from fxq.integer.layers import accumulator_scale
from fxq.integer.program import Instruction

from ._onnx_emitter import Emitter, UnexportableError
from ._onnx_weights import weight


def bias(emit: Emitter, step: Instruction) -> str:
    """The tensor with the dequantized bias of a layer, ``[out]``: int32 in accumulator units."""
    name, graph = f"{step.name}.bias", emit.graph
    source = emit.grid(step.inputs[0])
    unit = accumulator_scale(source.scale, emit.program.tensor(step, "scale")).numpy()
    inputs = [
        graph.constant(name, emit.program.tensor(step, "bias").numpy()),
        graph.constant(f"{name}_scale", unit),
        graph.constant(f"{name}_zero_point", np.zeros(len(unit), np.int32)),
    ]
    return graph.node("DequantizeLinear", inputs, f"{name}.float", axis=0)


def conv(emit: Emitter, step: Instruction) -> None:
    """A convolution, with its ReLU in the quantizer."""
    attributes = step.attributes
    total = emit.graph.node(
        "Conv",
        [emit.float_of(step.inputs[0]), weight(emit, step), bias(emit, step)],
        f"{step.name}.sum",
        kernel_shape=list(emit.program.tensor(step, "weight").shape[2:]),
        strides=list(attributes["stride"]),
        pads=list(attributes["padding"]) * 2,
        dilations=list(attributes["dilation"]),
        group=attributes["groups"],
    )
    emit.codes[step.name] = emit.quantize(step, total, relu=attributes["relu"])


def linear(emit: Emitter, step: Instruction) -> None:
    """A linear layer as Gemm, the one matrix product with an integer bias: of rows, reshaped."""
    graph, relu = emit.graph, step.attributes["relu"]
    is_matrix = len(emit.shape(step.inputs[0])) == 2
    rows = emit.float_of(step.inputs[0]) if is_matrix else _rows(emit, step)
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
    if not isinstance(emit.codes[source], str):
        raise UnexportableError("a float operator reads a tuple of integer tensors")
    emit.floats[step.name] = emit.dequantized(emit.codes[source], source, step.name)
