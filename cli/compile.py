"""``fxq compile``: a network becomes a run folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import ArtifactError, CaptureError, RecipeError
from fxq.zoo_entry import Normalization

from .options import Engine, Flavor, Print, default_folder

if TYPE_CHECKING:
    from fxq.compiler import Result
    from fxq.recipe import Recipe
    from fxq.trail.journal import Step

    from .load import Batches, Subject
    from .max_drop import Raised
    from .score import Evaluation, Score


@dataclass(frozen=True)
class Job:
    """What ``fxq compile`` was asked for; the fields are its options."""

    model: str
    recipe: str
    weights: Path | None = None
    calibration: str | None = None
    images: int | None = None
    evaluation: str | None = None
    eval_images: int | None = None
    settings: list[str] = field(default_factory=list)
    backend: str = "eager"
    options: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None
    force: bool = False
    fresh: bool = False
    batch_size: int = 64
    seed: int = 0
    leaves: list[str] = field(default_factory=list)
    printing: Print = Print.NONE
    normalization: Normalization | None = None
    input_shape: tuple[int, ...] | None = None
    accept_coverage: bool = False
    max_drop: float | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that was opened and checked before the work begins."""

    recipe: Recipe
    subject: Subject
    folder: Path
    unfinished: Path | None
    calibration: Batches | None
    evaluation: Evaluation | None


def run(job: Job, on_step: Callable[[Step], None] | None = None) -> None:
    """The network is compiled, measured and saved, and all of it told.

    Args:
        job: What was asked for.
        on_step: Called after every pass.
    """
    from . import compile_parts, failure, unfinished
    from .show_compile import Reporter, coverage_warning, simulation_warning

    plan = prepared(job)
    _check_trains_nothing(plan.recipe)
    announce(plan)
    with unfinished.kept(plan.unfinished, fresh=job.fresh):
        with Reporter(job.printing, on_step) as reporter:
            before = measured(plan, plan.subject.model.module, reporter)
            try:
                with failure.reproducible(job, plan.recipe, plan.folder, reporter):
                    result, raised = _compiled(job, plan, reporter)
            except CaptureError as whole:
                compile_parts.run(job, plan, whole, before, reporter)
                return
            after = measured(plan, result.module, reporter)
        result.artifact.metadata.update(metadata_of(job, plan, before, after))
        if raised is not None:
            result.artifact.metadata["raised"] = raised.to_json()
        result.artifact.save(plan.folder, force=job.force)
    _summarize(plan, result, before, after, raised)
    if result.artifact.simulation:
        simulation_warning(result.artifact.warnings)
    else:
        coverage_warning(result.artifact.warnings, job.accept_coverage)


def _check_trains_nothing(recipe: Recipe) -> None:
    """The recipe gives integers without training.

    Raises:
        RecipeError: It gives a network to be trained.
    """
    if recipe.training:
        raise RecipeError(
            f"{recipe.name} gives a network to be trained, not integers",
            hint=f"fxq train MODEL --recipe {recipe.name} trains it and writes the same run folder",
        )


def prepared(job: Job) -> Plan:
    """Cheap checks first: names, then the output folder, then the network and its data."""
    from fxq.recipe import Recipe
    from fxq.registry import find_backend

    from . import load, score, unfinished

    recipe = Recipe.load(job.recipe).with_settings(job.settings)
    find_backend(job.backend)
    folder = job.output or default_folder(_short_name(job.model), recipe.name)
    check_output(folder, force=job.force)
    partial = unfinished.folder_beside(folder, recipe)
    subject = load.load_subject(
        job.model,
        weights=job.weights,
        input_shape=job.input_shape,
        normalization=job.normalization,
        seed=job.seed,
    )
    calibration = calibration_for(
        recipe,
        subject,
        job.calibration,
        images=job.images,
        batch_size=job.batch_size,
        seed=job.seed,
    )
    evaluation = score.evaluation_of(
        subject, job.evaluation, limit=job.eval_images, batch_size=job.batch_size
    )
    return Plan(recipe, subject, folder, partial, calibration, evaluation)


