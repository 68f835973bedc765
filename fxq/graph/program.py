"""`Program`: the graph of a model, the facts passes wrote about its nodes, and what it runs on."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxq.graph import html

FACTS_KEY = "fxq"

Progress = Callable[[str, int, int | None], None]
"""Called as ``progress(label, done, total)`` while something long runs; total may be unknown."""


@dataclass(frozen=True)
class Facts:
    """What passes know about a node; passes talk to each other only through these.

    Attributes:
        origin: Name of the pass that made the node; ``"capture"`` for the user's own.
        path: Qualified name of the module the node was called in, for example ``layer1.0.conv1``.
        shape: Shape of the node's value on the example input, where it is one tensor.
        dtype: Its dtype.
        nonneg: Whether the value is known to be at least zero.
        upper: A bound the value is known not to exceed (6.0 after a ReLU6).
        fused_relu: On a convolution, linear or add: name of the ReLU that runs inside its kernel.
        fused_into: On that ReLU: name of the node whose kernel runs it.
        observes: On an observer: name of the node whose value it watches.
        bits_of: On an observer: name of the node whose bits the value has, where those are its own
            and not those of the layers that read it.
        norm_mean: Mean of each output channel, as a batch norm left it that was folded in.
        norm_std: Deviation of each output channel, likewise.
        skip: Why the node stays in float, where a policy decided so.
        note: Free text that a pass wants shown beside the node.
    """

    origin: str = "capture"
    path: str = ""
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    nonneg: bool = False
    upper: float | None = None
    fused_relu: str | None = None
    fused_into: str | None = None
    observes: str | None = None
    bits_of: str | None = None
    norm_mean: tuple[float, ...] | None = None
    norm_std: tuple[float, ...] | None = None
    skip: str | None = None
    note: str = ""


def facts(node: fx.Node) -> Facts:
    """The facts of a node; empty facts where none were written."""
    found = node.meta.get(FACTS_KEY)
    return found if isinstance(found, Facts) else Facts()


def write_facts(node: fx.Node, **changes: Any) -> Facts:
    """Replace the given fields of a node's facts and return the new facts."""
    updated = replace(facts(node), **changes)
    node.meta[FACTS_KEY] = updated
    return updated


@dataclass(frozen=True)
class LayerOverride:
    """Options of a pass that apply only to the layers a glob selects.

    Attributes:
        pattern: Glob over module paths, for example ``layer4.*``.
        options: Option name to value, for example ``{"weight_bits": 8}``; ``skip = true`` leaves
            the layer in float.
    """

    pattern: str
    options: Mapping[str, Any]


