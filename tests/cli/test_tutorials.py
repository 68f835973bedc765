"""The tutorials: every command and snippet runs, in order, and prints what the page says.

In a ``console`` block, ``…`` stands for any lines. Words must be the same; numbers may differ a
little between machines, and times as they like.
"""

from __future__ import annotations

import contextlib
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fxq import registry

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("tutorial-4-bits", "tutorial-a-pass", "parts", "metrics")
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.M | re.S)
TIME = re.compile(r"\d+\.\d+ s\b")

Invoke = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_plugins() -> Iterator[None]:
    """A tutorial's plugin is gone afterwards."""
    before = dict(registry._plugins)
    yield
    registry._plugins.clear()
    registry._plugins.update(before)


@pytest.mark.parametrize("page", PAGES)
def test_everything_on_the_page_is_true(page: str, fxq: Invoke, tmp_path: Path) -> None:
    blocks = BLOCK.findall((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 4
    for language, file, text in blocks:
        if file:
            (tmp_path / file).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, f"{page}.md", "exec"), {})
        elif language == "console":
            run_commands(text, fxq)
    for test in tmp_path.glob("test_*.py"):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test.name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout
    assert all(path.stat().st_size > 1000 for path in tmp_path.glob("*.png"))


def run_commands(text: str, fxq: Invoke) -> None:
    """Each command of a block prints what follows it."""
    for part in text.split("$ ")[1:]:
        command, _, wanted = part.partition("\n")
        name, *arguments = shlex.split(command)
        assert name == "fxq"
        done = fxq(*arguments)
        assert done.code == 0, f"{command}\n{done.err}"
        missing = first_missing(wanted.splitlines(), done.out.splitlines())
        assert missing is None, f"{command} does not print {missing!r} there:\n{done.out}"


def first_missing(wanted: list[str], printed: list[str]) -> str | None:
    """The first line that is not printed where it should be; None where all are."""
    place, anywhere = 0, False
    for line in wanted:
        if line == "…":
            anywhere = True
            continue
        if anywhere:
            found = (i for i in range(place, len(printed)) if same(line, printed[i]))
            place = next(found, len(printed))
        if place >= len(printed) or not same(line, printed[place]):
            return line
        place, anywhere = place + 1, False
    return None if anywhere or place == len(printed) else "the end"


def same(wanted: str, printed: str) -> bool:
    """The same words, and about the same numbers."""
    pair = [TIME.sub("", line).replace("−", "-").split() for line in (wanted, printed)]
    return len(pair[0]) == len(pair[1]) and all(map(alike, *pair))


def alike(wanted: str, printed: str) -> bool:
    with contextlib.suppress(ValueError):
        return math.isclose(float(wanted), float(printed), rel_tol=0.25, abs_tol=0.25)
    return re.sub(r"\d", "0", wanted) == re.sub(r"\d", "0", printed)


@pytest.mark.parametrize(
    ("wanted", "printed", "missing"),
    [
        (["a 1.00", "…", "c"], ["a 1.01", "b", "c"], None),
        (["a"], ["a", "b"], "the end"),
        (["…", "c"], ["a", "b"], "c"),
        (["a 9.0 dB"], ["a 3.0 dB"], "a 9.0 dB"),
        (["…", "took 0.01 s", "…"], ["x", "took 7.00 s", "y"], None),
    ],
)
def test_how_pages_are_compared(wanted: list[str], printed: list[str], missing: str | None) -> None:
    assert first_missing(wanted, printed) == missing
