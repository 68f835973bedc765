"""Exported programs, whose nodes are ATen operators, in the spelling of `torch` and its modules.

`torch.export` writes every operator as an overload of ATen and every parameter as an attribute.
Operators with a function or method of the same arguments become that; the few whose arguments
differ are rewritten; what is left stays as it is and computes in float.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxq.errors import CaptureError
from fxq.graph.call_ops import RESHAPES

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_FUNCTIONAL_IN_PLACE = (
    *("dropout", "elu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu6"),
    "silu",
)
"""Operators that work in place as an option of a function, not as a method."""


def as_module(model: Any) -> Any:
    """The module of an exported program; anything else as it is."""
    kind: Any = getattr(sys.modules.get("torch.export"), "ExportedProgram", None)
    if kind is None or not isinstance(model, kind):
        return model
    module = model.module()
    for name in ("train", "eval"):  # its own refuse; the graph has one mode anyway
        vars(module).pop(name, None)
    return module


def load_exported(path: Path) -> tuple[nn.Module, tuple[Any, ...]]:
    """The module of a ``.pt2`` file, and the example it was exported with.

    Raises:
        CaptureError: The file cannot be read as an exported program.
    """
    import torch.export

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the versions of its own format
            program = torch.export.load(path)
        example = program.example_inputs
    except Exception as error:
        raise CaptureError(
            f"the exported program cannot be read: {str(error).partition(chr(10))[0]}",
            where=str(path),
            hint="write it with torch.export.save, by a version of torch like the one here",
        ) from error
    if example is None or example[1]:
        raise CaptureError(
            "the program was exported without an example, or with keyword arguments",
            where=str(path),
            hint="export it with a tuple of positional arguments",
        )
    return as_module(program), tuple(example[0])


def is_exported(model: nn.Module) -> bool:
    """Whether a module is the graph of an exported program."""
    if not isinstance(model, fx.GraphModule):
        return False
    return any(isinstance(node.target, OpOverload) for node in model.graph.nodes)


def respelled(model: fx.GraphModule) -> fx.GraphModule:
    """The graph of an exported program as tracing would have written it; the model is changed.

    Raises:
        CaptureError: It was exported in training mode, or returns an object of another class than
            tuples, lists and dictionaries.
    """
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    for node in model.graph.nodes:
        if node.op == "output":
            graph.output(_returned(model, fx.map_arg(node.args[0], values.__getitem__)))
        elif not _is_check(node):
            copied = graph.node_copy(node, values.__getitem__)
            _respell(copied)
            values[node] = copied
    return fx.GraphModule(model, graph, type(model).__name__)


def _is_check(node: fx.Node) -> bool:
    """Whether a node only checks something."""
    name = getattr(node.target, "__name__", str(node.target))
    return name == "_guards_fn" or name.startswith("_assert")


def _returned(model: fx.GraphModule, value: Any) -> Any:
    """What the program returns, in the structure of the model's output."""
    info = getattr(model.graph._codegen, "pytree_info", None)
    if info is None or info.out_spec is None:
        return value
    found = pytree.tree_unflatten(list(value), info.out_spec)
    if not isinstance(found, (fx.Node, tuple, list, dict)):
        raise CaptureError(
            f"the exported program returns a {type(found).__name__}",
            hint="export a model that returns tensors, tuples, lists or dictionaries",
        )
    return found


def _respell(node: fx.Node) -> None:
    if not isinstance(node.target, OpOverload):
        return
    name, overload = node.target._schema.name.removeprefix("aten::"), node.target._overloadname
    rewrite = _REWRITTEN.get(f"{name}.{overload}") or _REWRITTEN.get(name)
    if rewrite is not None:
        function, (args, kwargs) = rewrite(node)
    else:
        function, args, kwargs = _same(name), node.args, dict(node.kwargs)
    if function is None:
        return
    node.op = "call_method" if isinstance(function, str) else "call_function"
    node.target, node.args, node.kwargs = function, args, kwargs


def _same(name: str) -> Any:
    """The method or function that takes the operator's arguments in the same order."""
    base = name.removesuffix("_")
    if name in RESHAPES or (name != base and base not in _FUNCTIONAL_IN_PLACE):
        return name if hasattr(torch.Tensor, name) else None
    return getattr(torch, name, None) or getattr(F, name, None)


def _functional_in_place(node: fx.Node) -> tuple[Callable[..., Any], _Arguments]:
    name = str(node.target._schema.name).removeprefix("aten::")[:-1]  # type: ignore[union-attr]
    return getattr(F, name), (node.args, {**node.kwargs, "inplace": True})


def _batch_norm(node: fx.Node) -> tuple[Callable[..., Any], _Arguments]:
    x, weight, bias, mean, variance, training, momentum, eps, *_ = node.args
    if training:
        raise CaptureError(
            "the program was exported in training mode",
            where=f"%{node.name}",
            hint="export model.eval()",
        )
    return F.batch_norm, ((x, mean, variance, weight, bias, False, momentum, eps), {})


def _embedding(node: fx.Node) -> tuple[Callable[..., Any], _Arguments]:
    weight, indices, *rest = node.args
    padding = rest[0] if rest and rest[0] != -1 else None
    return F.embedding, ((indices, weight, padding), {})


def _nearest(node: fx.Node) -> tuple[Callable[..., Any], _Arguments]:
    x, size, scales = node.args
    return F.interpolate, ((x, size, scales, "nearest"), {})


def _bilinear(node: fx.Node) -> tuple[Callable[..., Any], _Arguments]:
    x, size, corners, scales = node.args
    return F.interpolate, ((x, size, scales, "bilinear", corners), {})


def _named(function: Any) -> Callable[[fx.Node], tuple[Any, _Arguments]]:
    return lambda node: (function, (node.args, dict(node.kwargs)))


_REWRITTEN: dict[str, Callable[[fx.Node], tuple[Any, _Arguments]]] = {
    "batch_norm": _batch_norm,
    "embedding": _embedding,
    "upsample_nearest2d.vec": _nearest,
    "upsample_bilinear2d.vec": _bilinear,
    "sym_size": _named("size"),
    "split_with_sizes": _named("split"),
    "softmax": _named(torch.softmax),
    "hardtanh": _named(F.hardtanh),
    "adaptive_avg_pool2d": _named(F.adaptive_avg_pool2d),
    **{f"{name}_": _functional_in_place for name in _FUNCTIONAL_IN_PLACE},
}
"""Operators whose functions take their arguments in another order, or have another name."""
