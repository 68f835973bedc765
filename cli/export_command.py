"""The options of ``fxq export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt


def export_command(
    run: opt.Run,
    backend: Annotated[
        str, typer.Option("--backend", metavar="NAME", help="A backend that writes files")
    ] = "onnx",
    flavor: Annotated[
        opt.Flavor,
        typer.Option(
            "--flavor",
            help="fast: int8 containers and integer kernels; packed: the same with 4-bit weights "
            "packed on disk; compact: INT4 and UINT4 throughout, computed in float",
        ),
    ] = opt.Flavor.FAST,
    opset: opt.Opset = None,
    static: Annotated[
        bool, typer.Option("--static", help="Fix the batch size to that of the example")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            show_default=False,
            help="The file; RUN/model.onnx, or RUN/model-FLAVOR.onnx, if not given",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file")] = False,
) -> None:
    """Write a run as a quantized ONNX model: standard operators, on the integers of the run."""
    from . import export

    export.run(
        export.Job(
            run=run,
            backend=backend,
            flavor=flavor.value,
            opset=opset,
            static=static,
            output=output,
            force=force,
        )
    )
