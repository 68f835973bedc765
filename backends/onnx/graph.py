"""An ONNX graph under construction: nodes and initializers with stable names, sorted at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class GraphBuilder:
    """Collects nodes and initializers; a tensor is known by its name.

    Attributes:
        nodes: In the order they were added.
        initializers: By name.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node with one output, which names it; the name of the output."""
        from onnx import helper

        given = {name: value for name, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}/{op}", **given))
        return output

    def constant(self, name: str, value: Array) -> str:
        """Add an initializer, once; its name."""
        from onnx import numpy_helper

        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def scalar(self, value: int | float, dtype: Any) -> str:
        """A constant shared by all who need that number."""
        array = np.array(value, dtype)
        return self.constant(f"constants/{array.dtype}_{value}", array)

    def shape(self, sizes: Sequence[int]) -> str:
        """A shape shared by all who need it."""
        text = "x".join(str(size) for size in sizes) or "scalar"
        return self.constant(f"constants/shape_{text}", np.array(sizes, np.int64))

    def sorted_nodes(self, inputs: Iterable[str]) -> list[onnx.NodeProto]:
        """The nodes, each after those it reads from, otherwise in the order they were added.

        Raises:
            ValueError: A node reads what nothing writes; a bug of ours.
        """
        known = {"", *inputs, *self.initializers}
        waiting: dict[str, list[int]] = {}
        missing: list[int] = []
        done: list[onnx.NodeProto] = []
        for index, node in enumerate(self.nodes):
            needs = {name for name in node.input if name not in known}
            missing.append(len(needs))
            for name in needs:
                waiting.setdefault(name, []).append(index)
            if not needs:
                _finish(self.nodes, index, known, waiting, missing, done)
        if len(done) != len(self.nodes):
            unknown = sorted(set(waiting) - known)
            raise ValueError(f"nothing writes {', '.join(unknown[:5])}")
        return done


def _finish(
    nodes: list[onnx.NodeProto],
    first: int,
    known: set[str],
    waiting: dict[str, list[int]],
    missing: list[int],
    done: list[onnx.NodeProto],
) -> None:
    """A node is done, and so is everything added before it that only waited for it."""
    ready = [first]
    while ready:
        node = nodes[ready.pop(0)]
        done.append(node)
        for name in node.output:
            known.add(name)
            for index in waiting.pop(name, []):
                missing[index] -= 1
                if not missing[index]:
                    ready.append(index)
