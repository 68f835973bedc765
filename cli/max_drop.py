"""``fxq compile --max-drop``: layers are raised to 8 bits until accuracy is close to float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxq.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fxq.compiler import Result
    from fxq.graph.program import Progress
    from fxq.model_file import NamedModel
    from fxq.search import Search, Trial
    from fxq.trail.journal import Step

    from .show_compile import Meter, Reporter

MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        metavar="POINTS",
        show_default=False,
        min=0.0,
        rich_help_panel="Compilation",
        help="Raise the fewest layers to 8 bits so that top-1 on the calibration images falls at "
        "most so many points below float; without labels, agreement with float is measured",
    ),
]


@dataclass(frozen=True)
class Answers:
    """The right answers on the calibration images.

    Attributes:
        read: Gives the inputs, batch by batch, as often as it is called.
        wanted: ``[n]`` the right answers of each batch.
        float_right: How many of them the float network gives.
        labelled: Whether they are labels; else they are what the float network answers.
    """

    read: Callable[[], Iterator[tuple[Any, ...]]]
    wanted: list[Tensor]
    float_right: int
    labelled: bool

    @property
    def total(self) -> int:
        """How many images there are."""
        return sum(map(len, self.wanted))

    @property
    def source(self) -> str:
        """What a drop is a drop of, for people."""
        what = "top-1" if self.labelled else "agreement with float, there being no labels,"
        return f"{what} on {self.total} calibration images"

    def drop(self, module: nn.Module, progress: Progress) -> float:
        """By how many points fewer images a network answers right than in float."""
        right = done = 0
        for inputs, wanted in zip(self.read(), self.wanted, strict=True):
            right += int((_answers(module, inputs) == wanted).sum())
            done += len(wanted)
            progress("measure drop", done, self.total)
        return 100 * (self.float_right - right) / self.total


def right_answers(model: NamedModel, batches: Iterable[Any], progress: Progress) -> Answers:
    """The labels that come with calibration images; without them what the float network answers.

    Args:
        model: The float network.
        batches: What it is calibrated on; can be read repeatedly.
        progress: Told how far it is.

    Raises:
        DataError: The network does not give one row of logits per image.
    """
    labelled = getattr(batches, "labelled", None)
    source = batches if labelled is None else labelled()
    count = len(model.example_inputs)
    answers: list[Tensor] = []
    labels: list[Tensor | None] = []
    for batch in source:
        inputs = _inputs(batch, count)
        answers.append(_answers(model.module, inputs))
        labels.append(_labels(batch, count, len(answers[-1])))
        progress("answers in float", len(answers), None)
    known = [one for one in labels if one is not None]
    wanted = known if len(known) == len(answers) else answers
    pairs = zip(answers, wanted, strict=True)
    return Answers(
        read=lambda: (_inputs(batch, count) for batch in batches),
        wanted=wanted,
        float_right=sum(int((mine == right).sum()) for mine, right in pairs),
        labelled=wanted is known,
    )


@dataclass(frozen=True)
class Raised:
    """Which layers were raised, and what it was measured on."""

    search: Search
    answers: Answers

    @property
    def result(self) -> Result:
        """The compilation that is near enough to float."""
        return self.search.result

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What the summary says."""
        found = self.search
        layers = f"{len(found.raised)} of {found.candidates} layers to 8 bits"
        shown = f"{layers}: {', '.join(found.raised)}" if found.raised else "no layer had to be"
        trials = f"{len(found.trials)} compilations tried"
        drop = f"{found.drop:.2f} points of {self.answers.source}; {trials}"
        return [("raised", shown), ("drop", drop)]

    def to_json(self) -> dict[str, Any]:
        """The search as JSON-ready data."""
        trials = [{"raised": list(t.raised), "drop": t.drop} for t in self.search.trials]
        raised = list(self.search.raised)
        return {"raised": raised, "measured": self.answers.source, "trials": trials}


def raised(
    compile_with: Callable[[Sequence[str], Any], Result],
    answers: Answers,
    limit: float,
    reporter: Reporter,
) -> Raised:
    """The fewest layers have 8 bits; each trial was told on a line.

    Args:
        compile_with: Compiles with settings, reporting to whom it is given.
        answers: What a drop is measured against.
        limit: The largest drop, in points.
        reporter: Shows progress, and the passes of the first compilation.
    """
    from fxq.search import raise_layers

    quiet = Quiet(reporter)

    def told(trial: Trial) -> None:
        layers = f"{len(trial.raised)} layers at 8 bits" if trial.raised else "as asked"
        verdict = "near enough" if trial.drop <= limit else f"more than {limit:g}"
        text = f"{layers}: {trial.drop:.2f} points below float, {verdict}"
        reporter.console.print(text, soft_wrap=True)

    found = raise_layers(
        lambda settings: compile_with(settings, quiet if settings else reporter),
        lambda result: answers.drop(result.module, quiet),
        limit,
        on_trial=told,
    )
    return Raised(found, answers)


class Quiet:
    """Shows progress, and says nothing of passes."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def step(self, step: Step) -> None:
        """Nothing."""

    def __call__(self, label: str, done: int, total: int | None) -> None:
        """Progress is shown."""
        self._meter(label, done, total)


def _inputs(batch: Any, count: int) -> tuple[Any, ...]:
    return tuple(batch[:count]) if isinstance(batch, (tuple, list)) else (batch,)


def _labels(batch: Any, count: int, images: int) -> Tensor | None:
    """What follows the inputs in a batch, where it can be labels."""
    import torch

    if not isinstance(batch, (tuple, list)) or len(batch) != count + 1:
        return None
    try:
        labels = torch.as_tensor(batch[-1]).flatten()
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not labels.is_floating_point() and not labels.is_complex()
    return labels if whole and len(labels) == images else None


def _answers(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """``[n]``: the class with the largest logit."""
    import torch

    from .score import evaluating

    with torch.no_grad(), evaluating(module):
        logits = module(*inputs)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise DataError(
            "--max-drop needs a network that gives one row of logits per image",
            hint="measure with --eval instead, and raise layers with "
            "--set layer:GLOB.weight_bits=8",
        )
    return logits.argmax(1)
