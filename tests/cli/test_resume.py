"""``fxq compile`` that was interrupted: the same command continues, and nothing is left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fxq.workspace import MARKER

MAIN = (sys.executable, "-c", "from fxq.cli.main import main; main()")

RECIPE = """
    name = "trained"
    summary = "Few bits, trained a little"
    [[pass]]
    use = "fold-batch-norm"
    [[pass]]
    use = "insert-observers"
    [[pass]]
    use = "calibrate"
    [[pass]]
    use = "quantize-minmax"
    weight_bits = 4
    [[pass]]
    use = "reconstruct"
    iterations = 8
    batch_size = 4
    images = 16
"""
PARTIAL = "out.partial"


def command(*more: str) -> tuple[str, ...]:
    return (
        *("compile", "digits/convnet", "-r", "trained.toml", "-n", "16", "--eval-images", "20"),
        *("--threads", "1", "-o", "out", *more),
    )


@pytest.fixture
def recipe(write: Callable) -> Path:
    """The recipe, in the folder of the test."""
    return write("trained.toml", RECIPE)


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Call it as ``stop(pass, step)``: Ctrl-C is pressed there, once."""

    def at(name: str, step: int) -> None:
        from fxq.cli.show_compile import Meter

        original, left = Meter.__call__, [KeyboardInterrupt()]

        def told(self: Any, label: str, done: int, total: int | None) -> None:
            original(self, label, done, total)
            if (label, done) == (name, step) and left:
                raise left.pop()

        monkeypatch.setattr(Meter, "__call__", told)

    return at


def same(one: Path, other: Path) -> bool:
    """Whether two runs have the same weights and structure."""
    ours, theirs = load_file(one / "weights.safetensors"), load_file(other / "weights.safetensors")
    structures = [(run / "structure.json").read_bytes() for run in (one, other)]
    equal = all(bool((value == theirs[name]).all()) for name, value in ours.items())
    return structures[0] == structures[1] and ours.keys() == theirs.keys() and equal


@pytest.fixture
def whole(fxq: Callable, recipe: Path) -> Path:
    """A run that nobody interrupted."""
    assert fxq(*command("-o", "whole")).code == 0
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["trained.toml", "whole"]
    return recipe.parent / "whole"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- Ctrl-C ------------------------------------------------------------------------------------


def test_the_same_command_continues(fxq: Callable, whole: Path, stop: Callable) -> None:
    stop("reconstruct", 5)
    done = fxq(*command())
    told = f"interrupted; the same command continues where it was, from {PARTIAL}\n"
    assert (done.code, done.err) == (130, told)
    assert names(whole.parent) == {"trained.toml", "whole", PARTIAL}
    again = fxq(*command())
    assert again.code == 0, again.err
    assert "continued at step 5 of 8" in again.out
    assert names(whole.parent) == {"trained.toml", "whole", "out"}
    assert same(whole, whole.with_name("out"))


def test_fresh_begins_anew(fxq: Callable, whole: Path, stop: Callable) -> None:
    stop("reconstruct", 5)
    assert fxq(*command()).code == 130
    done = fxq(*command("--fresh"))
    assert done.code == 0, done.err
    assert "continued" not in done.out
    assert names(whole.parent) == {"trained.toml", "whole", "out"}
    assert same(whole, whole.with_name("out"))


def test_an_interruption_before_a_long_pass_leaves_nothing(
    fxq: Callable, recipe: Path, stop: Callable
) -> None:
    stop("calibrate", 1)
    done = fxq(*command())
    assert (done.code, done.err) == (130, "interrupted; nothing was written\n")
    assert names(recipe.parent) == {"trained.toml"}


def test_quick_recipes_have_no_such_folder(
    fxq: Callable, tmp_path: Path, write: Callable, stop: Callable
) -> None:
    write(f"{PARTIAL}/notes.txt", "mine")
    stop("calibrate", 1)
    assert fxq(*command("-r", "minmax-int8")).code == 130
    assert fxq(*command("-r", "minmax-int8")).code == 0
    assert names(tmp_path) == {PARTIAL, "out"}


