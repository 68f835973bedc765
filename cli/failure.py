"""What a failed compilation leaves behind, and ``fxq replay``, which runs it again.

The folder ``OUTPUT.failed`` holds the journal of the passes that ran, whose last snapshot is the
last good program; the whole recipe; the recipe of the passes that remain; and the arguments. A
program in the middle of a recipe is not saved with its weights: a replay computes it again, and
says where it comes out differently.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import ArtifactError, FxqError, PassError, RequirementError, VerifyError
from fxq.zoo_entry import Normalization

from .options import Print

if TYPE_CHECKING:
    from fxq.recipe import Recipe
    from fxq.trail.journal import Journal, Step

    from .compile import Job
    from .show_compile import Reporter

FILE, WHOLE, REMAINING = "replay.json", "recipe.toml", "remaining.toml"
_PATHS = ("weights", "calibration", "evaluation", "output")


@contextlib.contextmanager
def reproducible(job: Job, recipe: Recipe, folder: Path, reporter: Reporter) -> Iterator[None]:
    """Where a pass fails in the body, the error names the command that runs it again.

    Args:
        job: What was asked for.
        recipe: Its recipe, with its settings.
        folder: The run folder; what is left behind goes beside it.
        reporter: Knows the passes that ran.
    """
    try:
        yield
    except (PassError, VerifyError) as error:
        place = folder.with_name(f"{folder.name}.failed")
        if not isinstance(error, RequirementError) and _is_free(place):
            with contextlib.suppress(OSError):  # the error itself matters more
                leave(place, job, recipe, reporter.steps, error)
                again = f"fxq replay {place} runs it again"
                error.hint = f"{error.hint}\n        {again}" if error.hint else again
        raise


def _is_free(place: Path) -> bool:
    """Whether nothing is there but what an earlier failure left."""
    with contextlib.suppress(OSError):
        return not place.exists() or (place / FILE).is_file() or not any(place.iterdir())
    return False


def leave(place: Path, job: Job, recipe: Recipe, steps: list[Step], error: FxqError) -> None:
    """The folder holds what a replay needs.

    Args:
        place: The folder.
        job: What was asked for.
        recipe: Its recipe, with its settings.
        steps: The passes that ran.
        error: Why the next one failed.
    """
    from fxq.registry import plugin_files
    from fxq.trail.journal import Journal

    done = len(steps)
    Journal(steps).save(place)
    rest = dataclasses.replace(recipe, passes=recipe.passes[done:])
    (place / WHOLE).write_text(recipe.to_toml(), encoding="utf-8")
    (place / REMAINING).write_text(rest.to_toml(), encoding="utf-8")
    data = {
        "fxq": version("fxq"),
        "failed": recipe.passes[min(done, len(recipe.passes) - 1)].name,
        "error": str(error),
        "plugins": [str(path) for path in plugin_files()],
        "job": _job_to_json(job),
    }
    (place / FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _job_to_json(job: Job) -> dict[str, Any]:
    """The arguments; names of files are made absolute, the recipe is beside them."""
    data = dataclasses.asdict(job)
    for name in _PATHS:
        data[name] = data[name] and _absolute(str(data[name]))
    file, colon, name = job.model.partition(":")
    data["model"] = f"{_absolute(file)}{colon}{name}" if file.endswith(".py") else job.model
    return data | {"printing": job.printing.value, "settings": [], "recipe": ""}


def _absolute(text: str) -> str:
    """A file that exists by its absolute path; other words, such as ``random``, as they are."""
    return str(Path(text).resolve()) if Path(text).exists() or "/" in text else text


# ---- replay ------------------------------------------------------------------------------------


def replay(folder: Path, *, verbose: bool) -> None:
    """The compilation has been run again; where it went another way, that was told.

    Args:
        folder: What a failed compilation left behind.
        verbose: Whether the changed nodes are printed after each pass.
    """
    from fxq.trail.journal import Journal

    from . import compile as work
    from . import show
    from .load import load_plugins

    data, job = _read(folder)
    known = Journal.load(folder)
    load_plugins([Path(path) for path in data["plugins"]])
    show.line(f"{len(known)} passes ran before {data['failed']} failed; all are run again")
    shown = Print.CHANGED if verbose else Print.NONE
    job = dataclasses.replace(job, recipe=str(folder / WHOLE), printing=shown, force=True)
    work.run(job, on_step=_Compared(known))


class _Compared:
    """Tells the first pass that leaves another program than it left when it was recorded."""

    def __init__(self, known: Journal) -> None:
        self._known, self._done, self._told = list(known), 0, False

    def __call__(self, step: Step) -> None:
        """One more pass has run."""
        from . import show

        self._done += 1
        if self._told or self._done > len(self._known):
            return
        if step.after != self._known[self._done - 1].after:
            self._told = True
            show.notice(f"{step.name} leaves another program than in the record")


def _read(folder: Path) -> tuple[dict[str, Any], Job]:
    """What a failure left behind.

    Raises:
        ArtifactError: The folder is no such thing, or damaged.
    """
    from .compile import Job

    path = folder / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        known = dict(data["job"])
        for name in ("weights", "output"):
            known[name] = Path(known[name]) if known[name] else None
        if known["normalization"]:
            known["normalization"] = Normalization(
                tuple(known["normalization"]["mean"]), tuple(known["normalization"]["std"])
            )
        known["input_shape"] = tuple(known["input_shape"]) if known["input_shape"] else None
        known["printing"] = Print(known["printing"])
        return {"failed": str(data["failed"]), "plugins": list(data["plugins"])}, Job(**known)
    except FileNotFoundError as error:
        raise ArtifactError(
            "this is not what a failed compilation leaves behind",
            where=str(folder),
            hint="give the folder RUN.failed that fxq compile named",
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"the replay cannot be read: {error}", where=str(path)) from error
