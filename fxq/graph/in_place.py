"""In-place operators become out-of-place, and their readers see what they saw when the model ran.

After ``y = x.add_(1)`` the model reads the new value through ``x``, too. In the graph ``y`` becomes
``x.add(1)`` and every later reader of ``x``, or of another name of the very same memory, reads
``y``. A value that only overlaps ``x`` (a slice, a transpose) and is read later cannot be expressed
so; it is refused. Which values overlap is found by running the example once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxq.errors import CaptureError
from fxq.graph.op import target_name
from fxq.graph.program import Program
from fxq.graph.shapes import ShapeRun, capture_error

IN_PLACE_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}
"""Augmented assignments and what they compute."""

_WRITES_NOTHING = frozenset({"requires_grad_", "share_memory_"})
_WRITES_SHAPES = frozenset({"detach_", "squeeze_", "swapaxes_", "t_", "transpose_", "unsqueeze_"})
_SHAPE_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim"})


def remove_in_place(program: Program) -> None:
    """No node of the program writes into a value that another node made, and all have shapes.

    Raises:
        CaptureError: The model fails on the example, or a write cannot be expressed out of place:
            it goes into a parameter or buffer, or into memory that is read again through a view.
    """
    writes = {node: _written(program, node) for node in program.nodes()}
    written = {node: target for node, target in writes.items() if target is not None}
    run = _WriteRun(program, written)
    run.run_example()
    for node in written:
        _clear(program, node)
    for node, names in reversed(run.rewired.items()):
        for name in names:
            for user in list(name.users):
                if run.order[user] > run.order[node]:
                    user.replace_input_with(name, node)


# ---- which nodes write -----------------------------------------------------------------------


def _written(program: Program, node: fx.Node) -> fx.Node | None:
    """The node whose value a node overwrites; None where it overwrites nothing."""
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    target = node.args[0] if node.args else node.kwargs.get("input")
    if not _works_in_place(program, node) or not isinstance(target, fx.Node):
        return None
    return target


def _works_in_place(program: Program, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(program.submodule(node), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in IN_PLACE_OPERATORS or bool(node.kwargs.get("inplace")):
        return True
    name = target_name(node)
    return name.endswith("_") and not name.endswith("__") and name not in _WRITES_NOTHING


# ---- what else sees the write ----------------------------------------------------------------


class _WriteRun(ShapeRun):
    """Runs the example and finds, for every write, the values that share its memory.

    Attributes:
        order: Position of every node.
        rewired: For every writing node, the names of what it overwrites that later nodes read.
    """

    def __init__(self, program: Program, written: dict[fx.Node, fx.Node]) -> None:
        super().__init__(program)
        self.order = {node: position for position, node in enumerate(program.nodes())}
        self.rewired: dict[fx.Node, list[fx.Node]] = {}
        self._written = written

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, after looking at what it is about to overwrite."""
        target = self._written.get(n)
        if target is not None and isinstance(self.env[target], torch.Tensor):
            only_shape = target_name(n) in _WRITES_SHAPES
            names = () if only_shape else self._other_names(n, target)
            self.rewired[n] = [target, *names]
        return super().run_node(n)

    def _other_names(self, node: fx.Node, target: fx.Node) -> Iterator[fx.Node]:
        if target.op == "get_attr":
            raise _refusal(node, f"a parameter or buffer of the model, {target.target}")
        value = self.env[target]
        for other, found in self.env.items():
            if other is target or not self._read_later(other, node):
                continue
            if isinstance(found, torch.Tensor) and _same_view(found, value):
                yield other
            elif any(_overlap(tensor, value) for tensor in _tensors(found)):
                raise _refusal(node, f"memory that %{other.name} shares, which is read again")

    def _read_later(self, other: fx.Node, node: fx.Node) -> bool:
        """Whether the numbers of a value are read after a node; its shape may be."""
        return any(
            self.order[user] > self.order[node] for user in other.users if not _reads_shape(user)
        )


def _reads_shape(user: fx.Node) -> bool:
    if user.target is getattr:
        return user.args[1] in _SHAPE_ATTRIBUTES
    return user.target in ("size", "dim")


def _refusal(node: fx.Node, what: str) -> CaptureError:
    return capture_error(
        f"the in-place {target_name(node)} writes into {what}",
        node,
        hint="use the out-of-place operator",
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same_view(one: torch.Tensor, other: torch.Tensor) -> bool:
    return _memory(one) == _memory(other) and (
        one.shape,
        one.stride(),
        one.storage_offset(),
        one.dtype,
    ) == (other.shape, other.stride(), other.storage_offset(), other.dtype)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have an element of memory in common."""
    if _memory(one) != _memory(other) or one.dtype != other.dtype:
        return _memory(one) == _memory(other)
    size = one.untyped_storage().nbytes() // one.element_size()
    marks = torch.zeros(size, dtype=torch.bool)
    marks.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    seen = marks.as_strided(other.shape, other.stride(), other.storage_offset())
    return bool(seen.any())


# ---- the out-of-place form -------------------------------------------------------------------


def _clear(program: Program, node: fx.Node) -> None:
    """The node computes the same value without writing."""
    if node.op == "call_module":
        program.submodule(node).inplace = False  # type: ignore[union-attr]
        return
    node.kwargs = {
        key: value for key, value in node.kwargs.items() if key not in ("inplace", "out")
    }
    name = target_name(node)
    if node.target in IN_PLACE_OPERATORS:
        node.target = IN_PLACE_OPERATORS[node.target]
    elif name.endswith("_"):
        node.target = _out_of_place(node, name.removesuffix("_"))


def _out_of_place(node: fx.Node, name: str) -> Any:
    homes = (torch.Tensor,) if node.op == "call_method" else (F, torch)
    for home in homes:
        if callable(getattr(home, name, None)):
            return name if node.op == "call_method" else getattr(home, name)
    raise capture_error(
        f"the in-place {target_name(node)} has no out-of-place form",
        node,
        hint="write the value into a new tensor",
    )
