"""``fxq bisect``, and ``fxq replay`` of what a failed pass leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fxq import registry
from fxq.recipe import Recipe

Fxq = Callable[..., Any]
BROKEN = str(Path(__file__).parents[1] / "broken.py")
INT8 = ("-r", "minmax-int8")
DIGITS = ("bisect", "digits/convnet", "-n", "64", "--sample", "16")


@pytest.fixture(autouse=True)
def no_plugins_stay() -> Iterator[None]:
    before = dict(registry._plugins)
    yield
    registry._plugins.clear()
    registry._plugins.update(before)


def recipe_with(folder: Path, entry: str) -> str:
    """A recipe file: minmax-int8, and another pass after it."""
    text = Recipe.load("minmax-int8").to_toml()
    (folder / "mine.toml").write_text(f"{text}\n[[pass]]\n{entry}\n")
    return "./mine.toml"


def test_a_plugin_that_swaps_channels(fxq: Fxq, tmp_path: Path) -> None:
    paths = json.loads(fxq(*DIGITS, *INT8, "--bound", "-100", "--json").out)["measured"]
    held = {one["name"]: one["value"] for one in paths}
    layer = first_layer(fxq)
    recipe = recipe_with(tmp_path, f'use = "swap-channels"\nlayer = "{layer}"')
    bound = min(held["quantize-minmax"], held["correct-bias"]) - 1
    done = fxq(*DIGITS, "-r", recipe, "--plugin", BROKEN, "--bound", str(bound))
    assert done.code == 0, done.err
    assert f"swap-channels is the first pass after which it is below {bound:.1f} dB" in done.out
    assert f"of {layer})" in done.out
    assert done.out.splitlines()[0].split() == ["capture", "exact"]


def first_layer(fxq: Fxq) -> str:
    shown = fxq("show", "digits/convnet", "--no-digests").out
    line = next(one for one in shown.splitlines() if "Conv2d" in one)
    return line.split()[0].removeprefix("%")


def test_accuracy(fxq: Fxq) -> None:
    bits = [f"--set={name}=2" for name in ("weight_bits", "activation_bits", "first_last_bits")]
    few = ("--metric", "accuracy", "--eval-images", "100", *bits)
    done = fxq(*DIGITS, *few, "--bound", "98.5")
    assert done.code == 0, done.err
    assert "quantize-aciq is the first pass after which it is below 98.50" in done.out
    assert "enough" in done.out


def test_never(fxq: Fxq) -> None:
    done = fxq(*DIGITS, "--bound", "-100")
    assert done.out.splitlines()[-1] == "never below -100.0 dB"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("digits/convnet", "-n", "16"), "--bound"),
        (("tiny/conv", "-c", "random", "--bound", "9", "--metric", "accuracy"), "--eval"),
        (("digits/convnet", "-r", "apot-4bit", "--bound", "9"), "without training"),
        (("digits/convnet", "--metric", "accuracy", "--bound", "101"), "below the bound already"),
    ],
    ids=["no bound", "no labels", "training", "float"],
)
def test_errors(fxq: Fxq, arguments: tuple[str, ...], words: str) -> None:
    done = fxq("bisect", *arguments)
    assert done.code == 2
    assert words in done.err


# ---- replay ------------------------------------------------------------------------------------


COMPILE = ("compile", "digits/convnet", "-n", "32", "-r", "./mine.toml", "-o", "runs/mine")


def test_a_failed_pass_leaves_what_runs_it_again(
    fxq: Fxq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_with(tmp_path, 'use = "explode"')
    done = fxq(*COMPILE, "--plugin", BROKEN)
    assert done.code == 2
    assert "explode failed" in done.err
    assert "fxq replay runs/mine.failed runs it again" in done.err
    place = tmp_path / "runs/mine.failed"
    names = [one.name for one in Recipe.load("minmax-int8").passes]
    assert (place / f"{len(names):02d}-{names[-1]}.txt").is_file()
    remaining = Recipe.load(place / "remaining.toml")
    assert [one.name for one in remaining.passes] == ["explode"]
    assert "runs/mine.failed" in done.err
    assert not (tmp_path / "runs/mine").exists()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    registry._plugins.clear()
    again = fxq("replay", str(place))
    assert again.code == 2
    assert f"{len(names)} passes ran before explode failed" in again.out
    assert "explode failed" in again.err
    assert "another program" not in again.err


def test_a_replay_of_what_was_repaired_writes_the_run(fxq: Fxq, tmp_path: Path) -> None:
    recipe_with(tmp_path, 'use = "explode"')
    assert fxq(*COMPILE, "--plugin", BROKEN).code == 2
    place = tmp_path / "runs/mine.failed"
    plain = Recipe.load("minmax-int8").with_settings(["weight_bits=4"])
    (place / "recipe.toml").write_text(plain.to_toml())
    done = fxq("replay", "runs/mine.failed", "-v")
    assert done.code == 0, done.err
    assert "quantize-minmax leaves another program than in the record" in done.err
    assert (tmp_path / "runs/mine/journal.json").is_file()


def test_a_replay_does_not_train_roundings_again(fxq: Fxq, tmp_path: Path) -> None:
    slow = Recipe.load("adaround-4bit").with_settings(["adaround.iterations=20"]).to_toml()
    (tmp_path / "mine.toml").write_text(f'{slow}\n[[pass]]\nuse = "explode"\n')
    assert fxq(*COMPILE, "--plugin", BROKEN).code == 2
    again = fxq("replay", "runs/mine.failed")
    assert "explode failed" in again.err
    assert "continued behind 5 layers that were finished" in again.out + again.err
    assert "another program" not in again.err


def test_a_folder_of_something_else_is_left_alone(fxq: Fxq, tmp_path: Path) -> None:
    recipe_with(tmp_path, 'use = "explode"')
    place = tmp_path / "runs/mine.failed"
    place.mkdir(parents=True)
    (place / "mine.txt").write_text("mine")
    done = fxq(*COMPILE, "--plugin", BROKEN)
    assert (done.code, "fxq replay" in done.err) == (2, False)
    assert [path.name for path in place.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("text", [None, "{", "{}", '{"job": {"model": 3}}'])
def test_what_is_no_failure(fxq: Fxq, tmp_path: Path, text: str | None) -> None:
    (tmp_path / "folder").mkdir()
    if text is not None:
        (tmp_path / "folder/replay.json").write_text(text)
    done = fxq("replay", "folder")
    assert (done.code, done.err.startswith("ArtifactError")) == (2, True)
