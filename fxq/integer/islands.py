"""What a float instruction calls: an operator of the list, a module as data, or foreign code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxq.integer.float_ops import call_any_method, describe_module, method_allowed, target_of
from fxq.quant.quantizers import QuantizedLayer


@dataclass(frozen=True)
class FloatCall:
    """The callee of a float instruction.

    Attributes:
        op: ``float`` or ``module``.
        attributes: The target or the description of the module.
        tensors: The tensors of the module, by their name in it.
        foreign: Code of the user's own, where it is neither.
    """

    op: str
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    foreign: Callable[..., Any] | None = None


def float_call(node: fx.Node, module: nn.Module | None) -> FloatCall:
    """What a node calls; a quantized layer that stays in float is called as it was."""
    if node.op == "call_module":
        assert module is not None
        return _module_call(module.layer if isinstance(module, QuantizedLayer) else module)
    if node.op == "call_method":
        return _method_call(str(node.target))
    target = target_of(node.target)
    if target is None:
        return FloatCall("float", foreign=node.target)  # type: ignore[arg-type]
    return FloatCall("float", {"target": target})


def _module_call(module: nn.Module) -> FloatCall:
    described = describe_module(module)
    if described is None:
        return FloatCall("module", foreign=module)
    return FloatCall("module", {"module": described[0]}, described[1])


def _method_call(name: str) -> FloatCall:
    if method_allowed(name):
        return FloatCall("float", {"target": f"method.{name}"})
    return FloatCall("float", foreign=functools.partial(call_any_method, name))
