"""Lowering: a quantized program becomes an `IntegerProgram`, and a ledger of where each node went.

The graph is walked once. A layer whose input is quantized and whose output goes into a quantizer,
with or without a ReLU between, becomes one integer instruction; what follows it on the same scale
moves codes; everything else becomes a float instruction between a dequantize and a quantize.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxq.graph.ops import ANCHORS, Kind, Op, describe, target_name
from fxq.graph.program import Program, facts, layer_path
from fxq.integer.arguments import Register, registers_in
from fxq.integer.islands import float_call
from fxq.integer.layers import (
    IntegerLayer,
    average_layer,
    conv_geometry,
    could_overflow,
    integer_layer,
    is_supported,
)
from fxq.integer.ledger import Ledger, LedgerEntry, removed_by_passes
from fxq.integer.program import Grid, Instruction, IntegerProgram, examples_of
from fxq.quant.quantizers import ActivationQuantizer, QuantizedLayer
from fxq.trail.journal import Journal


@dataclass(frozen=True)
class _Value:
    """Where a node's value is: a register, and the grid of its codes (None for a float)."""

    register: str
    grid: Grid | None = None


@dataclass
class Lowering:
    """The walk over a program; `run` gives the result."""

    program: Program
    steps: list[Instruction] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    foreign: dict[str, Callable[..., Any]] = field(default_factory=dict)
    values: dict[fx.Node, _Value] = field(default_factory=dict)
    ledger: dict[fx.Node, LedgerEntry] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    output: Any = None
    _floats: dict[str, str] = field(default_factory=dict)

    def run(self) -> IntegerProgram:
        """The integer program."""
        for node in self.program.nodes():
            if node not in self.values and node not in self.ledger:
                op = describe(node, self.program.module)
                _RULES.get(op.kind, Lowering._float)(self, node, op)
        result = IntegerProgram(
            tuple(self.inputs), self.steps, self.output, self.tensors, self.foreign
        )
        result.examples = examples_of(self.program.example_inputs, len(self.inputs))
        result.drop_unused()
        return result

    # ---- edges of the program ----------------------------------------------------------------

    def _input(self, node: fx.Node, op: Op) -> None:
        self.inputs.append(node.name)
        self.values[node] = _Value(node.name)

    def _constant(self, node: fx.Node, op: Op) -> None:
        value: Any = self.program.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor):
            self.tensors[node.name] = value.detach().clone()
            self._emit(node, "constant", tensors={"value": node.name})

    def _output(self, node: fx.Node, op: Op) -> None:
        self.output = self._arguments(node.args[0])

    # ---- values ------------------------------------------------------------------------------

    def _quantizer(self, node: fx.Node, op: Op) -> None:
        grid = _grid(op.module)
        value = self.values[op.inputs[0]]
        if value.grid == grid:
            self.values[node] = value
        elif value.grid is not None:
            self._emit(node, "requantize", (value.register,), grid=grid)
        else:
            self._emit(node, "quantize", (value.register,), grid=grid)

    def _layer(self, node: fx.Node, op: Op) -> None:
        source = self.values[op.inputs[0]]
        target = self._quantizer_after(node)
        grid = None if target is None else _grid(self.program.submodule(target))
        needs_grid = op.kind is Kind.CONV
        why = facts(node).skip
        if source.grid is None:
            why = why or "its input is not quantized"
        elif not isinstance(op.module, QuantizedLayer) or not is_supported(op.module):
            why = why or "it was not quantized"
        elif could_overflow(op.module):
            why = why or "its sums could leave 32 bits"
        elif needs_grid and grid is None:
            why = why or "its output has no scale"
        else:
            self._integer_layer(node, op.module, source, target, grid)
            return
        self._float_call(node, op, why)

    def _integer_layer(
        self,
        node: fx.Node,
        module: QuantizedLayer,
        source: _Value,
        target: fx.Node | None,
        grid: Grid | None,
    ) -> None:
        assert source.grid is not None
        layer = integer_layer(module, source.grid)
        attributes: dict[str, Any] = {"relu": self._kernel_relu(node, grid) is not None}
        register = source.register
        if isinstance(module.layer, nn.Linear):
            name = "linear"
        else:
            name = "conv"
            attributes |= conv_geometry(module.layer)
            before = attributes.pop("pad_before")
            if before:
                name_of_pad = self._new_name(f"{node.name}_pad")
                register = self._emit_register(
                    name_of_pad, "pad", (register,), {"pad": before}, grid=source.grid
                )
        self._computed(node, name, (register,), attributes, layer, target, grid)

    def _computed(
        self,
        node: fx.Node,
        name: str,
        inputs: tuple[str, ...],
        attributes: dict[str, Any],
        layer: IntegerLayer | None,
        target: fx.Node | None,
        grid: Grid | None,
    ) -> None:
        """Emit an instruction for a node together with its fused ReLU and its quantizer."""
        tensors = {}
        for role, tensor in (layer.tensors() if layer is not None else {}).items():
            tensors[role] = f"{node.name}.{role}"
            self.tensors[tensors[role]] = tensor
        relu = self._kernel_relu(node, grid)
        fused = [node] + ([relu] if relu is not None else [])
        sources = tuple(one.name for one in fused)
        register = self._emit_register(
            node.name, name, inputs, attributes, tensors, grid, sources=sources
        )
        upper = facts(relu).upper if relu is not None else None
        if relu is not None and grid is not None and upper is not None:
            register = self._bounded(relu, register, grid, grid.code_of(upper))
        for one in (*fused, *([target] if target is not None else [])):
            self.values[one] = _Value(register, grid)
        self._record(node, "int8", "")
        if relu is not None:
            self._record(relu, "folded", f"runs in the kernel of %{node.name}")

    def _bounded(self, relu: fx.Node, register: str, grid: Grid, top: int) -> str:
        """Codes that a ReLU6 also bounds from above, where the grid goes beyond its bound."""
        if top >= grid.top:
            return register
        return self._emit_register(relu.name, "relu", (register,), {"top": top}, grid=grid)

    def _add(self, node: fx.Node, op: Op) -> None:
        values = [self.values[source] for source in op.inputs]
        target = self._quantizer_after(node)
        if target is None or any(value.grid is None for value in values):
            self._float_call(node, op, "an addend or the sum has no scale")
            return
        attributes = {"relu": self._fused_relu(node) is not None}
        registers = tuple(value.register for value in values)
        grid = _grid(self.program.submodule(target))
        self._computed(node, "add", registers, attributes, None, target, grid)

    def _average(self, node: fx.Node, op: Op) -> None:
        value = self.values[op.inputs[0]]
        target = self._quantizer_after(node)
        shape = facts(op.inputs[0]).shape or ()
        if value.grid is None or target is None or len(shape) != 4:
            self._float_call(node, op, "its input or its result has no scale")
            return
        grid = _grid(self.program.submodule(target))
        if op.kind is Kind.GLOBAL_AVG_POOL:
            attributes = {"keepdim": op.attributes["keepdim"]}
            self._computed(
                node, "global_avg_pool", (value.register,), attributes, None, target, grid
            )
            return
        layer, attributes = average_layer(int(shape[1]), op.attributes)
        self._computed(node, "conv", (value.register,), attributes, layer, target, grid)

    def _cat(self, node: fx.Node, op: Op) -> None:
        values = [self.values[source] for source in op.inputs]
        grid = values[0].grid
        if grid is None or any(value.grid != grid for value in values):
            self._float_call(node, op, "its branches do not share a scale")
            return
        registers = tuple(value.register for value in values)
        self._emit(node, "cat", registers, {"dim": op.attributes["dim"]}, grid=grid)

    def _moved(self, node: fx.Node, op: Op) -> None:
        """Pools, paddings, reshapes and lone ReLUs of codes move codes."""
        value = self.values[op.inputs[0]]
        if value.grid is None:
            self._float_call(node, op, "it lies between float operators")
            return
        attributes = dict(op.attributes)
        if op.kind is Kind.RESHAPE:
            attributes["arguments"] = self._arguments(attributes["arguments"], codes=True)
            attributes["keywords"] = self._arguments(attributes.get("keywords", {}), codes=True)
        if op.kind is Kind.RELU:
            upper = attributes.pop("upper", None)
            attributes = {"top": value.grid.top if upper is None else value.grid.code_of(upper)}
        self._emit(node, str(op.kind.value), (value.register,), attributes, grid=value.grid)

    def _identity(self, node: fx.Node, op: Op) -> None:
        self.values[node] = self.values[op.inputs[0]]
        self._record(node, "folded", "does nothing in eval mode")

    # ---- float -------------------------------------------------------------------------------

    def _size(self, node: fx.Node, op: Op) -> None:
        is_dtype = node.target is getattr and node.args[1] == "dtype"
        self._float_call(node, op, "", codes=not is_dtype)
        self.ledger.pop(node, None)

    def _float(self, node: fx.Node, op: Op) -> None:
        self._float_call(node, op, facts(node).skip or op.reason or "no integer form")

    def _float_call(self, node: fx.Node, op: Op, why: str, codes: bool = False) -> None:
        arguments = self._arguments(node.args, codes)
        keywords = self._arguments(node.kwargs, codes)
        call = float_call(node, op.module)
        attributes = {"arguments": tuple(arguments), "keywords": keywords, **call.attributes}
        if call.foreign is not None:
            attributes["foreign"] = self._foreign(node, call.foreign)
        names = {role: f"{node.name}.{role}" for role in call.tensors}
        self.tensors |= {names[role]: tensor.clone() for role, tensor in call.tensors.items()}
        inputs = tuple(dict.fromkeys([*registers_in(arguments), *registers_in(keywords)]))
        self._emit(node, call.op, inputs, attributes, names)
        self._record(node, "float", why)

    def _foreign(self, node: fx.Node, function: Callable[..., Any]) -> str:
        name = f"foreign.{layer_path(node)}"
        if self.foreign.get(name, function) is not function:
            name = f"foreign.{node.name}"
        self.foreign[name] = function
        return name

    # ---- plumbing ----------------------------------------------------------------------------

    def _arguments(self, value: Any, codes: bool = False) -> Any:
        """Arguments with nodes replaced by registers: float ones, or codes as they are."""
        if isinstance(value, fx.Node):
            return Register(self.values[value].register if codes else self._as_float(value))
        if isinstance(value, dict):
            return {key: self._arguments(item, codes) for key, item in value.items()}
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            items = [self._arguments(item, codes) for item in value]
            return tuple(items) if isinstance(value, tuple) else list(items)
        if isinstance(value, slice):
            return slice(*self._arguments((value.start, value.stop, value.step), codes))
        return value

    def _as_float(self, node: fx.Node) -> str:
        value = self.values[node]
        if value.grid is None:
            return value.register
        if value.register not in self._floats:
            self._floats[value.register] = self._emit_register(
                self._new_name(f"{value.register}_float"), "dequantize", (value.register,), {}
            )
        return self._floats[value.register]

    def _emit(
        self,
        node: fx.Node,
        op: str,
        inputs: tuple[str, ...] = (),
        attributes: dict[str, Any] | None = None,
        tensors: dict[str, str] | None = None,
        grid: Grid | None = None,
    ) -> None:
        sources = (node.name,)
        register = self._emit_register(
            node.name, op, inputs, attributes or {}, tensors or {}, grid, sources
        )
        self.values[node] = _Value(register, grid)
        if grid is not None and op not in ("quantize", "requantize"):
            self._record(node, "int8", "")

    def _emit_register(
        self,
        name: str,
        op: str,
        inputs: tuple[str, ...],
        attributes: dict[str, Any],
        tensors: dict[str, str] | None = None,
        grid: Grid | None = None,
        sources: tuple[str, ...] = (),
    ) -> str:
        self.steps.append(Instruction(name, op, inputs, attributes, tensors or {}, grid, sources))
        return name

    def _new_name(self, name: str) -> str:
        """That name, or one like it that no node of the graph has."""
        while any(node.name == name for node in self.program.nodes()):
            name += "_"
        return name

    def _fused_relu(self, node: fx.Node) -> fx.Node | None:
        name = facts(node).fused_relu
        return self.program.node(name) if name is not None else None

    def _kernel_relu(self, node: fx.Node, grid: Grid | None) -> fx.Node | None:
        """The fused ReLU that a kernel computes; one that is bounded needs a grid to end it."""
        relu = self._fused_relu(node)
        bounded = relu is not None and facts(relu).upper is not None
        return None if grid is None and bounded else relu

    def _quantizer_after(self, node: fx.Node) -> fx.Node | None:
        """The quantizer that alone reads a node, or its fused ReLU."""
        point = self._fused_relu(node) or node
        users = list(point.users)
        if len(users) != 1:
            return None
        user = users[0]
        module = self.program.submodule(user)
        return user if isinstance(module, ActivationQuantizer) and not module.per_channel else None

    def _record(self, node: fx.Node, where: str, why: str) -> None:
        op = describe(node, self.program.module)
        name = target_name(node)
        if op.module is not None:
            name = type(getattr(op.module, "layer", op.module)).__name__
        self.ledger[node] = LedgerEntry(
            node.name, layer_path(node), name, where, why, op.kind in ANCHORS
        )


