"""One spelling for what models write in several ways, applied once at capture.

* An in-place operator becomes its out-of-place form (`fxq.graph.in_place`).
* ``F.conv2d(x, self.weight)`` and its kin with constant weights become modules, so that every pass
  meets one form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxq.graph.in_place import remove_in_place
from fxq.graph.op import is_computed, shape_of
from fxq.graph.program import Program, facts, recompile, write_facts

Builder = Callable[[Program, dict[str, Any]], nn.Module | None]
"""Makes the module of a functional layer from its arguments; None where it has none."""


def canonicalize(program: Program) -> None:
    """No node of the program works in place, and constant-weight layers are modules.

    Raises:
        CaptureError: The model fails on the example, or an in-place operator has no out-of-place
            equivalent.
    """
    remove_in_place(program)
    for node in program.nodes():
        if node.op == "call_function" and node.target in _LAYERS:
            names, builder = _LAYERS[node.target]
            _as_module(program, node, names.split(), builder)
    recompile(program)


def _constant(program: Program, value: Any) -> torch.Tensor | None:
    """The tensor a ``get_attr`` node reads; None for a value computed in the graph."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found: Any = program.module
    for part in str(value.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, torch.Tensor) else None


def _as_module(program: Program, node: fx.Node, names: list[str], builder: Builder) -> None:
    values = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if not isinstance(values.get("input"), fx.Node):
        return
    layer = builder(program, values)
    if layer is None:
        return
    name = node.name
    while hasattr(program.module, name):
        name = f"{name}_layer"
    program.module.add_submodule(name, layer.eval())
    with program.graph.inserting_after(node):
        call = program.graph.call_module(name, (values["input"],))
    call.meta = dict(node.meta)
    write_facts(call, path=facts(node).path or name)
    node.replace_all_uses_with(call)
    program.graph.erase_node(node)


def _with_parameters(layer: nn.Module, **tensors: torch.Tensor | None) -> nn.Module:
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            setattr(layer, name, tensor)
        elif tensor is not None:
            setattr(layer, name, nn.Parameter(tensor.detach(), requires_grad=False))
    return layer


_CONV_OPTIONS = ("stride", "padding", "dilation", "output_padding", "groups")


def _conv_builder(layer_type: Any) -> Builder:
    def build(program: Program, values: dict[str, Any]) -> nn.Module | None:
        weight, bias = _constant(program, values["weight"]), _constant(program, values.get("bias"))
        if weight is None or (bias is None) != (values.get("bias") is None):
            return None
        options = {key: values[key] for key in _CONV_OPTIONS if key in values}
        if any(is_computed(value) for value in options.values()):
            return None
        transposed = "Transpose" in layer_type.__name__
        channels = (weight.shape[0], weight.shape[1] * options.get("groups", 1))
        inputs, outputs = channels if transposed else (channels[1], channels[0])
        kernel = tuple(weight.shape[2:])
        with torch.device("meta"):
            layer = layer_type(inputs, outputs, kernel, bias=bias is not None, **options)
        return _with_parameters(layer, weight=weight, bias=bias)

    return build


def _linear_builder(program: Program, values: dict[str, Any]) -> nn.Module | None:
    weight, bias = _constant(program, values["weight"]), _constant(program, values.get("bias"))
    if weight is None or weight.dim() != 2 or (bias is None) != (values.get("bias") is None):
        return None
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return _with_parameters(layer, weight=weight, bias=bias)


_BATCH_NORMS: dict[int, Any] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def _batch_norm_builder(program: Program, values: dict[str, Any]) -> nn.Module | None:
    names = ("running_mean", "running_var", "weight", "bias")
    mean, variance, weight, bias = (_constant(program, values.get(name)) for name in names)
    if mean is None or variance is None or values.get("training"):
        return None
    layer_type = _BATCH_NORMS.get(len(shape_of(values["input"]) or ()))
    if layer_type is None:
        return None
    layer = layer_type(mean.numel(), eps=float(values.get("eps", 1e-5)))
    layer.running_mean = mean.detach()
    layer.running_var = variance.detach()
    ones, zeros = torch.ones_like(mean), torch.zeros_like(mean)
    return _with_parameters(
        layer,
        weight=ones if weight is None else weight,
        bias=zeros if bias is None else bias,
    )


_CONV = "input weight bias stride padding dilation groups"
_TRANSPOSED = "input weight bias stride padding output_padding groups dilation"
_NORM = "input running_mean running_var weight bias training momentum eps"

_LAYERS: dict[Any, tuple[str, Builder]] = {
    F.conv1d: (_CONV, _conv_builder(nn.Conv1d)),
    F.conv2d: (_CONV, _conv_builder(nn.Conv2d)),
    F.conv3d: (_CONV, _conv_builder(nn.Conv3d)),
    F.conv_transpose1d: (_TRANSPOSED, _conv_builder(nn.ConvTranspose1d)),
    F.conv_transpose2d: (_TRANSPOSED, _conv_builder(nn.ConvTranspose2d)),
    F.conv_transpose3d: (_TRANSPOSED, _conv_builder(nn.ConvTranspose3d)),
    F.linear: ("input weight bias", _linear_builder),
    F.batch_norm: (_NORM, _batch_norm_builder),
}
"""The functions that become modules: the order of their arguments, and what builds the module."""
