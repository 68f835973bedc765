"""The graph of an exported island module, taken apart: tensors under the names of registers.

The exporter's names depend on the whole graph. Here a tensor that is a register's value gets the
register's name, a weight that of the program's tensor, and everything else a name below the first
register that it is computed for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from fxq.integer.shapes import Size

from .island_module import IslandModule

if TYPE_CHECKING:
    import onnx
    import onnx_ir

ORPHANS = "islands"
"""Where names go that belong to no register."""


class Dismantling:
    """Takes an exported island module apart.

    Args:
        model: The model the exporter made of the module; it is used up.
        module: The module.
        needed: The tensors to keep: names among the module's results.
    """

    def __init__(self, model: onnx_ir.Model, module: IslandModule, needed: Collection[str]) -> None:
        self.graph = model.graph
        self.module = module
        outputs = map(_source, model.graph.outputs)
        self.results = dict(zip(module.trail.results, outputs, strict=True))
        self.needed = [name for name in module.trail.results if name in needed]
        self.names: dict[Any, str] = {}
        self.copies: dict[str, Any] = {}
        self._prune(model)

    def run(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """The nodes, sorted, and the initializers they read."""
        from onnx import helper
        from onnx_ir import serde

        self._share_batch()
        self._name_registers()
        self._name_rest()
        for rank, value in enumerate(self.names):
            value.name = f"#{rank}"  # no new name may meet an old one
        for value, name in self.names.items():
            value.name = name
        nodes = [_plain_node(serde.serialize_node(node)) for node in self.graph]
        nodes += [
            helper.make_node("Identity", [value.name], [name], name=f"{name}/Identity")
            for name, value in self.copies.items()
        ]
        constants = sorted(self.graph.initializers.values(), key=lambda value: str(value.name))
        return nodes, [_plain_tensor(value) for value in constants]

    def _prune(self, model: onnx_ir.Model) -> None:
        """Only what the needed results take is in the graph, constants as initializers."""
        from onnx_ir.passes import common

        self.graph.outputs[:] = [self.results[name] for name in self.needed]
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.LiftSubgraphInitializersToMainGraphPass()(model)
        common.RemoveUnusedNodesPass()(model)

    def _share_batch(self) -> None:
        """The batch size is read off the program's input, not off what would be dequantized."""
        module = self.module
        if module.batch is None:
            return
        inputs: dict[Any, str] = dict(zip(self.graph.inputs, module.arguments, strict=True))
        source = self.graph.inputs[module.arguments.index(module.batch)]
        for node in self.graph:
            read = inputs.get(node.inputs[0]) if node.op_type == "Shape" else None
            if read is None or read == module.batch:
                continue
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", -1)
            if (start, end) == (0, 1) and module.shape(read)[0] == Size(1, 0):
                node.replace_input_with(0, source)

    # ---- names -------------------------------------------------------------------------------

    def _name_registers(self) -> None:
        """Arguments, weights and results have their names; a second name of one is a copy."""
        for value, name in zip(self.graph.inputs, self.module.arguments, strict=True):
            self.names[value] = name
        for path, value in self.graph.initializers.items():
            if path in self.module.tensors:
                self.names[value] = self.module.tensors[path]
        items_last = sorted(self.results, key=lambda name: "." in name)
        for name in [*self.needed, *items_last]:
            value = self.results[name]
            if value not in self.names:
                self.names[value] = name
            elif name in self.needed and self.names[value] != name:
                self.copies[name] = value

    def _name_rest(self) -> None:
        """Inner values are named below the first register that takes them."""
        registers = [*self.results, ORPHANS]
        ranks: dict[Any, int] = {}
        for rank, value in enumerate(self.results.values()):
            ranks.setdefault(value, rank)
        owners: dict[Any, int] = {}
        for node in reversed(list(self.graph)):
            own = [ranks[one] for one in node.outputs if one in ranks]
            later = [owners[one] for one in node.outputs if one in owners]
            owner = min([*own, *later], default=len(self.results))
            for value in (*node.inputs, *_inner_values(node)):
                owners[value] = min(owners.get(value, owner), owner)
            for value in node.outputs:
                owners.setdefault(value, owner)
        counts: Counter[str] = Counter()
        for value, kind in self._unnamed():
            stem = f"{registers[owners[value]].partition('.')[0]}/{kind}"
            counts[stem] += 1
            self.names[value] = stem if counts[stem] == 1 else f"{stem}_{counts[stem]}"

    def _unnamed(self) -> Iterator[tuple[Any, str]]:
        """Values without a name, in the order they are used, and what makes them."""
        for node in self.graph:
            for value in (*node.inputs, *_inner_values(node), *node.outputs):
                if value is not None and value not in self.names:
                    maker = value.producer()
                    yield value, "constant" if maker is None else maker.op_type


def _source(value: Any) -> Any:
    """What a value is a copy of; the exporter copies where two results are the same."""
    maker = value.producer()
    return value if maker is None or maker.op_type != "Identity" else _source(maker.inputs[0])


def _inner_values(node: onnx_ir.Node) -> Iterator[Any]:
    """What the subgraphs of a node read and write."""
    from onnx_ir.traversal import RecursiveGraphIterator

    for attribute in node.attributes.values():
        for graph in _graphs(attribute):
            yield from graph.inputs
            for inner in RecursiveGraphIterator(graph):
                yield from (*inner.inputs, *inner.outputs)
            yield from graph.outputs


def _graphs(attribute: Any) -> list[Any]:
    kind = attribute.type.name
    if kind == "GRAPH":
        return [attribute.value]
    return list(attribute.value) if kind == "GRAPHS" else []


def _plain_node(node: onnx.NodeProto) -> onnx.NodeProto:
    """The node, named after its first output, without what the exporter notes on it."""
    node.name = f"{next(name for name in node.output if name)}/{node.op_type}"
    node.ClearField("doc_string")
    del node.metadata_props[:]
    for attribute in node.attribute:
        attribute.ClearField("doc_string")
        for graph in (*attribute.graphs, *((attribute.g,) if attribute.HasField("g") else ())):
            graph.name = node.name
            del graph.value_info[:], graph.metadata_props[:]
            for inner in graph.node:
                _plain_node(inner)
    return node


def _plain_tensor(value: Any) -> onnx.TensorProto:
    """The tensor of an initializer under its name, and nothing but its numbers."""
    from onnx_ir import serde

    tensor = serde.serialize_tensor(value.const_value)
    tensor.name = value.name
    tensor.ClearField("doc_string")
    del tensor.metadata_props[:]
    return tensor
