"""The options of ``fxq cost``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt


def cost_command(
    name: opt.RunOrModel,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME|FILE",
            show_default=False,
            rich_help_panel="Compilation",
            help="A recipe of `fxq recipes`, or a .toml, for MODEL; aciq-4bit if not given",
        ),
    ] = None,
    settings: opt.Settings = None,
    weights: opt.Weights = None,
    input_shape: opt.InputShape = None,
    leaf: opt.Leaf = None,
    plugin: opt.Plugin = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            "-c",
            metavar="DATA",
            show_default=False,
            rich_help_panel="Data",
            help="Images that a recipe chooses bits on, as for fxq compile; one that gives all "
            "layers theirs needs none",
        ),
    ] = None,
    images: opt.Images = None,
    batch_size: opt.BatchSize = 64,
    mean: opt.Mean = None,
    std: opt.Std = None,
    seed: opt.Seed = 0,
    as_json: Annotated[
        bool,
        typer.Option("--json", rich_help_panel="Output", help="As JSON, for other programs"),
    ] = False,
    csv: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            show_default=False,
            rich_help_panel="Output",
            help="Write the table to this file, too",
        ),
    ] = None,
) -> None:
    """Count multiply-adds, FixOPs, shift-adds and bytes, per layer and in total.

    A network is taken through a recipe as far as its bits are decided; no weights are needed. A run
    has its bits already.
    """
    from . import cost
    from .load import load_plugins

    load_plugins(plugin)
    request = cost.Request(
        name=name,
        recipe=recipe,
        settings=settings or [],
        weights=weights,
        input_shape=opt.shape(input_shape),
        leaves=leaf or [],
        calibration=calibration,
        images=images,
        batch_size=batch_size,
        normalization=opt.normalization(mean, std),
        seed=seed,
    )
    cost.run(request, as_json=as_json, csv=csv)
