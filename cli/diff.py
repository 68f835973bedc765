"""``fxq diff``: what passes changed, and how the graphs of two runs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from fxq.errors import FxqError

from .diff_command import View
from .difference import Filter, Section
from .trail import CAPTURE, LAST, find_step, graph_after, is_run, load_journal, names_a_folder

if TYPE_CHECKING:
    from fxq.trail.journal import Journal, Step
    from fxq.trail.snapshot import Snapshot


def run(ask: Request) -> None:
    """The difference is printed.

    Raises:
        FxqError: The arguments do not go together, or one of them names nothing.
    """
    from . import show, show_code, show_diff

    found = sections(ask)
    if ask.code:
        show_code.differences(found, ask)
        return
    ask.keeps.check([record for one in found for record in (*one.before.nodes, *one.after.nodes)])
    if ask.view is View.JSON:
        data = {"run": ask.run, "against": ask.against, "sections": [x.to_json() for x in found]}
        show.raw(json.dumps(data, indent=1))
    elif ask.view is View.DOT:
        show.raw(_picture(found, ask))
    else:
        show_diff.differences(found, ask)


def _picture(found: Sequence[Section], ask: Request) -> str:
    """All that is compared in one picture, from the first graph to the last."""
    from fxq.trail.dot import dot

    if not found:
        raise FxqError("no pass has run, so there is nothing to draw", where=ask.run)
    whole = replace(found[0], after=found[-1].after)
    near = {one.name for hunk in whole.hunks(ask.context or 0) for one in hunk}
    title = " -> ".join((found[0].sides[0], found[-1].sides[1]))
    return dot(
        whole.before,
        whole.after,
        title=title,
        keeps=ask.keeps.keeps,
        shown=lambda record: ask.context is None or record.name in near,
    )


# ---- what is compared --------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What ``fxq diff`` was asked for.

    Attributes:
        run: ``RUN`` or ``RUN:STEP``.
        others: Up to two of ``STEP``, ``RUN`` and ``RUN:STEP``.
        only: The pass of ``--pass``.
        against: The run of ``--against``.
        keeps: Which changes are told.
        view: How.
        context: Unchanged nodes, or lines of code, around each change; None for the usual.
        code: Whether the generated forward is compared instead of the nodes.
        backward: Whether training steps are compared, forward and backward, instead of forwards.
        digests: Whether weights are shown as digests.
        width: Columns; None for the terminal's.
    """

    run: str
    others: tuple[str, ...] = ()
    only: str | None = None
    against: str | None = None
    keeps: Filter = field(default_factory=Filter)
    view: View = View.UNIFIED
    context: int | None = None
    code: bool = False
    backward: bool = False
    digests: bool = True
    width: int | None = None

    def journal(self, run: str) -> Journal:
        """The journal of a run, whose steps can be compared."""
        from .backward import trained_journal

        return trained_journal(run) if self.backward else load_journal(run)

    def place(self, text: str) -> Place:
        """The graph that ``RUN`` or ``RUN:STEP`` means; ``RUN`` alone is that of ``--pass``."""
        run, own = split(text)
        journal = self.journal(run)
        wanted = own or self.only
        position = len(journal) if wanted is None else find_step(journal, wanted)
        return Place(run, journal, position, self.backward)


@dataclass(frozen=True)
class Place:
    """The graph of a run after a pass; position 0 is the captured graph."""

    run: str
    journal: Journal
    position: int
    backward: bool = False

    @property
    def graph(self) -> Snapshot:
        """The graph, or that of a training step."""
        from .backward import step_of_run

        if self.backward:
            return step_of_run(self.run, self.position)
        return graph_after(self.journal, self.position)

    @property
    def name(self) -> str:
        """The pass it is after."""
        return self.journal.steps[self.position - 1].name if self.position else CAPTURE

    @property
    def label(self) -> str:
        """The run, with the pass where that is not the last one."""
        return self.run if self.position == len(self.journal) else f"{self.run}:{self.name}"


def split(text: str) -> tuple[str, str | None]:
    """The run and the step of ``RUN:STEP``; no step where there is none.

    Example:
        >>> split("runs/a:calibrate"), split("runs/a")
        (('runs/a', 'calibrate'), ('runs/a', None))
    """
    run, colon, step = text.rpartition(":")
    return (run, step or None) if colon and run and not is_run(text) else (text, None)


