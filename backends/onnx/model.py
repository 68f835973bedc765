"""An integer program as an ONNX model: instructions emitted, islands exported, nodes sorted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

import fxq
from fxq.backend import Obstacle
from fxq.errors import FxqError, LoweringError
from fxq.integer.arguments import Register, registers_in
from fxq.integer.program import Instruction, IntegerProgram
from fxq.integer.shapes import Size, register_values

from . import layers, moves
from .emitter import ISLANDS, Emitter, Flavor, UnexportableError

if TYPE_CHECKING:
    import onnx

OLDEST_OPSET = 21
"""The first opset with 4-bit types, and with int8 weights per channel beside them."""

RULES: dict[str, Callable[[Emitter, Instruction], None]] = {
    "quantize": layers.quantize,
    "requantize": layers.requantize,
    "dequantize": layers.dequantize,
    "fake_quantize": layers.fake_quantize,
    "conv": layers.conv,
    "linear": layers.linear,
    "add": layers.add,
    "global_avg_pool": layers.global_avg_pool,
    "lookup": moves.lookup,
    "max_pool": moves.max_pool,
    "cat": moves.cat,
    "pad": moves.pad,
    "relu": moves.relu,
    "reshape": moves.reshape,
}


def newest_opset() -> int:
    """The newest opset the installed onnx knows."""
    from onnx import defs

    return int(defs.onnx_opset_version())


def check_opset(opset: int) -> None:
    """The opset has what a quantized model needs.

    Raises:
        FxqError: It is too old, or newer than the installed onnx.
    """
    if opset < OLDEST_OPSET:
        raise FxqError(
            f"opset {opset} is too old: quantized models need {OLDEST_OPSET}",
            hint=f"use {OLDEST_OPSET} to {newest_opset()}",
        )
    if opset > newest_opset():
        raise FxqError(
            f"opset {opset} is newer than the {newest_opset()} of the installed onnx",
            hint=f"use {OLDEST_OPSET} to {newest_opset()}, or upgrade onnx",
        )


def onnx_model(
    program: IntegerProgram,
    *,
    flavor: Flavor = Flavor.FAST,
    opset: int = OLDEST_OPSET,
    dynamic: bool = True,
) -> onnx.ModelProto:
    """A program as an ONNX model; the same program gives the same bytes.

    Args:
        program: The program.
        flavor: What the integers are stored in.
        opset: The opset, 21 or later.
        dynamic: Whether the first dimension of every input is a batch of any size.

    Raises:
        LoweringError: Something has no ONNX form; all of it is listed.
    """
    check_opset(opset)
    _check_ranges(program)
    values = register_values(program, dynamic=dynamic)
    emit = Emitter(program, values, flavor, opset)
    obstacles = [*_emitted(emit), *_joined(emit, dynamic), *_unstated(emit)]
    if obstacles:
        raise LoweringError(
            f"the onnx backend cannot express {len(obstacles)} nodes",
            obstacles,
            hint="keep what cannot be exported outside the model",
        )
    return _model(emit, _own_metadata(emit))


def _check_ranges(program: IntegerProgram) -> None:
    """Every range is known.

    Raises:
        LoweringError: Some are found at run time.
    """
    why = "finds its range in each batch, for which ONNX has no operators"
    found = [Obstacle(step.name, why) for step in program if step.op == "dynamic_quantize"]
    if found:
        raise LoweringError(
            f"the onnx backend cannot express {len(found)} nodes",
            found,
            hint="set dynamic = false on quantize-aciq, or compile for the eager backend",
        )


def _emitted(emit: Emitter) -> Iterator[Obstacle]:
    """The instructions that could not be emitted; the others are."""
    failed: set[str] = set()
    for step in emit.program:
        if step.op in ISLANDS:
            emit.floats[step.name] = step.name
        elif failed.isdisjoint(step.reads):
            try:
                RULES[step.op](emit, step)
            except UnexportableError as error:
                yield Obstacle(step.name, str(error))
                failed.add(step.name)
        else:
            failed.add(step.name)  # only because of what it reads


def _joined(emit: Emitter, dynamic: bool) -> Iterator[Obstacle]:
    """The float islands are in the graph, with what they read; or why not."""
    if not any(step.op in ISLANDS for step in emit.program):
        return
    from .islands import export_islands

    try:
        graph = export_islands(emit.program, emit.values, opset=emit.opset, dynamic=dynamic)
    except LoweringError as error:
        yield from error.obstacles  # type: ignore[misc]
        return
    keep_float(emit, graph.nodes)
    emit.graph.nodes += graph.nodes
    emit.graph.initializers.update({one.name: one for one in graph.initializers})


def keep_float(emit: Emitter, nodes: list[onnx.NodeProto]) -> None:
    """What runtimes would compute on integers between a DequantizeLinear and a QuantizeLinear.

    ONNX Runtime makes an integer kernel of an operator that stands between the two, and rounds even
    float weights for it. A layer that was left in float must stay there.
    """
    dequantized = {step.name for step in emit.program if step.op == "dequantize"}
    quantized = {step.inputs[0] for step in emit.program if step.op == "quantize"}
    guarded: dict[str, str] = {}
    for node in nodes:
        found = [index for index, name in enumerate(node.input) if name in dequantized]
        if not found or (node.op_type not in _PRODUCTS and quantized.isdisjoint(node.output)):
            continue
        name = node.input[found[0]]
        if name not in guarded:
            guarded[name] = layers.apart(emit, name, f"{name}.apart")
        node.input[found[0]] = guarded[name]


_PRODUCTS = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])


def _unstated(emit: Emitter) -> Iterator[Obstacle]:
    """Outputs that are no tensors of a known shape."""
    for leaf in _leaves(emit.program.output):
        if not isinstance(leaf, Register):
            yield Obstacle("output", f"{leaf!r} is no tensor")
        elif emit.values[leaf.name].shape is None:
            yield Obstacle(leaf.name, "it is an output, and no tensor of a known shape")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


# ---- the model -------------------------------------------------------------------------------


def _model(emit: Emitter, metadata: Mapping[str, str]) -> onnx.ModelProto:
    from onnx import helper

    program, graph = emit.program, emit.graph
    outputs = [
        _value_info(emit, _output(emit, name, shown), name)
        for name, shown in output_names(program).items()
    ]
    made = helper.make_graph(
        graph.sorted_nodes(program.inputs),
        "fxq",
        [_value_info(emit, name, name) for name in program.inputs],
        outputs,
        list(graph.initializers.values()),
    )
    opsets = [helper.make_opsetid("", emit.opset)]
    model = helper.make_model(
        made,
        opset_imports=opsets,
        producer_name="fxq",
        producer_version=fxq.__version__,
        ir_version=helper.find_min_ir_version_for(opsets),
    )
    helper.set_model_props(model, dict(sorted(metadata.items())))
    return model


def output_names(program: IntegerProgram) -> dict[str, str]:
    """The name of each output of the model, by register: the register's, or its key in a dict."""
    names = {name: name for name in registers_in(program.output)}
    if isinstance(program.output, dict):
        taken = {step.name for step in program} | set(program.inputs)
        for key, value in program.output.items():
            if isinstance(value, Register) and isinstance(key, str) and key not in taken:
                names[value.name] = key
    return names


