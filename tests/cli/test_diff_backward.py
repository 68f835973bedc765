"""``fxq diff --backward``: training steps of runs, forward and backward, compared as graphs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Fxq = Callable[..., Any]
Golden = Callable[[str, str], None]

RECIPES = {"eight": "adaptive-fixed-point", "four": "adaptive-int4"}
QUICK = ("-n", "64", "-b", "32", "--epochs", "1", "--eval-images", "1", "--augmentation", "none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, invoke: Fxq) -> Path:
    """Trainings of one network with two recipes, and a compilation."""
    place = tmp_path_factory.mktemp("steps")
    for name, recipe in RECIPES.items():
        out = str(place / name)
        done = invoke(
            *("train", "digits/convnet", "-r", recipe, *QUICK, "--threads", "1", "-o", out)
        )
        assert done.code == 0, done.err
    compiled = ("-r", "minmax-int8", "-n", "8", "--eval-images", "1", "-o", str(place / "int8"))
    assert invoke("compile", "digits/convnet", *compiled).code == 0
    return place


@pytest.fixture
def diff(folder: Path, monkeypatch: pytest.MonkeyPatch, invoke: Fxq) -> Fxq:
    """``fxq diff --backward`` beside the runs."""
    monkeypatch.chdir(folder)
    return lambda *arguments: invoke("diff", *arguments, "--backward")


def steady(text: str) -> str:
    """Without the widths and exponents that training came to."""
    text = re.sub(r"\d+ bits of 2\*\*-?\d+", "B bits of 2**E", text)
    return re.sub(r", -\d+\)", ", E)", text)


VIEWS = {
    "backward": ("eight", "--node", "conv2*"),
    "backward-stat": ("eight", "--stat"),
    "backward-runs": ("eight", "four", "--node", "fc*"),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(diff: Fxq, golden: Golden, view: str) -> None:
    done = diff(*VIEWS[view], "--width", "100")
    assert done.code == 0, done.err
    golden(f"diff--{view}", steady(done.out))
    assert max(len(line) for line in done.out.splitlines()) <= 100


def test_it_is_what_fxq_backward_shows_of_the_training(diff: Fxq, invoke: Fxq) -> None:
    own = diff("eight").out.splitlines()
    shown = invoke("backward", "digits/convnet", "-r", RECIPES["eight"], "--trained", "eight")
    assert shown.out.splitlines()[1:-1] == own[1:]
    assert shown.out.splitlines()[0].split(": ")[1] == own[0].split("  ", 1)[1]
    assert any("fxq.conv_wtgrad" in line for line in own)


def test_the_step_of_a_pass(diff: Fxq) -> None:
    data = json.loads(diff("eight", "adapt-backward", "--json").out)
    (section,) = data["sections"]
    assert (section["from"], section["to"]) == ("insert-observers", "adapt-backward")
    assert section["census"]["fxq.conv_bprop"] == 3
    assert diff("eight", "mark-relu").out == "join-batch-norm -> mark-relu  no change\n"
    assert diff("eight", "eight").out == "adapt-backward -> adapt-backward  no change\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("int8",), "quantizes without training"),
        (("eight", "int8"), "quantizes without training"),
        (("eight", "--code"), "leave one out"),
        (("eight", "--values"), "leave one out"),
        (("eight", "freeze-trained"), "no pass in this run"),
        (("nine",), "no such run folder"),
    ],
)
def test_wrong(diff: Fxq, arguments: tuple[str, ...], told: str) -> None:
    done = diff(*arguments)
    assert (done.code, done.out) == (2, "")
    assert told in " ".join(done.err.split())
