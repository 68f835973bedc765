"""What notebooks show: plain HTML that is well formed, escaped, and legible on light and dark."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch

import fxq
from fxq.graph.html import COLOURS
from fxq.models_zoo import tiny_residual
from fxq.trail.delta import KINDS, SHOWN, compare
from fxq.trail.journal import Journal
from fxq.trail.snapshot import NodeRecord, Snapshot

VOID = {"br"}


class Page(HTMLParser):
    """Reads HTML strictly: every element that is opened is closed, in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def result(one_thread: None) -> fxq.Result:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return fxq.compile(tiny_residual(), images[:1], "minmax-int8", calibration=[images])


def test_a_journal(result: fxq.Result) -> None:
    page = Page(result.journal._repr_html_())
    assert page.tags.count("details") == len(result.journal)
    for step in result.journal:
        assert step.name in page.words
        assert step.delta.summary().split()[0] in page.words
    assert Journal()._repr_html_() == "no pass has run"


def test_a_delta(result: fxq.Result) -> None:
    delta = result.journal["fold-batch-norm"].delta
    page = Page(delta._repr_html_())
    for line in delta.text().splitlines():
        assert line in page.words
    assert COLOURS["removed"] in delta._repr_html_()
    assert "no change" in Page(compare(Snapshot(()), Snapshot(()))._repr_html_()).words


def test_a_program(result: fxq.Result) -> None:
    page = Page(result.program._repr_html_())
    for node in result.program.nodes():
        assert f"%{node.name}" in page.words
    assert "QuantizedLayer" in page.words
    assert "fold-batch-norm" in page.words


def test_an_artifact(result: fxq.Result) -> None:
    page = Page(result.artifact._repr_html_())
    assert f"{result.artifact.size_after:,} bytes" in page.words
    assert "100% of layers on integers" in page.words
    assert "fold-batch-norm" in page.words
    result.artifact.journal, journal = None, result.artifact.journal
    assert "fold-batch-norm" not in Page(result.artifact._repr_html_()).words
    result.artifact.journal = journal


def test_what_users_name_is_no_markup() -> None:
    nasty = NodeRecord("x", "<script>alert(1)</script>", arguments="'\"&")
    shown = compare(Snapshot(()), Snapshot((nasty,)))._repr_html_()
    assert "<script" not in shown
    assert nasty.text() in Page(shown).words


def test_a_long_delta_is_cut_and_says_so() -> None:
    nodes = tuple(NodeRecord(f"n{number}", "ReLU") for number in range(SHOWN + 7))
    words = Page(compare(Snapshot(()), Snapshot(nodes))._repr_html_()).words
    assert "… and 7 more" in words
    assert f"%n{SHOWN - 1} " in words
    assert f"%n{SHOWN} " not in words


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page", ["#ffffff", "#111111"])
def test_colours_are_legible_on_light_and_dark(kind: str, page: str) -> None:
    dark, light = sorted((luminance(COLOURS[kind]), luminance(page)))
    assert (light + 0.05) / (dark + 0.05) >= 4.0
