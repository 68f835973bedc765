"""The options of ``fxq replay``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt


def replay_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            show_default=False,
            help="The folder RUN.failed that a failed fxq compile left behind",
        ),
    ],
    verbose: opt.Verbose = False,
    threads: opt.Threads = None,
) -> None:
    """Run a compilation again that failed in a pass, and say where it goes another way.

    The passes before are computed again from the same arguments and data. Where the failure is
    gone, the run folder is written.
    """
    from . import failure
    from .load import set_threads

    set_threads(threads)
    failure.replay(folder, verbose=verbose)