def _output(emit: Emitter, name: str, shown: str) -> str:
    """The tensor that is an output, under the name it is to have."""
    tensor = emit.float_of(name)
    if tensor == shown and tensor not in emit.program.inputs:
        return tensor
    shown = f"{shown}.output" if shown in emit.program.inputs else shown
    return emit.graph.node("Identity", [tensor], shown)


def _value_info(emit: Emitter, tensor: str, register: str) -> onnx.ValueInfoProto:
    from onnx import helper

    value = emit.values[register]
    assert value.shape is not None
    is_codes = emit.grids.get(register) is not None  # whose float value is meant
    dtype = helper.np_dtype_to_tensor_dtype(
        np.dtype(np.float32) if is_codes else _numpy_dtype(value.dtype)
    )
    return helper.make_tensor_value_info(tensor, dtype, [_dim(size) for size in value.shape])


def _numpy_dtype(dtype: Any) -> Any:
    import torch

    return torch.empty(0, dtype=dtype).numpy().dtype


def _dim(size: Size) -> int | str:
    """A dimension of a shape: a number, or its formula in ``batch``."""
    if not size.is_dynamic:
        return size.constant
    product = "batch" if size.per_image == 1 else f"{size.per_image}*batch"
    return product if not size.constant else f"{product}{size.constant:+d}"


def _own_metadata(emit: Emitter) -> dict[str, str]:
    return {
        "fxq.version": fxq.__version__,
        "fxq.flavor": emit.flavor.value,
        "fxq.weights_sha256": weights_digest(emit.program),
    }


def weights_digest(program: IntegerProgram) -> str:
    """SHA-256 of all tensors of a program, with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(program.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
