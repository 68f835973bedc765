"""``fxq report``: a saved run as one page to look at."""

from __future__ import annotations

import webbrowser
from pathlib import Path


def run(name: str, output: Path | None, *, force: bool, open_it: bool) -> None:
    """The page is written, and opened where that was asked for."""
    from fxq.report import write

    from . import show
    from .trail import run_folder

    path = write(run_folder(name), output, force=force)
    show.line(f"{path}, {show.size_text(path.stat().st_size)}")
    if open_it and not webbrowser.open(path.resolve().as_uri()):
        show.notice("no browser could be opened; open the file in one")
