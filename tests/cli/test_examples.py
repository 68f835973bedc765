"""Every example that a ``--help`` shows works, in the order of the commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fxq.cli import failure
from fxq.cli.compile import Job
from fxq.cli.examples import EXAMPLES
from fxq.errors import PassError
from fxq.models_zoo import resnet20
from fxq.recipe import Recipe

SLOW = "torchvision/resnet18"
"""What takes seconds is tried by a smaller stand-in of the same kind."""

LINES = [line for lines in EXAMPLES.values() for line in lines]
COMMANDS = list(dict.fromkeys(LINES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_file: str) -> Path:
    """The files that examples name."""
    place = tmp_path_factory.mktemp("examples")
    (place / "model.py").write_text(model_file, encoding="utf-8")
    weights = resnet20().state_dict()
    save_file(weights, place / "w.safetensors")
    for bits in (2, 4):
        torch.save(weights | _clips(weights), place / f"apot-{bits}bit.pth")
    random = np.random.Generator(np.random.PCG64(0))
    for name, count in (("train", 80), ("test", 16)):
        images = random.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        np.savez(place / f"{name}.npz", x=images, y=np.arange(count) % 10)
    job = Job("digits/convnet", "minmax-int8", images=32, output=place / "runs/broken")
    failed = PassError("a pass failed")
    failure.leave(place / "runs/broken.failed", job, Recipe.load(job.recipe), [], failed)
    return place


def _clips(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of every convolution but the first, as APoT's authors name them."""
    layers = [name for name, value in weights.items() if value.ndim == 4][1:]
    endings = ("weight_quant.wgt_alpha", "act_alpha")
    return {
        f"{name.removesuffix('weight')}{ending}": torch.ones(1)
        for name in layers
        for ending in endings
    }


@pytest.fixture(scope="module")
def outcomes(folder: Path, invoke: Callable[..., Any]) -> dict[str, Any]:
    """What each example did, run one after the other in one folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return {command: invoke(*_arguments(command)) for command in COMMANDS}


def _arguments(command: str) -> list[str]:
    program, *arguments = shlex.split(command)
    assert program == "fxq"
    return [argument.replace(SLOW, "torchvision/squeezenet1_1") for argument in arguments]


@pytest.mark.parametrize("command", COMMANDS)
def test_example(outcomes: dict[str, Any], command: str) -> None:
    done = outcomes[command]
    assert done.code == 0, done.err
    assert done.out
    assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_shows_its_examples(fxq: Callable[..., Any], command: str) -> None:
    done = fxq(*command.split(), "--help")
    assert done.code == 0
    for line in EXAMPLES[command]:
        assert f" {line} " in f" {done.out} ".replace("\n", " ")


def test_every_command_has_examples(fxq: Callable[..., Any]) -> None:
    listing = fxq("--help").out
    known = [line.split()[1] for line in listing.splitlines() if line.startswith("│ ")]
    commands = [name for name in known if name.isalpha()]
    assert sorted(set(commands) & set(EXAMPLES)) == sorted(set(EXAMPLES) - {""})
