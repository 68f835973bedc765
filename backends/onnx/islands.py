"""Float islands as ONNX nodes: traced together, exported once by torch.onnx, taken apart."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxq.backend import Obstacle
from fxq.errors import LoweringError
from fxq.integer.arguments import registers_in, substitute
from fxq.integer.program import Instruction, IntegerProgram
from fxq.integer.shapes import Value

from .island_module import ISLANDS, IslandModule, reason
from .island_names import Dismantling

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class IslandGraph:
    """The nodes of all float islands of a program.

    Attributes:
        nodes: Sorted. They read and write tensors that are named as registers; the items of a
            register that is a tuple are ``NAME.INDEX``.
        initializers: The constants they read, under the names of the program's tensors.
    """

    nodes: list[onnx.NodeProto]
    initializers: list[onnx.TensorProto]


def export_islands(
    program: IntegerProgram, values: Mapping[str, Value], *, opset: int, dynamic: bool = True
) -> IslandGraph:
    """The instructions ``float``, ``module`` and ``constant`` of a program as ONNX nodes.

    Every register that something else reads is written; no quantized register is read.

    Args:
        program: The program.
        values: What `register_values` says of it, with the same ``dynamic``.
        opset: The opset of the nodes.
        dynamic: Whether the batch may have any size.

    Raises:
        LoweringError: Instructions have no ONNX form; all that are known to are listed.
    """
    steps = [step for step in program if step.op in ISLANDS]
    obstacles = list(_no_tensors(program, values))
    needed = _read_elsewhere(program, values)
    if not obstacles and needed:
        module = IslandModule(program, values, _leading_to(steps, needed))
        with quietly():
            result, obstacles = _exported(module, needed, opset)
        if result is not None:
            return result
    if obstacles:
        raise LoweringError(
            f"torch.onnx cannot export {len(obstacles)} nodes",
            obstacles,
            hint="keep what cannot be exported outside the model",
        )
    return IslandGraph([], [])


def _no_tensors(program: IntegerProgram, values: Mapping[str, Value]) -> Iterator[Obstacle]:
    """Outputs of the program that hold no tensor but an integer or a tuple, or complex numbers."""
    steps = {step.name: step for step in program}
    for name in dict.fromkeys(registers_in(program.output)):
        if name in steps and steps[name].op in ISLANDS:
            dtype = values[name].dtype
            if dtype is None or dtype.is_complex:
                yield Obstacle(
                    name, f"it is an output, and {'no' if dtype is None else 'a complex'} tensor"
                )


def _read_elsewhere(program: IntegerProgram, values: Mapping[str, Value]) -> list[str]:
    """The tensors of islands that other instructions read, or that are outputs."""
    written = {step.name for step in program if step.op in ISLANDS}
    outside = [name for step in program if step.op not in ISLANDS for name in step.inputs]
    read = dict.fromkeys([*outside, *registers_in(program.output)])
    return [name for name in read if name in written and values[name].shape is not None]


def _leading_to(steps: list[Instruction], names: list[str]) -> list[Instruction]:
    """The instructions that those registers take."""
    needed = set(names)
    kept = []
    for step in reversed(steps):
        if step.name in needed:
            kept.append(step)
            needed.update(step.reads)
    return kept[::-1]


# ---- the exporter ----------------------------------------------------------------------------


def _exported(
    module: IslandModule, needed: list[str], opset: int
) -> tuple[IslandGraph | None, list[Obstacle]]:
    """The islands as ONNX, or what is in the way."""
    why, model = _attempt(module, opset)
    if model is not None:
        return IslandGraph(*Dismantling(model, module, needed).run()), []
    found = module.trail.failed or _each_alone(module, opset) or {module.steps[-1].name: why}
    return None, [Obstacle(name, one) for name, one in found.items()]


def _attempt(module: IslandModule, opset: int) -> tuple[str, Any]:
    """The ONNX model of a module, of standard operators only; or why there is none."""
    from onnx_ir.passes import common

    try:
        traced = module.trace()
        if module.trail.failed:
            return "", None
        exported = torch.onnx.export(traced, dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:  # what torch.export and torch.onnx raise has no common base
        return reason(error), None
    model: Any = exported.model  # type: ignore[union-attr]
    common.InlinePass()(model)
    domains = sorted({node.domain for node in model.graph} - {"", "ai.onnx"})
    if domains:
        return f"it needs operators of {', '.join(domains)}", None
    if model.opset_imports[""] != opset:
        return f"torch.onnx has no form of it in opset {opset}", None
    return "", model


def _each_alone(module: IslandModule, opset: int) -> dict[str, str]:
    """Why instructions cannot be exported on their own; of those that are alike, one is tried."""
    reasons: dict[str, str] = {}
    found = {}
    for step in module.steps:
        kind = _kind(step, module.values)
        if kind not in reasons:
            before = [other for other in module.steps if other.name in step.reads]
            unknown = [other for other in before if module.values[other.name] == Value()]
            one = IslandModule(module.program, module.values, [*unknown, step])
            why, model = _attempt(one, opset)
            is_fine = model is not None or not one.trail.results
            reasons[kind] = "" if is_fine else one.trail.failed.get(step.name, why)
        if reasons[kind]:
            found[step.name] = reasons[kind]
    return found


def _kind(step: Instruction, values: Mapping[str, Value]) -> str:
    """What an instruction calls, with what arguments, on what kinds of tensors."""
    kinds = {
        name: value if value.shape is None else (len(value.shape), value.dtype)
        for name, value in values.items()
    }
    return repr((step.op, substitute(step.attributes, kinds)))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Neither warnings nor log lines of the exporter get out; what it raises does."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