def sections(ask: Request) -> list[Section]:
    """What is compared, in order.

    Raises:
        FxqError: The arguments do not go together, or one of them names nothing.
    """
    if ask.against is not None:
        return [_against(ask, ask.against)]
    others = ask.others
    run, step = split(ask.run)
    journal = ask.journal(run)
    if not others:
        return _passes(ask, journal, step or ask.only)
    if len(others) == 1 and _is_side(others[0], journal):
        return [_between(ask.place(ask.run), ask.place(others[0]), ask.keeps)]
    if ask.only is not None:
        raise FxqError("a step was given twice", where=f"--pass {ask.only}", hint="leave one out")
    ends = others if step is None else (step, *others)
    if len(ends) == 1:
        return _passes(ask, journal, ends[0])
    if len(ends) > 2 or any(_is_side(end, journal) for end in ends):
        raise FxqError(
            "two graphs can be compared, not three",
            where=" ".join((ask.run, *others)),
            hint="fxq diff RUN STEP STEP, or fxq diff RUN:STEP RUN:STEP",
        )
    first, second = (Place(run, journal, find_step(journal, end), ask.backward) for end in ends)
    return [_between(first, second, ask.keeps)]


def _is_side(text: str, journal: Journal) -> bool:
    """Whether an argument means a run, with or without a step, and not a step of this one."""
    if is_run(text):
        return True
    is_step = text.isdigit() or text in (CAPTURE, LAST) or text in {one.name for one in journal}
    return not is_step and (names_a_folder(text) or ":" in text)


def _against(ask: Request, against: str) -> Section:
    if ask.others:
        raise FxqError(
            "what to compare with was given twice",
            where=f"{' '.join(ask.others)} --against {against}",
            hint="leave one out: fxq diff OTHER RUN is fxq diff RUN --against OTHER",
        )
    return _between(ask.place(against), ask.place(ask.run), ask.keeps)


def _passes(ask: Request, journal: Journal, only: str | None) -> list[Section]:
    """Each pass, or one; of training steps all passes together, since each graph takes a while."""
    run = split(ask.run)[0]
    positions = range(1, len(journal) + 1)
    if only is not None:
        chosen = find_step(journal, only)
        if chosen == 0:
            raise FxqError(
                "the captured graph is where the passes begin; no pass made it",
                where=only,
                hint=f"fxq diff {run} {CAPTURE} {LAST} compares it with the last graph",
            )
        positions = range(chosen, chosen + 1)
    if ask.backward:
        ends = (positions.start - 1, positions.stop - 1)
        first, second = (Place(run, journal, end, backward=True) for end in ends)
        return [_between(first, second, ask.keeps)]
    found = []
    for position in positions:
        step, before = journal.steps[position - 1], Place(run, journal, position - 1)
        sides = (before.name, step.name)
        found.append(Section(position, step.name, sides, step.before, step.after, ask.keeps, step))
    return found


def _between(first: Place, second: Place, keeps: Filter) -> Section:
    same = first.run == second.run
    sides = (first.name, second.name) if same else (first.label, second.label)
    recipe = () if same else tuple(_recipes(first, second))
    title = " -> ".join(sides)
    return Section(second.position, title, sides, first.graph, second.graph, keeps, recipe=recipe)


def _recipes(first: Place, second: Place) -> Iterator[str]:
    """How the passes that led to two graphs differ, a line each."""
    old, new = (one.journal.steps[: one.position] for one in (first, second))
    names = [step.name for step in old], [step.name for step in new]
    matcher = SequenceMatcher(None, names[0], names[1], autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag != "equal":
            yield from (f"- pass {name}" for name in names[0][a:b])
            yield from (f"+ pass {name}" for name in names[1][c:d])
            continue
        for before, after in zip(old[a:b], new[c:d], strict=True):
            yield from _options(before, after)


def _options(before: Step, after: Step) -> Iterator[str]:
    for name, value in after.options.items():
        was = before.options.get(name, value)
        if was != value:
            yield f"~ pass {after.name}: {name}={_value(value)}  was {_value(was)}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
