"""`Editor`: the one way passes change a program; it stamps who made what and keeps the misses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fxq.graph.program import Facts, Program, facts, write_facts


@dataclass(frozen=True)
class Miss:
    """A match a pass refused: the node, and why."""

    node: str
    why: str

    def __str__(self) -> str:
        return f"%{self.node}: {self.why}"


@dataclass
class Editor:
    """Edits a program on behalf of one pass.

    Attributes:
        program: The program being edited.
        origin: Name of the pass.
        hits: Nodes the pass rewrote.
        misses: Matches it refused, with the reason.
        notes: Sentences the pass wants told.
        current: The node being looked at, named in an error.
    """

    program: Program
    origin: str
    hits: list[str] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    current: fx.Node | None = None

    def visit(self) -> Iterable[fx.Node]:
        """The nodes in order, each remembered while it is looked at; erased ones are left out."""
        for node in self.program.nodes():
            if not _erased(node):
                self.current = node
                yield node
        self.current = None

    def hit(self, node: fx.Node) -> None:
        """The pass rewrote this node."""
        self.hits.append(node.name)

    def miss(self, node: fx.Node, why: str) -> None:
        """The pass refused this node, for this reason."""
        self.misses.append(Miss(node.name, why))

    def note(self, sentence: str) -> None:
        """Something the user should be told."""
        self.notes.append(sentence)

    def insert_module(self, name: str, module: nn.Module, *, after: fx.Node) -> fx.Node:
        """A new module call that reads a node; nothing else is rewired.

        Args:
            name: Name of the node and of the submodule; made unique where it is taken.
            module: The module; one that is already in the program is called once more.
            after: The node whose value it reads.
        """
        target = self._target_of(module) or self._free_name(name)
        self.program.module.add_submodule(target, self._in_mode(module))
        with self.program.graph.inserting_after(after):
            node = self.program.graph.call_module(target, (after,))
        known = facts(after)
        write_facts(node, origin=self.origin, path=known.path, shape=known.shape, dtype=known.dtype)
        return node

    def replace_module(self, node: fx.Node, module: nn.Module) -> None:
        """The node calls another module under the same name."""
        self.program.module.set_submodule(str(node.target), self._in_mode(module))

    def call_instead(self, node: fx.Node, name: str, module: nn.Module) -> fx.Node:
        """A call of a new module stands where a function was called, and reads the same nodes."""
        target = self._free_name(name)
        self.program.module.add_submodule(target, self._in_mode(module))
        with self.program.graph.inserting_before(node):
            operands = (*node.args, *node.kwargs.values())
            read = tuple(value for value in operands if isinstance(value, fx.Node))
            call = self.program.graph.call_module(target, read)
        known = facts(node)
        write_facts(call, origin=self.origin, path=known.path, shape=known.shape, dtype=known.dtype)
        node.replace_all_uses_with(call)
        self.program.graph.erase_node(node)
        return call

    def reroute(
        self, old: fx.Node, new: fx.Node, where: Callable[[fx.Node], bool] | None = None
    ) -> None:
        """The users of one node read another instead (those for which ``where`` holds)."""
        for user in list(old.users):
            if user is not new and (where is None or where(user)):
                user.replace_input_with(old, new)

    def remove(self, node: fx.Node) -> None:
        """A node is gone; its users read its first input."""
        node.replace_all_uses_with(node.all_input_nodes[0])
        self.program.graph.erase_node(node)

    def write_facts(self, node: fx.Node, **changes: Any) -> Facts:
        """Replace the given fields of a node's facts."""
        return write_facts(node, **changes)

    def _in_mode(self, module: nn.Module) -> nn.Module:
        """The module in the program's mode: a probe must not move what follows batches."""
        return module.train(self.program.module.training)

    def _target_of(self, module: nn.Module) -> str | None:
        for name, child in self.program.module.named_children():
            if child is module:
                return name
        return None

    def _free_name(self, name: str) -> str:
        taken = dict(self.program.module.named_children())
        names = {node.name for node in self.program.graph.nodes}
        candidate, count = name, 1
        while candidate in taken or candidate in names:
            candidate, count = f"{name}_{count}", count + 1
        return candidate


def _erased(node: fx.Node) -> bool:
    return bool(getattr(node, "_erased", False))


def neighbourhood(node: fx.Node) -> str:
    """A node with what it reads and what reads it, for error messages."""
    lines = [f"     %{other.name} = {other.format_node()}" for other in node.all_input_nodes[:3]]
    lines.append(f"  >  %{node.name} = {node.format_node()}")
    lines += [f"     %{other.name} = {other.format_node()}" for other in list(node.users)[:3]]
    return "\n".join(lines)
