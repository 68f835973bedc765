"""The options of ``fxq report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt


def report_command(
    run: opt.Run,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            show_default=False,
            help="The file; RUN/report.html if not given",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file")] = False,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in a browser")] = False,
) -> None:
    """Write a run as one HTML page: its passes, its graph step by step, and every node."""
    from . import report

    report.run(run, output, force=force, open_it=open_it)
