"""The fewest layers to raise to 8 bits so that a network is as good as asked.

Layers are ranked by how much the output suffers when only they are quantized. The smallest prefix
of that ranking that is good enough is found by bisection, as ``git bisect`` finds a commit; then
members that turn out not to be needed are left out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxq.compiler import Result
from fxq.errors import CalibrationError, FxqError
from fxq.graph.op import PASS_THROUGH, Kind
from fxq.graph.ops import describe
from fxq.graph.program import Program, layer_path
from fxq.quant.quantizers import ActivationQuantizer, QuantizedLayer
from fxq.sensitivity import KeptRun

FULL_BITS = 8
_REMOVALS = 4
"""How many members are tried to be left out at most; each trial is a compilation."""


@dataclass(frozen=True)
class Candidate:
    """A layer that can be raised.

    Attributes:
        path: What users know it by.
        settings: What `fxq.compile` takes to raise it: its weights, and the values it reads, also
            for the other layers that read them, since they share their codes.
        loss: How much the output suffers when only this layer is quantized.
    """

    path: str
    settings: tuple[str, ...]
    loss: float


@dataclass(frozen=True)
class Trial:
    """One compilation.

    Attributes:
        raised: Paths of the layers that had 8 bits.
        drop: By how much the network was worse than in float.
    """

    raised: tuple[str, ...]
    drop: float


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        result: The compilation that is good enough.
        raised: Paths of the layers that have 8 bits in it, the most sensitive first.
        trials: Every compilation that was tried, in order.
        candidates: How many layers had fewer than 8 bits at first.
    """

    result: Result
    raised: tuple[str, ...]
    trials: tuple[Trial, ...]
    candidates: int

    @property
    def drop(self) -> float:
        """By how much the result is worse than float."""
        return next(trial.drop for trial in self.trials if trial.raised == self.raised)


def raise_layers(
    compile_with: Callable[[Sequence[str]], Result],
    drop: Callable[[Result], float],
    limit: float,
    *,
    on_trial: Callable[[Trial], None] | None = None,
) -> Search:
    """The compilation with the fewest layers at 8 bits, as far as a few trials can tell.

    Args:
        compile_with: Compiles with settings, as `fxq.compile` takes them.
        drop: By how much a result is worse than the float network; at most 0 where it is not.
        limit: The largest drop that is good enough.
        on_trial: Called after every compilation.

    Raises:
        FxqError: Not even all layers at 8 bits are good enough; the error says by how much.
    """
    state = _Trials(compile_with, drop, limit, on_trial)
    first = state.run([])
    if first is not None:
        return state.found(first, [], 0)
    ranked = candidates(state.last)
    chosen, result = _smallest_prefix(state, ranked)
    for extra in chosen[-2::-1][:_REMOVALS]:  # the last member is needed: without it, it failed
        fewer = [one for one in chosen if one is not extra]
        better = state.run(fewer)
        if better is not None:
            chosen, result = fewer, better
    return state.found(result, chosen, len(ranked))


def _smallest_prefix(state: _Trials, ranked: list[Candidate]) -> tuple[list[Candidate], Result]:
    """The shortest prefix that is good enough, where longer ones are never worse."""
    low, high = 0, len(ranked)
    result: Result | None = None
    while high - low > 1:
        middle = (low + high) // 2
        tried = state.run(ranked[:middle])
        if tried is None:
            low = middle
        else:
            high, result = middle, tried
    if result is None and ranked:
        result = state.run(ranked)
    if result is None:
        raise FxqError(
            f"even with every layer at {FULL_BITS} bits the drop is {state.trials[-1].drop:.2f}",
            where=f"{len(ranked)} layers had fewer; at most {state.limit:g} was asked for",
            hint="allow a larger drop, calibrate on more images, or take another recipe",
        )
    return ranked[:high], result


class _Trials:
    """Compiles, measures, and remembers."""

    def __init__(
        self,
        compile_with: Callable[[Sequence[str]], Result],
        drop: Callable[[Result], float],
        limit: float,
        on_trial: Callable[[Trial], None] | None,
    ) -> None:
        self._compile, self._drop, self._on_trial = compile_with, drop, on_trial
        self.limit = limit
        self.trials: list[Trial] = []

    def run(self, raised: Sequence[Candidate]) -> Result | None:
        """The result where it is good enough."""
        self.last = self._compile([text for one in raised for text in one.settings])
        trial = Trial(tuple(one.path for one in raised), self._drop(self.last))
        self.trials.append(trial)
        if self._on_trial is not None:
            self._on_trial(trial)
        return self.last if trial.drop <= self.limit else None

    def found(self, result: Result, raised: Sequence[Candidate], candidates: int) -> Search:
        """The search with its result."""
        return Search(result, tuple(o.path for o in raised), tuple(self.trials), candidates)


# ---- ranking -----------------------------------------------------------------------------------


def candidates(result: Result) -> list[Candidate]:
    """The layers with fewer than 8 bits, those that hurt the output most first.

    Args:
        result: A compilation; the first batch that its program kept is what it is measured on.

    Raises:
        CalibrationError: It kept no calibration images.
    """
    program = result.program
    if not program.sample:
        raise CalibrationError("calibration kept no images to rank the layers on")
    run = KeptRun(program, program.laid_out(program.sample[0]))
    reads = {
        node: set(_quantizers(program, node))
        for node in program.nodes()
        if isinstance(program.submodule(node), QuantizedLayer)
    }
    found = []
    for target in dict.fromkeys(str(node.target) for node in reads):
        nodes = [node for node in reads if node.target == target]
        read = set().union(*(reads[node] for node in nodes))
        if _bits(program, nodes[0], read) < FULL_BITS:
            changes: dict[fx.Node, Any] = {n: program.submodule(n) for n in (*nodes, *read)}
            shared = {one.target for one in read}
            sharing = [n for n, values in reads.items() if shared & {v.target for v in values}]
            settings = _settings(nodes, sharing)
            found.append(Candidate(layer_path(nodes[0]), settings, run.damage(changes)))
            program.report_progress("rank layers", len(found), None)
    return sorted(found, key=lambda one: -one.loss)


def _settings(nodes: list[fx.Node], sharing: list[fx.Node]) -> tuple[str, ...]:
    weights = [f"layer:{node.name}.weight_bits={FULL_BITS}" for node in nodes]
    return (*weights, *(f"layer:{node.name}.activation_bits={FULL_BITS}" for node in sharing))


def _bits(program: Program, node: fx.Node, quantizers: set[fx.Node]) -> int:
    """The fewest bits of a layer's weights and of what it reads."""
    layer: Any = program.submodule(node)
    read: list[Any] = [program.submodule(quantizer) for quantizer in quantizers]
    return int(min([layer.bits.min(), *(one.bits for one in read)]))


def _quantizers(program: Program, node: fx.Node) -> Iterator[fx.Node]:
    """The quantizers whose codes a layer multiplies."""
    for source in describe(node, program.module).inputs:
        if isinstance(program.submodule(source), ActivationQuantizer):
            yield source
        elif describe(source, program.module).kind in {*PASS_THROUGH, Kind.CAT}:
            yield from _quantizers(program, source)
