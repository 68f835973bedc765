"""HTML for notebooks: plain strings with styles of their own, for light pages and dark ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

COLOURS = {
    "added": "#1a8a45",
    "removed": "#d43c3e",
    "rewired": "#a06b00",
    "noted": "#0f7fa8",
    "retuned": "#a14fc9",
}
"""Of the five kinds of change; each can be read on white and on black."""

_CELL = "text-align:left;vertical-align:top;padding:2px 12px 2px 0"
_TABLE = "border-collapse:collapse;background:transparent;color:inherit"
_MONOSPACE = "font-family:monospace;white-space:pre"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already.

    Example:
        >>> "<th" in table(["node"], [[text("a < b")]])
        True
    """
    top = "".join(f'<th style="{_CELL}">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    return f'<table style="{_TABLE}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _cells(row: Sequence[str]) -> str:
    return "".join(f'<td style="{_CELL}">{cell}</td>' for cell in row)


def text(value: object, kind: str = "") -> str:
    """A value as text, in the colour of a kind of change where one is given.

    Example:
        >>> text("a < b"), text("+1", "added")
        ('a &lt; b', '<span style="color:#1a8a45">+1</span>')
    """
    shown = escape(str(value))
    return f'<span style="color:{COLOURS[kind]}">{shown}</span>' if kind else shown


def code(lines: Iterable[str]) -> str:
    """Lines that are HTML already, in letters of equal width."""
    return f'<div style="{_MONOSPACE};overflow-x:auto">{"<br>".join(lines)}</div>'


def folded(summary: str, content: str) -> str:
    """Content that a click shows, under a summary that is HTML already."""
    return f"<details><summary>{summary}</summary>{content}</details>"
