"""The forward and backward pass of a network as one graph, to be printed and compared.

Autograd builds the backward pass while it runs and shows it to nobody. Here a step is traced ahead
of time: the loss is left out, the gradient of the output comes in, those of inputs and parameters
go out. Products are named by the layer they are of, so that two such graphs can be compared.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fxq.errors import CaptureError
from fxq.graph.ops import target_name
from fxq.quant.controller import Controller
from fxq.quant.learned_values import FollowedRange
from fxq.trail.snapshot import NodeRecord, Snapshot, value_text

GRADIENT = "output_gradient"

_ROLES = {
    "fxq.conv_fprop": "fprop",
    "fxq.conv_bprop": "bprop",
    "fxq.conv_wtgrad": "wtgrad",
    "fxq.matmul": "product",
    "aten.convolution": "fprop",
    "aten.convolution_backward": "backward",
    "aten.addmm": "fprop",
    "aten.mm": "product",
    "fxq.quantize": "quantizer",
}


def joint_graph(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """A step of a network: ``(parameters, inputs, output gradient) -> (output, gradients)``.

    The network is not touched. Controllers that never saw a tensor choose by these inputs; the
    others show the widths they have.

    Args:
        module: A network in train or eval mode, float or of a recipe that trains.
        inputs: One batch.

    Raises:
        CaptureError: The network has more outputs than one, or its step cannot be traced.
    """
    own = copy.deepcopy(module).train()
    output = own(*inputs)
    if not isinstance(output, Tensor):
        raise CaptureError(
            "the step of a network with several outputs cannot be shown",
            hint="wrap it in a module that gives one tensor",
        )
    output.sum().backward()  # type: ignore[no-untyped-call]
    for child in own.modules():
        if isinstance(child, Controller):
            child.is_watching = False
        if isinstance(child, FollowedRange):
            child.eval()
    trained = {n: p.detach() for n, p in own.named_parameters() if p.requires_grad}

    def step(
        parameters: dict[str, Tensor], batch: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        result = torch.func.functional_call(own, leaves, batch)
        found = torch.autograd.grad(result, list(leaves.values()), gradient, allow_unused=True)
        return result, dict(zip(leaves, found, strict=True))

    try:
        traced = make_fx(step)(trained, inputs, torch.ones_like(output))
    except (RuntimeError, NotImplementedError) as error:
        raise CaptureError(f"the step cannot be traced: {error}") from error
    _without_detach(traced.graph)
    _name(traced.graph, list(trained), len(inputs))
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def joint_snapshot(module: nn.Module, *inputs: Tensor) -> Snapshot:
    """The graph of a step, forward and backward, to be printed or compared with another.

    Raises:
        CaptureError: As `joint_graph`.

    Example:
        >>> step = joint_snapshot(nn.Linear(3, 2, bias=False), torch.ones(1, 3))
        >>> print(step.text())
        %weight = Input:f32[2,3]()
        %input = Input:f32[1,3]()
        %output_gradient = Input:f32[1,2]()
        %t = aten.t:f32[3,2](%weight)
        %weight_product = aten.mm:f32[1,2](%input, %t)
        %t_1 = aten.t:f32[2,1](%output_gradient)
        %product = aten.mm:f32[2,3](%t_1, %input)
        %t_2 = aten.t:f32[3,2](%product)
        %weight_gradient = aten.t:f32[2,3](%t_2)
        %output = Output(%weight_product, %weight_gradient)
    """
    graph = joint_graph(module, *inputs).graph
    return Snapshot(tuple(_record(node) for node in graph.nodes))


def _record(node: fx.Node) -> NodeRecord:
    value = node.meta.get("val")
    return NodeRecord(
        name=node.name,
        op={"placeholder": "Input", "output": "Output"}.get(node.op, _operator(node)),
        inputs=tuple(other.name for other in node.all_input_nodes),
        arguments=_arguments(node),
        value=value_text(value.dtype, value.shape) if isinstance(value, Tensor) else "",
    )


def _operator(node: fx.Node) -> str:
    if node.op == "get_attr":
        return "Constant"
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if packet is not None else target_name(node)


def _arguments(node: fx.Node) -> str:
    if node.op != "call_function":
        return ""
    if _operator(node) == "fxq.quantize":
        return f"{node.args[1]} bits of 2**{node.args[2]}"
    plain = [repr(value) for value in node.args if not _reads(value)]
    return ", ".join(plain)


def _reads(value: Any) -> bool:
    return value is None or any(isinstance(item, fx.Node) for item in pytree.tree_leaves(value))


def _without_detach(graph: fx.Graph) -> None:
    """What autograd detaches is the same tensor."""
    for node in list(graph.nodes):
        if node.op == "call_function" and _operator(node) == "aten.detach":
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


# ---- names -----------------------------------------------------------------------------------


def _name(graph: fx.Graph, parameters: list[str], inputs: int) -> None:
    """Nodes are named by what they are: parameters, products of a layer, and its quantizers."""
    taken: Counter[str] = Counter()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    batch = ["input"] if inputs == 1 else [f"input_{i + 1}" for i in range(inputs)]
    origin: dict[fx.Node, str] = {}
    names = [*(_plain(name) for name in parameters), *batch, GRADIENT]
    wanted = dict(zip(placeholders, names, strict=True))
    for node, name in zip(placeholders, parameters, strict=False):
        origin[node] = _layer(name)
    for node in graph.nodes:
        if node not in wanted and node.op == "call_function":
            wanted[node] = _wanted(node, origin)
    (output,) = (node for node in graph.nodes if node.op == "output")
    found = pytree.tree_leaves(output.args)[1:]
    for node, name in zip(found, parameters, strict=True):
        if isinstance(node, fx.Node) and node in wanted and node.op != "placeholder":
            wanted[node] = f"{_plain(name)}_gradient"
            _name_reader(node, _layer(name), wanted)
    for node in graph.nodes:
        name = wanted.get(node, node.name)
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name] - 1}"


def _wanted(node: fx.Node, origin: dict[fx.Node, str]) -> str:
    """A node's name: by the layer whose weights it reads, directly or as codes."""
    known = {origin[other] for other in node.all_input_nodes if other in origin}
    operator = _operator(node)
    is_view = operator in ("aten.t", "aten.transpose", "aten.view", "aten.select", "aten.unsqueeze")
    if len(known) == 1 and (operator == "fxq.quantize" or is_view):
        origin[node] = next(iter(known))
    role = _ROLES.get(operator)
    if role is not None and len(known) == 1:
        layer = next(iter(known))
        return f"{layer}_weight_quantizer" if role == "quantizer" else f"{layer}_{role}"
    return role or operator.rpartition(".")[2]


