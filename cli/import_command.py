"""The options of ``fxq import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt


def import_command(
    model: opt.Model,
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            show_default=False,
            help="Weights with clips, as APoT's authors publish them: .safetensors, .pt, .pth or "
            ".pth.tar",
        ),
    ],
    recipe: opt.Recipe = "apot-4bit",
    settings: opt.Settings = None,
    backend: opt.Backend = "eager",
    engine: opt.EngineOption = None,
    flavor: opt.FlavorOption = None,
    opset: opt.Opset = None,
    input_shape: opt.InputShape = None,
    leaf: opt.Leaf = None,
    plugin: opt.Plugin = None,
    calibration: opt.Calibration = None,
    images: opt.Images = None,
    evaluation: opt.Eval = None,
    eval_images: opt.EvalImages = None,
    batch_size: opt.BatchSize = 64,
    mean: opt.Mean = None,
    std: opt.Std = None,
    seed: opt.Seed = 0,
    output: opt.Output = None,
    force: opt.Force = False,
    threads: opt.Threads = None,
) -> None:
    """Lower a network that APoT's authors trained to integers, and write a run folder.

    The recipe must have the bits of the checkpoint. Calibration gives 8-bit ranges to what the
    authors leave in float: the network's input, its last layer's input and residual sums. With
    `--set quantize-apot.placement=paper` these stay in float: such a network is only measured.
    """
    from . import importing
    from .compile import Job, backend_options
    from .load import load_plugins, set_threads

    load_plugins(plugin)
    set_threads(threads)
    job = Job(
        model=model,
        recipe=recipe,
        calibration=calibration,
        images=images,
        evaluation=evaluation,
        eval_images=eval_images,
        settings=settings or [],
        backend=backend,
        options=backend_options(engine, flavor, opset),
        output=output,
        force=force,
        batch_size=batch_size,
        seed=seed,
        leaves=leaf or [],
        normalization=opt.normalization(mean, std),
        input_shape=opt.shape(input_shape),
    )
    importing.run(job, checkpoint)
