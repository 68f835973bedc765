"""Where text meets the terminal: consoles, errors, frames and columns. Nothing else prints.

Everything is plain text where the output is not a terminal: no colour, no frame, no wrapping.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable, Sequence

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fxq.errors import FxqError


class _Quiet(Console):
    """A console that ends the program without a word when its reader has gone away."""

    is_silent = False

    def on_broken_pipe(self) -> None:
        silence_stdout()
        raise SystemExit(0)


def silence_stdout() -> None:
    """Whatever is still buffered for a closed pipe goes nowhere."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())


def be_silent() -> None:
    """This process tells nothing but errors: another one does."""
    _Quiet.is_silent = True


def out() -> Console:
    """The console of results."""
    return _Quiet(highlight=False, markup=False, emoji=False, quiet=_Quiet.is_silent)


def err() -> Console:
    """The console of errors and warnings."""
    return _Quiet(stderr=True, highlight=False, markup=False, emoji=False)


def line(text: str | Text = "", console: Console | None = None) -> None:
    """One line, never wrapped or cut by us."""
    (console or out()).print(text, soft_wrap=True)


def lines(texts: Iterable[str | Text]) -> None:
    """Several lines on standard output, never wrapped or cut by us."""
    console = out()
    for text in texts:
        console.print(text, soft_wrap=True)


def raw(text: str) -> None:
    """Text for another program, such as JSON or TOML: exactly as it is."""
    out().print(text, soft_wrap=True, end="" if text.endswith("\n") else "\n")


def facts(
    rows: Iterable[tuple[str, str]], title: str, style: str, console: Console | None = None
) -> None:
    """A title, and what is known by name: framed on a terminal, aligned lines elsewhere."""
    target, known = console or out(), list(rows)
    if target.is_terminal:
        frame = Panel(_grid(known), title=Text(title), title_align="left", border_style=style)
        target.print(frame)
        return
    width = max((len(name) for name, _ in known), default=0)
    line(title, target)
    for name, value in known:
        line(f"  {name:<{width}}  {value}", target)


def _grid(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def columns(rows: Sequence[Sequence[str]], *, head: Sequence[str] = ()) -> None:
    """Rows in aligned columns; on a terminal the last one folds, and nothing is ever cut."""
    if not rows:
        return
    console = out()
    if console.is_terminal:
        console.print(_folding(rows, head))
        return
    shown = [head, *rows] if head else rows
    widths = [max(len(row[place]) for row in shown) for place in range(len(rows[0]))]
    for row in shown:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        line("  ".join(cells).rstrip(), console)


def _folding(rows: Sequence[Sequence[str]], head: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=bool(head), header_style="dim")
    for place in range(len(rows[0])):
        last = place == len(rows[0]) - 1
        style = "bold" if place == 0 else None
        title = head[place] if head else ""
        table.add_column(title, no_wrap=not last, overflow="fold", style=style)
    for row in rows:
        table.add_row(*row)
    return table


# ---- errors ------------------------------------------------------------------------------------


def error(problem: FxqError) -> None:
    """What is wrong, where, and what to do about it, on standard error."""
    console, kind = err(), type(problem).__name__
    if not console.is_terminal:
        line(f"{kind}: {problem}", console)
        return
    rows = [(name, value) for name, value in _places(problem) if value]
    content = Group(Text(problem.what, style="bold"), *([_grid(rows)] if rows else []))
    console.print(Panel(content, title=kind, title_align="left", border_style="red"))


def _places(problem: FxqError) -> list[tuple[str, str]]:
    return [("where", problem.where or ""), ("hint", problem.hint or "")]


def trace(problem: BaseException) -> None:
    """Every frame of an error, on standard error."""
    line("".join(traceback.format_exception(problem)).rstrip(), err())


def warning(sentence: str, title: str = "warning") -> None:
    """Something that must not be overlooked, on standard error."""
    console = err()
    if console.is_terminal:
        frame = Panel(Text(sentence), title=title, title_align="left", border_style="yellow")
        console.print(frame)
    else:
        line(f"{title}: {sentence}", console)


def notice(sentence: str) -> None:
    """A remark on standard error."""
    if not _Quiet.is_silent:
        line(Text(sentence, style="dim"), err())


# ---- numbers -----------------------------------------------------------------------------------


def size_text(count: int) -> str:
    """A number of bytes for people.

    Example:
        >>> [size_text(count) for count in (17, 1_500, 44_600_000)]
        ['17 B', '1.5 kB', '44.60 MB']
    """
    if count < 1000:
        return f"{count} B"
    if count < 1_000_000:
        return f"{count / 1000:.1f} kB"
    return f"{count / 1_000_000:.2f} MB"


def plural(count: int, word: str) -> str:
    """A count with its noun.

    Example:
        >>> plural(1, "image"), plural(2, "image")
        ('1 image', '2 images')
    """
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