def _short_name(spec: str) -> str:
    """The part of a network's name that a folder is named after."""
    path, _, name = spec.partition(":")
    if path.endswith(".py"):
        stem = Path(path).stem
        return f"{stem}-{name}" if name else stem
    return name or path


def check_output(folder: Path, *, force: bool) -> None:
    """The run can be written to this folder.

    Raises:
        ArtifactError: It cannot, or would overwrite something.
    """
    from fxq.run_folder import check_writable

    here = Path.cwd()
    if folder.resolve() in (here, *here.parents):
        raise ArtifactError(
            "the output folder is the current folder, or holds it",
            where=str(folder),
            hint="name a folder below the current one, for example -o runs/mine",
        )
    try:
        check_writable(folder, force=force)
        parent = next(place for place in folder.absolute().parents if place.exists())
    except OSError as error:
        raise ArtifactError(
            f"the output folder cannot be made: {error.strerror}",
            where=str(folder),
            hint="choose another folder with --output",
        ) from error
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ArtifactError(
            "the output folder cannot be made: its parent is not writable",
            where=str(parent),
            hint="choose another folder with --output",
        )


def calibration_for(
    recipe: Recipe,
    subject: Subject,
    data: str | None,
    *,
    images: int | None,
    batch_size: int,
    seed: int,
) -> Batches | None:
    """The batches a recipe calibrates on; None where it does not calibrate."""
    from .load import DEFAULT_IMAGES, calibration_of
    from .processes import share_of

    if not any(one.name == "calibrate" for one in recipe.passes):
        return None
    batches = calibration_of(
        subject,
        data,
        images=images,
        batch_size=batch_size,
        seed=seed,
        default=max(DEFAULT_IMAGES, *(one.wants_images for one in recipe.passes)),
    )
    return share_of(batches)


def _compiled(job: Job, plan: Plan, reporter: Any) -> tuple[Result, Raised | None]:
    """The compilation that was asked for, with layers raised where a largest drop was given."""
    data = plan.calibration and plan.calibration.data

    def compile_with(settings: Sequence[str], meter: Any) -> Result:
        return compiled(
            plan.subject,
            plan.recipe.with_settings(settings),
            data,
            backend=job.backend,
            options=job.options,
            leaves=job.leaves,
            reporter=meter,
            workspace=plan.unfinished,
        )

    if job.max_drop is None:
        return compile_with([], reporter), None
    from . import max_drop

    if data is None:
        raise RecipeError("--max-drop needs a recipe that calibrates", where=plan.recipe.name)
    data = data if isinstance(data, Sized) else list(data)  # it is read by every trial
    answers = max_drop.right_answers(plan.subject.model, data, reporter)
    raised = max_drop.raised(compile_with, answers, job.max_drop, reporter)
    return raised.result, raised


def compiled(
    subject: Subject,
    recipe: Recipe,
    calibration: Iterable[Any] | None,
    *,
    backend: str = "eager",
    options: dict[str, Any] | None = None,
    leaves: list[str] | None = None,
    reporter: Any = None,
    workspace: Path | None = None,
) -> Result:
    """A network through a recipe."""
    from fxq.compiler import compile as compile_model

    return compile_model(
        subject.model.module,
        subject.model.example_inputs,
        recipe,
        backend=backend,
        calibration=calibration,
        leaf_modules=leaves or (),
        on_step=None if reporter is None else reporter.step,
        progress=reporter,
        workspace=workspace,
        **(options or {}),
    )


def backend_options(
    engine: Engine | None, flavor: Flavor | None = None, opset: int | None = None
) -> dict[str, Any]:
    """The options of a backend that were given."""
    given = {
        "engine": engine and engine.value,
        "flavor": flavor and flavor.value,
        "opset": opset,
    }
    return {name: value for name, value in given.items() if value is not None}


def measured(plan: Plan, module: Any, reporter: Any) -> Score | None:
    """What a network scores; None where there is nothing to measure with."""
    return None if plan.evaluation is None else plan.evaluation.measure(module, reporter)


