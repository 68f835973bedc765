"""What a model's submodules are called with: recorded while the model runs as it was written."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxq.errors import CaptureError, FxqError
from fxq.graph.trace_error import class_place

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.Size)


@dataclass(frozen=True)
class Arguments:
    """How a submodule is called: which arguments are tensors, and what the others are.

    Attributes:
        tensors: Names of the arguments that are tensors, in the order of ``forward``.
        fixed: The others, which are the same in every call.
    """

    tensors: tuple[str, ...]
    fixed: Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of a submodule.

    Attributes:
        bound: Every argument by name, defaults included.
        output: What it returned; None where that was not recorded.
    """

    bound: Mapping[str, Any]
    output: Any = None

    def arguments(self) -> Arguments:
        """The tensors among the arguments, and the rest.

        Raises:
            CaptureError: An argument is neither a tensor nor a plain value.
        """
        tensors, fixed = [], {}
        for name, value in self.bound.items():
            if isinstance(value, Tensor):
                tensors.append(name)
            elif _is_plain(value):
                fixed[name] = value
            else:
                raise CaptureError(
                    f"its argument {name} is a {type(value).__name__}",
                    hint="give its modules one tensor each, and they become parts of their own",
                )
        return Arguments(tuple(tensors), fixed)

    def tensors(self, names: Iterable[str]) -> tuple[Tensor, ...]:
        """The tensors of these names."""
        return tuple(self.bound[name] for name in names)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)


def bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
    """Every argument of a call by name, defaults included.

    Raises:
        CaptureError: ``forward`` takes any number of arguments, so that they have no names.
    """
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(one.kind in kinds for one in signature.parameters.values()):
        raise CaptureError(
            "its forward takes any number of arguments",
            hint="write out the arguments of its forward",
        )
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What the model computes, without gradients.

    Raises:
        CaptureError: It fails.
    """
    try:
        with torch.no_grad():
            return model(*inputs)
    except FxqError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} fails on its inputs: {type(error).__name__}: {error}",
            where=class_place(type(model)),
            hint="a batch is a tensor, or a tuple with one entry per argument of forward",
        ) from error


def counted(model: nn.Module, inputs: tuple[Any, ...]) -> dict[nn.Module, int]:
    """How often each submodule is called when the model runs."""
    counts: dict[nn.Module, int] = dict.fromkeys(model.modules(), 0)

    def count(module: nn.Module, _args: Any) -> None:
        counts[module] += 1

    with hooked(module.register_forward_pre_hook(count) for module in counts):
        run(model, inputs)
    return counts


def recorded(
    model: nn.Module, inputs: tuple[Any, ...], module: nn.Module, count: int
) -> list[Call]:
    """The first so many calls of a submodule when the model runs; it runs no further.

    Raises:
        CaptureError: The model fails, or ``forward`` takes any number of arguments.
    """
    calls: list[Call] = []
    signature = inspect.signature(module.forward)

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        # Copies: a later operator may write into what was passed.
        bound = bind(signature, args, kwargs)
        calls.append(Call({name: _copied(value) for name, value in bound.items()}))

    def after(_module: nn.Module, _args: Any, result: Any) -> None:
        calls[-1] = Call(calls[-1].bound, _copied(result))
        if len(calls) == count:
            raise _Enough

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    with hooked(handles), contextlib.suppress(_Enough):
        run(model, inputs)
    return calls


class _Enough(BaseException):
    """Ends a run; no ``except Exception`` of the model's own catches it."""


def _copied(value: Any) -> Any:
    copied: Any = pytree.tree_map_only(Tensor, Tensor.clone, value)
    return copied


@contextlib.contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Hooks that are gone when the body ends."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()
