"""One vocabulary for the module, function and method spellings of the operators fxq knows.

`describe` turns a node into an `Op`: what it computes (its `Kind`), the nodes it reads and its
attributes. Passes and the lowering read `Op`s, so none of them matches spellings itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxq.graph.program import FACTS_KEY


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

CONV_MODULES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
BATCH_NORM_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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


def describe(node: fx.Node, root: nn.Module) -> Op:
    """The operator a node computes; `Kind.OTHER` with a reason where fxq does not know it.

    Args:
        node: A node of a graph module.
        root: That graph module.

    Example:
        >>> graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
        >>> [describe(node, graph).kind.value for node in graph.graph.nodes]
        ['input', 'conv', 'relu', 'output']
    """
    if node.op == "placeholder":
        return Op(Kind.INPUT)
    if node.op == "output":
        return Op(Kind.OUTPUT, tuple(node.all_input_nodes))
    if node.op == "get_attr":
        return Op(Kind.CONSTANT)
    if node.op == "call_module":
        return _describe_module(node, root.get_submodule(str(node.target)))
    if _is_number(node):
        return _size_call(node)
    if target_name(node) == "stochastic_depth" and not _argument(node, 3, "training", True):
        return _identity_call(node)
    rules = _FUNCTIONS if node.op == "call_function" else _METHODS
    rule = rules.get(node.target)  # type: ignore[call-overload]
    if rule is None:
        return Op(Kind.OTHER, tuple(node.all_input_nodes), reason=f"no integer {target_name(node)}")
    return rule(node)


def _is_number(node: fx.Node) -> bool:
    """Whether a call computes with sizes rather than tensors (``x.size(1) // 2``)."""
    known = node.meta.get(FACTS_KEY)
    is_tensor = known is None or known.shape is not None
    arithmetic = getattr(node.target, "__module__", "") == "_operator"
    return arithmetic and not is_tensor and node.target is not operator.getitem


def target_name(node: fx.Node) -> str:
    """A short readable name of what a node calls."""
    if isinstance(node.target, str):
        return node.target
    return str(getattr(node.target, "__name__", node.target))


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """The argument of a call, whether it was given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _other(node: fx.Node, reason: str) -> Op:
    return Op(Kind.OTHER, tuple(node.all_input_nodes), reason=reason)


def _first_input(node: fx.Node) -> tuple[fx.Node, ...]:
    value = _argument(node, 0, "input")
    return (value,) if isinstance(value, fx.Node) else ()


# ---- modules ---------------------------------------------------------------------------------


def _describe_module(node: fx.Node, module: nn.Module) -> Op:
    own = getattr(module, "fxq_kind", None)
    if isinstance(own, str):
        return Op(Kind(own), _first_input(node), module=module)
    for types, rule in _MODULE_RULES:
        if isinstance(module, types):
            op = rule(node, module)
            return Op(op.kind, op.inputs, op.attributes, module, op.reason)
    if is_frozen_batch_norm(module):
        return Op(Kind.BATCH_NORM, _first_input(node), module=module)
    return Op(
        Kind.OTHER,
        tuple(node.all_input_nodes),
        module=module,
        reason=f"no integer {type(module).__name__}",
    )


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a FrozenBatchNorm2d of torchvision or of a detection library."""
    return type(module).__name__ == "FrozenBatchNorm2d" and hasattr(module, "running_var")


def _simple(kind: Kind) -> Callable[[fx.Node, Any], Op]:
    return lambda node, module: Op(kind, _first_input(node))


def _hardtanh(node: fx.Node, module: nn.Hardtanh) -> Op:
    return _bounded_relu(node, module.min_val, module.max_val)


def _bounded_relu(node: fx.Node, low: float, high: float) -> Op:
    if low != 0 or high <= 0:
        return _other(node, f"hardtanh({low}, {high}) is not a ReLU")
    return Op(Kind.RELU, _first_input(node), {"upper": float(high)})


def _max_pool_module(node: fx.Node, module: nn.MaxPool2d) -> Op:
    if module.return_indices:
        return _other(node, "max pool that returns indices")
    return _pool(
        node,
        Kind.MAX_POOL,
        kernel_size=module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        ceil_mode=module.ceil_mode,
    )


def _avg_pool_module(node: fx.Node, module: nn.AvgPool2d) -> Op:
    return _pool(
        node,
        Kind.AVG_POOL,
        kernel_size=module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        ceil_mode=module.ceil_mode,
        count_include_pad=module.count_include_pad,
        divisor_override=module.divisor_override,
    )


def _pool(node: fx.Node, kind: Kind, **attributes: Any) -> Op:
    kernel = pair(attributes["kernel_size"])
    stride = attributes.get("stride")
    attributes["kernel_size"] = kernel
    attributes["stride"] = kernel if stride in (None, [], ()) else pair(stride)
    attributes["padding"] = pair(attributes.get("padding", 0))
    if kind is Kind.MAX_POOL:
        attributes["dilation"] = pair(attributes.get("dilation", 1))
    elif attributes.get("divisor_override"):
        return _other(node, "average pool with a divisor override")
    elif attributes.get("ceil_mode"):
        return _other(node, "average pool in ceil mode")
    elif not attributes.get("count_include_pad", True) and attributes["padding"] != (0, 0):
        return _other(node, "average pool that leaves the padding out of the count")
    return Op(kind, _first_input(node), attributes)


def pair(value: Any) -> tuple[int, int]:
    """A size given once or per dimension, as two ints."""
    if isinstance(value, int):
        return (value, value)
    first, second = value if len(value) == 2 else (value[0], value[0])
    return (int(first), int(second))


def _adaptive_module(node: fx.Node, module: nn.AdaptiveAvgPool2d) -> Op:
    return _adaptive(node, module.output_size)


def _adaptive(node: fx.Node, output_size: Any) -> Op:
    inputs = _first_input(node)
    shape = (
        tuple(inputs[0].meta[FACTS_KEY].shape or ())
        if inputs and FACTS_KEY in inputs[0].meta
        else ()
    )
    wanted = (output_size,) * 2 if isinstance(output_size, int) else tuple(output_size)
    if wanted == (1, 1):
        return Op(Kind.GLOBAL_AVG_POOL, inputs, {"keepdim": True})
    if len(shape) != 4:
        return _other(node, f"adaptive average pool to {wanted} of an unknown shape")
    size = shape[2:]
    target = tuple(have if want is None else want for want, have in zip(wanted, size, strict=True))
    if target == size:
        return Op(Kind.IDENTITY, inputs)
    if all(have % want == 0 for want, have in zip(target, size, strict=True)):
        kernel = (size[0] // target[0], size[1] // target[1])
        return _pool(node, Kind.AVG_POOL, kernel_size=kernel, stride=kernel)
    return _other(node, f"adaptive average pool from {size} to {target} has uneven windows")


def _zero_pad_module(node: fx.Node, module: nn.ZeroPad2d) -> Op:
    return Op(Kind.PAD, _first_input(node), {"pad": tuple(module.padding)})


def _flatten_module(node: fx.Node, module: nn.Flatten) -> Op:
    arguments = (module.start_dim, module.end_dim)
    return Op(Kind.RESHAPE, _first_input(node), {"call": "flatten", "arguments": arguments})


def _unflatten_module(node: fx.Node, module: nn.Unflatten) -> Op:
    arguments = (module.dim, tuple(module.unflattened_size))
    return Op(Kind.RESHAPE, _first_input(node), {"call": "unflatten", "arguments": arguments})


def _pixel_shuffle_module(node: fx.Node, module: Any) -> Op:
    name = "pixel_shuffle" if isinstance(module, nn.PixelShuffle) else "pixel_unshuffle"
    factor = getattr(module, "upscale_factor", None) or module.downscale_factor
    return Op(Kind.RESHAPE, _first_input(node), {"call": name, "arguments": (factor,)})


_MODULE_RULES: tuple[tuple[Any, Callable[[fx.Node, Any], Op]], ...] = (
    (CONV_MODULES, _simple(Kind.CONV)),
    (nn.Linear, _simple(Kind.LINEAR)),
    (BATCH_NORM_MODULES, _simple(Kind.BATCH_NORM)),
    (nn.ReLU, _simple(Kind.RELU)),
    (nn.Hardtanh, _hardtanh),  # nn.ReLU6 is one
    (nn.MaxPool2d, _max_pool_module),
    (nn.AvgPool2d, _avg_pool_module),
    (nn.AdaptiveAvgPool2d, _adaptive_module),
    ((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), _zero_pad_module),
    (nn.Flatten, _flatten_module),
    (nn.Unflatten, _unflatten_module),
    ((nn.PixelShuffle, nn.PixelUnshuffle), _pixel_shuffle_module),
    (
        (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
        _simple(Kind.IDENTITY),
    ),
)


# ---- functions and methods -------------------------------------------------------------------


def _relu_call(node: fx.Node) -> Op:
    return Op(Kind.RELU, _first_input(node))


def _relu6_call(node: fx.Node) -> Op:
    return Op(Kind.RELU, _first_input(node), {"upper": 6.0})


def _hardtanh_call(node: fx.Node) -> Op:
    low, high = _argument(node, 1, "min_val", -1.0), _argument(node, 2, "max_val", 1.0)
    return _bounded_relu(node, low, high)


def _clamp_call(node: fx.Node) -> Op:
    low, high = _argument(node, 1, "min"), _argument(node, 2, "max")
    if low != 0:
        return _other(node, f"clamp({low}, {high}) is not a ReLU")
    return _relu_call(node) if high is None else _bounded_relu(node, 0.0, high)


def _add_call(node: fx.Node) -> Op:
    left, right = _argument(node, 0, "input"), _argument(node, 1, "other")
    if node.kwargs.get("alpha", 1) != 1:
        return _other(node, "add with alpha")
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return _other(node, "add of a constant")
    shapes = [
        value.meta[FACTS_KEY].shape if FACTS_KEY in value.meta else None for value in (left, right)
    ]
    if None in shapes or shapes[0] != shapes[1]:
        return _other(node, "add that broadcasts")
    return Op(Kind.ADD, (left, right))


def _cat_call(node: fx.Node) -> Op:
    tensors = _argument(node, 0, "tensors")
    dim = _argument(node, 1, "dim", 0)
    if not isinstance(tensors, (list, tuple)) or not isinstance(dim, int):
        return _other(node, "concatenation of a computed list")
    if not all(isinstance(tensor, fx.Node) for tensor in tensors):
        return _other(node, "concatenation of constants")
    return Op(Kind.CAT, tuple(tensors), {"dim": dim})


def _max_pool_call(node: fx.Node) -> Op:
    if _argument(node, 6, "return_indices", False):
        return _other(node, "max pool that returns indices")
    return _pool(
        node,
        Kind.MAX_POOL,
        kernel_size=_argument(node, 1, "kernel_size"),
        stride=_argument(node, 2, "stride"),
        padding=_argument(node, 3, "padding", 0),
        dilation=_argument(node, 4, "dilation", 1),
        ceil_mode=_argument(node, 5, "ceil_mode", False),
    )


def _avg_pool_call(node: fx.Node) -> Op:
    return _pool(
        node,
        Kind.AVG_POOL,
        kernel_size=_argument(node, 1, "kernel_size"),
        stride=_argument(node, 2, "stride"),
        padding=_argument(node, 3, "padding", 0),
        ceil_mode=_argument(node, 4, "ceil_mode", False),
        count_include_pad=_argument(node, 5, "count_include_pad", True),
        divisor_override=_argument(node, 6, "divisor_override"),
    )


def _adaptive_call(node: fx.Node) -> Op:
    return _adaptive(node, _argument(node, 1, "output_size"))


def _mean_call(node: fx.Node) -> Op:
    dims = _argument(node, 1, "dim")
    if node.op == "call_method" and len(node.args) > 2 and isinstance(node.args[2], int):
        dims, keep = node.args[1:], node.kwargs.get("keepdim", False)
    else:
        keep = _argument(node, 2, "keepdim", False)
    dims = tuple(dims) if isinstance(dims, (list, tuple)) else (dims,)
    if set(dims) not in ({2, 3}, {-1, -2}):
        return _other(node, f"mean over {dims}")
    return Op(Kind.GLOBAL_AVG_POOL, _first_input(node), {"keepdim": bool(keep)})


def _pad_call(node: fx.Node) -> Op:
    mode, value = _argument(node, 2, "mode", "constant"), _argument(node, 3, "value", None)
    if mode != "constant" or value not in (None, 0):
        return _other(node, f"padding by {mode} {value or ''}".rstrip())
    pad = _argument(node, 1, "pad")
    if not all(isinstance(size, int) for size in pad):
        return _other(node, "padding by a computed size")
    return Op(Kind.PAD, _first_input(node), {"pad": tuple(pad)})


def _identity_call(node: fx.Node) -> Op:
    return Op(Kind.IDENTITY, _first_input(node))


def _size_call(node: fx.Node) -> Op:
    return Op(Kind.SIZE, tuple(node.all_input_nodes))


def _getattr_call(node: fx.Node) -> Op:
    if node.args[1] in ("shape", "dtype", "device", "ndim"):
        return _size_call(node)
    return _other(node, f"attribute {node.args[1]}")


def _getitem_call(node: fx.Node) -> Op:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return _other(node, "index of a constant")
    if source.target in ("size", getattr):
        return _size_call(node)
    return Op(Kind.RESHAPE, (source,), {"call": "getitem", "arguments": (node.args[1],)})


def _reshape_call(name: str) -> Callable[[fx.Node], Op]:
    def rule(node: fx.Node) -> Op:
        inputs = _first_input(node)
        if not inputs:
            return _other(node, f"{name} of a list")
        keywords = {key: value for key, value in node.kwargs.items() if key != "input"}
        arguments = tuple(node.args[1:]) if node.args else ()
        attributes = {"call": name, "arguments": arguments, "keywords": keywords}
        return Op(Kind.RESHAPE, inputs, attributes)

    return rule


_RESHAPES = (
    "flatten unflatten reshape view permute transpose squeeze unsqueeze contiguous chunk split "
    "narrow select unbind movedim swapaxes"
).split()

_METHODS: dict[Any, Callable[[fx.Node], Op]] = {
    "relu": _relu_call,
    "clamp": _clamp_call,
    "add": _add_call,
    "mean": _mean_call,
    "size": _size_call,
    "dim": _size_call,
    "detach": _identity_call,
    "clone": _identity_call,
    **{name: _reshape_call(name) for name in _RESHAPES},
}

_FUNCTIONS: dict[Any, Callable[[fx.Node], Op]] = {
    F.relu: _relu_call,
    torch.relu: _relu_call,
    F.relu6: _relu6_call,
    F.hardtanh: _hardtanh_call,
    torch.clamp: _clamp_call,
    operator.add: _add_call,
    operator.iadd: _add_call,
    torch.add: _add_call,
    torch.cat: _cat_call,
    torch.concat: _cat_call,
    torch.concatenate: _cat_call,
    F.max_pool2d: _max_pool_call,
    torch.max_pool2d: _max_pool_call,
    F.avg_pool2d: _avg_pool_call,
    F.adaptive_avg_pool2d: _adaptive_call,
    torch.mean: _mean_call,
    F.pad: _pad_call,
    F.dropout: _identity_call,
    F.dropout2d: _identity_call,
    torch.dropout: _identity_call,
    getattr: _getattr_call,
    operator.getitem: _getitem_call,
    F.pixel_shuffle: _reshape_call("pixel_shuffle"),
    **{getattr(torch, name): _reshape_call(name) for name in _RESHAPES if hasattr(torch, name)},
}
