"""Which parts of a model can be traced, and what keeps the rest from it.

The largest ones come first: a submodule is a part if it can be traced with the arguments the model
calls it with, and the graph computes what it computes. Where it cannot, its children are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxq.errors import CaptureError, FxqError
from fxq.graph.capture import ExampleInputs, as_inputs, capture, copied_for_inference
from fxq.graph.ops import ANCHORS, describe
from fxq.graph.program import Program
from fxq.graph.trace_error import class_place
from fxq.parts.calls import Arguments, Call, counted, recorded, run
from fxq.parts.composition import Part, PartMissesError, composed

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
"""What is worth compiling."""

TOLERANCE = 1e-3
"""Of the largest output: how far a graph may be from the module, in another order of summation."""


@dataclass(frozen=True)
class Gap:
    """A submodule that runs as it was written.

    Attributes:
        path: Where the model has it.
        kind: Name of its class.
        why: What keeps it from being traced.
        where: File and line.
        hint: What would make it traceable.
    """

    path: str
    kind: str
    why: str
    where: str
    hint: str


@dataclass
class Survey:
    """What of a model can be traced.

    Attributes:
        model: A copy of the model, in eval mode.
        inputs: The example it was run on.
        parts: Its largest traceable parts, by path; ``""`` is the whole model.
        gaps: What was looked into instead, because it cannot be traced.
        left: Paths of convolutions and linears that are in no part.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    parts: dict[str, Part] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def find_parts(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
) -> Survey:
    """The largest traceable parts of a model, found by running it once and tracing.

    Args:
        model: The model; it is copied, and stays as it is.
        example_inputs: One batch: a tensor, or a tuple with one entry per argument.
        leaf_modules: Module classes or names that stay one node each, and are never parts.

    Raises:
        CaptureError: The model cannot be copied, or fails on the example.

    Example:
        >>> class Halves(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        ...     def forward(self, x: Tensor) -> Tensor:
        ...         return self.left(x) if x.sum() > 0 else self.right(x)
        >>> found = find_parts(Halves(), torch.ones(1, 4))
        >>> list(found.parts), found.left
        (['left'], ['right'])
    """
    survey = Survey(copied_for_inference(model), as_inputs(example_inputs))
    counts = counted(survey.model, survey.inputs)
    frontier = [("", survey.model)]
    while frontier:
        frontier = _next(survey, frontier, counts, tuple(leaf_modules))
        if not frontier:
            frontier = _unreplaceable(survey)
    survey.left = _left(survey)
    return survey


def _next(
    survey: Survey,
    frontier: list[tuple[str, nn.Module]],
    counts: dict[nn.Module, int],
    leaves: tuple[type[nn.Module] | str, ...],
) -> list[tuple[str, nn.Module]]:
    """The submodules to look at after these."""
    worth = [
        (path, module)
        for path, module in frontier
        if _has_weights(module) and not {path, type(module), type(module).__name__} & {*leaves}
    ]
    further = []
    for path, module in worth:
        if counts[module]:
            try:
                calls = recorded(survey.model, survey.inputs, module, counts[module])
                part = _part(path, module, calls, leaves)
            except CaptureError as error:
                survey.gaps.append(_gap(path, module, error))
                part = None
            if part is not None:
                survey.parts[path] = part
                continue
        further += _children(path, module)
    return further


