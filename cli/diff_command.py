"""The options of ``fxq diff``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from fxq.errors import FxqError

from . import options as opt


class View(StrEnum):
    """How a difference is told."""

    UNIFIED = "unified"
    SIDE_BY_SIDE = "side-by-side"
    STAT = "stat"
    VALUES = "values"
    JSON = "json"
    DOT = "dot"


class Kind(StrEnum):
    """How a node changed."""

    ADDED = "added"
    REMOVED = "removed"
    REWIRED = "rewired"
    NOTED = "noted"
    RETUNED = "retuned"


_VIEW, _WHICH = "How it is shown", "Which nodes"


def diff_command(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            show_default=False,
            help="A folder that fxq compile wrote; alone, all its passes one after the other",
        ),
    ],
    others: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STEP|RUN",
            show_default=False,
            help="STEP: what that pass changed. STEP STEP: from the graph after the first to the "
            "one after the second. RUN: from the last graph of the first run to that of this one; "
            "RUN:STEP is another graph of a run. A step is a pass by name or position; `capture` "
            "or 0 is the graph before all, `last` the one after all",
        ),
    ] = None,
    only: opt.PassName = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="RUN",
            show_default=False,
            help="Compare from the graph of another run: fxq diff OTHER RUN",
        ),
    ] = None,
    side_by_side: Annotated[
        bool,
        typer.Option("--side-by-side", "-y", rich_help_panel=_VIEW, help="In two columns"),
    ] = False,
    stat: Annotated[
        bool,
        typer.Option(
            "--stat",
            rich_help_panel=_VIEW,
            help="Only how many nodes changed, by pass, or by operator where one pass or two "
            "graphs are compared",
        ),
    ] = False,
    values: Annotated[
        bool,
        typer.Option(
            "--values",
            rich_help_panel=_VIEW,
            help="How far each pass moved each value on the probe batch, instead of the nodes",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=_VIEW, help="As JSON, for other programs")
    ] = False,
    dot: Annotated[
        bool,
        typer.Option(
            "--dot", rich_help_panel=_VIEW, help="As one picture, in the language of Graphviz"
        ),
    ] = False,
    code: Annotated[
        bool,
        typer.Option(
            "--code", rich_help_panel=_VIEW, help="The generated forward instead of the nodes"
        ),
    ] = False,
    backward: Annotated[
        bool,
        typer.Option(
            "--backward",
            rich_help_panel=_VIEW,
            help="The graphs of a training step, forward and backward, of runs of fxq train; the "
            "passes are run again",
        ),
    ] = False,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            "-U",
            min=0,
            show_default=False,
            rich_help_panel=_VIEW,
            help="Unchanged nodes around each change; 0 if not given, 3 lines with --code, and "
            "the whole graph with --dot",
        ),
    ] = None,
    digests: Annotated[
        bool,
        typer.Option(rich_help_panel=_VIEW, help="Whether weights are shown as digests"),
    ] = True,
    width: Annotated[
        int | None,
        typer.Option(
            "--width",
            min=40,
            show_default=False,
            rich_help_panel=_VIEW,
            help="Columns to fill; the terminal's if not given. Piped, lines are as long as they "
            "are, and --side-by-side and --stat have 100",
        ),
    ] = None,
    node: Annotated[
        list[str] | None,
        typer.Option(
            "--node",
            metavar="GLOB",
            show_default=False,
            rich_help_panel=_WHICH,
            help="Only nodes whose name or module path matches; repeatable",
        ),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(
            "--op",
            metavar="GLOB",
            show_default=False,
            rich_help_panel=_WHICH,
            help="Only nodes whose operator matches, before or after; repeatable",
        ),
    ] = None,
    kinds: Annotated[
        list[Kind] | None,
        typer.Option(
            "--only",
            show_default=False,
            rich_help_panel=_WHICH,
            help="Only changes of this kind; repeatable",
        ),
    ] = None,
) -> None:
    """Show what each pass changed, or how two graphs differ: two steps of a run, or two runs.

    Nodes are matched by name: + added, - removed, ~ rewired (other inputs or operator), ! noted
    (other facts), # retuned (other parameters). Ends with 0 whether or not anything differs.
    """
    view = _view(
        {
            View.SIDE_BY_SIDE: side_by_side,
            View.STAT: stat,
            View.VALUES: values,
            View.JSON: as_json,
            View.DOT: dot,
        }
    )
    if code:
        _check_code(view, filtered=bool(node or op or kinds))
    if backward and (code or values):
        raise FxqError(
            "of a training step the nodes can be compared",
            where=f"--backward --{'code' if code else 'values'}",
            hint="leave one out",
        )
    from . import diff
    from .difference import Filter

    ask = diff.Request(
        run=run,
        others=tuple(others or ()),
        only=only,
        against=against,
        keeps=Filter(tuple(node or ()), tuple(op or ()), tuple(kinds or ())),
        view=view,
        context=context,
        code=code,
        backward=backward,
        digests=digests,
        width=width,
    )
    diff.run(ask)


def _view(given: dict[View, bool]) -> View:
    chosen = [view for view, wanted in given.items() if wanted]
    if len(chosen) > 1:
        raise FxqError(
            "a difference is shown in one way at a time",
            where=" ".join(f"--{view}" for view in chosen),
        )
    return chosen[0] if chosen else View.UNIFIED


def _check_code(view: View, *, filtered: bool) -> None:
    if view not in (View.UNIFIED, View.SIDE_BY_SIDE):
        raise FxqError("--code is shown as text", where=f"--code --{view}", hint=f"drop --{view}")
    if filtered:
        raise FxqError(
            "--node, --op and --only choose nodes, and code has lines",
            where="--code",
            hint="leave out --code, or the filters",
        )
