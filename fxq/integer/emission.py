"""What a lowering has emitted so far: registers, instructions, tensors, and where nodes went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxq.graph.ops import ANCHORS, Op, describe, target_name
from fxq.graph.program import Program, layer_path
from fxq.integer.arguments import Register, registers_in
from fxq.integer.islands import float_call
from fxq.integer.ledger import LedgerEntry
from fxq.integer.program import Grid, Instruction


@dataclass(frozen=True)
class Value:
    """Where a node's value is.

    Attributes:
        register: The register.
        grid: The grid of its codes; None for a float.
        rounded: Of a float that a quantizer rounded, or that was moved from such: why it has no
            codes that an integer kernel could read.
    """

    register: str
    grid: Grid | None = None
    rounded: str = ""


@dataclass
class Emission:
    """Instructions emitted for the nodes of a program, and the values they gave.

    Attributes:
        program: The program.
        steps: The instructions so far.
        tensors: What they use, by name.
        foreign: Code of the user's own that they call, by name.
        values: Where the value of each node is.
        ledger: Where each node went.
    """

    program: Program
    steps: list[Instruction] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    foreign: dict[str, Callable[..., Any]] = field(default_factory=dict)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    ledger: dict[fx.Node, LedgerEntry] = field(default_factory=dict)
    _floats: dict[str, str] = field(default_factory=dict)

    def emit(
        self,
        node: fx.Node,
        op: str,
        inputs: tuple[str, ...] = (),
        attributes: dict[str, Any] | None = None,
        tensors: dict[str, str] | None = None,
        grid: Grid | None = None,
    ) -> None:
        """A node is one instruction, which writes a register of its name."""
        sources = (node.name,)
        register = self.emit_register(
            node.name, op, inputs, attributes or {}, tensors or {}, grid, sources
        )
        self.values[node] = Value(register, grid)
        if grid is not None and op not in ("quantize", "requantize", "lookup"):
            self.record(node, "int8", "")

    def emit_register(
        self,
        name: str,
        op: str,
        inputs: tuple[str, ...],
        attributes: dict[str, Any],
        tensors: dict[str, str] | None = None,
        grid: Grid | None = None,
        sources: tuple[str, ...] = (),
    ) -> str:
        """The register that a new instruction writes."""
        self.steps.append(Instruction(name, op, inputs, attributes, tensors or {}, grid, sources))
        return name

    def store(self, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        """The names, by role, under which the program has these tensors of an instruction."""
        names = {role: f"{name}.{role}" for role in tensors}
        self.tensors |= {names[role]: tensor for role, tensor in tensors.items()}
        return names

    def emit_float(self, node: fx.Node, op: Op, why: str, codes: bool = False) -> None:
        """A node is a call of what it called, on floats.

        Args:
            node: The node.
            op: What it computes.
            why: Why it is in float.
            codes: Whether quantized registers are given as they are, for their shapes alone.
        """
        arguments = self.arguments(node.args, codes)
        keywords = self.arguments(node.kwargs, codes)
        call = float_call(node, op.module)
        attributes = {"arguments": tuple(arguments), "keywords": keywords, **call.attributes}
        if call.foreign is not None:
            attributes["foreign"] = self._foreign(node, call.foreign)
        names = self.store(node.name, {role: one.clone() for role, one in call.tensors.items()})
        inputs = tuple(dict.fromkeys([*registers_in(arguments), *registers_in(keywords)]))
        self.emit(node, call.op, inputs, attributes, names)
        self.record(node, "float", why)

    def _foreign(self, node: fx.Node, function: Callable[..., Any]) -> str:
        name = f"foreign.{layer_path(node)}"
        if self.foreign.get(name, function) is not function:
            name = f"foreign.{node.name}"
        self.foreign[name] = function
        return name

    def arguments(self, value: Any, codes: bool = False) -> Any:
        """Arguments with nodes replaced by registers: float ones, or codes as they are."""
        if isinstance(value, fx.Node):
            return Register(self.values[value].register if codes else self.as_float(value))
        if isinstance(value, dict):
            return {key: self.arguments(item, codes) for key, item in value.items()}
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            items = [self.arguments(item, codes) for item in value]
            return tuple(items) if isinstance(value, tuple) else list(items)
        if isinstance(value, slice):
            return slice(*self.arguments((value.start, value.stop, value.step), codes))
        return value

    def as_float(self, node: fx.Node) -> str:
        """The register with the float value of a node, dequantized where it holds codes."""
        value = self.values[node]
        if value.grid is None:
            return value.register
        if value.register not in self._floats:
            self._floats[value.register] = self.emit_register(
                self.new_name(f"{value.register}_float"), "dequantize", (value.register,), {}
            )
        return self._floats[value.register]

    def new_name(self, name: str) -> str:
        """That name, or one like it that no node of the graph has."""
        while any(node.name == name for node in self.program.nodes()):
            name += "_"
        return name

    def record(self, node: fx.Node, where: str, why: str) -> None:
        """The ledger says where a node went, and why."""
        op = describe(node, self.program.module)
        name = target_name(node)
        if op.module is not None:
            name = type(getattr(op.module, "layer", op.module)).__name__
        self.ledger[node] = LedgerEntry(
            node.name, layer_path(node), name, where, why, op.kind in ANCHORS
        )
