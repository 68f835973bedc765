"""The options of ``fxq bisect``."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as opt
from .analyze_command import Sample


def bisect_command(
    model: opt.Model,
    bound: Annotated[
        float,
        typer.Option(
            "--bound",
            metavar="X",
            show_default=False,
            rich_help_panel="Search",
            help="What the metric must not fall below: dB, or per cent of right answers",
        ),
    ],
    metric: Annotated[
        opt.Measure,
        typer.Option(
            "--metric",
            rich_help_panel="Search",
            help="SQNR of the output on calibration inputs, or accuracy on --eval",
        ),
    ] = opt.Measure.SQNR,
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
    threads: opt.Threads = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", show_default=False, rich_help_panel="Output", help="As JSON, for programs"
        ),
    ] = False,
) -> None:
    """Find the first pass, and the fewest nodes, that make a network worse than a bound.

    The network is measured after every pass. Then its versions before and after the pass that made
    it fall are mixed node by node, until a smallest set of nodes is found that suffices. Contracts
    are not checked, so that a pass that breaks its own is found by what it does.
    """
    from . import analyze, bisect

    request = analyze.Request(
        name=model,
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
        threads=threads,
    )
    bisect.run(request, metric, bound, as_json=as_json)