def _name_reader(node: fx.Node, layer: str, wanted: dict[fx.Node, str]) -> None:
    """What a weight gradient was made of: the gradient's quantizer and that of the input."""
    if _operator(node) not in ("fxq.conv_wtgrad", "fxq.matmul"):
        return
    wanted[node] = f"{layer}_wtgrad"
    for other in node.all_input_nodes:
        source = other if _operator(other) == "fxq.quantize" else _first(other)
        if source is not None and _operator(source) == "fxq.quantize":
            is_gradient = _is_after(source, wanted)
            wanted[source] = f"{layer}_{'gradient' if is_gradient else 'input'}_quantizer"


def _first(node: fx.Node) -> fx.Node | None:
    return node.all_input_nodes[0] if node.all_input_nodes else None


def _is_after(node: fx.Node, wanted: dict[fx.Node, str]) -> bool:
    """Whether the gradient of the output has a part in a value."""
    seen, todo = set[fx.Node](), [node]
    while todo:
        one = todo.pop()
        if wanted.get(one) == GRADIENT:
            return True
        if one not in seen:
            seen.add(one)
            todo += one.all_input_nodes
    return False


def _plain(name: str) -> str:
    """A name of a node, from that of a parameter."""
    path = re.sub(r"\W", "_", re.sub(r"(^|\.)(network|layer)\.", r"\1", name))
    return f"_{path}" if path[0].isdigit() else path


def _layer(name: str) -> str:
    """The layer that a parameter is of; the parameter itself where it stands alone."""
    return _plain(name).removesuffix("_weight").removesuffix("_bias")