@dataclass
class Program:
    """A model as a graph, with everything the passes need to transform it.

    Attributes:
        module: The graph module; passes edit it in place.
        example_inputs: One batch of inputs, used for shapes.
        probe: The batch on which contracts are checked and errors measured.
        calibration: Batches the `calibrate` pass reads, and those that optimize; or None.
        sample: A few calibration batches, kept by `calibrate` to rank the layers on afterwards.
        overrides: Per-layer options, in the order they apply (a later one wins).
        passes_run: Names of the passes that have run.
        recipe: Name of the recipe, for messages.
        simulation: Whether quantized layers without an integer kernel may compute in float.
        progress: Where long work reports how far it is.
        workspace: The folder where long passes keep how far they are (`fxq.workspace`); or None.
    """

    module: fx.GraphModule
    example_inputs: tuple[Any, ...]
    probe: tuple[Any, ...] = ()
    calibration: Iterable[Any] | None = None
    sample: list[tuple[Any, ...]] = field(default_factory=list)
    overrides: tuple[LayerOverride, ...] = ()
    passes_run: list[str] = field(default_factory=list)
    recipe: str = ""
    simulation: bool = False
    progress: Progress | None = None
    workspace: Path | None = None

    def __post_init__(self) -> None:
        if not self.probe:
            self.probe = self.example_inputs

    def _repr_html_(self) -> str:
        rows = [
            (
                html.text(f"%{node.name}"),
                html.text(_operator(self, node)),
                html.text(list(shape) if (shape := facts(node).shape) is not None else ""),
                html.text(", ".join(f"%{other.name}" for other in node.all_input_nodes)),
                html.text(facts(node).origin),
            )
            for node in self.nodes()
        ]
        done = html.text(f"{len(rows)} nodes after {', '.join(self.passes_run) or 'capture'}")
        head = ("node", "operator", "shape", "reads", "made by")
        return html.folded(done, html.table(head, rows))

    @property
    def graph(self) -> fx.Graph:
        """The graph of the module."""
        return self.module.graph

    def nodes(self) -> Iterator[fx.Node]:
        """The nodes in execution order; safe against edits while iterating."""
        return iter(list(self.module.graph.nodes))

    def node(self, name: str) -> fx.Node:
        """The node of that name.

        Raises:
            KeyError: No node has that name.
        """
        for node in self.module.graph.nodes:
            if node.name == name:
                found: fx.Node = node
                return found
        raise KeyError(name)

    def submodule(self, node: fx.Node) -> nn.Module | None:
        """The module a ``call_module`` node calls; None for every other node."""
        if node.op != "call_module":
            return None
        return self.module.get_submodule(str(node.target))

    def run(self, *inputs: Any) -> Any:
        """The output of the program for these inputs, without gradients."""
        with torch.no_grad():
            return self.module(*self.laid_out(inputs))

    def laid_out(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs with images channels-last, which convolutions run faster.

        A model that reshapes with ``view`` asks for the layout it was written for, and keeps it.
        """
        if any(_may_view(self, node) for node in self.graph.nodes):
            return inputs
        return tuple(
            value.contiguous(memory_format=torch.channels_last)
            if isinstance(value, torch.Tensor) and value.dim() == 4
            else value
            for value in inputs
        )

    def layer_options(self, node: fx.Node) -> dict[str, Any]:
        """The overriding options that apply to a node, by its module path or node name."""
        path = layer_path(node)
        merged: dict[str, Any] = {}
        for override in self.overrides:
            if fnmatch.fnmatchcase(path, override.pattern) or fnmatch.fnmatchcase(
                node.name, override.pattern
            ):
                merged.update(override.options)
        return merged

    def report_progress(self, label: str, done: int, total: int | None) -> None:
        """Tell whoever listens how far a long step is."""
        if self.progress is not None:
            self.progress(label, done, total)


_KNOWN_CODE = frozenset({"torch", "torchvision", "fxq", "_operator", "math", "builtins"})


def _may_view(program: Program, node: fx.Node) -> bool:
    """Whether a node asks for a memory layout, or runs code of the user's that may."""
    if node.op == "call_method":
        return node.target == "view"
    code = type(program.submodule(node)) if node.op == "call_module" else node.target
    home = getattr(code, "__module__", None) or "torch"
    return node.op in ("call_module", "call_function") and home.split(".")[0] not in _KNOWN_CODE


def _operator(program: Program, node: fx.Node) -> str:
    """What a node calls, for people."""
    module = program.submodule(node)
    if module is not None:
        return type(module).__name__
    if node.op in ("placeholder", "output", "get_attr"):
        return node.op
    return getattr(node.target, "__name__", str(node.target))


def layer_path(node: fx.Node) -> str:
    """The path users know a node by: of the module it calls, else of the one it was called in."""
    return facts(node).path or (str(node.target) if node.op == "call_module" else node.name)


def recompile(program: Program) -> None:
    """Drop what the graph no longer uses and regenerate its forward."""
    program.graph.eliminate_dead_code(is_impure_node=_keep)
    program.module.delete_all_unused_submodules()
    program.graph.lint()
    program.module.recompile()


def _keep(node: fx.Node) -> bool:
    """Placeholders and outputs stay; everything else without a user may go."""
    return node.op in ("placeholder", "output") or facts(node).observes is not None
