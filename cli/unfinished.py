"""The folder ``OUTPUT.partial``, from which an interrupted command continues."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxq.recipe import Recipe

_ABOUT_TRAINING = """\
fxq keeps here how far a training is. The same command continues where it was.
The folder goes away when the network is written; it may be deleted at any time.
"""


def folder_beside(output: Path, recipe: Recipe) -> Path | None:
    """Where a recipe that takes long keeps how far it is; None where it has no such pass.

    Raises:
        ArtifactError: Something that fxq did not write is in that place.
    """
    from fxq.workspace import open_workspace

    if not recipe.training and not any(one.resumable for one in recipe.passes):
        return None
    return open_workspace(output.with_name(f"{output.name}.partial"))


@contextlib.contextmanager
def kept(folder: Path | None, *, fresh: bool) -> Iterator[None]:
    """The folder is gone when the body ends well; else the user is told what it is for.

    Args:
        folder: The folder; None for nothing.
        fresh: Whether what an earlier run left there is removed first.
    """
    from fxq.workspace import holds_state, remove_workspace

    if folder is None:
        yield
        return
    if fresh:
        remove_workspace(folder)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not holds_state(folder):
            remove_workspace(folder)
            raise
        _tell(error, folder)
        raise
    remove_workspace(folder)


@contextlib.contextmanager
def training_kept(folder: Path, *, fresh: bool) -> Iterator[Path]:
    """The same for a training, which keeps its files in a folder inside.

    Yields:
        The folder for the files of the training.
    """
    from fxq.training.checkpoint import FILE, FOLDER
    from fxq.workspace import MARKER

    inside = folder / FOLDER
    if fresh:
        _remove_training(folder)
    inside.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(_ABOUT_TRAINING, encoding="utf-8")
    try:
        yield inside
    except (Exception, KeyboardInterrupt) as error:
        if not (inside / FILE).exists():
            _remove_training(folder)
            raise
        _tell(error, folder)
        raise
    _remove_training(folder)


def _tell(error: BaseException, folder: Path) -> None:
    """The user knows how to continue.

    Raises:
        KeyboardInterrupt: The error was one; it says so then.
    """
    from . import show

    sentence = f"the same command continues where it was, from {folder}"
    if isinstance(error, KeyboardInterrupt):
        raise KeyboardInterrupt(sentence) from None
    show.notice(sentence)


def _remove_training(folder: Path) -> None:
    """What fxq wrote into the folder of a training is gone."""
    from fxq.training.checkpoint import FILE, FOLDER
    from fxq.training.log import CURVES, LOG, STEPS
    from fxq.workspace import is_workspace, remove_workspace

    if not is_workspace(folder):
        return
    inside = folder / FOLDER
    with contextlib.suppress(OSError):
        for name in (FILE, LOG, STEPS, CURVES):
            for path in inside.glob(f"{name}*"):
                path.unlink()
        inside.rmdir()
    remove_workspace(folder)
