"""The options of ``fxq train``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import options as opt

_TRAINING = "Training"


class Schedule(StrEnum):
    """How the learning rate falls."""

    COSINE = "cosine"
    STEP = "step"


class Augmentation(StrEnum):
    """What is done to images at random."""

    NONE = "none"
    FLIP = "flip"
    FLIP_SHIFT = "flip-shift"


class Device(StrEnum):
    """Where the network is trained."""

    CPU = "cpu"
    CUDA = "cuda"


def train_command(
    model: opt.Model,
    recipe: opt.Recipe = "apot-4bit",
    settings: opt.Settings = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            metavar="DATA",
            show_default=False,
            rich_help_panel="Data",
            help="Images to train and calibrate on: an .npz, a CIFAR-10 folder or a folder of "
            "class folders; what MODEL brings if not given",
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            "--images",
            "-n",
            metavar="N",
            show_default=False,
            rich_help_panel="Data",
            min=1,
            help="Only so many of them, for trying",
        ),
    ] = None,
    calibration_images: Annotated[
        int | None,
        typer.Option(
            "--calibration-images",
            metavar="N",
            show_default=False,
            rich_help_panel="Data",
            min=1,
            help="Images that the first clips are chosen on; 512 if not given",
        ),
    ] = None,
    evaluation: opt.Eval = None,
    eval_images: opt.EvalImages = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            rich_help_panel="Data",
            min=0,
            help="Draws the order of images, their variants and random weights",
        ),
    ] = 0,
    weights: opt.Weights = None,
    init: Annotated[
        Path | None,
        typer.Option(
            "--init",
            metavar="RUN",
            show_default=False,
            rich_help_panel="Network",
            help="Begin with the weights, biases and norms of this run of fxq train, whose levels "
            "may be others: 5, 4, 3 and 2 bits, each from the one before",
        ),
    ] = None,
    input_shape: opt.InputShape = None,
    leaf: opt.Leaf = None,
    plugin: opt.Plugin = None,
    epochs: Annotated[
        int, typer.Option("--epochs", metavar="N", rich_help_panel=_TRAINING, min=1, help="Epochs")
    ] = 10,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size",
            "-b",
            metavar="N",
            rich_help_panel=_TRAINING,
            min=1,
            help="Images per step, over all processes; an incomplete last batch is left out",
        ),
    ] = 128,
    lr: Annotated[
        float,
        typer.Option("--lr", metavar="X", rich_help_panel=_TRAINING, help="Learning rate"),
    ] = 0.01,
    alpha_lr: Annotated[
        float | None,
        typer.Option(
            "--alpha-lr",
            metavar="X",
            show_default=False,
            rich_help_panel=_TRAINING,
            help="That of the clips; as --lr if not given",
        ),
    ] = None,
    schedule: Annotated[
        Schedule,
        typer.Option("--schedule", rich_help_panel=_TRAINING, help="How learning rates fall"),
    ] = Schedule.COSINE,
    milestones: Annotated[
        str,
        typer.Option(
            "--milestones",
            metavar="X,…",
            rich_help_panel=_TRAINING,
            help="Where the step schedule divides them by 10, as shares of the training",
        ),
    ] = "0.5,0.75",
    warmup: Annotated[
        float,
        typer.Option(
            "--warmup",
            metavar="EPOCHS",
            rich_help_panel=_TRAINING,
            help="Epochs over which they rise at first",
        ),
    ] = 0.0,
    momentum: Annotated[
        float, typer.Option("--momentum", metavar="X", rich_help_panel=_TRAINING, help="Momentum")
    ] = 0.9,
    nesterov: Annotated[
        bool,
        typer.Option(
            "--nesterov", show_default=False, rich_help_panel=_TRAINING, help="Nesterov's momentum"
        ),
    ] = False,
    weight_decay: Annotated[
        float,
        typer.Option(
            "--weight-decay",
            metavar="X",
            rich_help_panel=_TRAINING,
            help="L2 penalty of weights; norms and biases have none",
        ),
    ] = 1e-4,
    alpha_weight_decay: Annotated[
        float | None,
        typer.Option(
            "--alpha-weight-decay",
            metavar="X",
            show_default=False,
            rich_help_panel=_TRAINING,
            help="That of the clips; as --weight-decay if not given",
        ),
    ] = None,
    label_smoothing: Annotated[
        float,
        typer.Option(
            "--label-smoothing",
            metavar="X",
            rich_help_panel=_TRAINING,
            help="Share of the target that goes to all classes evenly",
        ),
    ] = 0.0,
    distill: Annotated[
        float,
        typer.Option(
            "--distill",
            metavar="SHARE",
            rich_help_panel=_TRAINING,
            help="How much of the loss is the divergence from the float network, which knows more "
            "than labels tell; 0 to 1",
        ),
    ] = 0.0,
    clip_gradients: Annotated[
        float | None,
        typer.Option(
            "--clip-gradients",
            metavar="NORM",
            show_default=False,
            rich_help_panel=_TRAINING,
            help="Largest norm of all gradients together; any if not given",
        ),
    ] = None,
    augmentation: Annotated[
        Augmentation,
        typer.Option(
            "--augmentation", rich_help_panel=_TRAINING, help="What is done to images at random"
        ),
    ] = Augmentation.FLIP_SHIFT,
    amp: Annotated[
        bool,
        typer.Option(
            "--amp", show_default=False, rich_help_panel=_TRAINING, help="Autocast to bfloat16"
        ),
    ] = False,
    compiling: Annotated[
        bool,
        typer.Option(
            "--compile",
            show_default=False,
            rich_help_panel=_TRAINING,
            help="Train through torch.compile, where a C++ compiler is at hand; the first step "
            "takes a minute then, which pays off after some hundred",
        ),
    ] = False,
    device: Annotated[
        Device, typer.Option("--device", rich_help_panel=_TRAINING, help="Where to train")
    ] = Device.CPU,
    checkpoint_seconds: Annotated[
        float,
        typer.Option(
            "--checkpoint-seconds",
            metavar="N",
            rich_help_panel=_TRAINING,
            min=0,
            help="Time between checkpoints within an epoch",
        ),
    ] = 60.0,
    output: opt.Output = None,
    force: opt.Force = False,
    fresh: opt.Fresh = False,
    threads: opt.Threads = None,
) -> None:
    """Train a network with its quantizers, then lower it to integers and write a run folder.

    Ctrl-C or a kill costs little: the same command continues, and ends with the same bits. Under
    `torchrun --nproc-per-node 2 --no-python fxq train …`, processes share every batch.
    """
    from fxq.quant import augment
    from fxq.training import options as training

    from . import train
    from .compile import Job
    from .load import load_plugins, set_threads

    load_plugins(plugin)
    set_threads(threads)
    options = training.TrainingOptions(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        alpha_lr=alpha_lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        alpha_weight_decay=alpha_weight_decay,
        schedule=training.Schedule(schedule.value),
        warmup=warmup,
        milestones=opt.numbers(milestones, "--milestones") or (),
        label_smoothing=label_smoothing,
        distill=distill,
        clip_gradients=clip_gradients,
        augmentation=augment.Augmentation(augmentation.value),
        amp=amp,
        compile=compiling,
        seed=seed,
    )
    job = Job(
        model=model,
        recipe=recipe,
        weights=weights,
        calibration=data,
        images=calibration_images,
        evaluation=evaluation,
        eval_images=eval_images,
        settings=settings or [],
        output=output,
        force=force,
        fresh=fresh,
        batch_size=batch_size,
        seed=seed,
        leaves=leaf or [],
        normalization=opt.normalization(mean, std),
        input_shape=opt.shape(input_shape),
    )
    train.run(train.Request(job, options, init, images, device.value, checkpoint_seconds))
