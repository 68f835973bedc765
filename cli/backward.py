"""``fxq backward``: the graph of a training step, before and after a recipe rewrote it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fxq.errors import TrainingError

from . import load, show, show_trail

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fxq.trail.journal import Journal
    from fxq.trail.snapshot import Snapshot


@dataclass(frozen=True)
class Request:
    """What ``fxq backward`` was asked for; the fields are its options."""

    model: str
    recipe: str
    settings: list[str]
    weights: Path | None
    trained: Path | None
    input_shape: tuple[int, ...] | None
    batch_size: int
    seed: int


def run(request: Request, *, view: str) -> None:
    """The graph, or what changed in it, has been told."""
    from fxq.trail.delta import compare
    from fxq.trail.joint import joint_snapshot

    subject = load.load_subject(
        request.model,
        weights=request.weights,
        input_shape=request.input_shape,
        seed=request.seed,
    )
    batch = _batch(subject, request.batch_size, request.seed)
    before = joint_snapshot(subject.model.module, *batch)
    if view == "float":
        show_trail.graph(before, digests=False)
        return
    after = joint_snapshot(_rewritten(subject, request), *batch)
    if view == "full":
        show_trail.graph(after, digests=False)
        return
    delta = compare(before, after)
    show.line(f"a training step of {request.model}, float and {request.recipe}: {delta.summary()}")
    for change in delta.changes:
        for line in show_trail.change_lines(change, digests=False):
            show.line(line)
    show.line(_widths(after))


def _batch(subject: load.Subject, size: int, seed: int) -> tuple[torch.Tensor, ...]:
    """As many copies of the example as make a batch, with noise where they are no tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    made = []
    for value in subject.model.example_inputs:
        batch = value[:1].expand(size, *value.shape[1:]).contiguous()
        noise = torch.randn(batch.shape, generator=generator)
        made.append(batch + noise if batch.is_floating_point() else batch)
    return tuple(made)


def _rewritten(subject: load.Subject, request: Request) -> nn.Module:
    """The module that a recipe gives, with the widths of a training where one is given."""
    import fxq

    from .train import check_recipe

    check_recipe(request.recipe)
    made = fxq.compile(
        subject.model.module,
        subject.model.example_inputs,
        request.recipe,
        calibration=[subject.model.example_inputs],
        settings=request.settings,
        check=False,
    )
    if request.trained is not None:
        _restore(made.module, request.trained)
    return made.module


def _checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a training that is done, or under way; None where there is none."""
    from fxq.training.checkpoint import FILE, FOLDER

    runs = (folder, folder.with_name(f"{folder.name}.partial"))
    return next((file for run in runs if (file := run / FOLDER / FILE).is_file()), None)


def _restore(module: nn.Module, folder: Path) -> None:
    from fxq.training.checkpoint import Checkpoint

    found = _checkpoint(folder)
    if found is None:
        raise TrainingError(
            "there is no checkpoint of a training",
            where=str(folder),
            hint="give a run of fxq train",
        )
    state = Checkpoint.load(found).model
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise TrainingError(
            "the checkpoint is of another network or recipe",
            where=str(found),
            hint="give the model and the recipe that were trained",
        ) from error


# ---- runs --------------------------------------------------------------------------------------

BATCH = 4
"""How many samples the step of a run is traced with."""


def trained_journal(run: str) -> Journal:
    """The journal of a run of ``fxq train``, up to what was trained.

    Raises:
        ArtifactError: There is no such run, or it does not say what network it is of.
        RecipeError: Its recipe does not train.
    """
    from fxq.trail.journal import Journal

    from .analyze import Request as Asked
    from .analyze import of_run, recipe_of
    from .trail import load_journal
    from .train import check_recipe

    journal = load_journal(run)
    asked = of_run(Asked(run))
    check_recipe(asked.recipe)
    return Journal(journal.steps[: len(recipe_of(asked).passes)])


def step_of_run(run: str, position: int) -> Snapshot:
    """The training step of a run's network after so many passes; 0 is the float network's.

    The passes are run again. After the last of them the network is as it was trained to be.

    Raises:
        ArtifactError: The run does not say what network it is of.
        TrainingError: Its checkpoint is of another network.
        CaptureError: The step cannot be traced.
    """
    import fxq
    from fxq.trail.joint import joint_snapshot

    from .analyze import Request as Asked
    from .analyze import calibration_data, of_run, recipe_of, subject_of

    asked = of_run(Asked(run))
    recipe, subject = recipe_of(asked), subject_of(asked)
    batch = _batch(subject, BATCH, asked.seed)
    if position == 0:
        return joint_snapshot(subject.model.module, *batch)
    some = replace(recipe, passes=recipe.passes[:position])
    made = fxq.compile(
        subject.model.module,
        subject.model.example_inputs,
        some,
        calibration=calibration_data(asked, some, subject) or [subject.model.example_inputs],
        check=False,
    )
    if some == recipe and _checkpoint(Path(run)) is not None:
        _restore(made.module, Path(run))
    return joint_snapshot(made.module, *batch)


def _widths(step: Snapshot) -> str:
    """How many quantizers have how many bits.

    Example:
        >>> from fxq.trail.snapshot import NodeRecord, Snapshot
        >>> node = NodeRecord("q", "fxq.quantize", ("x",), "8 bits of 2**-3")
        >>> _widths(Snapshot((node,)))
        '1 quantizer of 8 bits'
    """
    bits = [int(n.arguments.split()[0]) for n in step.nodes if n.op == "fxq.quantize"]
    counts = {width: bits.count(width) for width in sorted(set(bits))}
    return ", ".join(
        f"{show.plural(n, 'quantizer')} of {width} bits" for width, n in counts.items()
    )
