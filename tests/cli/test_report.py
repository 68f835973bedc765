"""``fxq report``."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from pathlib import Path

import pytest

QUICK = ("compile", "tiny/residual", "-r", "aciq-4bit", "-c", "random", "-n", "8")


def test_a_run_becomes_a_page_that_is_replaced_only_when_asked(
    fxq: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    assert fxq(*QUICK, "-o", "out").code == 0
    done = fxq("report", "out")
    assert done.code == 0, done.err
    assert str(Path("out") / "report.html") in done.out
    assert "tiny/residual" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert fxq("report", "out").code == 2
    assert not opened
    assert fxq("report", "out", "--force", "--open").code == 0
    assert opened == [(tmp_path / "out" / "report.html").as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    done = fxq("report", "out", "-o", "elsewhere.html", "--open")
    assert done.code == 0
    assert "no browser" in done.out + done.err


def test_what_is_no_run_is_refused(fxq: Callable) -> None:
    done = fxq("report", "nowhere")
    assert done.code == 2
    assert "run folder" in done.err
