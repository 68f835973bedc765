"""What a node computes, as data: `Kind`, `Op`, and how they are made from a call's arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import fx, nn

from fxq.graph.program import FACTS_KEY, Facts


class Kind(StrEnum):
    """What a node computes, as far as quantization is concerned."""

    CONV = "conv"
    LINEAR = "linear"
    BATCH_NORM = "batch_norm"
    RELU = "relu"
    ADD = "add"
    CAT = "cat"
    MAX_POOL = "max_pool"
    AVG_POOL = "avg_pool"
    GLOBAL_AVG_POOL = "global_avg_pool"
    PAD = "pad"
    RESHAPE = "reshape"
    IDENTITY = "identity"
    SIZE = "size"
    OBSERVER = "observer"
    QUANTIZER = "quantizer"
    OTHER = "other"
    INPUT = "input"
    CONSTANT = "constant"
    OUTPUT = "output"


ANCHORS = frozenset({Kind.CONV, Kind.LINEAR})
"""Where the arithmetic is: the layers whose inputs are worth quantizing."""

FOLLOWERS = frozenset(
    {
        Kind.RELU,
        Kind.ADD,
        Kind.CAT,
        Kind.MAX_POOL,
        Kind.AVG_POOL,
        Kind.GLOBAL_AVG_POOL,
        Kind.PAD,
        Kind.RESHAPE,
        Kind.IDENTITY,
    }
)
"""What can run on integers between two anchors."""

PASS_THROUGH = frozenset({Kind.RELU, Kind.MAX_POOL, Kind.PAD, Kind.RESHAPE, Kind.IDENTITY})
"""Followers whose output is made of values of their input, so it shares the input's scale."""


@dataclass(frozen=True)
class Op:
    """A node, read as an operator.

    Attributes:
        kind: What it computes.
        inputs: The nodes whose values it reads, in operator order.
        attributes: What else it needs (kernel sizes, dims, bounds), by name.
        module: The module it calls, where it calls one.
        reason: For `Kind.OTHER`: why the operator is not one of the known kinds.
    """

    kind: Kind
    inputs: tuple[fx.Node, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    reason: str = ""


def target_name(node: fx.Node) -> str:
    """A short readable name of what a node calls."""
    if isinstance(node.target, str):
        return node.target
    return str(getattr(node.target, "__name__", node.target))


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """The argument of a call, whether it was given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def other(node: fx.Node, reason: str) -> Op:
    """An operator fxq does not know, and why."""
    return Op(Kind.OTHER, tuple(node.all_input_nodes), reason=reason)


def first_input(node: fx.Node) -> tuple[fx.Node, ...]:
    """The node a call works on, as operator inputs; empty where that is no node."""
    value = argument(node, 0, "input")
    return (value,) if isinstance(value, fx.Node) else ()


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's value on the example input, where it is one tensor."""
    known = node.meta.get(FACTS_KEY)
    return known.shape if isinstance(known, Facts) else None


def bounded_relu(node: fx.Node, low: Any, high: Any) -> Op:
    """``clamp(low, high)``, which is a ReLU where it keeps ``0 .. high``."""
    numbers = isinstance(low, (int, float)) and isinstance(high, (int, float))
    if not numbers or low != 0 or high <= 0:
        return other(node, f"hardtanh({low}, {high}) is not a ReLU")
    return Op(Kind.RELU, first_input(node), {"upper": float(high)})


def pool(node: fx.Node, kind: Kind, **attributes: Any) -> Op:
    """A pooling operator; its sizes are pairs."""
    if any(is_computed(value) for value in attributes.values()):
        return other(node, f"{kind.value} of a computed size")
    kernel, stride = pair(attributes["kernel_size"]), attributes.get("stride")
    attributes["kernel_size"] = kernel
    attributes["stride"] = kernel if stride in (None, [], ()) else pair(stride)
    attributes["padding"] = pair(attributes.get("padding", 0))
    if kind is Kind.MAX_POOL:
        attributes["dilation"] = pair(attributes.get("dilation", 1))
    refusal = _unusual_average(attributes) if kind is Kind.AVG_POOL else None
    return other(node, refusal) if refusal else Op(kind, first_input(node), attributes)


def _unusual_average(attributes: dict[str, Any]) -> str | None:
    """Why an average pool is not the plain mean of its window; None where it is."""
    if attributes.get("divisor_override"):
        return "average pool with a divisor override"
    if attributes.get("ceil_mode"):
        return "average pool in ceil mode"
    if not attributes.get("count_include_pad", True) and attributes["padding"] != (0, 0):
        return "average pool that leaves the padding out of the count"
    return None


def is_computed(value: Any) -> bool:
    """Whether a size, or an entry of it, is computed in the graph."""
    if isinstance(value, (tuple, list)):
        return any(is_computed(item) for item in value)
    return isinstance(value, fx.Node)


def pair(value: Any) -> tuple[int, int]:
    """A size given once or per dimension, as two ints."""
    if isinstance(value, int):
        return (value, value)
    first, second = value if len(value) == 2 else (value[0], value[0])
    return (int(first), int(second))


def adaptive(node: fx.Node, output_size: Any) -> Op:
    """An adaptive average pool: global, the identity, or an average pool of even windows."""
    inputs = first_input(node)
    shape = (shape_of(inputs[0]) if inputs else None) or ()
    if len(shape) != 4 or is_computed(output_size):
        return other(node, f"adaptive average pool to {output_size} of shape {list(shape)}")
    wanted = (output_size,) * 2 if isinstance(output_size, int) else tuple(output_size)
    if wanted == (1, 1):
        return Op(Kind.GLOBAL_AVG_POOL, inputs, {"keepdim": True})
    size = shape[2:]
    target = tuple(have if want is None else want for want, have in zip(wanted, size, strict=True))
    if target == size:
        return Op(Kind.IDENTITY, inputs)
    if all(have % want == 0 for want, have in zip(target, size, strict=True)):
        kernel = (size[0] // target[0], size[1] // target[1])
        return pool(node, Kind.AVG_POOL, kernel_size=kernel, stride=kernel)
    return other(node, f"adaptive average pool from {size} to {target} has uneven windows")
