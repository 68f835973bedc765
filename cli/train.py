"""``fxq train``: a network is trained with its quantizers, and becomes a run folder."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import RecipeError, TrainingError

from . import compile as compiling
from . import load

if TYPE_CHECKING:
    from torch import nn

    from fxq.artifact import Artifact
    from fxq.compiler import Result
    from fxq.training import Training, TrainingOptions
    from fxq.world import World

    from .load import Subject
    from .score import Evaluation, Score
    from .show_train import TrainingMeter


@dataclass(frozen=True)
class Request:
    """What ``fxq train`` was asked for.

    Attributes:
        job: What it shares with ``fxq compile``.
        options: How to train.
        init: A training to begin with the weights of.
        images: Only so many images to train on.
        device: Where to train.
        checkpoint_seconds: Time between checkpoints within an epoch.
    """

    job: compiling.Job
    options: TrainingOptions
    init: Path | None = None
    images: int | None = None
    device: str = "cpu"
    checkpoint_seconds: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        plan: The network, its data and its recipe.
        training: The training.
        artifact: The trained network on integers.
        float_score: What the float network scored, where something was measured.
        trained: What the trained module scored.
        lowered: What it scored on integers.
    """

    plan: compiling.Plan
    training: Training
    artifact: Artifact
    float_score: Score | None
    trained: Score | None
    lowered: Score | None


def run(request: Request) -> None:
    """The network is trained, lowered and saved, and all of it told, by the first process."""
    from fxq.world import process_group

    check_device(request.device)
    check_recipe(request.job.recipe)
    with process_group(request.device) as world:
        try:
            _run(request, world)
        except KeyboardInterrupt:
            if world.is_first:
                raise
            raise SystemExit(130) from None


def check_recipe(name: str) -> None:
    """The recipe is one that trains.

    Raises:
        RecipeError: It is not; the hint names those that are.
    """
    from fxq.recipe import Recipe, builtin_files

    if Recipe.load(name).training:
        return
    known = [one for one in builtin_files() if Recipe.load(one).training]
    raise RecipeError(
        f"{name} quantizes without training",
        hint=f"recipes that train: {', '.join(sorted(known))}; fxq compile takes the others",
    )


def check_device(device: str) -> None:
    """The device is there.

    Raises:
        TrainingError: It is not.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("there is no CUDA device", hint="leave out --device cuda")


def _run(request: Request, world: World) -> None:
    from fxq.training.checkpoint import FOLDER

    from . import show_train

    job, plan = request.job, compiling.prepared(request.job)
    data = training_data(plan.subject, job.calibration, request.images, job.seed)
    assert plan.unfinished is not None  # the recipe trains
    if world.is_first:
        compiling.announce(plan)
        show_train.announce(data.source, request.options, world.processes)
    with _kept(plan.unfinished, world, fresh=job.fresh) as folder:
        outcome = _outcome(request, plan, data, folder, world)
        if outcome is None:
            return
        scores = (outcome.float_score, outcome.lowered)
        about = compiling.metadata_of(job, plan, *scores)
        if outcome.trained is not None:
            about["accuracy"]["trained"] = outcome.trained.to_json()
        outcome.artifact.metadata.update(about)
        outcome.artifact.save(plan.folder, force=job.force, attached={FOLDER: folder})
    show_train.summary(outcome)


@contextlib.contextmanager
def _kept(folder: Path, world: World, *, fresh: bool) -> Any:
    """The folder of the training's files, in the care of the first process."""
    from fxq.training.checkpoint import FOLDER

    from .unfinished import training_kept

    if not world.is_first:
        world.wait()
        yield folder / FOLDER
        return
    with training_kept(folder, fresh=fresh) as inside:
        world.wait()  # nobody looks for a checkpoint that is about to be removed
        yield inside


# ---- data --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """Samples to train on, and where they come from, for people."""

    samples: Any
    source: str


