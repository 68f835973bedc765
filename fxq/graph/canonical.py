"""One spelling for what models write in several ways, applied once at capture.

* An in-place operator becomes its out-of-place form, and later readers of the overwritten value
  read the result, as they did when the model ran.
* ``F.conv2d(x, self.weight)`` and its kin with constant weights become modules, so that every pass
  meets one form.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxq.errors import CaptureError
from fxq.graph.program import Program, facts, layer_path, recompile, write_facts

_VIEWS = frozenset("view reshape permute transpose chunk split narrow select unbind t".split())


def canonicalize(program: Program) -> None:
    """No node of the program works in place, and constant-weight layers are modules.

    Raises:
        CaptureError: An in-place operator writes through a view that is read again later.
    """
    for node in program.nodes():
        _out_of_place(program, node)
    for node in program.nodes():
        builder = _LAYERS.get(node.target) if node.op == "call_function" else None
        if builder is not None:
            _as_module(program, node, builder)
    recompile(program)


# ---- in-place --------------------------------------------------------------------------------

_INPLACE_FUNCTIONS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    F.relu_: F.relu,
    torch.relu_: torch.relu,
    F.hardtanh_: F.hardtanh,
    F.elu_: F.elu,
    F.leaky_relu_: F.leaky_relu,
    torch.dropout_: torch.dropout,
}


def _out_of_place(program: Program, node: fx.Node) -> None:
    if not _works_in_place(program, node):
        return
    source = node.args[0] if node.args else node.kwargs.get("input")
    _clear_in_place(program, node)
    if not isinstance(source, fx.Node) or facts(source).shape is None:
        return
    _refuse_view(node, source)
    order = {other: position for position, other in enumerate(program.graph.nodes)}
    later = [user for user in source.users if order[user] > order[node]]
    for user in later:
        user.replace_input_with(source, node)


def _works_in_place(program: Program, node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _INPLACE_FUNCTIONS or bool(node.kwargs.get("inplace"))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.startswith("_")
    module = program.submodule(node)
    return bool(getattr(module, "inplace", False))


def _clear_in_place(program: Program, node: fx.Node) -> None:
    if node.op == "call_function":
        node.target = _INPLACE_FUNCTIONS.get(node.target, node.target)
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}
    elif node.op == "call_method":
        name = str(node.target).removesuffix("_")
        if not hasattr(torch.Tensor, name):
            raise CaptureError(
                f"the in-place method {node.target} has no out-of-place form",
                where=f"%{node.name} in {layer_path(node)}",
                hint="write the value into a new tensor",
            )
        node.target = name
    else:
        module = program.submodule(node)
        assert module is not None
        module.inplace = False  # type: ignore[assignment]


def _refuse_view(node: fx.Node, source: fx.Node) -> None:
    """A write through a view also changes the tensor behind it; refuse when that is read again."""
    is_view = str(getattr(source.target, "__name__", source.target)) in _VIEWS | {"getitem"}
    base = source.all_input_nodes[0] if is_view and source.all_input_nodes else None
    if base is not None and len(base.users) > 1 and facts(base).shape is not None:
        raise CaptureError(
            f"in-place {getattr(node.target, '__name__', node.target)} writes through a view of "
            f"%{base.name}, which is read again",
            where=f"%{node.name} in {layer_path(node)}",
            hint="use the out-of-place operator",
        )


# ---- functional layers -----------------------------------------------------------------------


def _constant(program: Program, value: Any) -> torch.Tensor | None:
    """The tensor a ``get_attr`` node reads; None for a value computed in the graph."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found: Any = program.module
    for part in str(value.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, torch.Tensor) else None


def _as_module(
    program: Program, node: fx.Node, builder: Callable[[Program, dict[str, Any]], nn.Module | None]
) -> None:
    arguments = node.normalized_arguments(program.module, normalize_to_only_use_kwargs=True)
    if arguments is None or not isinstance(arguments.kwargs.get("input"), fx.Node):
        return
    values = dict(arguments.kwargs)
    layer = builder(program, values)
    if layer is None:
        return
    name = f"{node.name}_layer" if hasattr(program.module, node.name) else node.name
    program.module.add_submodule(name, layer.eval())
    with program.graph.inserting_after(node):
        call = program.graph.call_module(name, (values["input"],))
    call.meta = dict(node.meta)
    write_facts(call, path=facts(node).path or name)
    node.replace_all_uses_with(call)
    program.graph.erase_node(node)


def _with_parameters(layer: nn.Module, **tensors: torch.Tensor | None) -> nn.Module:
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(layer, name, nn.Parameter(tensor.detach(), requires_grad=False))
    return layer


def _conv_builder(
    layer_type: Any,
) -> Callable[[Program, dict[str, Any]], nn.Module | None]:
    def build(program: Program, values: dict[str, Any]) -> nn.Module | None:
        weight, bias = _constant(program, values["weight"]), _constant(program, values["bias"])
        if weight is None or (bias is None) != (values["bias"] is None):
            return None
        groups = int(values.get("groups", 1))
        transposed = "Transpose" in layer_type.__name__
        channels = (weight.shape[0], weight.shape[1] * groups)
        inputs, outputs = channels if transposed else (channels[1], channels[0])
        options = {
            key: values[key]
            for key in ("stride", "padding", "dilation", "output_padding")
            if key in values
        }
        with torch.device("meta"):
            layer = layer_type(
                inputs,
                outputs,
                tuple(weight.shape[2:]),
                groups=groups,
                bias=bias is not None,
                **options,
            )
        return _with_parameters(layer, weight=weight, bias=bias)

    return build


def _linear_builder(program: Program, values: dict[str, Any]) -> nn.Module | None:
    weight, bias = _constant(program, values["weight"]), _constant(program, values.get("bias"))
    if weight is None or weight.dim() != 2 or (bias is None) != (values.get("bias") is None):
        return None
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return _with_parameters(layer, weight=weight, bias=bias)


def _batch_norm_builder(program: Program, values: dict[str, Any]) -> nn.Module | None:
    mean = _constant(program, values["running_mean"])
    variance = _constant(program, values["running_var"])
    weight, bias = _constant(program, values["weight"]), _constant(program, values["bias"])
    if mean is None or variance is None or values.get("training"):
        return None
    layer = nn.BatchNorm2d(mean.numel(), eps=float(values["eps"]), affine=True)
    layer._check_input_dim = lambda input: None  # type: ignore[method-assign]
    layer.running_mean = mean.detach()
    layer.running_var = variance.detach()
    ones, zeros = torch.ones_like(mean), torch.zeros_like(mean)
    return _with_parameters(
        layer,
        weight=ones if weight is None else weight,
        bias=zeros if bias is None else bias,
    )


_LAYERS: dict[Any, Callable[[Program, dict[str, Any]], nn.Module | None]] = {
    F.conv1d: _conv_builder(nn.Conv1d),
    F.conv2d: _conv_builder(nn.Conv2d),
    F.conv3d: _conv_builder(nn.Conv3d),
    F.conv_transpose1d: _conv_builder(nn.ConvTranspose1d),
    F.conv_transpose2d: _conv_builder(nn.ConvTranspose2d),
    F.conv_transpose3d: _conv_builder(nn.ConvTranspose3d),
    F.linear: _linear_builder,
    F.batch_norm: _batch_norm_builder,
}
