"""The options of ``fxq ablate``."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as opt


def ablate_command(
    model: opt.Model,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME|FILE",
            show_default=False,
            rich_help_panel="Compilation",
            help="What the settings change; aciq-paper-4w4a for Table 3, else aciq-4bit",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="PASS.OPTION=A,B,…",
            show_default=False,
            rich_help_panel="Compilation",
            help="Values to try of an option, named as for --set; every combination is run; "
            "repeatable",
        ),
    ] = None,
    table3: Annotated[
        bool,
        typer.Option(
            "--table3",
            show_default=False,
            rich_help_panel="Compilation",
            help="The 16 combinations of ACIQ's Table 3: clipping, bits per channel of values, "
            "bits per channel of weights, bias correction; what is run without --option",
        ),
    ] = False,
    settings: opt.Settings = None,
    weights: opt.Weights = None,
    input_shape: opt.InputShape = None,
    plugin: opt.Plugin = None,
    calibration: opt.Calibration = None,
    images: opt.Images = None,
    evaluation: opt.Eval = None,
    eval_images: opt.EvalImages = None,
    batch_size: opt.BatchSize = 64,
    mean: opt.Mean = None,
    std: opt.Std = None,
    seeds: Annotated[
        str,
        typer.Option(
            "--seeds",
            metavar="N,…",
            rich_help_panel="Data",
            help="Each combination is run once per seed, which draws its calibration images; the "
            "first draws random weights",
        ),
    ] = "0",
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            show_default=False,
            rich_help_panel="Output",
            help="Folder of ablation.csv, .json and .png; ablations/MODEL-RECIPE if not given",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            show_default=False,
            rich_help_panel="Output",
            help="Begin anew where the folder holds an ablation of something else",
        ),
    ] = False,
    threads: opt.Threads = None,
) -> None:
    """Run every combination of settings on a network, and compare their accuracy.

    What is finished is kept: run again after an interruption, or with more values of an option, and
    only what is missing is computed.
    """
    from . import ablate
    from .load import load_plugins, set_threads

    load_plugins(plugin)
    set_threads(threads)
    request = ablate.Request(
        model=model,
        recipe=recipe,
        options=option or [],
        table3=table3,
        settings=settings or [],
        weights=weights,
        input_shape=opt.shape(input_shape),
        calibration=calibration,
        images=images,
        evaluation=evaluation,
        eval_images=eval_images,
        batch_size=batch_size,
        normalization=opt.normalization(mean, std),
        seeds=ablate.seeds_of(seeds),
        output=output,
        force=force,
    )
    ablate.run(request)