def training_data(
    subject: Subject, data: str | None, images: int | None, seed: int
) -> TrainingData:
    """The images at a path, else what the network's file or zoo entry brings.

    Args:
        subject: The network.
        data: A path, or None.
        images: Only so many of them.
        seed: Draws them.

    Raises:
        TrainingError: There is nothing to train on.
    """
    import torch
    from torch.utils.data import Subset

    own = load.own_train_data(subject) if data is None else None
    found = load.open_data(subject, data, "train") if own is None else own
    if found is None:
        raise TrainingError(
            "there is nothing to train on",
            where=subject.model.spec,
            hint="pass --data with an .npz file or a folder of images, or define train_data in "
            "the model file",
        )
    count = len(found) if images is None else min(images, len(found))
    source = load.described(count, found)
    if count == len(found):
        return TrainingData(found, source)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return TrainingData(Subset(found, order[:count].tolist()), source)


# ---- training ----------------------------------------------------------------------------------


def _outcome(
    request: Request, plan: compiling.Plan, data: TrainingData, folder: Path, world: World
) -> Outcome | None:
    """The trained and lowered network; None in all processes but the first."""
    from fxq.compiler import lower

    from .show_train import TrainingMeter

    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(TrainingMeter()) if world.is_first else None
        before = compiling.measured(plan, plan.subject.model.module, meter) if meter else None
        result = _compiled(request.job, plan, meter)
        training, trained = _trained(request, plan, data, folder, result, meter)
        if meter is None:
            return None
        artifact = lower(result.module, request.job.backend, **request.job.options)
        after = compiling.measured(plan, artifact.module, meter)
    return Outcome(plan, training, artifact, before, trained, after)


def _compiled(job: compiling.Job, plan: compiling.Plan, meter: TrainingMeter | None) -> Result:
    return compiling.compiled(
        plan.subject,
        plan.recipe,
        plan.calibration and plan.calibration.data,
        backend=job.backend,
        options=job.options,
        leaves=job.leaves,
        reporter=meter,
    )


def _trained(
    request: Request,
    plan: compiling.Plan,
    data: TrainingData,
    folder: Path,
    result: Result,
    meter: TrainingMeter | None,
) -> tuple[Training, Score | None]:
    """The training, and what the module scored after its last epoch."""
    from fxq.training import Watch, fit, initialize
    from fxq.training.checkpoint import FILE

    module = result.module
    if request.init is not None and not (folder / FILE).exists():
        initialize(module, request.init)
    measure = _Measure(plan.evaluation, meter)
    training = fit(
        module.to(_own_device(request.device)),
        data.samples,
        request.options,
        teacher=plan.subject.model.module if request.options.distill else None,
        evaluate=measure if plan.evaluation is not None else None,
        folder=folder,
        identity=_identity(request, plan, data),
        checkpoint_seconds=request.checkpoint_seconds,
        watch=None if meter is None else Watch(meter.moment, meter.epoch, meter.tell),
    )
    if meter is not None and plan.evaluation is not None and measure.last is None:
        measure(module)  # it was trained to the end before
    return training, measure.last


def _own_device(device: str) -> str:
    """The device of this process."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


@dataclass
class _Measure:
    """Measures a module after each epoch, and remembers what it scored last."""

    evaluation: Evaluation | None
    meter: Callable[[str, int, int | None], None] | None
    last: Score | None = field(default=None)

    def __call__(self, module: nn.Module) -> float | None:
        from .ablate import figure

        if self.evaluation is None:
            return None
        own = not self.evaluation.name  # data of the model file is on the CPU
        self.last = self.evaluation.measure(
            copy.deepcopy(module).cpu() if own else module, self.meter
        )
        return self.last.correct / self.last.total if self.last.total else figure(self.last)


def _identity(request: Request, plan: compiling.Plan, data: TrainingData) -> dict[str, Any]:
    """What a checkpoint must agree with, besides what `fit` sees."""
    from fxq.workspace import digest

    known, model = plan.subject.normalization, plan.subject.model
    return {
        "model": model.spec,
        "recipe": plan.recipe.to_toml(),
        "weights": digest(model.module.state_dict()),
        "init": None if request.init is None else str(request.init),
        "data": data.source,
        "calibration": None if plan.calibration is None else plan.calibration.source,
        "normalization": known and [list(known.mean), list(known.std)],
    }