def test_an_error_behind_a_long_pass_keeps_its_work(
    fxq: Callable, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "out")

    with monkeypatch.context() as patch:
        patch.setattr("fxq.artifact.Artifact.save", fail)
        done = fxq(*command())
    assert done.code == 2
    assert f"the same command continues where it was, from {PARTIAL}" in done.err
    again = fxq(*command())
    assert again.code == 0
    assert "continued at step 8 of 8" in again.out
    assert names(recipe.parent) == {"trained.toml", "out"}


# ---- kills -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_real_process_continues(fxq: Callable, recipe: Path, how: signal.Signals) -> None:
    """After Ctrl-C at the step it was at; after a kill at the last one that was saved."""
    steps = 100
    settings = ("--set", f"reconstruct.iterations={steps}")
    script = "import fxq.workspace; fxq.workspace.INTERVAL = 0; "
    arguments = [*MAIN[:2], script + MAIN[2], *command(*settings)]
    partial = recipe.with_name(PARTIAL)
    with subprocess.Popen(
        arguments, cwd=recipe.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not list(partial.glob("*.safetensors")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(how)
        _, told = process.communicate(timeout=120)
    assert process.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL), told
    again = fxq(*command(*settings))
    assert again.code == 0, again.err
    (note,) = (line for line in again.out.splitlines() if "continued at step" in line)
    assert 0 < int(note.split()[3]) < steps
    assert fxq(*command(*settings, "-o", "whole")).code == 0
    assert same(recipe.with_name("whole"), recipe.with_name("out"))
    assert names(recipe.parent) == {"trained.toml", "whole", "out"}


# ---- folders of others -------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [(), ("--fresh",)])
def test_a_folder_of_that_name_is_not_touched(
    fxq: Callable, recipe: Path, write: Callable, fresh: tuple[str, ...]
) -> None:
    mine = write(f"{PARTIAL}/notes.txt", "mine")
    done = fxq(*command(*fresh))
    assert done.code == 2
    assert "taken by something that fxq did not write" in done.err
    assert PARTIAL in done.err
    assert (names(mine.parent), mine.read_text()) == ({"notes.txt"}, "mine")


def test_files_that_were_added_stay(
    fxq: Callable, recipe: Path, write: Callable, stop: Callable
) -> None:
    stop("reconstruct", 2)
    assert fxq(*command()).code == 130
    mine = write(f"{PARTIAL}/notes.txt", "mine")
    assert fxq(*command()).code == 0
    assert names(mine.parent) == {"notes.txt"}
    assert MARKER not in names(mine.parent)


def test_a_damaged_state_begins_anew(fxq: Callable, whole: Path, stop: Callable) -> None:
    stop("reconstruct", 5)
    assert fxq(*command()).code == 130
    (state,) = whole.with_name(PARTIAL).glob("*.safetensors")
    state.write_bytes(state.read_bytes()[:1000])
    done = fxq(*command())
    assert (done.code, "continued" in done.out) == (0, False)
    assert same(whole, whole.with_name("out"))


def test_a_search_continues(fxq: Callable, recipe: Path, stop: Callable) -> None:
    """With --max-drop each compilation has a state of its own."""
    search = ("--set", "quantize-minmax.weight_bits=2", "--max-drop", "40")
    assert fxq(*command(*search, "-o", "whole")).code == 0
    stop("measure drop", 16)
    assert fxq(*command(*search)).code == 130
    done = fxq(*command(*search))
    assert done.code == 0, done.err
    assert "continued at step 8 of 8" in done.out
    assert same(recipe.with_name("whole"), recipe.with_name("out"))
    ours, theirs = (
        json.loads(recipe.with_name(run).joinpath("metadata.json").read_text())["raised"]
        for run in ("whole", "out")
    )
    assert ours == theirs
