"""How differences of generated code look."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from rich.text import Text

from fxq.errors import FxqError

from . import show
from .diff_command import View
from .show_diff import Pair, columns, folded, side_by_side, wide

if TYPE_CHECKING:
    from .diff import Request
    from .difference import Section

CONTEXT = 3
_RELEASE = re.compile(r";( +\w+ =)+ None$")
_STYLES = {"+": "green", "-": "red", " ": "dim"}

Opcode = tuple[str, int, int, int, int]


def differences(found: Sequence[Section], ask: Request) -> None:
    """The forward before and after each step, or of two graphs.

    Raises:
        FxqError: The run was recorded without code.
    """
    for position, one in enumerate(found):
        if position:
            show.line()
        show.lines(folded(_body(one, ask), columns(ask)))


def _body(one: Section, ask: Request) -> Iterator[Text]:
    before, after = (lines_of(graph.code) for graph in (one.before, one.after))
    if not before or not after:
        raise FxqError(
            "the generated forward was not recorded",
            where=ask.run,
            hint="compile again, or leave out --code: an older fxq wrote this run",
        )
    context = CONTEXT if ask.context is None else ask.context
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    groups = [list(group) for group in matcher.get_grouped_opcodes(context)]
    groups = [group for group in groups if any(tag != "equal" for tag, *_ in group)]
    if not groups:
        yield Text.assemble((one.title, "bold"), ("  no change", "dim"))
    elif ask.view is View.SIDE_BY_SIDE:
        hunks = [list(_pairs(before, after, group)) for group in groups]
        yield from side_by_side(one.sides, hunks, wide(ask))
    else:
        yield Text(f"--- {one.sides[0]}", style="bold")
        yield Text(f"+++ {one.sides[1]}", style="bold")
        for group in groups:
            yield from _hunk(before, after, group)


def lines_of(code: str) -> list[str]:
    """The lines of a forward, without the releases that torch.fx appends to them.

    Example:
        >>> lines_of("def forward(self, x):" + chr(10) + "    y = self.c(x);  x = None" + chr(10))
        ['def forward(self, x):', '    y = self.c(x)']
    """
    return [_RELEASE.sub("", line) for line in code.strip("\n").splitlines()]


def _hunk(before: list[str], after: list[str], group: list[Opcode]) -> Iterator[Text]:
    first, final = group[0], group[-1]
    spans = (_span(first[1], final[2]), _span(first[3], final[4]))
    yield Text(f"@@ -{spans[0]} +{spans[1]} @@", style="cyan")
    for tag, a, b, c, d in group:
        if tag == "equal":
            yield from (_line(" ", text) for text in before[a:b])
            continue
        yield from (_line("-", text) for text in before[a:b])
        yield from (_line("+", text) for text in after[c:d])


def _span(start: int, end: int) -> str:
    return f"{start + 1},{end - start}"


def _line(sign: str, text: str) -> Text:
    return Text(f"{sign}{text}", style=_STYLES[sign])


def _pairs(before: list[str], after: list[str], group: list[Opcode]) -> Iterator[Pair]:
    for tag, a, b, c, d in group:
        if tag == "equal":
            yield from (_pair(line, line, same=True) for line in before[a:b])
        else:
            yield from _matched(before[a:b], after[c:d])


def _matched(before: list[str], after: list[str]) -> Iterator[Pair]:
    """Lines that differ, those that assign to the same name beside each other."""
    names = [[line.split(" = ")[0] for line in lines] for lines in (before, after)]
    matcher = SequenceMatcher(None, names[0], names[1], autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            yield from (
                _pair(*both, same=False) for both in zip(before[a:b], after[c:d], strict=True)
            )
            continue
        yield from (_pair(line, None, same=False) for line in before[a:b])
        yield from (_pair(None, line, same=False) for line in after[c:d])


def _pair(left: str | None, right: str | None, *, same: bool) -> Pair:
    first, second = (left or "").strip(), (right or "").strip()
    if same:
        return " ", Text(first, style="dim"), Text(second, style="dim")
    sign = "-" if right is None else "+" if left is None else "~"
    return sign, Text(first, style="red"), Text(second, style="green")
