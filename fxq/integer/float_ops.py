"""Float islands: the PyTorch operators and modules an artifact may name, and nothing else.

Loading an artifact must not run code from it. A float instruction therefore names an operator of a
closed list (pure tensor functions and methods of PyTorch, operators of Python, and three functions
of torchvision), or a module class of ``torch.nn`` rebuilt from plain attributes and tensors.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxq.errors import ArtifactError

_OPERATORS = frozenset(
    [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "neg",
        "pos",
        "abs",
        "matmul",
        "getitem",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "and_",
        "or_",
        "xor",
        "invert",
        "not_",
        "lshift",
        "rshift",
        "iadd",
        "isub",
        "imul",
        "itruediv",
    ]
)
_NO_TORCH = frozenset(
    [
        "from_file",
        "set_num_threads",
        "manual_seed",
        "save",
        "load",
        "compile",
        "import_ir_module",
        "frombuffer",
        "init_num_threads",
    ]
)
_NO_METHODS = frozenset(
    [
        "apply_",
        "map_",
        "map2_",
        "backward",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "share_memory_",
        "set_",
        "storage",
        "untyped_storage",
        "numpy",
        "retain_grad",
        "requires_grad_",
        "resize_",
        "resize_as_",
        "data_ptr",
        "const_data_ptr",
        "module_load",
        "record_stream",
    ]
)
_NO_FUNCTIONAL = frozenset(["boolean_dispatch", "assert_int_or_pair"])
_ATTRIBUTES = frozenset(
    ["shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "real", "imag", "data", "is_cuda"]
)
_TORCHVISION = {
    "torchvision.models.swin_transformer": {
        "shifted_window_attention",
        "shifted_window_attention_v2",
        "_get_relative_position_bias",
        "_patch_merging_pad",
    },
    "torchvision.ops.stochastic_depth": {"stochastic_depth"},
    "torchvision.models.maxvit": {"_get_relative_position_index"},
}


def target_of(function: Any) -> str | None:
    """The stored name of an operator; None where it is not on the list.

    Example:
        >>> target_of(torch.add), target_of(F.gelu), target_of(operator.getitem), target_of(eval)
        ('torch.add', 'functional.gelu', 'operator.getitem', None)
    """
    name = str(getattr(function, "__name__", ""))
    if name == "getattr" and function is getattr:
        return "builtin.getattr"
    for prefix, resolve in _FAMILIES.items():
        if resolve(name) is function and function is not None:
            return f"{prefix}.{name}"
    module = str(getattr(function, "__module__", ""))
    if name in _TORCHVISION.get(module, ()):
        return f"{module}.{name}"
    for prefix, owner in (("functional", F), ("torch", torch)):
        for alias in _aliases(owner, function):
            if _FAMILIES[prefix](alias) is function:
                return f"{prefix}.{alias}"
    return None


def resolve(target: str) -> Callable[..., Any]:
    """The operator of that stored name.

    Raises:
        ArtifactError: It is not on the list.
    """
    prefix, _, name = target.rpartition(".")
    found: Any = None
    if prefix in _FAMILIES:
        found = _FAMILIES[prefix](name)
    elif prefix == "method" and method_allowed(name):
        found = functools.partial(call_method, name)
    elif name in _TORCHVISION.get(prefix, ()):
        from fxq.torchvision_import import import_torchvision

        import_torchvision()
        found = getattr(importlib.import_module(prefix), name, None)
    elif target == "builtin.getattr":
        found = _plain_getattr
    if not callable(found):
        raise ArtifactError(
            f"the artifact names {target!r}, which is not an operator it may use",
            hint="it was changed, or saved by a newer fxq",
        )
    result: Callable[..., Any] = found
    return result


def method_allowed(name: str) -> bool:
    """Whether an artifact may call a tensor method."""
    return (
        name.isidentifier()
        and not name.startswith("_")
        and name not in _NO_METHODS
        and callable(getattr(torch.Tensor, name, None))
    )


def call_method(name: str, *args: Any, **kwargs: Any) -> Any:
    """The result of a tensor method of the list."""
    if not method_allowed(name) or not isinstance(args[0], (torch.Tensor, torch.Size)):
        raise ArtifactError(f"the artifact calls {name!r}, which is not a method it may use")
    return call_any_method(name, *args, **kwargs)


def call_any_method(name: str, *args: Any, **kwargs: Any) -> Any:
    """The result of a method of the first argument; never what an artifact names."""
    return getattr(args[0], name)(*args[1:], **kwargs)


def _plain_getattr(value: Any, name: str) -> Any:
    if name not in _ATTRIBUTES:
        raise ArtifactError(f"the artifact reads the attribute {name!r}, which it may not")
    return getattr(value, name)


def _from_operator(name: str) -> Any:
    return getattr(operator, name, None) if name in _OPERATORS else None


def _from_torch(name: str) -> Any:
    if name.startswith("_") or name in _NO_TORCH:
        return None
    if name not in dir(torch._C._VariableFunctions) and name not in ("einsum", "meshgrid", "split"):
        return None
    return getattr(torch, name, None)


def _from_functional(name: str) -> Any:
    found = getattr(F, name, None)
    own = getattr(found, "__module__", "") in (
        "torch.nn.functional",
        "torch._C._nn",
        "torch._jit_internal",
    )
    is_native = found is not None and (
        found is getattr(torch._C._nn, name, None) or found is getattr(torch, name, None)
    )
    allowed = not name.startswith("_") and name not in _NO_FUNCTIONAL
    return found if allowed and not isinstance(found, type) and (own or is_native) else None


_FAMILIES: dict[str, Callable[[str], Any]] = {
    "operator": _from_operator,
    "functional": _from_functional,
    "torch": _from_torch,
}


def _aliases(owner: Any, function: Any) -> list[str]:
    """Other names a function goes by (``F.max_pool2d`` is called ``fn``)."""
    return [name for name, value in vars(owner).items() if value is function]


# ---- modules ---------------------------------------------------------------------------------

_PLAIN = (bool, int, float, str, type(None))
_OWN = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DERIVED = frozenset(["_flat_weights", "_flat_weight_refs"])  # of recurrent modules


def describe_module(module: nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """A ``torch.nn`` module as plain data and tensors; None where it is not one, or holds more.

    Returns:
        The description and the tensors it refers to, by their name in the module.
    """
    description = _describe(module)
    if description is None:
        return None
    parameters = module.named_parameters(remove_duplicate=False)
    tensors = {name: value.detach() for name, value in parameters}
    return description, tensors | dict(module.named_buffers(remove_duplicate=False))


def _describe(module: nn.Module) -> dict[str, Any] | None:
    kind = type(module)
    if class_of(f"{kind.__module__}.{kind.__qualname__}") is not kind:
        return None
    modules = {name: child for name, child in module._modules.items() if child is not None}
    children = {name: _describe(child) for name, child in modules.items()}
    names = vars(module).keys() - _OWN - _DERIVED
    attributes = {name: value for name, value in vars(module).items() if name in names}
    hooked = any(getattr(module, name) for name in _HOOKS)
    if hooked or None in children.values() or not _is_plain(list(attributes.values())):
        return None
    slots = (module._parameters, module._buffers, module._modules)
    empty = [name for slot in slots for name, value in slot.items() if value is None]
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "attributes": attributes,
        "children": children,
        "empty": empty,
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def class_of(path: str) -> type[nn.Module] | None:
    """The module class of that path, if it is one of ``torch.nn``'s."""
    module_name, _, name = path.rpartition(".")
    if not module_name.startswith("torch.nn.modules.") or not name.isidentifier():
        return None
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ImportError:
        return None
    is_module = isinstance(found, type) and issubclass(found, nn.Module)
    return found if is_module and found.__module__ == module_name else None


def build_module(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The module that `describe_module` described, in eval mode.

    Raises:
        ArtifactError: The description names a class that is not of ``torch.nn``.
    """
    kind = class_of(str(description["class"]))
    if kind is None:
        raise ArtifactError(
            f"the artifact names the module {description['class']!r}, which it may not use"
        )
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    _set_attributes(module, description["attributes"])
    for name in description["empty"]:
        module.register_parameter(name, None)
    for name, child in description["children"].items():
        prefix = f"{name}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        module.add_module(name, build_module(child, own))
    for name, tensor in tensors.items():
        if "." not in name:
            _set_tensor(module, name, tensor)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
    module.training = False
    return module


def _set_attributes(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        known = not str(name).isidentifier() or str(name).startswith("__") or name in _OWN
        if known or not _is_plain(value) or callable(getattr(module, name, None)):
            raise ArtifactError(f"the artifact sets the attribute {name!r}, which it may not")
        module.__dict__[name] = value


def _set_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(name, tensor)
