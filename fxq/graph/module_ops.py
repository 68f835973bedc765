"""The module spellings of the operators fxq knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from fxq.graph.op import Kind, Op, adaptive, bounded_relu, first_input, other, pool

CONV_MODULES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
BATCH_NORM_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def describe_module(node: fx.Node, module: nn.Module) -> Op:
    """The operator a module call computes."""
    own = getattr(module, "fxq_kind", None)
    if isinstance(own, str):
        return Op(Kind(own), first_input(node), module=module)
    for types, rule in _MODULE_RULES if _computes_what_it_is(module) else ():
        if isinstance(module, types):
            op = rule(node, module)
            return Op(op.kind, op.inputs, op.attributes, module, op.reason)
    if is_frozen_batch_norm(module):
        return Op(Kind.BATCH_NORM, first_input(node), module=module)
    inputs = tuple(node.all_input_nodes)
    return Op(Kind.OTHER, inputs, module=module, reason=f"no integer {type(module).__name__}")


def _computes_what_it_is(module: nn.Module) -> bool:
    """Whether a module computes what its torch.nn class does: no user's forward, and no hooks."""
    hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
    return type(module).forward.__module__.startswith("torch.nn") and not hooks


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a FrozenBatchNorm2d of torchvision or of a detection library."""
    return type(module).__name__ == "FrozenBatchNorm2d" and hasattr(module, "running_var")


def _simple(kind: Kind) -> Callable[[fx.Node, Any], Op]:
    return lambda node, module: Op(kind, first_input(node))


def _hardtanh(node: fx.Node, module: nn.Hardtanh) -> Op:
    return bounded_relu(node, module.min_val, module.max_val)


def _max_pool_module(node: fx.Node, module: nn.MaxPool2d) -> Op:
    if module.return_indices:
        return other(node, "max pool that returns indices")
    return pool(
        node,
        Kind.MAX_POOL,
        kernel_size=module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        ceil_mode=module.ceil_mode,
    )


def _avg_pool_module(node: fx.Node, module: nn.AvgPool2d) -> Op:
    return pool(
        node,
        Kind.AVG_POOL,
        kernel_size=module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        ceil_mode=module.ceil_mode,
        count_include_pad=module.count_include_pad,
        divisor_override=module.divisor_override,
    )


def _adaptive_module(node: fx.Node, module: nn.AdaptiveAvgPool2d) -> Op:
    return adaptive(node, module.output_size)


def _zero_pad_module(node: fx.Node, module: nn.ZeroPad2d) -> Op:
    return Op(Kind.PAD, first_input(node), {"pad": tuple(module.padding)})


def _flatten_module(node: fx.Node, module: nn.Flatten) -> Op:
    arguments = (module.start_dim, module.end_dim)
    return Op(Kind.RESHAPE, first_input(node), {"call": "flatten", "arguments": arguments})


def _unflatten_module(node: fx.Node, module: nn.Unflatten) -> Op:
    arguments = (module.dim, tuple(module.unflattened_size))
    return Op(Kind.RESHAPE, first_input(node), {"call": "unflatten", "arguments": arguments})


def _pixel_shuffle_module(node: fx.Node, module: Any) -> Op:
    name = "pixel_shuffle" if isinstance(module, nn.PixelShuffle) else "pixel_unshuffle"
    factor = getattr(module, "upscale_factor", None) or module.downscale_factor
    return Op(Kind.RESHAPE, first_input(node), {"call": name, "arguments": (factor,)})


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
