"""`bisect`: the first pass after which a network is worse than allowed, and the nodes it is due to.

The network is measured after every pass, and after lowering. The versions before and after the
pass that made it fall are then mixed node by node (`fxq.graph.mixture`): the smallest set of nodes
is sought whose new version alone makes the network as bad.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxq.attribution import INTEGERS, decibels
from fxq.compiler import lower, opened
from fxq.errors import FxqError, RecipeError
from fxq.graph.capture import ExampleInputs
from fxq.graph.mixture import Mixture
from fxq.graph.program import Program, Progress, layer_path
from fxq.measure import Metric
from fxq.pipeline import Pipeline
from fxq.recipe import Recipe
from fxq.trail.drift import finite

CAPTURE = "capture"
"""The name of the measurement before all passes."""

_NOISE = 1e-12  # relative squared error of float arithmetic in another order; 120 dB


@dataclass(frozen=True)
class Measured:
    """How good the network was after a pass.

    Attributes:
        name: The pass, `CAPTURE`, or ``lower``.
        value: The metric.
    """

    name: str
    value: float


@dataclass(frozen=True)
class Culprit:
    """A node whose change makes the metric fall.

    Attributes:
        node: The node.
        path: What users know it by.
        operator: What it is after the pass.
        sqnr: How far its own computation moved, in dB, from unchanged inputs.
        alone: The metric where only this node is changed.
    """

    node: str
    path: str
    operator: str
    sqnr: float
    alone: float

    def to_json(self) -> dict[str, Any]:
        """The node as JSON-ready data."""
        known = {"node": self.node, "path": self.path, "operator": self.operator}
        return known | {"sqnr_db": finite(self.sqnr), "alone": finite(self.alone)}


@dataclass(frozen=True)
class Bisection:
    """What was found.

    Attributes:
        bound: What the metric must not fall below.
        measured: The metric after each pass, up to the one that made it fall.
        culprits: The smallest set of nodes found that makes it fall, the worst first; empty where
            it never falls, where lowering makes it fall, or where no node can be told apart.
        changed: How many nodes the pass changed.
        together: The metric where only the culprits are changed.
    """

    bound: float
    measured: tuple[Measured, ...]
    culprits: tuple[Culprit, ...] = ()
    changed: int = 0
    together: float | None = None

    @property
    def first(self) -> str | None:
        """The pass that makes the metric fall; None where it never does."""
        last = self.measured[-1]
        return None if last.value >= self.bound else last.name

    def to_json(self) -> dict[str, Any]:
        """The bisection as JSON-ready data."""
        return {
            "bound": self.bound,
            "first": self.first,
            "measured": [{"name": o.name, "value": finite(o.value)} for o in self.measured],
            "culprits": [one.to_json() for one in self.culprits],
            "changed": self.changed,
            "together": finite(self.together),
        }


def bisect(
    model: nn.Module,
    example_inputs: ExampleInputs,
    recipe: Recipe,
    metric: Metric,
    bound: float,
    *,
    calibration: Iterable[Any] | None = None,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    on_measured: Callable[[Measured], None] | None = None,
    progress: Progress | None = None,
) -> Bisection:
    """The first pass after which a metric is below a bound, and the nodes that make it fall.

    Contracts are not checked, so that a pass that breaks its own is found by what it does.

    Args:
        model: The model; it is not touched.
        example_inputs: One batch.
        recipe: The recipe; it must not train.
        metric: How good a network is.
        bound: What it must not fall below.
        calibration: As for `fxq.compile`.
        leaf_modules: As for `fxq.compile`.
        on_measured: Called after every measurement.
        progress: Called as ``progress(label, done, total)`` during long steps.

    Raises:
        RecipeError: The recipe trains.
        FxqError: The float network is below the bound already; or whatever a pass raises.

    Example:
        >>> import torch
        >>> from fxq.measure import OutputSqnr
        >>> from fxq.models_zoo import tiny_conv
        >>> images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = tiny_conv().eval()
        >>> found = bisect(
        ...     model,
        ...     images[:1],
        ...     Recipe.load("minmax-int8").with_settings(["weight_bits=2"]),
        ...     OutputSqnr(model, [images]),
        ...     20.0,
        ...     calibration=[images],
        ... )
        >>> found.first
        'quantize-minmax'
    """
    if recipe.training:
        raise RecipeError(
            f"{recipe.name} gives a network to be trained", hint="bisect a recipe without training"
        )
    program = opened(model, example_inputs, recipe, calibration, leaf_modules=leaf_modules)
    program.progress = progress
    search = _Search(metric, bound, on_measured or (lambda _: None), program)
    if not search.holds(CAPTURE, program.module):
        raise FxqError(
            f"the float network is below the bound already: {search.measured[-1].value:.2f}",
            hint=f"give a bound below that instead of {bound:g}",
        )
    for one in recipe.passes:
        before = copy.deepcopy(program.module)
        step = Pipeline(one, check=False).run(program).steps[0]
        if set(step.delta.counts()) <= {"noted"}:
            search.same(one.name)
        elif not search.holds(one.name, program.module):
            return search.blame(before)
    search.holds(INTEGERS, lower(program).module)
    return Bisection(bound, tuple(search.measured))


class _Search:
    """Measures, and remembers."""

    def __init__(
        self,
        metric: Metric,
        bound: float,
        on_measured: Callable[[Measured], None],
        program: Program,
    ) -> None:
        self._metric, self._on_measured, self._program = metric, on_measured, program
        self.bound = bound
        self.measured: list[Measured] = []

    def holds(self, name: str, module: nn.Module) -> bool:
        """Whether a network is good enough."""
        self._add(Measured(name, self._metric(module)))
        return self.measured[-1].value >= self.bound

    def same(self, name: str) -> None:
        """A pass changed nothing that is computed."""
        self._add(Measured(name, self.measured[-1].value))

    def _add(self, one: Measured) -> None:
        self.measured.append(one)
        self._on_measured(one)

    def blame(self, before: fx.GraphModule) -> Bisection:
        """The nodes of the program that make it worse than it was before."""
        program = self._program
        mixture = Mixture(before, program.module)
        moved = mixture.introduced(*program.laid_out(program.probe))
        changed = {name: error for name, error in moved.items() if error > _NOISE}
        alone = {}
        for done, name in enumerate(changed, 1):
            mixture.kept = {name}
            alone[name] = self._metric(mixture)
            program.report_progress("try nodes", done, len(changed))
        values: dict[frozenset[str], float] = {frozenset({n}): v for n, v in alone.items()}

        def fails(names: Sequence[str]) -> bool:
            key = frozenset(names)
            if key not in values:
                mixture.kept = key
                values[key] = self._metric(mixture)
                program.report_progress("try sets", len(values) - len(alone), None)
            return not values[key] >= self.bound  # what is no number is no good

        ranked = sorted(changed, key=lambda name: (alone[name], -changed[name]))
        chosen = smallest_set(ranked, fails)
        culprits = [self._culprit(name, changed[name], alone[name]) for name in chosen]
        together = values[frozenset(chosen)] if chosen else None
        return Bisection(self.bound, tuple(self.measured), tuple(culprits), len(changed), together)

    def _culprit(self, name: str, error: float, alone: float) -> Culprit:
        node = self._program.node(name)
        module = self._program.submodule(node)
        operator = getattr(module, "operator", None) or type(module).__name__
        shown = str(node.target) if module is None else str(operator)
        return Culprit(name, layer_path(node), shown, decibels(error), alone)


def smallest_set(ranked: Sequence[str], fails: Callable[[Sequence[str]], bool]) -> list[str]:
    """A small set that fails, none of whose members can be left out.

    The shortest failing prefix is found by bisection, as if longer ones failed too; then each
    member is tried to be left out, the least likely first.

    Args:
        ranked: The members to choose from, the likeliest first.
        fails: Whether a set fails.

    Returns:
        In the order of the ranking; empty where not even all of them together fail.

    Example:
        >>> smallest_set("abcdef", lambda some: {"b", "e"} <= set(some))
        ['b', 'e']
    """
    if not ranked or not fails(ranked):
        return []
    low, high = 0, len(ranked)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(ranked[:middle]) else (middle, high)
    chosen = list(ranked[:high])
    for extra in chosen[-2::-1] if high > 1 else ():  # the last is needed: without it, it held
        fewer = [one for one in chosen if one != extra]
        if fails(fewer):
            chosen = fewer
    return chosen
