"""mark-relu: every ReLU that can run inside the kernel before it is marked; no number changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxq.contracts import Contract
from fxq.graph.ops import Kind, describe
from fxq.graph.program import Program, facts
from fxq.graph.rewrite import Editor, Miss
from fxq.pipeline import RulePass

_FUSES = frozenset({Kind.CONV, Kind.LINEAR, Kind.ADD})
_KEEPS_SIGN = frozenset(
    {Kind.MAX_POOL, Kind.AVG_POOL, Kind.GLOBAL_AVG_POOL, Kind.RESHAPE, Kind.IDENTITY, Kind.PAD}
)


def mark_relu(program: Program, edit: Editor, node: fx.Node) -> bool | Miss | None:
    """A ReLU or ReLU6 is known to be nonnegative, and fused into its producer where it has one."""
    op = describe(node, program.module)
    if op.kind is not Kind.RELU:
        return None
    upper = op.attributes.get("upper")
    edit.write_facts(node, nonneg=True, upper=upper)
    source = op.inputs[0]
    kind = describe(source, program.module).kind
    if kind not in _FUSES:
        return Miss(node.name, f"it reads %{source.name} ({kind.value}), which has no fused ReLU")
    if len(source.users) > 1:
        others = ", ".join(f"%{user.name}" for user in source.users if user is not node)
        return Miss(
            node.name,
            f"%{source.name} also feeds {others}, which needs its negative values",
        )
    edit.write_facts(source, fused_relu=node.name)
    edit.write_facts(node, fused_into=source.name)
    return True


def carry_sign(program: Program, edit: Editor, node: fx.Node) -> None:
    """Pools and reshapes of a nonnegative value are nonnegative, and bounded as it is."""
    op = describe(node, program.module)
    if op.kind in _KEEPS_SIGN and op.inputs and all(facts(n).nonneg for n in op.inputs):
        edit.write_facts(node, nonneg=True, upper=facts(op.inputs[0]).upper)


@dataclass(frozen=True)
class MarkRelu(RulePass):
    """Every ReLU is marked nonnegative, and fused into the convolution, linear or add before it.

    A producer with other users keeps its negative values, so its ReLU is refused with that reason.
    Modules, functions and methods, in-place or not, ReLU, ReLU6 and ``clamp(0, c)`` count alike.
    """

    name: ClassVar[str] = "mark-relu"
    contract: ClassVar[Contract] = Contract.ANNOTATES_ONLY
    rules = (mark_relu, carry_sign)
