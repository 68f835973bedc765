"""The options of ``fxq analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt

Sample = Annotated[
    int,
    typer.Option(
        "--sample",
        metavar="N",
        rich_help_panel="Data",
        min=1,
        help="Calibration inputs that SQNRs are measured on",
    ),
]


def analyze_command(
    name: opt.RunOrModel,
    recipe: opt.Recipe = "aciq-4bit",
    settings: opt.Settings = None,
    weights: opt.Weights = None,
    input_shape: opt.InputShape = None,
    leaf: opt.Leaf = None,
    plugin: opt.Plugin = None,
    calibration: opt.Calibration = None,
    images: opt.Images = None,
    sample: Sample = 32,
    evaluation: opt.Eval = None,
    eval_images: opt.EvalImages = None,
    batch_size: opt.BatchSize = 64,
    mean: opt.Mean = None,
    std: opt.Std = None,
    seed: opt.Seed = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            show_default=False,
            rich_help_panel="Output",
            help="Folder of analysis.csv, .json and .png and attribution.json; the run's own, or "
            "analyses/MODEL-RECIPE",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            show_default=False,
            rich_help_panel="Output",
            help="Begin anew where the folder holds an analysis of something else",
        ),
    ] = False,
    processes: Annotated[
        int,
        typer.Option(
            "--processes",
            metavar="N",
            min=1,
            help="Processes that share the layers; each compiles the network for itself",
        ),
    ] = 1,
    threads: opt.Threads = None,
) -> None:
    """Show which passes and which layers cost a network how much, ranked.

    Each layer is measured both ways: only it is quantized, and everything but it. Its own error is
    split into weights, clipping and rounding. What is finished is kept: run again after an
    interruption, and only what is missing is computed.
    """
    from . import analyze

    request = analyze.Request(
        name=name,
        recipe=recipe,
        settings=settings or [],
        weights=weights,
        input_shape=opt.shape(input_shape),
        plugins=plugin or [],
        leaves=leaf or [],
        calibration=calibration,
        images=images,
        evaluation=evaluation,
        eval_images=eval_images,
        batch_size=batch_size,
        normalization=opt.normalization(mean, std),
        seed=seed,
        sample=sample,
        output=output,
        force=force,
        processes=processes,
        threads=threads,
    )
    analyze.run(request)
