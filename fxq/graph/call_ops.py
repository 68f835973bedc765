"""The function and method spellings of the operators fxq knows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxq.graph.op import (
    Kind,
    Op,
    adaptive,
    argument,
    bounded_relu,
    first_input,
    is_computed,
    other,
    pool,
    shape_of,
    target_name,
)
from fxq.graph.program import FACTS_KEY


def describe_call(node: fx.Node) -> Op:
    """The operator a function or method call computes."""
    if _is_number(node):
        return _size_call(node)
    if target_name(node) == "stochastic_depth" and not argument(node, 3, "training", True):
        return _identity_call(node)
    rules = _FUNCTIONS if node.op == "call_function" else _METHODS
    rule = rules.get(node.target)
    return other(node, f"no integer {target_name(node)}") if rule is None else rule(node)


def _is_number(node: fx.Node) -> bool:
    """Whether a call computes with sizes rather than tensors (``x.size(1) // 2``)."""
    arithmetic = getattr(node.target, "__module__", "") == "_operator"
    known = FACTS_KEY in node.meta
    return arithmetic and known and shape_of(node) is None and node.target is not operator.getitem


def _relu_call(node: fx.Node) -> Op:
    return Op(Kind.RELU, first_input(node))


def _relu6_call(node: fx.Node) -> Op:
    return Op(Kind.RELU, first_input(node), {"upper": 6.0})


def _hardtanh_call(node: fx.Node) -> Op:
    low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    return bounded_relu(node, low, high)


def _clamp_call(node: fx.Node) -> Op:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if isinstance(low, (int, float)) and low == 0 and high is None:
        return _relu_call(node)
    return bounded_relu(node, low, high)


def _add_call(node: fx.Node) -> Op:
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
    if node.kwargs.get("alpha", 1) != 1:
        return other(node, "add with alpha")
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return other(node, "add of a constant")
    if shape_of(left) is None or shape_of(left) != shape_of(right):
        return other(node, "add that broadcasts")
    return Op(Kind.ADD, (left, right))


def _cat_call(node: fx.Node) -> Op:
    tensors = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    if not isinstance(tensors, (list, tuple)) or not isinstance(dim, int):
        return other(node, "concatenation of a computed list")
    if not all(isinstance(tensor, fx.Node) for tensor in tensors):
        return other(node, "concatenation of constants")
    return Op(Kind.CAT, tuple(tensors), {"dim": dim})


def _max_pool_call(node: fx.Node) -> Op:
    if argument(node, 6, "return_indices", False):
        return other(node, "max pool that returns indices")
    return pool(
        node,
        Kind.MAX_POOL,
        kernel_size=argument(node, 1, "kernel_size"),
        stride=argument(node, 2, "stride"),
        padding=argument(node, 3, "padding", 0),
        dilation=argument(node, 4, "dilation", 1),
        ceil_mode=argument(node, 5, "ceil_mode", False),
    )


def _avg_pool_call(node: fx.Node) -> Op:
    return pool(
        node,
        Kind.AVG_POOL,
        kernel_size=argument(node, 1, "kernel_size"),
        stride=argument(node, 2, "stride"),
        padding=argument(node, 3, "padding", 0),
        ceil_mode=argument(node, 4, "ceil_mode", False),
        count_include_pad=argument(node, 5, "count_include_pad", True),
        divisor_override=argument(node, 6, "divisor_override"),
    )


def _adaptive_call(node: fx.Node) -> Op:
    return adaptive(node, argument(node, 1, "output_size"))


def _mean_call(node: fx.Node) -> Op:
    dims, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
    inputs = first_input(node)
    rank = len((shape_of(inputs[0]) if inputs else None) or ())
    listed = tuple(dims) if isinstance(dims, (list, tuple)) else (dims,)
    if rank != 4 or not all(isinstance(dim, int) for dim in listed):
        return other(node, f"mean over {listed} of {rank} dimensions")
    if {dim % rank for dim in listed} != {2, 3}:
        return other(node, f"mean over {listed}")
    return Op(Kind.GLOBAL_AVG_POOL, inputs, {"keepdim": bool(keep)})


def _pad_call(node: fx.Node) -> Op:
    mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value", None)
    if mode != "constant" or value not in (None, 0):
        return other(node, f"padding by {mode} {value or ''}".rstrip())
    pad = argument(node, 1, "pad")
    if is_computed(pad):
        return other(node, "padding by a computed size")
    return Op(Kind.PAD, first_input(node), {"pad": tuple(pad)})


def _identity_call(node: fx.Node) -> Op:
    return Op(Kind.IDENTITY, first_input(node))


def _dropout_call(node: fx.Node) -> Op:
    """``F.dropout`` drops by default, in eval mode too."""
    name = "train" if node.target is torch.dropout else "training"
    if argument(node, 2, name, True) is not False:
        return other(node, "dropout that is active in eval mode")
    return _identity_call(node)


def _size_call(node: fx.Node) -> Op:
    return Op(Kind.SIZE, tuple(node.all_input_nodes))


def _getattr_call(node: fx.Node) -> Op:
    if node.args[1] in ("shape", "dtype", "device", "ndim"):
        return _size_call(node)
    return other(node, f"attribute {node.args[1]}")


def _getitem_call(node: fx.Node) -> Op:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return other(node, "index of a constant")
    if source.target in ("size", getattr) and shape_of(node) is None:
        return _size_call(node)
    if is_computed(node.args[1]):
        return other(node, "index that is computed")
    return Op(Kind.RESHAPE, (source,), {"call": "getitem", "arguments": (node.args[1],)})


def _reshape_call(name: str) -> Callable[[fx.Node], Op]:
    def rule(node: fx.Node) -> Op:
        inputs = first_input(node)
        if not inputs:
            return other(node, f"{name} of a list")
        keywords = {key: value for key, value in node.kwargs.items() if key != "input"}
        arguments = tuple(node.args[1:]) if node.args else ()
        attributes = {"call": name, "arguments": arguments, "keywords": keywords}
        return Op(Kind.RESHAPE, inputs, attributes)

    return rule


RESHAPES = (
    "chunk",
    "contiguous",
    "flatten",
    "movedim",
    "narrow",
    "permute",
    "reshape",
    "select",
    "split",
    "squeeze",
    "swapaxes",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
    "view",
)

_METHODS: dict[Any, Callable[[fx.Node], Op]] = {
    "relu": _relu_call,
    "clamp": _clamp_call,
    "clip": _clamp_call,
    "clamp_min": _clamp_call,
    "add": _add_call,
    "mean": _mean_call,
    "size": _size_call,
    "dim": _size_call,
    "detach": _identity_call,
    "clone": _identity_call,
    **{name: _reshape_call(name) for name in RESHAPES},
}

_FUNCTIONS: dict[Any, Callable[[fx.Node], Op]] = {
    F.relu: _relu_call,
    torch.relu: _relu_call,
    F.relu6: _relu6_call,
    F.hardtanh: _hardtanh_call,
    torch.clamp: _clamp_call,
    torch.clip: _clamp_call,
    torch.clamp_min: _clamp_call,
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
    F.dropout: _dropout_call,
    F.dropout2d: _dropout_call,
    torch.dropout: _dropout_call,
    getattr: _getattr_call,
    operator.getitem: _getitem_call,
    F.pixel_shuffle: _reshape_call("pixel_shuffle"),
    **{getattr(torch, name): _reshape_call(name) for name in RESHAPES if hasattr(torch, name)},
}
