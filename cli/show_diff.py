"""How differences look: unified, side by side, and as bars; the same text plain when piped."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.text import Text

from fxq.errors import FxqError
from fxq.trail.delta import KINDS, SIGNS, Change
from fxq.trail.journal import format_db

from . import show
from .diff_command import View
from .show_trail import COLOURS, change_lines, counts, totals

if TYPE_CHECKING:
    from fxq.trail.drift import Drift
    from fxq.trail.journal import Step
    from fxq.trail.snapshot import NodeRecord

    from .diff import Request
    from .difference import Section

PIPED_WIDTH = 100
_GAP = Text("  …", style="dim")
_INDENT = " " * 6

Pair = tuple[str, Text, Text]
"""A row of two columns: the sign between them, and the two."""


def differences(found: Sequence[Section], ask: Request) -> None:
    """What is compared, one after the other."""
    if ask.view is View.VALUES:
        _values(found, ask)
        return
    told = [one for one in found if one.delta] if ask.keeps else list(found)
    if not told:
        show.line("no change matches" if found else "no pass has run")
        return
    if ask.view is View.STAT and len(found) > 1:
        show.lines(_passes(told, wide(ask)))
        return
    for position, one in enumerate(told):
        if position:
            show.line()
        show.lines(_body(one, ask))
    if len(told) == 1 and told[0].strangers:
        show.warning("no node is in both graphs: nodes are matched by name", "two networks?")


def _body(one: Section, ask: Request) -> Iterator[Text]:
    fitted = columns(ask)
    yield from folded([heading(one)], fitted)
    yield from folded((Text(line, style=_colour(line)) for line in one.recipe), fitted)
    if one.recipe and one.delta:
        yield Text()
    if ask.view is View.STAT:
        yield from _operators(one, wide(ask))
    elif ask.view is View.SIDE_BY_SIDE:
        rows = (_pairs(hunk, ask.digests) for hunk in one.hunks(ask.context or 0))
        yield from side_by_side(one.sides, list(rows), wide(ask)) if one.delta else ()
    else:
        yield from folded(_unified(one, ask), fitted)


def heading(one: Section) -> Text:
    """What is compared, how many nodes changed in each way, and what that cost."""
    name = f"{one.position} {one.title:<18} " if one.step is not None else f"{one.title}  "
    return Text.assemble((name, "bold"), counts(one.delta), (_costs(one.step), "dim"))


def _costs(step: Step | None) -> str:
    if step is None:
        return ""
    parts = [format_db(step.sqnr), f"{step.seconds:.2f} s"]
    parts += [f"{len(step.misses)} refused"] if step.misses else []
    return "".join(f"  {part}" for part in parts if part)


def _colour(line: str) -> str:
    return {SIGNS[kind]: COLOURS[kind] for kind in KINDS}.get(line[:1], "")


# ---- unified -----------------------------------------------------------------------------------


def _unified(one: Section, ask: Request) -> Iterator[Text]:
    for place, hunk in enumerate(one.hunks(ask.context or 0)):
        if place and ask.context:
            yield _GAP
        for row in hunk:
            yield from _row(row, ask.digests)


def _row(row: Change | NodeRecord, digests: bool) -> list[Text]:
    if isinstance(row, Change):
        return change_lines(row, digests)
    return [Text(f"  {row.text(digests)}", style="dim")]


# ---- side by side ------------------------------------------------------------------------------


def _pairs(hunk: Iterable[Change | NodeRecord], digests: bool) -> list[Pair]:
    return [_pair(row, digests) for row in hunk]


def _pair(row: Change | NodeRecord, digests: bool) -> Pair:
    if not isinstance(row, Change):
        same = _cell(row, digests, "dim")
        return " ", same, same
    style = COLOURS[row.kind]
    left, right = (_cell(record, digests, style) for record in (row.before, row.after))
    return SIGNS[row.kind], left, right


def _cell(record: NodeRecord | None, digests: bool, style: str) -> Text:
    """A node, which may break before what it is called with."""
    text = "" if record is None else record.text(digests).replace("(", " (", 1)
    return Text(text, style=style)


def side_by_side(
    sides: tuple[str, str], hunks: Sequence[Sequence[Pair]], width: int
) -> Iterator[Text]:
    """Rows in two columns of equal width under the names of the two sides; long ones wrap."""
    column = (width - 3) // 2
    left, right = (Text(side, style="bold") for side in sides)
    yield from _joined(" ", left, right, column)
    yield Text(f"{'─' * column}   {'─' * column}", style="dim")
    for place, hunk in enumerate(hunks):
        if place:
            yield _GAP
        for row in hunk:
            yield from _joined(*row, column)


def _joined(sign: str, left: Text, right: Text, column: int) -> Iterator[Text]:
    cells = [textwrap.wrap(text.plain, column, subsequent_indent="    ") for text in (left, right)]
    for first, second in zip_longest(*cells, fillvalue=""):
        line = Text(f"{first:<{column}}", style=left.style)
        line.append(f" {sign} ").append(second, style=right.style)
        line.rstrip()
        yield line
        sign = " "


# ---- bars --------------------------------------------------------------------------------------


def _passes(found: Sequence[Section], width: int) -> list[Text]:
    """A bar for each pass, and below all what they changed in total."""
    names = [f"{one.position} {one.title}" for one in found]
    bars = [Counter(one.delta.counts()) for one in found]
    lines = _bars(names, bars, width, [_costs(one.step) for one in found])
    total: Counter[str] = sum(bars, Counter())
    return [*lines, Text("in all  ").append_text(totals(total))]


def _operators(one: Section, width: int) -> list[Text]:
    """A bar for each operator, the ones with most changes first."""
    bars: dict[str, Counter[str]] = {}
    for change in one.delta.changes:
        bars.setdefault(_operator(change), Counter())[change.kind] += 1
    ranked = sorted(bars.items(), key=lambda item: (-item[1].total(), item[0]))
    return _bars([f"  {name}" for name, _ in ranked], [bar for _, bar in ranked], width, [])


def _operator(change: Change) -> str:
    ops = [one.op for one in (change.before, change.after) if one is not None]
    return " -> ".join(dict.fromkeys(ops))


def _bars(
    names: Sequence[str], bars: Sequence[Counter[str]], width: int, tails: Sequence[str]
) -> list[Text]:
    """Names, counts, bars of signs that fit the width, and what follows them."""
    room = max((len(name) for name in names), default=0)
    digits = max((len(str(bar.total())) for bar in bars), default=0)
    tail = max((len(text) for text in tails), default=0)
    space = max(10, width - room - digits - tail - 4)
    most = max((bar.total() for bar in bars), default=0)
    drawn = [_bar(bar, most, space) for bar in bars]
    longest = max((len(bar) for bar in drawn), default=0)
    lines = []
    for place, (name, bar) in enumerate(zip(names, drawn, strict=True)):
        line = Text(f"{name:<{room}}  {bars[place].total():>{digits}}  ").append_text(bar)
        if tails:
            line.append(" " * (longest - len(bar)) + tails[place], style="dim")
        line.rstrip()
        lines.append(line)
    return lines


def _bar(counted: Counter[str], most: int, space: int) -> Text:
    bar = Text()
    for kind in KINDS:
        if counted[kind]:
            signs = SIGNS[kind] * _length(counted[kind], most, space)
            bar.append(signs, style=COLOURS[kind])
    return bar


def _length(count: int, most: int, space: int) -> int:
    """Signs for a count: as many where all fit, else in proportion and at least one."""
    room = space - len(KINDS)  # each kind may take one more than its share
    return count if most <= space else min(count, 1 + count * room // most)


# ---- values ------------------------------------------------------------------------------------


def _values(found: Sequence[Section], ask: Request) -> None:
    """Of each pass the values that it moved, in order, and how far.

    Raises:
        FxqError: No pass leads from one graph to the other.
    """
    if any(one.step is None for one in found):
        raise FxqError(
            "how far values moved is recorded for each pass",
            where=found[0].title,
            hint="fxq diff RUN --values, or fxq diff RUN STEP --values",
        )
    told = [one for one in found if one.moved]
    if not told:
        show.line("no value moved" if found else "no pass has run")
        return
    room = max(len(name) for one in told for name in one.moved)
    for position, one in enumerate(told):
        if position:
            show.line()
        show.lines(folded([heading(one)], columns(ask)))
        show.line(Text(f"  {'value':<{room + 1}}  {'SQNR':>10}  largest change", style="dim"))
        show.lines(_moved(name, drift, room) for name, drift in one.moved.items())


def _moved(name: str, drift: Drift, room: int) -> Text:
    words = f"{format_db(drift.sqnr):>10}", f"{drift.largest:.3g}"
    return Text.assemble(f"  %{name:<{room}}  ", words[0], (f"  {words[1]}", "dim"))


# ---- widths ------------------------------------------------------------------------------------


def columns(ask: Request) -> int | None:
    """The columns that lines are folded to; None where they stay as long as they are."""
    console = show.out()
    return ask.width or (console.width if console.is_terminal else None)


def wide(ask: Request) -> int:
    """The columns of what is laid out."""
    return columns(ask) or PIPED_WIDTH


def folded(lines: Iterable[Text], width: int | None) -> Iterator[Text]:
    """Lines that fit the width; what does not continues below, indented."""
    for line in lines:
        if width is None or len(line.plain) <= width:
            yield line
            continue
        yield from _wrapped(line, width)


def _wrapped(line: Text, width: int) -> Iterator[Text]:
    """A line broken at spaces, its colours kept."""
    start = 0
    parts = textwrap.wrap(
        line.plain, width - len(_INDENT), break_long_words=False, break_on_hyphens=False
    )
    for position, part in enumerate(parts):
        start = line.plain.index(part.strip(), start)
        piece = line[start : start + len(part.strip())]
        yield Text(_INDENT).append_text(piece) if position else piece
        start += len(part.strip())
