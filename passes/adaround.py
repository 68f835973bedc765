"""adaround: weights are rounded up or down so that every layer's output changes least.

After a quantize pass has chosen the scales, every layer's codes are chosen anew, in the order of
the network: the layer is given what reaches it behind the layers already rounded, and its output
shall be that of the float network (asymmetric reconstruction). What the images have to say is
gathered once per layer, as second moments of the layer's input; see
`fxq.numerics.reconstruction`.

Papers: Nagel, Amjad, van Baalen, Louizos, Blankevoort, "Up or Down? Adaptive Rounding for
Post-Training Quantization", ICML 2020, arXiv:2004.10568.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import fx

from fxq.contracts import Contract
from fxq.errors import SpecError
from fxq.graph.program import Program, facts
from fxq.graph.rewrite import Editor
from fxq.numerics.reconstruction import GramProblem, SampleProblem
from fxq.numerics.rounding import Annealing, Schedule, anneal_rounding, descend_rounding
from fxq.numerics.saturation import largest_pair_sum, pair_limit
from fxq.pipeline import Pass
from fxq.quant.quantizers import QuantizedLayer, from_rows, rows
from fxq.workspace import Checkpoint

from .correct_bias import mean_shift
from .patches import Moments, moments, samples
from .post_training import is_depthwise
from .side_by_side import Meeting, fitting_images, run_side_by_side

GRAM_COLUMNS = 5120
"""Inputs per output value up to which second moments are gathered: 210 MB each in float64."""

SAMPLES = 4096
"""Patches that stand for the images where the error is measured on samples."""

BLOCK_ELEMENTS = 2**24
"""Weights optimized at a time on samples; channels do not depend on each other."""


class Solver(StrEnum):
    """How the best rounding is searched for."""

    ANNEALED = "annealed"
    DESCENT = "descent"


@dataclass(frozen=True)
class Adaround(Pass):
    """Every integer layer has the codes that keep its output nearest to the float network's.

    Scales, bits and the range of the codes stay; the bias takes up the error of the mean, as after
    correct-bias, so that weights need not. The error is that of the output before the activation
    function, exactly, borders included; ``refine_iterations`` continue behind it. No channel ends
    with a larger error than rounding to the nearest gives it. Layers with more than
    5120 inputs per output are optimized on samples, with the solver ``annealed``.

    Refused: layers that several calls share, and codes that are no rounding of the weights (levels
    spread by ACIQ's bias correction, powers of two). A depthwise channel of 8 bits that would no
    longer be safe from saturating keeps its codes.

    Args:
        images: How many calibration images at most; fewer where memory is short.
        solver: ``annealed`` is the paper's: soft rounding, made hard by a regularizer. ``descent``
            moves one weight per channel at a time to its best code, which takes a tenth of the
            time and finds errors as small.
        relaxed: How many codes beyond the two neighbours of its exact value a weight may go; the
            paper allows none. The solver ``annealed`` is then followed by the other.
        damping: White inputs added to the images, per weight of a channel; they keep a weight near
            its float value where few images say otherwise.
        iterations: Of the annealed solver.
        learning_rate: Of its Adam.
        regularization: Of its rounding.
        warm_start: Share of the iterations before the regularizer sets in.
        beta_start: First exponent of the regularizer.
        beta_end: Last exponent.
        schedule: How the exponent falls.
        refine_iterations: Iterations of the annealed solver behind the activation function, on
            samples, from the rounding found.
        seed: For samples.

    Raises:
        SpecError: An option is out of range.
        CalibrationError: There is no calibration data.
    """

    name: ClassVar[str] = "adaround"
    after: ClassVar[tuple[str, ...]] = ("calibrate",)
    contract: ClassVar[Contract] = Contract.CHANGES_NUMBERS
    resumable: ClassVar[bool] = True

    images: int = 512
    solver: Solver = Solver.ANNEALED
    relaxed: int = 0
    damping: float = 10.0
    iterations: int = 2000
    learning_rate: float = 0.01
    regularization: float = 0.01
    warm_start: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    schedule: Schedule = Schedule.COSINE
    refine_iterations: int = 0
    seed: int = 0

    def apply(self, program: Program, edit: Editor) -> None:
        """The layers have been rounded one after the other."""
        inputs = fitting_images(program, self.images)
        checkpoint = Checkpoint(program, edit, self.options(), inputs)
        finished = checkpoint.load()
        if finished:
            edit.note(f"continued behind {len(finished) // 2} layers that were finished")

        def visit(at: Meeting) -> None:
            if not is_rounding(at.layer):
                edit.miss(at.node, "its codes are no rounding of its weights to a uniform grid")
                return
            if not _recall(at, finished):
                self._round(at, _bounds(program, at.node))
                finished.update({name: value.clone() for name, value in _chosen(at).items()})
            edit.hit(at.node)
            keep_if_due()

        with checkpoint.keeping(lambda: finished) as keep_if_due:
            run_side_by_side(program, edit, visit, inputs)

    def __post_init__(self) -> None:
        """Refuse what cannot be, before anything runs."""
        if self.relaxed < 0 or self.refine_iterations < 0 or not self.damping >= 0:
            raise SpecError("relaxed, refine_iterations and damping must not be negative")
        self._annealing(self.iterations)

    def _annealing(self, iterations: int) -> Annealing:
        return Annealing(
            iterations,
            self.learning_rate,
            self.regularization,
            self.warm_start,
            self.beta_start,
            self.beta_end,
            self.schedule,
        )

    # ---- one layer ---------------------------------------------------------------------------

    def _round(self, at: Meeting, bounds: tuple[float, float]) -> None:
        """The layer has new codes, and the bias that fits them."""
        layer = at.layer
        problem = _ends(layer)
        if problem["weight"].shape[-1] > GRAM_COLUMNS:
            codes = self._on_samples(at, problem, bounds)
        else:
            codes = self._on_moments(problem, moments(at).centred())
            if self.refine_iterations:
                codes = self._on_samples(at, problem, bounds, codes)
        flat = codes.flatten(0, 1).to(torch.int8)
        if is_depthwise(layer.layer):
            safe = largest_pair_sum(flat) <= pair_limit(255)
            flat = torch.where(safe.unsqueeze(1), flat, rows(layer.layer, layer.codes))
        layer.codes.copy_(from_rows(layer.layer, flat, layer.codes.shape))
        layer.bias_shift.add_(mean_shift(at))

    def _on_moments(self, ends: dict[str, Any], seen: Moments) -> torch.Tensor:
        """Codes from second moments of the layer's input."""
        problem = GramProblem(**ends, gram=seen.gram, correlation=seen.correlation)
        problem = problem.damped(seen.samples, self.damping)
        if self.solver is Solver.DESCENT:
            return descend_rounding(problem, reach=self.relaxed)
        codes = anneal_rounding(problem, self._annealing(self.iterations))
        if not self.relaxed:
            return codes
        return descend_rounding(problem, start=codes, reach=self.relaxed)

    def _on_samples(
        self,
        at: Meeting,
        ends: dict[str, Any],
        bounds: tuple[float, float],
        start: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Codes from samples, a block of channels at a time; better ones, where some are given."""
        inputs, outputs = samples(at, SAMPLES, self.seed)
        mean = outputs.mean(1)
        bias: Any = at.layer.layer.bias
        offset = mean if bias is None else mean + bias.detach().view_as(mean)
        problem = SampleProblem(
            **ends,
            inputs=inputs - inputs.mean(1, keepdim=True),
            outputs=outputs - mean.unsqueeze(1),
            offset=offset,
            bounds=bounds,
        )
        annealing = self._annealing(self.iterations if start is None else self.refine_iterations)
        step = max(1, BLOCK_ELEMENTS // (inputs.shape[0] * inputs.shape[2]))
        found = []
        for begin in range(0, outputs.shape[2], step):
            block = slice(begin, begin + step)
            codes = None if start is None else start[:, block]
            found.append(
                anneal_rounding(problem.channels(block), annealing, start=codes, seed=self.seed)
            )
        return torch.cat(found, 1)


def _chosen(at: Meeting) -> dict[str, torch.Tensor]:
    """What the pass chooses of a layer, by name."""
    name = at.node.name
    return {f"{name}.codes": at.layer.codes, f"{name}.bias_shift": at.layer.bias_shift}


def _recall(at: Meeting, finished: dict[str, torch.Tensor]) -> bool:
    """Whether the layer was finished before; if so, it is again as it was."""
    chosen = _chosen(at)
    if not chosen.keys() <= finished.keys():
        return False
    for name, value in chosen.items():
        value.copy_(finished[name])
    return True


def _ends(layer: QuantizedLayer) -> dict[str, Any]:
    """The weights of a layer and their grid, group by group, as `Grid` takes them."""
    groups = int(getattr(layer.layer, "groups", 1))
    weight: Any = layer.layer.weight
    top = 2.0 ** (layer.bits - 1) - 1
    split = {
        "weight": rows(layer.layer, weight.detach()).double(),
        "scale": layer.scale,
        "low": -top,
        "high": top,
    }
    return {name: torch.unflatten(value, 0, (groups, -1)) for name, value in split.items()}


def is_rounding(layer: QuantizedLayer) -> bool:
    """Whether every code is one of the two neighbours of its weight on the layer's grid."""
    ends = _ends(layer)
    steps = ends["weight"] / ends["scale"].double().unsqueeze(-1)
    steps = steps.clamp(ends["low"].unsqueeze(-1), ends["high"].unsqueeze(-1))
    codes = rows(layer.layer, layer.codes).view_as(steps)
    return bool(((codes - steps).abs() < 1).all())


def _bounds(program: Program, node: fx.Node) -> tuple[float, float]:
    """The bounds that a fused activation function sets to a layer's output."""
    relu = facts(node).fused_relu
    if relu is None:
        return -math.inf, math.inf
    upper = facts(program.node(relu)).upper
    return 0.0, math.inf if upper is None else upper