def leaves_below(
    path: str, leaves: Sequence[type[nn.Module] | str]
) -> tuple[type[nn.Module] | str, ...]:
    """The leaf modules as a part has them: qualified names without the path of the part.

    Example:
        >>> leaves_below("head", ["head.tower", "Attention"])
        ('tower', 'Attention')
    """
    prefix = f"{path}." if path else ""
    return tuple(leaf.removeprefix(prefix) if isinstance(leaf, str) else leaf for leaf in leaves)


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _children(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    prefix = f"{path}." if path else ""
    return [(prefix + name, child) for name, child in module.named_children()]


def _part(
    path: str,
    module: nn.Module,
    calls: list[Call],
    leaves: tuple[type[nn.Module] | str, ...],
) -> Part | None:
    """The module as a part; None where it holds nothing to quantize.

    Raises:
        CaptureError: It cannot be traced, or the graph computes something else.
    """
    arguments = _common(calls)
    first = calls[0].tensors(arguments.tensors)
    own = leaves_below(path, leaves)
    program = capture(module, first, leaf_modules=own, concrete_args=arguments.fixed)
    for call in calls:
        _check_same(program, call, arguments)
    if not any(describe(node, program.module).kind in ANCHORS for node in program.nodes()):
        return None
    return Part(path, type(module).__name__, arguments, len(calls), first, program.module)


def _common(calls: list[Call]) -> Arguments:
    """How all calls pass their arguments.

    Raises:
        CaptureError: They differ, or pass what no graph takes.
    """
    first = calls[0].arguments()
    if not first.tensors:
        raise CaptureError(
            "none of its arguments is a tensor", hint="pass what it computes on as arguments"
        )
    if any(call.arguments() != first for call in calls):
        raise CaptureError(
            f"its {len(calls)} calls differ in arguments that are no tensors",
            hint="make one module per use, or pass the same values",
        )
    return first


def _check_same(program: Program, call: Call, arguments: Arguments) -> None:
    """The graph computes what the module did.

    Raises:
        CaptureError: It does not, or fails on a later call's shapes.
    """
    try:
        with torch.no_grad():
            found = program.module(*call.tensors(arguments.tensors))
    except Exception as error:
        raise CaptureError(
            f"its graph does not run on the shapes of every call: {error}",
            hint="take sizes from x.shape where they are needed, not from attributes",
        ) from error
    values, wanted = _leaves(found), _leaves(call.output)
    alike = len(values) == len(wanted) and all(map(_close, values, wanted))
    if not alike:
        raise CaptureError(
            "its graph computes something else than the module does",
            hint="keep what changes from call to call, random numbers too, out of its forward",
        )


def _leaves(value: Any) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves(value) if leaf is not None]


def _close(found: Any, wanted: Any) -> bool:
    if not (isinstance(found, Tensor) and isinstance(wanted, Tensor)):
        return bool(found == wanted)
    if found.shape != wanted.shape:
        return False
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    return torch.allclose(found.double(), wanted.double(), rtol=0, atol=TOLERANCE * scale + 1e-12)


def _gap(path: str, module: nn.Module, error: FxqError) -> Gap:
    where = error.where or class_place(type(module))
    return Gap(path, type(module).__name__, error.what, where, error.hint or "")


def _unreplaceable(survey: Survey) -> list[tuple[str, nn.Module]]:
    """The children of a part whose attributes the model reads, which no graph has."""
    graphs = {path: part.graph for path, part in survey.parts.items()}
    arguments = {path: part.arguments for path, part in survey.parts.items()}
    try:
        run(composed(survey.model, graphs, arguments), survey.inputs)
    except CaptureError as error:
        missed = _missed(error)
        if missed is None:
            raise
        module = survey.model.get_submodule(missed.path)
        del survey.parts[missed.path]
        why = f"the model reads its attribute {missed.attribute}"
        hint = "call the module instead of reading what it holds"
        survey.gaps.append(_gap(missed.path, module, CaptureError(why, hint=hint)))
        return _children(missed.path, module)
    return []


def _missed(error: BaseException | None) -> PartMissesError | None:
    while error is not None and not isinstance(error, PartMissesError):
        error = error.__cause__
    return error


def _left(survey: Survey) -> list[str]:
    """Convolutions and linears outside of all parts."""
    inside = {
        module for path in survey.parts for module in survey.model.get_submodule(path).modules()
    }
    return [
        path
        for path, module in survey.model.named_modules()
        if isinstance(module, LAYERS) and module not in inside
    ]
