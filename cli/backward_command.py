"""The options of ``fxq backward``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt


def backward_command(
    model: opt.Model,
    recipe: Annotated[
        str,
        typer.Option("--recipe", "-r", metavar="NAME|FILE", help="A recipe that trains"),
    ] = "adaptive-fixed-point",
    settings: opt.Settings = None,
    weights: opt.Weights = None,
    trained: Annotated[
        Path | None,
        typer.Option(
            "--trained",
            metavar="RUN",
            show_default=False,
            help="A run of fxq train, or one under way: the widths it has come to",
        ),
    ] = None,
    float_only: Annotated[
        bool, typer.Option("--float", help="The graph of the float network, and nothing else")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="The whole graph after the rewriting, not what changed")
    ] = False,
    input_shape: opt.InputShape = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, help="Of the random batch that is traced")
    ] = 4,
    plugin: opt.Plugin = None,
    seed: opt.Seed = 0,
) -> None:
    """Show a training step as one graph, forward and backward, and what a recipe makes of it.

    Every product of a layer is a node, and so is every quantizer, with the bits it has now.
    """
    from . import backward
    from .load import load_plugins

    load_plugins(plugin)
    backward.run(
        backward.Request(
            model=model,
            recipe=recipe,
            settings=settings or [],
            weights=weights,
            trained=trained,
            input_shape=opt.shape(input_shape),
            batch_size=batch_size,
            seed=seed,
        ),
        view="float" if float_only else "full" if full else "changes",
    )
