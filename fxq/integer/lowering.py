"""Lowering: a quantized program becomes an `IntegerProgram`, and a ledger of where each node went.

The graph is walked once. A layer whose input is quantized and whose output goes into a quantizer,
with or without a ReLU between, becomes one integer instruction; what follows it on the same scale
moves codes; everything else becomes a float instruction between a dequantize and a quantize. A
layer whose input or output is quantized, but to no codes that kernels read, computes with
dequantized integers in float; in a simulation, so does every quantized layer without a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxq.graph.ops import Kind, Op, describe
from fxq.graph.program import Program, facts
from fxq.integer.arguments import Register
from fxq.integer.emission import Emission, Value
from fxq.integer.float_ops import target_of
from fxq.integer.layers import (
    average_layer,
    conv_geometry,
    could_overflow,
    dequantized_layer,
    integer_layer,
    is_supported,
)
from fxq.integer.ledger import Ledger, removed_by_passes
from fxq.integer.levels import finest_grid, level_grid, level_table
from fxq.integer.program import Grid, IntegerProgram, examples_of
from fxq.integer.targets import (
    Target,
    fused_relu,
    grid_of,
    kernel_relu,
    only_quantizer,
    settled,
    target_after,
)
from fxq.integer.thresholds import level_layer
from fxq.quant.dynamic import DynamicAciqQuantizer
from fxq.quant.quantizers import ActivationQuantizer, LevelQuantizer, QuantizedLayer
from fxq.trail.journal import Journal


@dataclass
class Lowering(Emission):
    """The walk over a program; `run` gives the result."""

    inputs: list[str] = field(default_factory=list)
    output: Any = None

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
        self.values[node] = Value(node.name)

    def _constant(self, node: fx.Node, op: Op) -> None:
        value: Any = self.program.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor):
            self.tensors[node.name] = value.detach().clone()
            self.emit(node, "constant", tensors={"value": node.name})

    def _output(self, node: fx.Node, op: Op) -> None:
        self.output = self.arguments(node.args[0])

    # ---- values ------------------------------------------------------------------------------

    def _quantizer(self, node: fx.Node, op: Op) -> None:
        value, module = self.values[op.inputs[0]], op.module
        if isinstance(module, DynamicAciqQuantizer):
            register = self.as_float(op.inputs[0])
            self.emit(node, "dynamic_quantize", (register,), dict(module.options()))
            self.values[node] = Value(node.name, rounded=_READS_DYNAMIC)
            return
        if isinstance(module, ActivationQuantizer) and module.per_channel:
            self._fake_quantizer(node, module, self.as_float(op.inputs[0]))
            return
        if isinstance(module, LevelQuantizer):
            self._level_quantizer(node, module, value)
            return
        grid = grid_of(module)
        if value.grid == grid:
            self.values[node] = value
        elif value.grid is not None:
            self.emit(node, "requantize", (value.register,), grid=grid)
        else:
            self.emit(node, "quantize", (value.register,), grid=grid)

    def _level_quantizer(self, node: fx.Node, module: LevelQuantizer, value: Value) -> None:
        """Levels of codes that are there already, or of a float on the finest grid there is."""
        register, grid = value.register, value.grid
        if grid is None:
            register, grid = self.new_name(f"{node.name}_fine"), finest_grid(module)
            self.emit_register(
                register, "quantize", (value.register,), {}, grid=grid, sources=(node.name,)
            )
        self.values[node] = self._looked_up(node, module, register, level_table(module, grid))

    def _looked_up(
        self, node: fx.Node, module: LevelQuantizer, register: str, table: torch.Tensor
    ) -> Value:
        """The levels that a table has for codes, in a register of the quantizer's name."""
        grid, names = level_grid(module), self.store(node.name, {"table": table})
        sources = (node.name,)
        return Value(
            self.emit_register(node.name, "lookup", (register,), {}, names, grid, sources), grid
        )

    def _fake_quantizer(self, node: fx.Node, module: ActivationQuantizer, register: str) -> None:
        """One scale per channel: the value stays a float, of which layers in float compute."""
        tensors = {"scale": module.scale.clone(), "zero_point": module.zero_point.to(torch.uint8)}
        if isinstance(module.top, torch.Tensor):
            tensors["top"] = module.top.to(torch.uint8)
        attributes = {"bits": module.bits, "axis": 1}
        names = self.store(node.name, tensors)
        self.emit(node, "fake_quantize", (register,), attributes, names)
        self.values[node] = Value(node.name, rounded=_READS_CHANNELS)

    def _layer(self, node: fx.Node, op: Op) -> None:
        source = self.values[op.inputs[0]]
        target = target_after(self.program, node, floors=True)
        why = self._why_no_integers(node, op, target)
        if isinstance(op.module, QuantizedLayer) and self._uses_dequantized(op.module, why):
            register = self.as_float(op.inputs[0])
            tensors = dequantized_layer(op.module)
            self._with_geometry(node, op.module, Value(register), tensors, None, why)
        elif isinstance(op.module, QuantizedLayer) and source.grid is not None and not why:
            if target is None or target.levels is None:
                layer = integer_layer(op.module, source.grid)
            else:
                layer = level_layer(op.module, source.grid, target.levels, target.grid)
            self._with_geometry(node, op.module, source, layer.tensors(), target)
        else:
            self.emit_float(node, op, facts(node).skip or why)

    def _uses_dequantized(self, module: QuantizedLayer, why: str) -> bool:
        """Whether a layer without a kernel computes with its dequantized integers in float."""
        simulated = self.program.simulation and bool(why) and is_supported(module)
        return simulated or why in _SIMULATED

    def _why_no_integers(self, node: fx.Node, op: Op, target: Target | None) -> str:
        """What keeps a layer from integer kernels; empty where nothing does."""
        source = self.values[op.inputs[0]]
        if source.grid is None and not source.rounded:
            return "its input is not quantized"
        if not isinstance(op.module, QuantizedLayer) or not is_supported(op.module):
            return "it was not quantized"
        if source.grid is None or source.rounded:
            return source.rounded
        if could_overflow(op.module, source.grid, None if target is None else target.grid):
            return "its sums could leave 32 bits"
        if target is not None or op.kind is not Kind.CONV:
            return ""
        quantizer = only_quantizer(self.program, node)
        if quantizer is None:
            return "its output has no scale"
        is_static = isinstance(self.program.submodule(quantizer), ActivationQuantizer)
        return _WRITES_CHANNELS if is_static else _WRITES_DYNAMIC

    def _with_geometry(
        self,
        node: fx.Node,
        module: QuantizedLayer,
        source: Value,
        tensors: dict[str, torch.Tensor],
        target: Target | None,
        why: str = "",
    ) -> None:
        """Emit a convolution or linear of these tensors."""
        grid = None if target is None else target.grid
        relu = kernel_relu(self.program, node, grid)
        attributes: dict[str, Any] = {"relu": relu is not None}
        register, name = source.register, "linear"
        if not isinstance(module.layer, nn.Linear):
            name = "conv"
            attributes |= conv_geometry(module.layer)
            register = self._padded(node, source, attributes.pop("pad_before"))
        self._computed(node, name, (register,), attributes, tensors, target, why)

    def _padded(self, node: fx.Node, source: Value, before: tuple[int, ...]) -> str:
        """What a convolution reads, padded where it does not pad both ends alike."""
        if not before:
            return source.register
        name, inputs = self.new_name(f"{node.name}_pad"), (source.register,)
        if source.grid is not None:
            return self.emit_register(name, "pad", inputs, {"pad": before}, grid=source.grid)
        arguments = (Register(source.register), before)
        call: dict[str, Any] = {
            "target": target_of(F.pad),
            "arguments": arguments,
            "keywords": {},
        }
        return self.emit_register(name, "float", inputs, call)

    def _computed(
        self,
        node: fx.Node,
        op: str,
        inputs: tuple[str, ...],
        attributes: dict[str, Any],
        tensors: dict[str, torch.Tensor],
        target: Target | None,
        why_float: str = "",
    ) -> None:
        """Emit an instruction for a node together with its fused ReLU and its quantizer."""
        grid = None if target is None else target.grid
        relu = kernel_relu(self.program, node, grid)
        fused = [node] + ([relu] if relu is not None else [])
        is_fine = target is not None and target.levels is not None
        name = self.new_name(f"{node.name}_fine") if is_fine else node.name
        names, sources = self.store(node.name, tensors), tuple(one.name for one in fused)
        self.emit_register(name, op, inputs, attributes, names, grid, sources)
        value = self._rounded(relu, name, target)
        for one in (*fused, *([target.node] if target is not None else [])):
            self.values[one] = value
        self.record(node, "float" if why_float else "int8", why_float)
        if relu is not None:
            self.record(relu, "folded", f"runs in the kernel of %{node.name}")

    def _rounded(self, relu: fx.Node | None, register: str, target: Target | None) -> Value:
        """What a kernel wrote, as its quantizer has it, below the bound of a ReLU6."""
        if target is None:
            return Value(register)
        upper = facts(relu).upper if relu is not None else None
        if target.levels is not None:
            table = level_table(target.levels, target.grid, floors=target.floors, upper=upper)
            return self._looked_up(target.node, target.levels, register, table)
        grid = target.grid
        if relu is not None and upper is not None:
            register = self._bounded(relu, register, grid, grid.code_of(upper))
        return Value(register, grid)

    def _bounded(self, relu: fx.Node, register: str, grid: Grid, top: int) -> str:
        """Codes that a ReLU6 also bounds from above, where the grid goes beyond its bound."""
        if top >= grid.top:
            return register
        return self.emit_register(relu.name, "relu", (register,), {"top": top}, grid=grid)

    def _add(self, node: fx.Node, op: Op) -> None:
        values = [self.values[source] for source in op.inputs]
        grids = [value.grid for value in values if value.grid is not None]
        target = target_after(self.program, node)
        if target is None or len(grids) < len(values):
            self.emit_float(node, op, "an addend or the sum has no single scale")
            return
        relu = fused_relu(self.program, node) is not None
        registers = tuple(value.register for value in values)
        target = settled(target, grids, relu)
        self._computed(node, "add", registers, {"relu": relu}, {}, target)

    def _average(self, node: fx.Node, op: Op) -> None:
        value = self.values[op.inputs[0]]
        target = target_after(self.program, node)
        shape = facts(op.inputs[0]).shape or ()
        if value.grid is None or target is None or len(shape) != 4:
            self.emit_float(node, op, "its input or its result has no single scale")
            return
        if op.kind is Kind.GLOBAL_AVG_POOL:
            attributes = {"keepdim": op.attributes["keepdim"]}
            self._computed(node, "global_avg_pool", (value.register,), attributes, {}, target)
            return
        layer, attributes = average_layer(int(shape[1]), op.attributes)
        self._computed(node, "conv", (value.register,), attributes, layer.tensors(), target)

    def _cat(self, node: fx.Node, op: Op) -> None:
        values = [self.values[source] for source in op.inputs]
        grid = values[0].grid
        if grid is None or any(value.grid != grid for value in values):
            self.emit_float(node, op, "its branches do not share a scale")
            self._keep_rounded(node, values)
            return
        registers = tuple(value.register for value in values)
        self.emit(node, "cat", registers, {"dim": op.attributes["dim"]}, grid=grid)

    def _moved(self, node: fx.Node, op: Op) -> None:
        """Pools, paddings, reshapes and lone ReLUs of codes move codes."""
        value = self.values[op.inputs[0]]
        if value.grid is None:
            self.emit_float(node, op, "it lies between float operators")
            self._keep_rounded(node, [value])
            return
        attributes = dict(op.attributes)
        if op.kind is Kind.RESHAPE:
            attributes["arguments"] = self.arguments(attributes["arguments"], codes=True)
            attributes["keywords"] = self.arguments(attributes.get("keywords", {}), codes=True)
        if op.kind is Kind.RELU:
            upper = attributes.pop("upper", None)
            attributes = {"top": value.grid.top if upper is None else value.grid.code_of(upper)}
        self.emit(node, str(op.kind.value), (value.register,), attributes, grid=value.grid)

    def _keep_rounded(self, node: fx.Node, sources: list[Value]) -> None:
        """What was moved in float is rounded where all it was moved from is."""
        if all(value.rounded or value.grid is not None for value in sources):
            why = next((value.rounded for value in sources if value.rounded), _READS_CHANNELS)
            self.values[node] = replace(self.values[node], rounded=why)

    def _identity(self, node: fx.Node, op: Op) -> None:
        self.values[node] = self.values[op.inputs[0]]
        self.record(node, "folded", "does nothing in eval mode")

    # ---- float -------------------------------------------------------------------------------

    def _size(self, node: fx.Node, op: Op) -> None:
        is_dtype = node.target is getattr and node.args[1] == "dtype"
        self.emit_float(node, op, "", codes=not is_dtype)
        self.ledger.pop(node, None)

    def _float(self, node: fx.Node, op: Op) -> None:
        self.emit_float(node, op, facts(node).skip or op.reason or "no integer form")


_READS_CHANNELS = "its input is quantized per channel, which no integer kernel multiplies"
_WRITES_CHANNELS = "its output is quantized per channel, which no integer kernel rounds to"
_READS_DYNAMIC = "its input is quantized over a range found at run time, in float"
_WRITES_DYNAMIC = "its output is quantized over a range found at run time, in float"
_SIMULATED = (_READS_CHANNELS, _WRITES_CHANNELS, _READS_DYNAMIC, _WRITES_DYNAMIC)

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
