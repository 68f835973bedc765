"""The options that commands share, and how their text is read."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fxq.errors import FxqError
from fxq.zoo_entry import Normalization


class Print(StrEnum):
    """What ``compile`` prints of each pass."""

    CHANGED = "changed"
    ALL = "all"
    NONE = "none"


class Engine(StrEnum):
    """The kernel library of the eager backend."""

    FBGEMM = "fbgemm"
    X86 = "x86"
    ONEDNN = "onednn"


class Flavor(StrEnum):
    """What the onnx backend stores integers in."""

    FAST = "fast"
    PACKED = "packed"
    COMPACT = "compact"


class Measure(StrEnum):
    """What ``bisect`` measures."""

    SQNR = "sqnr"
    ACCURACY = "accuracy"


_NETWORK, _DATA, _COMPILATION, _OUTPUT = "Network", "Data", "Compilation", "Output"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="model.py, model.py:name, package.module:name, or a network of `fxq models`",
    ),
]
Run = Annotated[
    str,
    typer.Argument(metavar="RUN", show_default=False, help="A folder that fxq compile wrote"),
]
RunOrModel = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL",
        show_default=False,
        help="A folder that fxq compile wrote, or a network as fxq compile takes it",
    ),
]
Recipe = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        metavar="NAME|FILE",
        rich_help_panel=_COMPILATION,
        help="A recipe of `fxq recipes`, or a .toml",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PASS.OPTION=VALUE",
        show_default=False,
        rich_help_panel=_COMPILATION,
        help="Change an option of a pass, for all layers or, as layer:GLOB.OPTION=VALUE, "
        "for some; repeatable",
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        rich_help_panel=_COMPILATION,
        help="A backend of `fxq backends`",
    ),
]
EngineOption = Annotated[
    Engine | None,
    typer.Option(
        "--engine",
        show_default=False,
        rich_help_panel=_COMPILATION,
        help="Kernels of the eager backend: fbgemm, the default, computes exactly what the "
        "reference and ONNX Runtime do; x86 is faster and rounds differently",
    ),
]
FlavorOption = Annotated[
    Flavor | None,
    typer.Option(
        "--flavor",
        show_default=False,
        rich_help_panel=_COMPILATION,
        help="What the onnx backend stores integers in; fast if not given",
    ),
]
Opset = Annotated[
    int | None,
    typer.Option(
        "--opset",
        metavar="N",
        show_default=False,
        rich_help_panel=_COMPILATION,
        help="Opset of the ONNX model, 21 or later; 21 if not given",
    ),
]
AcceptCoverage = Annotated[
    bool,
    typer.Option(
        "--accept-coverage",
        show_default=False,
        rich_help_panel=_COMPILATION,
        help="One line instead of a warning where fewer layers run on integers than promised",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        "-w",
        metavar="FILE",
        show_default=False,
        rich_help_panel=_NETWORK,
        help="Weights to load: .safetensors, .pt or .pth",
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        "--input-shape",
        metavar="N,C,H,W",
        show_default=False,
        rich_help_panel=_NETWORK,
        help="Shape of one input batch, where MODEL does not say",
    ),
]
Leaf = Annotated[
    list[str] | None,
    typer.Option(
        "--leaf",
        metavar="NAME",
        show_default=False,
        rich_help_panel=_NETWORK,
        help="A module class or path to keep as one node; repeatable",
    ),
]
Plugin = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        show_default=False,
        rich_help_panel=_NETWORK,
        help="A .py file with more passes, backends or networks; repeatable",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        "-c",
        metavar="DATA",
        show_default=False,
        rich_help_panel=_DATA,
        help="Images to calibrate on: an .npz, or a folder of CIFAR-10, class folders, VOC or "
        "COCO; or `random`, for trying speed and structure only",
    ),
]
Images = Annotated[
    int | None,
    typer.Option(
        "--images",
        "-n",
        metavar="N",
        show_default=False,
        rich_help_panel=_DATA,
        min=1,
        help="Images to draw for calibration; 512 if not given, or as many as the recipe uses",
    ),
]
Eval = Annotated[
    str | None,
    typer.Option(
        "--eval",
        "-e",
        metavar="DATA",
        show_default=False,
        rich_help_panel=_DATA,
        help="Images to measure accuracy on, before and after",
    ),
]
EvalImages = Annotated[
    int | None,
    typer.Option(
        "--eval-images",
        metavar="N",
        show_default=False,
        rich_help_panel=_DATA,
        min=1,
        help="Only the first so many of them",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size", "-b", metavar="N", rich_help_panel=_DATA, min=1, help="Images per batch"
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean",
        metavar="A,B,C",
        show_default=False,
        rich_help_panel=_DATA,
        help="Mean of each image channel in 0..1, where MODEL does not say",
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        "--std",
        metavar="A,B,C",
        show_default=False,
        rich_help_panel=_DATA,
        help="Standard deviation of each image channel in 0..1",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        rich_help_panel=_DATA,
        help="Draws calibration images and random weights",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        show_default=False,
        rich_help_panel=_OUTPUT,
        help="Run folder; runs/MODEL-RECIPE if not given",
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        show_default=False,
        rich_help_panel=_OUTPUT,
        help="Replace an earlier run in that folder",
    ),
]
Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh",
        show_default=False,
        rich_help_panel=_OUTPUT,
        help="Start anew where an interrupted run could be continued",
    ),
]
Printing = Annotated[
    Print | None,
    typer.Option(
        "--print",
        show_default=False,
        rich_help_panel=_OUTPUT,
        help="Print the changed nodes, or the whole graph, after each pass",
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", show_default=False, rich_help_panel=_OUTPUT, help="As --print changed"
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", show_default=False, min=1, help="Threads that torch uses"
    ),
]
PassName = Annotated[
    str | None,
    typer.Option(
        "--pass",
        metavar="NAME|N",
        show_default=False,
        help="Only this pass, by its name or position",
    ),
]


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """Comma-separated numbers; None where the option is absent.

    Raises:
        FxqError: One of them is no number.

    Example:
        >>> numbers("0.5,0.25", "--mean")
        (0.5, 0.25)
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise FxqError(
            f"{option} takes numbers separated by commas, not {text!r}",
            hint=f"for example {option} 0.485,0.456,0.406",
        ) from error