_RULES: dict[Kind, Callable[[Lowering, fx.Node, Op], None]] = {
    Kind.INPUT: Lowering._input,
    Kind.CONSTANT: Lowering._constant,
    Kind.OUTPUT: Lowering._output,
    Kind.QUANTIZER: Lowering._quantizer,
    Kind.CONV: Lowering._layer,
    Kind.LINEAR: Lowering._layer,
    Kind.ADD: Lowering._add,
    Kind.AVG_POOL: Lowering._average,
    Kind.GLOBAL_AVG_POOL: Lowering._average,
    Kind.CAT: Lowering._cat,
    Kind.MAX_POOL: Lowering._moved,
    Kind.PAD: Lowering._moved,
    Kind.RESHAPE: Lowering._moved,
    Kind.RELU: Lowering._moved,
    Kind.IDENTITY: Lowering._identity,
    Kind.SIZE: Lowering._size,
}


def lower_to_integers(
    program: Program, journal: Journal | None = None
) -> tuple[IntegerProgram, Ledger]:
    """The integers of a quantized program, and where every captured node went.

    Args:
        program: A program after a quantize pass.
        journal: Its journal, so that the ledger also names the nodes that passes removed.
    """
    walk = Lowering(program)
    result = walk.run()
    entries = {entry.node: entry for entry in walk.ledger.values()}
    for entry in removed_by_passes(program, journal):
        entries.setdefault(entry.node, entry)
    return result, Ledger(tuple(entries.values()))


def _grid(module: nn.Module | None) -> Grid:
    assert isinstance(module, ActivationQuantizer)
    return Grid(float(module.scale), int(module.zero_point), module.bits)
