"""Capture: a model becomes a `Program`, or a `CaptureError` that says which line is in the way.

The user's module is copied once and never touched. The copy is traced symbolically in eval mode and
brought to one spelling: in-place operators become out-of-place, functional convolutions, linears
and batch norms with constant weights become modules. Shapes are then propagated by running the
example once.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxq.errors import CaptureError
from fxq.graph.canonical import canonicalize
from fxq.graph.ops import is_frozen_batch_norm
from fxq.graph.program import Facts, Program, write_facts
from fxq.graph.trace_error import explain_trace_failure

ExampleInputs = torch.Tensor | Sequence[Any]


class _Tracer(fx.Tracer):
    """Traces into everything except torch.nn modules, frozen batch norms and the user's leaves."""

    def __init__(self, leaves: tuple[type[nn.Module] | str, ...]) -> None:
        super().__init__()
        self._leaf_types = tuple(leaf for leaf in leaves if isinstance(leaf, type))
        self._leaf_names = frozenset(leaf for leaf in leaves if isinstance(leaf, str))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one node of the graph."""
        if isinstance(m, self._leaf_types) or type(m).__name__ in self._leaf_names:
            return True
        if module_qualified_name in self._leaf_names or is_frozen_batch_norm(m):
            return True
        if type(m).__module__.startswith("fxq.quant"):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def capture(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    concrete_args: Mapping[str, Any] | None = None,
) -> Program:
    """A `Program` that computes what the model computes in eval mode.

    Args:
        model: The model; it is copied, and stays as it is.
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
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"a model must be a torch.nn.Module, not {type(model).__name__}",
            hint="pass the module itself, not its state dict or its class",
        )
    inputs = as_inputs(example_inputs)
    traced = _trace(_copied(model), tuple(leaf_modules), concrete_args)
    _name_paths(traced)
    program = Program(traced, inputs)
    propagate_shapes(program)
    canonicalize(program)
    propagate_shapes(program)
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


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied: {error}",
            where=type(model).__name__,
            hint="keep open files, locks and non-leaf tensors out of the module's attributes",
        ) from error


def _trace(
    model: nn.Module,
    leaves: tuple[type[nn.Module] | str, ...],
    concrete_args: Mapping[str, Any] | None,
) -> fx.GraphModule:
    tracer = _Tracer(leaves)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a forward warns about while traced is not news
            graph = tracer.trace(model, dict(concrete_args) if concrete_args else None)
    except Exception as error:
        raise explain_trace_failure(error, model) from error
    traced = fx.GraphModule(tracer.root, graph, type(model).__name__)
    _drop_concrete_placeholders(traced, concrete_args)
    return traced


def _drop_concrete_placeholders(
    traced: fx.GraphModule, concrete_args: Mapping[str, Any] | None
) -> None:
    """Remove the inputs that were fixed: they are constants now."""
    for node in list(traced.graph.nodes):
        if node.op != "placeholder":
            continue
        if concrete_args and any(node.name.startswith(name) for name in concrete_args):
            for user in list(node.users):
                if not user.users:
                    traced.graph.erase_node(user)
        is_optional = bool(node.args)  # a default value, never supplied by the example
        if not node.users and (is_optional or concrete_args):
            traced.graph.erase_node(node)
    traced.recompile()


def _name_paths(traced: fx.GraphModule) -> None:
    for node in traced.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        innermost = next(reversed(stack.values()), ("",)) if stack else ("",)
        path = innermost[0] if isinstance(innermost, tuple) else str(innermost)
        write_facts(node, path=str(node.target) if node.op == "call_module" else path)


class _ShapeRun(fx.Interpreter):
    """Runs the graph once and writes each value's shape and dtype into its facts."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            write_facts(n, shape=tuple(value.shape), dtype=value.dtype)
        else:
            write_facts(n, shape=None, dtype=None)
        return value


def propagate_shapes(program: Program) -> None:
    """Every node's facts carry the shape and dtype of its value on the example input.

    Raises:
        CaptureError: The model fails on the example; the error names the node that failed.
    """
    run = _ShapeRun(program.module)
    run.extra_traceback = False
    current: list[fx.Node] = []
    original = run.run_node

    def remember(node: fx.Node) -> Any:
        current[:] = [node]
        return original(node)

    run.run_node = remember  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            run.run(*program.example_inputs)
    except Exception as error:
        node = current[0] if current else None
        raise CaptureError(
            f"the model fails on the example input: {_first_line(error)}",
            where=_node_place(node),
            hint=f"the example has shapes {_shapes(program.example_inputs)}; give one batch of "
            "the shape and dtype the model expects",
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _node_place(node: fx.Node | None) -> str | None:
    if node is None:
        return None
    path = node.meta.get("fxq", Facts()).path
    return f"%{node.name}" + (f" in {path}" if path and path != node.name else "")


def _shapes(inputs: tuple[Any, ...]) -> str:
    shown = [
        f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, torch.Tensor)
        else type(value).__name__
        for value in inputs
    ]
    return ", ".join(shown) or "none"