def names(text: str) -> list[str]:
    """Comma-separated names; none where there is nothing.

    Example:
        >>> names("float, torch.ao")
        ['float', 'torch.ao']
    """
    return [part.strip() for part in text.split(",") if part.strip()]


def shape(text: str | None) -> tuple[int, ...] | None:
    """The sizes of ``--input-shape``; None where it is absent.

    Raises:
        FxqError: It is not made of positive whole numbers.

    Example:
        >>> shape("1,3,224,224")
        (1, 3, 224, 224)
    """
    if text is None:
        return None
    parts = re.split(r"[,x]", text.strip("()[] "))
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise FxqError(
            f"--input-shape takes positive sizes separated by commas, not {text!r}",
            hint="for example --input-shape 1,3,224,224",
        )
    return tuple(int(part) for part in parts)


def normalization(mean: str | None, std: str | None) -> Normalization | None:
    """What ``--mean`` and ``--std`` say; None where both are absent.

    Raises:
        FxqError: Only one is given, or they do not fit each other.
    """
    means, deviations = numbers(mean, "--mean"), numbers(std, "--std")
    if means is None and deviations is None:
        return None
    if means is None or deviations is None:
        raise FxqError("--mean and --std go together", hint="give one value per channel to each")
    try:
        return Normalization(means, deviations)
    except ValueError as error:
        raise FxqError(str(error), where=f"--mean {mean} --std {std}") from error


def default_folder(name: str, recipe: str) -> Path:
    """The run folder of a network and a recipe where ``--output`` does not say.

    Example:
        >>> default_folder("cifar/resnet20", "aciq-4bit").as_posix()
        'runs/cifar-resnet20-aciq-4bit'
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-{recipe}").strip("-.")
    return Path("runs") / (plain or "run")
