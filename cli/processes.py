"""``fxq compile`` in several processes, which ``torchrun`` starts: each calibrates on its share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fxq.errors import CaptureError, RecipeError

if TYPE_CHECKING:
    from fxq.trail.journal import Step

    from .compile import Job
    from .load import Batches


def run(job: Job, on_step: Callable[[Step], None] | None = None) -> None:
    """The network is compiled by all processes; the first one measures, saves and tells.

    Args:
        job: What was asked for.
        on_step: Called after every pass.

    Raises:
        RecipeError: Several processes cannot do what was asked for.
    """
    from fxq.world import process_group

    from . import compile as compiling

    with process_group("cpu") as world:
        if world.processes > 1 and job.max_drop is not None:
            raise RecipeError(
                "--max-drop searches in one process", hint="start fxq without torchrun"
            )
        if world.is_first:
            compiling.run(job, on_step)
        else:
            _assist(job)


def _assist(job: Job) -> None:
    """The same compilation, of which nothing is kept."""
    from fxq.parts.compilation import compile_parts

    from . import compile as compiling
    from . import show

    show.be_silent()
    plan = compiling.prepared(replace(job, evaluation=None))
    model, data = plan.subject.model, plan.calibration and plan.calibration.data
    try:
        compiling.compiled(
            plan.subject,
            plan.recipe,
            data,
            backend=job.backend,
            options=job.options,
            leaves=job.leaves,
        )
    except CaptureError:
        compile_parts(
            model.module,
            model.example_inputs,
            plan.recipe,
            backend=job.backend,
            calibration=data,
            leaf_modules=job.leaves,
            **job.options,
        )


def share_of(batches: Batches) -> Batches:
    """Every so many-th batch, where several processes read them; all of them in one."""
    from fxq.world import World

    world = World.current()
    if world.processes == 1:
        return batches
    data, turn = batches.data, slice(world.rank, None, world.processes)
    if isinstance(data, Iterator):  # it can be read once only, and so can its share
        return replace(batches, data=itertools.islice(data, turn.start, None, turn.step))
    kind = _SizedShare if isinstance(data, Sized) else _Share
    return replace(batches, data=kind(data, turn))


class _Share:
    """The batches of one process, those of all taking turns."""

    def __init__(self, data: Iterable[Any], turn: slice) -> None:
        self._data, self._turn = data, turn

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._data), self._turn.start, None, self._turn.step)


class _SizedShare(_Share):
    """The same, of a known number."""

    def __len__(self) -> int:
        assert isinstance(self._data, Sized)
        return len(range(len(self._data))[self._turn])
