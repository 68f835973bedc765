"""The folder ``OUTPUT.partial``, from which an interrupted ``fxq compile`` continues."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxq.recipe import Recipe


def folder_beside(output: Path, recipe: Recipe) -> Path | None:
    """Where long passes of a recipe keep how far they are; None where it has no such pass.

    Raises:
        ArtifactError: Something that fxq did not write is in that place.
    """
    from fxq.workspace import open_workspace

    if not any(one.resumable for one in recipe.passes):
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

    from . import show

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
        sentence = f"the same command continues where it was, from {folder}"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(sentence) from None
        show.notice(sentence)
        raise
    remove_workspace(folder)
