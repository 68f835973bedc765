"""``fxq bisect``: the first pass, and the smallest set of nodes, that make a network too bad."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fxq.errors import DataError

from .analyze import Request, calibration_data, recipe_of, sample_of, subject_of
from .options import Measure
from .show_compile import Meter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fxq.bisect import Bisection, Culprit, Measured
    from fxq.graph.program import Progress
    from fxq.measure import Metric

    from .load import Subject


def run(request: Request, metric: Measure, bound: float, *, as_json: bool) -> None:
    """What was found has been told."""
    from fxq.bisect import bisect

    from . import show

    recipe, subject = recipe_of(request), subject_of(request)
    data = calibration_data(request, recipe, subject)
    with Meter() as meter:

        def tell(one: Measured) -> None:
            meter.console.print(f"{one.name:<22}{_text(one.value, metric)}", soft_wrap=True)

        found = bisect(
            subject.model.module,
            subject.model.example_inputs,
            recipe,
            _metric(request, subject, data, metric, meter),
            bound,
            calibration=data,
            leaf_modules=request.leaves,
            on_measured=None if as_json else tell,
            progress=meter,
        )
    if as_json:
        show.raw(json.dumps(found.to_json(), indent=1))
        return
    show.lines(["", *verdict(found, metric)])


def _metric(
    request: Request,
    subject: Subject,
    data: Iterable[Any] | None,
    metric: Measure,
    progress: Progress,
) -> Metric:
    """How networks are measured.

    Raises:
        DataError: There is nothing to measure with.
    """
    from fxq.measure import OutputSqnr

    from . import score
    from .ablate import figure

    if metric is Measure.SQNR:
        examples = subject.model.example_inputs
        sample = sample_of([examples] if data is None else data, len(examples), request.sample)
        return OutputSqnr(subject.model.module, sample)
    evaluation = score.evaluation_of(
        subject, request.evaluation, limit=request.eval_images, batch_size=request.batch_size
    )
    if evaluation is None:
        raise DataError(
            "there is nothing to measure accuracy with",
            where=request.name,
            hint="pass --eval with an .npz file or a folder of images, or take --metric sqnr",
        )
    return lambda module: figure(evaluation.measure(module, progress))


def verdict(found: Bisection, metric: Measure) -> list[str]:
    """What was found, in sentences."""
    from fxq.attribution import INTEGERS

    bound = _text(found.bound, metric)
    if found.first is None:
        return [f"never below {bound}"]
    if found.first == INTEGERS:
        return [
            f"below {bound} on integer kernels only, after every pass held",
            "fxq compile, then fxq verify RUN, compares the kernels layer by layer",
        ]
    lines = [f"{found.first} is the first pass after which it is below {bound}"]
    if not found.culprits:
        return [*lines, "no node that it changed can be told apart from the others"]
    count = len(found.culprits)
    verb = "is" if count == 1 else "are"
    together = "" if found.together is None else f": {_text(found.together, metric)}"
    lines.append(f"{count} of the {found.changed} nodes it changed {verb} enough{together}")
    return lines + [_culprit(one, metric) for one in found.culprits]


def _culprit(one: Culprit, metric: Measure) -> str:
    from fxq.trail.journal import format_db

    place = f"%{one.node} ({one.operator} of {one.path})"
    alone = f"{_text(one.alone, metric)} where only it is changed"
    return f"  {place}: {alone}; its own output: {format_db(one.sqnr)}"


def _text(value: float, metric: Measure) -> str:
    from fxq.trail.journal import format_db

    return format_db(value) if metric is Measure.SQNR else f"{value:.2f}"
