"""Capture: a model becomes a `Program`, or a `CaptureError` that says which line is in the way.

The user's module is copied once and never touched. The copy is traced symbolically in eval mode and
brought to one spelling: in-place operators become out-of-place, functional convolutions, linears
and batch norms with constant weights become modules. Shapes are then propagated by running the
example once.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from fxq.errors import CaptureError, nearest_hint
from fxq.graph.canonical import canonicalize
from fxq.graph.exported import as_module, is_exported, respelled
from fxq.graph.in_place import IN_PLACE_OPERATORS
from fxq.graph.ops import is_frozen_batch_norm
from fxq.graph.program import Program, write_facts
from fxq.graph.shapes import propagate_shapes
from fxq.graph.trace_error import class_place, explain_trace_failure, traced_line

ExampleInputs = torch.Tensor | Sequence[Any]


class _Proxy(fx.Proxy):
    """A traced value that records ``y += x`` as the write it is; fx would record ``y = y + x``."""


def _recorder(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    name = IN_PLACE_OPERATORS[function].__name__
    return lambda self, value: self.tracer.create_proxy(
        "call_function", function, (self, value), {}, name
    )


for _function in IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_function.__name__}__", _recorder(_function))


class _Tracer(fx.Tracer):
    """Traces into everything except torch.nn modules, frozen batch norms and the user's leaves."""

    def __init__(self, leaves: tuple[type[nn.Module] | str, ...], fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self._fixed = fixed
        self._leaf_types = tuple(leaf for leaf in leaves if isinstance(leaf, type))
        self._leaf_names = frozenset(leaf for leaf in leaves if isinstance(leaf, str))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The value a node stands for while tracing."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one node of the graph."""
        if isinstance(m, self._leaf_types) or type(m).__name__ in self._leaf_names:
            return True
        if module_qualified_name in self._leaf_names or is_frozen_batch_norm(m):
            return True
        if type(m).__module__.startswith("fxq.quant"):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The arguments ``forward`` is traced with: proxies, and the fixed values as they are."""
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        for position, proxy in enumerate(arguments):
            if isinstance(proxy, fx.Proxy) and proxy.node.target in self._fixed:
                arguments[position] = self._fixed[str(proxy.node.target)]
                self.graph.erase_node(proxy.node)
        return function, arguments


def capture(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    concrete_args: Mapping[str, Any] | None = None,
) -> Program:
    """A `Program` that computes what the model computes in eval mode.

    Args:
        model: The model, or the program that `torch.export` made of it; it is copied, and stays as
            it is.
        example_inputs: One batch: a tensor, or a tuple with one entry per positional argument.
        leaf_modules: Module classes, class names or qualified names that stay one node each.
        concrete_args: Arguments of ``forward`` fixed to these values while tracing.

    Raises:
        CaptureError: The model is not a module, cannot be traced symbolically (the error names
            file, line, construct and remedy), or fails on the example.

    Example:
        >>> program = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.zeros(1, 3, 8, 8))
        >>> [node.name for node in program.nodes()]
        ['input_1', '_0', '_1', 'output']
    """
    model = as_module(model)
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"a model must be a torch.nn.Module, not {type(model).__name__}",
            hint="pass the module itself, not its state dict or its class",
        )
    inputs = as_inputs(example_inputs)
    fixed = _fixed_arguments(model, inputs, dict(concrete_args or {}))
    copied = copied_for_inference(model)
    tracer = _Tracer(tuple(leaf_modules), fixed)
    traced = _trace(copied, tracer)
    _name_paths(traced)
    program = Program(traced, inputs)
    try:
        canonicalize(program)
        propagate_shapes(program)
    except CaptureError as error:
        _add_line(error, copied, tracer)
        raise
    return program


def as_inputs(example_inputs: ExampleInputs) -> tuple[Any, ...]:
    """Example inputs as a tuple of arguments."""
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs)
    raise CaptureError(
        f"example inputs must be a tensor or a tuple of arguments, not "
        f"{type(example_inputs).__name__}",
        hint="for an image network: torch.zeros(1, 3, 224, 224)",
    )


def copied_for_inference(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode, its parametrized weights plain ones.

    Raises:
        CaptureError: It cannot be copied.
    """
    try:
        copied = copy.deepcopy(model).eval()
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied: {error}",
            where=f"{_uncopyable(model)}; {class_place(type(model))}",
            hint="keep open files, locks and non-leaf tensors out of the module's attributes",
        ) from error
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            _drop_parametrizations(module)
    return copied


def _drop_parametrizations(module: Any) -> None:
    """Weight norm and its kin become plain weights; torch's own removal changes a shared class."""
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _uncopyable(model: nn.Module) -> str:
    """The attribute that cannot be copied."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                copy.deepcopy(value) if name != "_modules" else None
            except Exception:
                return f"attribute {'.'.join(filter(None, (path, name)))}"
    return type(model).__name__


def _fixed_arguments(
    model: nn.Module, inputs: tuple[Any, ...], concrete_args: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of ``forward`` that are constants: the user's, and defaults no example replaces."""
    parameters = inspect.signature(model.forward).parameters
    kinds = inspect.Parameter
    variable = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    named = {name: one for name, one in parameters.items() if one.kind not in variable}
    for name in concrete_args:
        if name not in named:
            raise CaptureError(
                f"forward of {type(model).__name__} has no argument {name!r} to fix",
                hint=nearest_hint(name, sorted(named)),
            )
    free = [name for name in named if name not in concrete_args]
    places = [name for name in free if named[name].kind is not kinds.KEYWORD_ONLY]
    left = [name for name in free if name not in places[: len(inputs)]]
    defaults = {
        name: named[name].default for name in left if named[name].default is not kinds.empty
    }
    missing = [name for name in left if name not in defaults]
    if missing or (len(inputs) > len(places) and len(named) == len(parameters)):
        raise _wrong_count(model, places, missing, len(inputs))
    return {**defaults, **concrete_args}


def _wrong_count(
    model: nn.Module, places: list[str], missing: list[str], count: int
) -> CaptureError:
    has = f"leaves out {', '.join(missing)}" if missing else f"has {count} entries"
    return CaptureError(
        f"forward takes ({', '.join(places)}), the example {has}",
        where=class_place(type(model)),
        hint="give a tuple with one entry per argument, or fix some with concrete_args",
    )


def _trace(model: nn.Module, tracer: _Tracer) -> fx.GraphModule:
    if isinstance(model, fx.GraphModule) and is_exported(model):
        return respelled(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a forward warns about while traced is not news
            graph = tracer.trace(model)
    except Exception as error:
        raise explain_trace_failure(error, model) from error
    return fx.GraphModule(tracer.root, graph, type(model).__name__)


def _add_line(error: CaptureError, model: nn.Module, tracer: _Tracer) -> None:
    """The error says which line of the user's code made its node; tracing again finds it."""
    tracer.record_stack_traces = True
    for node in _trace(model, tracer).graph.nodes:
        line = traced_line(node.stack_trace) if node.name == error.node else None
        if line is not None:
            error.where = f"{line} ({error.where})"


def _name_paths(traced: fx.GraphModule) -> None:
    for node in traced.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        innermost = next(reversed(stack.values()), ("",)) if stack else ("",)
        path = innermost[0] if isinstance(innermost, tuple) else str(innermost)
        write_facts(node, path=str(node.target) if node.op == "call_module" else path)
