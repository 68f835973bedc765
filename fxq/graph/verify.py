"""Invariants of a program, each a named rule, checked after every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from fxq.errors import VerifyError
from fxq.graph.program import FACTS_KEY, Facts, Program, facts

Rule = Callable[[Program], Iterator[tuple[fx.Node | None, str]]]


def graph_lints(program: Program) -> Iterator[tuple[fx.Node | None, str]]:
    """Every node reads nodes defined before it, and every target exists."""
    try:
        program.graph.lint()
    except (RuntimeError, ValueError, AttributeError) as error:
        yield None, str(error)


def facts_are_typed(program: Program) -> Iterator[tuple[fx.Node | None, str]]:
    """Facts are `Facts`, never a loose dictionary."""
    for node in program.nodes():
        if not isinstance(node.meta.get(FACTS_KEY, Facts()), Facts):
            yield node, f"its facts are a {type(node.meta[FACTS_KEY]).__name__}"


def facts_name_nodes(program: Program) -> Iterator[tuple[fx.Node | None, str]]:
    """Every node a fact names exists."""
    names = {node.name for node in program.nodes()}
    for node in program.nodes():
        known = facts(node)
        for role in ("fused_relu", "fused_into", "observes", "bits_of"):
            target = getattr(known, role)
            if target is not None and target not in names:
                yield node, f"{role} names %{target}, which is not in the graph"


def fusions_agree(program: Program) -> Iterator[tuple[fx.Node | None, str]]:
    """A fused ReLU and the node that runs it name each other."""
    nodes = {node.name: node for node in program.nodes()}
    for node in nodes.values():
        relu, host = facts(node).fused_relu, facts(node).fused_into
        if relu in nodes and facts(nodes[relu]).fused_into != node.name:
            yield node, f"it runs %{relu}, which says otherwise"
        if host in nodes and facts(nodes[host]).fused_relu != node.name:
            yield node, f"it runs inside %{host}, which says otherwise"


def parameters_are_finite(program: Program) -> Iterator[tuple[fx.Node | None, str]]:
    """No parameter or buffer is NaN or infinite, those of observers apart."""
    for node in program.nodes():
        module = program.submodule(node)
        if module is None or getattr(module, "fxq_kind", None) == "observer":
            continue
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point() and not _is_finite(tensor):
                yield node, f"its {name} is not finite"


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN or infinity; its sum, which is faster, nearly always tells."""
    total = tensor.detach().sum()
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def one_output(program: Program) -> Iterator[tuple[fx.Node | None, str]]:
    """There is exactly one output node."""
    count = sum(node.op == "output" for node in program.nodes())
    if count != 1:
        yield None, f"there are {count} outputs"


RULES: tuple[Rule, ...] = (
    graph_lints,
    facts_are_typed,
    facts_name_nodes,
    fusions_agree,
    parameters_are_finite,
    one_output,
)


def verify(program: Program) -> None:
    """Every invariant holds.

    Raises:
        VerifyError: One does not; the error names the rule and the node.
    """
    for rule in RULES:
        for node, why in rule(program):
            raise VerifyError(
                f"{rule.__name__.replace('_', '-')}: {why}",
                where=f"%{node.name}" if node is not None else None,
                hint=f"rule: {(rule.__doc__ or '').splitlines()[0]}",
            )
