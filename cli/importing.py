"""``fxq import``: a checkpoint of APoT's authors becomes a run folder."""

from __future__ import annotations

import re
from collections.abc import Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import DataError

from . import compile as compiling
from .train import check_recipe

if TYPE_CHECKING:
    from fxq.artifact import Artifact
    from fxq.compiler import Result
    from fxq.recipe import Recipe

    from .score import Score


def run(job: compiling.Job, checkpoint: Path) -> None:
    """The network is imported, lowered, measured and saved, and all of it told.

    With the authors' own placement, which no integer kernels can run, it is only measured.
    """
    from fxq.compiler import lower

    from .show_compile import Reporter

    plan = _prepared(job, checkpoint)
    if _is_as_published(plan.recipe):
        _measure_only(job, plan, checkpoint)
        return
    with Reporter() as reporter:
        published = _published_score(job, plan, checkpoint, reporter)
        result = _imported(job, plan, checkpoint, reporter, on_step=reporter.step)
        artifact = lower(result.module, job.backend, **job.options)
        after = compiling.measured(plan, artifact.module, reporter)
    about = compiling.metadata_of(job, plan, None, after)
    if published is not None:
        about["accuracy"]["published"] = published.to_json()
    artifact.metadata.update(about)
    artifact.save(plan.folder, force=job.force)
    _summarize(plan, artifact, published, after)


def _prepared(job: compiling.Job, checkpoint: Path) -> compiling.Plan:
    """The checkpoint is one to import, and the rest is as for ``fxq compile``."""
    from fxq.apot_checkpoint import check_clips
    from fxq.weight_file import read_weights

    from . import show

    check_recipe(job.recipe)
    check_clips(read_weights(checkpoint), checkpoint)
    plan = compiling.prepared(job)
    data = plan.calibration
    if data is not None and not isinstance(data.data, Sized):  # it is read twice
        plan = replace(plan, calibration=replace(data, data=list(data.data)))
    plan = replace(plan, subject=replace(plan.subject, weights=str(checkpoint)))
    compiling.announce(plan)
    told, bits = bits_in(checkpoint), _weight_bits(plan.recipe)
    if told is not None and told not in bits:
        show.notice(
            f"the checkpoint's name says {told} bits, and {plan.recipe.name} has "
            f"{' and '.join(map(str, sorted(bits)))}: if that is right, its answers mean nothing"
        )
    return plan


def bits_in(checkpoint: Path) -> int | None:
    """The bits that a checkpoint's name tells, or its folder's; None where they do not.

    Example:
        >>> bits_in(Path("result/res20_4bit/model_best.pth.tar"))
        4
    """
    found = re.findall(r"(\d)[-_ ]?bit", "/".join(checkpoint.parts[-2:]), re.IGNORECASE)
    return int(found[-1]) if found else None


def _weight_bits(recipe: Recipe) -> set[int]:
    return {one.weight_bits for one in recipe.passes if hasattr(one, "weight_bits")}


def _is_as_published(recipe: Recipe) -> bool:
    """Whether the recipe quantizes only what the authors do."""
    from fxq.apot_checkpoint import AS_PUBLISHED

    name, _, setting = AS_PUBLISHED.partition(".")
    option, _, value = setting.partition("=")
    return any(getattr(one, option, None) == value for one in recipe.passes if one.name == name)


def _imported(
    job: compiling.Job,
    plan: compiling.Plan,
    checkpoint: Path,
    reporter: Any,
    **options: Any,
) -> Result:
    from fxq.apot_checkpoint import import_apot

    return import_apot(
        plan.subject.model.module,
        checkpoint,
        plan.subject.model.example_inputs,
        plan.recipe,
        calibration=plan.calibration.data if plan.calibration else (),
        leaf_modules=job.leaves,
        progress=reporter,
        backend=job.backend,
        **job.options,
        **options,
    )


def _published_score(
    job: compiling.Job, plan: compiling.Plan, checkpoint: Path, reporter: Any
) -> Score | None:
    """What the network scores as its authors run it; None where there is nothing to measure with.

    It is computed in float, because nothing else can.
    """
    from fxq.apot_checkpoint import AS_PUBLISHED

    if plan.evaluation is None:
        return None
    theirs = replace(plan, recipe=plan.recipe.with_settings([AS_PUBLISHED]))
    module: Any = _imported(job, theirs, checkpoint, reporter).module
    module.exact = False
    return plan.evaluation.measure(module, reporter)


def _measure_only(job: compiling.Job, plan: compiling.Plan, checkpoint: Path) -> None:
    """What the network scores as its authors run it has been told; nothing is written.

    Raises:
        DataError: There is nothing to measure with.
    """
    from . import show
    from .show_compile import Meter, score

    if plan.evaluation is None:
        raise DataError(
            "a network quantized as published can only be measured, and there is nothing to "
            "measure with",
            hint="pass --eval with an .npz file or a folder of images",
        )
    with Meter() as meter:
        found = _published_score(job, plan, checkpoint, meter)
    score(plan.evaluation.source, str(found))
    show.notice(
        "it is not lowered, and no run is written: the authors leave the network's input, its last "
        "layer's input and residual sums in float"
    )


def _summarize(
    plan: compiling.Plan, artifact: Artifact, published: Score | None, after: Score | None
) -> None:
    from . import show, show_compile

    before = compiling.float_bytes(plan.subject.model.module)
    rows = [
        ("network", plan.subject.model.spec),
        ("checkpoint", plan.subject.weights),
        ("recipe", f"{plan.recipe.name} on {artifact.backend}"),
        ("weights", compiling.sizes_text(before, artifact.size_after)),
        ("coverage", compiling.coverage_text(artifact.ledger)),
        *_score_rows(plan, published, after),
        ("disk", show.size_text(compiling.folder_bytes(plan.folder))),
    ]
    run = str(plan.folder)
    show.line()
    show.facts(rows, f"imported to {run}", "green")
    show.lines(["", *(f"  fxq {name} {run}" for name in ("verify", "export", "bench"))])
    if artifact.simulation:
        show_compile.simulation_warning(artifact.warnings)
    else:
        show_compile.coverage_warning(artifact.warnings, accepted=False)


def _score_rows(
    plan: compiling.Plan, published: Score | None, after: Score | None
) -> list[tuple[str, str]]:
    from .score import difference

    if plan.evaluation is None or published is None or after is None:
        return [("accuracy", "not measured; --eval DATA measures it before and after")]
    return [
        ("measured on", plan.evaluation.source),
        ("as published", str(published)),
        ("on integers", f"{after}, {difference(published, after)}"),
    ]
