"""`Snapshot`: a program's graph at one moment, as plain data that can be printed and compared."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxq.graph.ops import target_name
from fxq.graph.program import Program, facts, layer_path


@dataclass(frozen=True)
class NodeRecord:
    """One node of a snapshot.

    Attributes:
        name: The node's name, stable across passes.
        op: What it calls: a module class, a function or a method; ``Input``, ``Output``.
        inputs: Names of the nodes it reads, in order.
        arguments: Its other arguments, as text.
        value: Shape and dtype of its value, for example ``f32[1, 64, 56, 56]``.
        facts: What passes noted about it, as short words.
        digest: Digest of the parameters and buffers it holds; empty where it holds none.
        path: The module path users know it by.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    arguments: str = ""
    value: str = ""
    facts: tuple[str, ...] = ()
    digest: str = ""
    path: str = ""

    def text(self, digests: bool = True) -> str:
        """The node on one line: ``%c = Conv2d:f32[2,8,8,8](%x)  [bn]  #a36008``."""
        line = f"%{self.name} = {self.op}"
        line += f":{self.value}" if self.value else ""
        line += f"({self.operands()})"
        line += f"  [{', '.join(self.facts)}]" if self.facts else ""
        line += f"  #{self.digest}" if self.digest and digests else ""
        return line

    def operands(self) -> str:
        """What it is called with: the nodes it reads, then its other arguments."""
        operands = [f"%{name}" for name in self.inputs]
        return ", ".join([*operands, self.arguments] if self.arguments else operands)


@dataclass(frozen=True)
class Snapshot:
    """The nodes of a graph, in order.

    Attributes:
        nodes: The nodes.
        code: The forward that torch.fx generates for the graph; two snapshots of the same nodes
            are equal whatever it is.

    Example:
        >>> from fxq.graph.capture import capture
        >>> program = capture(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.zeros(1, 4))
        >>> print(snapshot(program).text(digests=False))
        %input_1 = Input:f32[1,4]()
        %_0 = Linear:f32[1,2](%input_1)
        %_1 = ReLU:f32[1,2](%_0)
        %output = Output:f32[1,2](%_1)
    """

    nodes: tuple[NodeRecord, ...]
    code: str = field(default="", compare=False, repr=False)

    def text(self, digests: bool = True) -> str:
        """The snapshot, one node per line."""
        return "\n".join(node.text(digests) for node in self.nodes)

    def census(self) -> dict[str, int]:
        """How many nodes of each operator there are."""
        counts: dict[str, int] = {}
        for node in self.nodes:
            counts[node.op] = counts.get(node.op, 0) + 1
        return counts

    def by_name(self) -> dict[str, NodeRecord]:
        """The nodes by name."""
        return {node.name: node for node in self.nodes}

    def to_json(self) -> list[dict[str, Any]]:
        """The nodes as JSON-ready data; the code is kept apart."""
        return [asdict(node) for node in self.nodes]

    @classmethod
    def from_json(cls, data: list[dict[str, Any]], code: str = "") -> Snapshot:
        """The snapshot that `to_json` wrote, with its code.

        Raises:
            TypeError: Something that is text in every snapshot is not.
        """
        strings([code])
        return cls(tuple(_record_from_json(entry) for entry in data), code)


def strings(values: Any) -> tuple[str, ...]:
    """A list of texts as a tuple.

    Raises:
        TypeError: It is no list, or holds something else.
    """
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{str(values)[:60]} is no list of texts")
    return tuple(values)


def _record_from_json(entry: dict[str, Any]) -> NodeRecord:
    inputs, known = strings(entry["inputs"]), strings(entry["facts"])
    texts = {name: value for name, value in entry.items() if name not in ("inputs", "facts")}
    strings(list(texts.values()))
    return NodeRecord(**texts, inputs=inputs, facts=known)


def snapshot(program: Program) -> Snapshot:
    """The program as it is now."""
    nodes = tuple(_record(program, node) for node in program.graph.nodes)
    return Snapshot(nodes, program.module.code)


_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def value_text(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """Dtype and shape of a value: ``f32[1,64,56,56]``."""
    kind = _SHORT.get(dtype, str(dtype).removeprefix("torch."))
    return f"{kind}[{','.join(str(size) for size in shape)}]"


def _record(program: Program, node: fx.Node) -> NodeRecord:
    known = facts(node)
    value = ""
    if known.shape is not None and known.dtype is not None:
        value = value_text(known.dtype, known.shape)
    module = program.submodule(node)
    return NodeRecord(
        name=node.name,
        op=_operator(node, module),
        inputs=tuple(other.name for other in node.all_input_nodes),
        arguments=_arguments(node, module),
        value=value,
        facts=_words(node),
        digest=module_digest(module) if module is not None else _constant_digest(program, node),
        path=layer_path(node),
    )


def _operator(node: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        own = getattr(module, "operator", None)
        return own if isinstance(own, str) else type(module).__name__
    if node.op in ("placeholder", "output", "get_attr"):
        return {"placeholder": "Input", "output": "Output", "get_attr": "Constant"}[node.op]
    return ("." if node.op == "call_method" else "") + target_name(node)


def _arguments(node: fx.Node, module: nn.Module | None) -> str:
    own = getattr(module, "describe", None)
    if callable(own):
        return str(own())
    if node.op not in ("call_function", "call_method"):
        return ""
    plain = [repr(value) for value in node.args if not _reads(value)]
    plain += [f"{name}={value!r}" for name, value in node.kwargs.items() if not _reads(value)]
    return ", ".join(plain)


def _reads(value: Any) -> bool:
    if isinstance(value, fx.Node):
        return True
    return isinstance(value, (list, tuple)) and any(_reads(item) for item in value)


def _words(node: fx.Node) -> tuple[str, ...]:
    known = facts(node)
    words = []
    if known.nonneg:
        words.append("nonneg")
    if known.upper is not None:
        words.append(f"<={known.upper:g}")
    for name in ("fused_relu", "fused_into", "observes", "skip"):
        value = getattr(known, name)
        if value is not None:
            words.append(f"{name}={value}")
    if known.note:
        words.append(known.note)
    return tuple(words)


# ---- digests ---------------------------------------------------------------------------------


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """A checksum of a tensor's shape and bytes.

    Always computed anew: torch does not count writes through ``tensor.data``, so nothing would say
    when a remembered digest is stale.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(flat.data, zlib.crc32(str(list(tensor.shape)).encode())).to_bytes(4, "big")


def module_digest(module: nn.Module) -> str:
    """Six hex digits that change with any parameter or buffer of the module; empty without any."""
    digest = hashlib.blake2b(digest_size=3)
    empty = True
    for tensors in (module.named_parameters(), module.named_buffers()):
        for name, tensor in tensors:
            digest.update(name.encode())
            digest.update(tensor_digest(tensor))
            empty = False
    return "" if empty else digest.hexdigest()


def _constant_digest(program: Program, node: fx.Node) -> str:
    if node.op != "get_attr":
        return ""
    value: Any = program.module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return tensor_digest(value).hex()[:6] if isinstance(value, torch.Tensor) else ""
