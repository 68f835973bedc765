"""``fxq compile`` of a network that cannot be traced whole: its largest traceable parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxq.errors import CaptureError

if TYPE_CHECKING:
    from fxq.parts.compilation import PartialResult
    from fxq.parts.composition import Part

    from .compile import Job, Plan
    from .score import Score
    from .show_compile import Reporter


def run(
    job: Job, plan: Plan, whole: CaptureError, before: Score | None, reporter: Reporter
) -> None:
    """The parts are compiled, measured together and saved, and what is left is told.

    Args:
        job: What was asked for.
        plan: What was opened for it.
        whole: Why the network cannot be traced whole.
        before: What it scores in float.
        reporter: Tells of passes and long steps.

    Raises:
        CaptureError: None of it can be traced, or what was asked for needs all of it.
    """
    from fxq.parts.compilation import compile_parts

    from . import show
    from .compile import measured, metadata_of

    if job.max_drop is not None:
        raise whole

    def begin(part: Part, index: int, total: int) -> None:
        if index == 0:
            show.notice(f"{whole.what}; its largest traceable parts are compiled")
        reporter.steps.clear()
        reporter.console.print()
        reporter.console.print(f"part {index + 1} of {total}: {_described(part)}", style="bold")

    model = plan.subject.model
    try:
        result = compile_parts(
            model.module,
            model.example_inputs,
            plan.recipe,
            backend=job.backend,
            calibration=plan.calibration and plan.calibration.data,
            leaf_modules=job.leaves,
            on_part=begin,
            on_step=reporter.step,
            progress=reporter,
            workspace=plan.unfinished,
            **job.options,
        )
    except CaptureError as error:  # not even in parts
        raise whole from error
    after = measured(plan, result.module, reporter)
    result.save(plan.folder, force=job.force, metadata=metadata_of(job, plan, before, after))
    _summarize(plan, result, before, after)


def _described(part: Part) -> str:
    times = "once" if part.calls == 1 else f"{part.calls} times"
    return f"{part.path or 'the whole network'}, a {part.kind}, called {times}"


def _summarize(
    plan: Plan, result: PartialResult, before: Score | None, after: Score | None
) -> None:
    from . import show, show_compile
    from .compile import float_bytes, score_rows, sizes_text

    survey, artifacts = result.survey, result.artifacts
    inside = {module for path in artifacts for module in survey.model.get_submodule(path).modules()}
    parameters = {weight for module in inside for weight in module.parameters(recurse=False)}
    rest = float_bytes(survey.model) - sum(one.numel() * one.element_size() for one in parameters)
    size = rest + sum(artifact.size_after for artifact in artifacts.values())
    rows = [
        ("network", plan.subject.model.spec),
        ("recipe", f"{plan.recipe.name} on {next(iter(artifacts.values())).backend}"),
        ("weights", sizes_text(float_bytes(survey.model), size)),
        ("coverage", f"{100 * result.coverage():.1f} % of layers, in {len(artifacts)} parts"),
    ]
    for path in survey.left:
        rows.append(("in no part", path))
    rows += score_rows(plan.evaluation, before, after)
    rows.append(("time", f"{result.seconds:.1f} s to compile"))
    for gap in survey.gaps:
        show.line(f"as written: {gap.path or 'the network itself'} ({gap.kind}): {gap.why}")
        show.line(f"   at {gap.where}")
        show.line(f"   {gap.hint}")
    run = str(plan.folder)
    first = next((plan.folder / "parts").iterdir())
    commands = [f"fxq verify {first}", f'fxq.load_parts("{run}", model)   # in Python']
    show_compile.summary(rows, run, commands)
