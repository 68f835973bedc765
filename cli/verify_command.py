"""The options of ``fxq verify``."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as opt


def verify_command(
    run: opt.Run,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            metavar="DATA",
            show_default=False,
            help="Images to compare on, a model.py with eval_data or calibration_data, or "
            "`random`; what the run was measured on if not given, else random inputs",
        ),
    ] = None,
    images: Annotated[
        int, typer.Option("--images", "-n", min=1, help="Images whose outputs are compared")
    ] = 256,
    layer_images: Annotated[
        int | None,
        typer.Option(
            "--layers-images",
            min=1,
            show_default=False,
            help="Images whose every layer is compared with the reference, which is slow; "
            "8 if not given",
        ),
    ] = None,
    batch_size: opt.BatchSize = 64,
    engine: Annotated[
        opt.Engine, typer.Option("--engine", help="Engine of the eager module; fbgemm is exact")
    ] = opt.Engine.FBGEMM,
    flavor: Annotated[
        opt.Flavor | None,
        typer.Option(
            "--flavor",
            show_default=False,
            help="Flavor of the ONNX model; that of the run's model.onnx if not given, else fast",
        ),
    ] = None,
    runtime: Annotated[
        str, typer.Option("--runtime", metavar="NAME,…", help="What to compare: `eager`, `onnx`")
    ] = "eager,onnx",
    mean: opt.Mean = None,
    std: opt.Std = None,
    threads: opt.Threads = None,
    everything: Annotated[
        bool, typer.Option("--all", help="A row for every layer, not only for those that differ")
    ] = False,
    worst: Annotated[
        int, typer.Option("--worst", metavar="K", min=0, help="Rows of layers that differ")
    ] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for other programs")] = False,
) -> None:
    """Compare a run, layer by layer, with the integer reference: eager module and ONNX Runtime.

    Exit code 2 where something differs that must not: fbgemm in any layer on integers, ONNX Runtime
    in the convolutions and linears of flavors fast and packed, or in more than 1 of 1000 argmaxes.
    """
    from . import verify
    from .load import set_threads
    from .verify_runtimes import check_runtimes

    set_threads(threads)
    request = verify.Request(
        run=run,
        data=data,
        images=images,
        layer_images=layer_images,
        batch_size=batch_size,
        engine=engine,
        flavor=flavor,
        runtimes=check_runtimes(opt.names(runtime)),
        normalization=opt.normalization(mean, std),
        everything=everything,
        worst=worst,
        as_json=as_json,
    )
    verify.run(request)
