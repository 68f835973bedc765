"""Run folders that are damaged, misspelt or lack what a command needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Write = Callable[..., Path]

QUICK = ("compile", "tiny/conv", "-r", "minmax-int8", "-c", "random", "-n", "4", "-o", "out")


@pytest.mark.parametrize("name", ["weights.safetensors", "structure.json", "metadata.json"])
def test_an_incomplete_run(fxq: Callable, digits_run: Path, tmp_path: Path, name: str) -> None:
    for file in digits_run.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    damaged = fxq("eval", ".")
    assert (damaged.code, "ArtifactError" in damaged.err) == (2, True)
    (tmp_path / name).unlink()
    missing = fxq("eval", ".")
    assert (missing.code, name in missing.err) == (2, True)


@pytest.mark.parametrize("name", ["journal.json", "ledger.json"])
def test_a_damaged_record(fxq: Callable, digits_run: Path, tmp_path: Path, name: str) -> None:
    for file in digits_run.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_text("[{", encoding="utf-8")
    done = fxq("explain", ".")
    assert (done.code, "ArtifactError" in done.err, name in done.err) == (2, True, True)


def test_a_run_without_data(fxq: Callable) -> None:
    assert fxq(*QUICK).code == 0
    done = fxq("eval", "out")
    assert (done.code, "there is nothing to measure with" in done.err) == (2, True)


def test_the_nearest_run_is_suggested(fxq: Callable, tmp_path: Path) -> None:
    assert fxq(*QUICK[:-1], "runs/first").code == 0
    done = fxq("diff", "runs/frist")
    assert (done.code, "did you mean 'runs/first'?" in done.err) == (2, True)


def test_a_pass_that_did_not_run(fxq: Callable, digits_run: Path) -> None:
    done = fxq("diff", str(digits_run), "--pass", "mark-rleu")
    assert (done.code, "did you mean 'mark-relu'?" in done.err) == (2, True)
    done = fxq("show", str(digits_run), "--step", "17")
    assert (done.code, "the run has 6 passes" in done.err) == (2, True)


def test_bench_runs_no_file_unasked(fxq: Callable, write: Write) -> None:
    write("model.py")
    assert fxq("compile", "model.py", "-r", "minmax-int8", "-o", "out").code == 0
    write("model.py", "raise SystemExit('this must not run')\n")
    done = fxq("bench", "out")
    assert (done.code, "--model model.py" in done.err) == (2, True)
    done = fxq("eval", "out")
    assert (done.code, "--data model.py" in done.err) == (2, True)