def announce(plan: Plan) -> None:
    """What is about to happen."""
    from . import show
    from .load import RANDOM

    model = plan.subject.model
    show.line(f"{model.spec}, weights: {plan.subject.weights}; recipe {plan.recipe.name}")
    if plan.subject.weights == RANDOM and not plan.recipe.training:
        show.notice("the weights are random: sizes and speed mean something, accuracy does not")
    if plan.calibration is not None:
        show.line(f"calibrating on {plan.calibration.source}")
        if plan.calibration.name == RANDOM:
            show.notice("random calibration is for trying speed and structure, not for accuracy")


def metadata_of(job: Job, plan: Plan, before: Score | None, after: Score | None) -> dict[str, Any]:
    """What ``fxq eval`` and ``fxq bench`` need to know later."""
    known = plan.subject.normalization
    model = {
        "spec": job.model,
        "weights": str(job.weights) if job.weights else plan.subject.weights,
        "input_shape": list(plan.subject.shape),
        "mean": list(known.mean) if known else None,
        "std": list(known.std) if known else None,
        "calibration": plan.calibration.source if plan.calibration else None,
        "calibrated": plan.calibration.name if plan.calibration else None,
        "images": job.images,
        "data": plan.evaluation.name if plan.evaluation else None,
        "seed": job.seed,
        "size": float_bytes(plan.subject.model.module),
    }
    scores = {
        name: score.to_json()
        for name, score in (("float", before), ("compiled", after))
        if score is not None
    }
    return {"model": model, "accuracy": scores}


def float_bytes(module: Any) -> int:
    """Bytes of the parameters of a network."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())


def folder_bytes(folder: Path) -> int:
    """Bytes of the weight file and the structure of a run, which are what is deployed."""
    total = 0
    for name in ("weights.safetensors", "structure.json", "model.onnx", "model.onnx.data"):
        with contextlib.suppress(OSError):
            total += (folder / name).stat().st_size
    return total


def _summarize(
    plan: Plan, result: Result, before: Score | None, after: Score | None, raised: Raised | None
) -> None:
    from . import show, show_compile

    artifact = result.artifact
    kind = artifact.metadata.get("engine") or artifact.metadata.get("flavor")
    rows = [
        ("network", plan.subject.model.spec),
        ("recipe", f"{plan.recipe.name} on {artifact.backend}" + (f", {kind}" if kind else "")),
        ("weights", sizes_text(float_bytes(plan.subject.model.module), artifact.size_after)),
        ("coverage", coverage_text(artifact.ledger)),
        ("any CPU", show_compile.proof_text(artifact)),
    ]
    rows += show_compile.placement_rows(result.journal)
    rows += raised.rows if raised is not None else []
    rows += score_rows(plan.evaluation, before, after)
    disk = show.size_text(folder_bytes(plan.folder))
    rows.append(("time", f"{result.seconds:.1f} s to compile; {disk} on disk"))
    run = str(plan.folder)
    commands = [f"fxq diff {run} --stat", f"fxq explain {run}", f"fxq bench {run}"]
    show_compile.summary(rows, run, commands)


def sizes_text(before: int, after: int) -> str:
    """The bytes of weights in float and afterwards, for people."""
    from . import show

    ratio = f", {before / after:.1f}x smaller" if after else ""
    return f"{show.size_text(before)} in float -> {show.size_text(after)}{ratio}"


def coverage_text(ledger: Any) -> str:
    """Where the nodes ended up, in counts."""
    layers = [entry for entry in ledger.entries if entry.layer]
    inside = sum(entry.where == "int8" for entry in layers)
    counts = ledger.counts()
    places = ", ".join(f"{count} {place}" for place, count in counts.items())
    return f"{inside} of {len(layers)} layers on integers; nodes: {places}"


def score_rows(
    evaluation: Evaluation | None, before: Score | None, after: Score | None
) -> list[tuple[str, str]]:
    """What was measured before and after."""
    from .score import difference

    if evaluation is None or before is None or after is None:
        return [("accuracy", "not measured; --eval DATA measures it before and after")]
    return [
        ("measured on", evaluation.source),
        ("float", str(before)),
        ("compiled", f"{after}, {difference(before, after)}"),
    ]
