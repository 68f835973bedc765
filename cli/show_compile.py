"""How a compilation looks while it runs, and the summary it ends with."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from fxq.trail.delta import KINDS, SIGNS
from fxq.trail.journal import format_db

from . import show, show_trail
from .options import Print

if TYPE_CHECKING:
    from fxq.artifact import Artifact
    from fxq.trail.journal import Journal, Step

_PLACEMENT = "placement: "
_VALUE_WIDTH = 64  # of the 80 columns that the summary has


class Meter:
    """A progress bar on the terminal, and nothing where there is none."""

    def __init__(self) -> None:
        console = show.out() if show.out().is_terminal else show.err()
        self._bars = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    @property
    def console(self) -> Console:
        """Where lines can be printed while bars are shown."""
        return self._bars.console if show.out().is_terminal else show.out()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, label: str, done: int, total: int | None) -> None:
        """Show how far something is; what has finished is taken away."""
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[label], completed=done, total=total)
        if total is not None and done >= total:
            self._bars.remove_task(self._tasks.pop(label))
            self._bars.refresh()


class Reporter(Meter):
    """Tells of each pass on one line as it finishes.

    Args:
        printing: Whether the changed nodes, or the whole graph, follow the line.
        on_step: Called after every pass, too.

    Attributes:
        steps: The passes so far.
    """

    def __init__(
        self, printing: Print = Print.NONE, on_step: Callable[[Step], None] | None = None
    ) -> None:
        super().__init__()
        self._printing, self._on_step = printing, on_step
        self.steps: list[Step] = []

    def step(self, step: Step) -> None:
        """One pass has finished."""
        if not self.steps:
            self._line(heading())
        self.steps.append(step)
        for text in step_lines(step, len(self.steps)):
            self._line(text)
        self._details(step)
        if self._on_step is not None:
            self._on_step(step)

    def _details(self, step: Step) -> None:
        if self._printing is Print.ALL:
            self._line(step.after.text())
        elif self._printing is Print.CHANGED:
            for change in step.delta.changes:
                for text in show_trail.change_lines(change):
                    self._line(text)

    def _line(self, text: str | Text) -> None:
        self.console.print(text, soft_wrap=True)


def heading() -> Text:
    """What the columns of `step_lines` are: the signs are those of ``fxq diff``."""
    signs = [Text(f"{SIGNS[kind]:>6}", style=show_trail.COLOURS[kind]) for kind in KINDS]
    numbers = Text(f"{'cost':>11}{'SQNR':>10}{'time':>9}")
    return Text(f"   {'pass':<16}").append_text(Text().join([*signs, numbers]))


def legend() -> Text:
    """What the signs mean."""
    words = [Text(f"{SIGNS[kind]} {kind}", style=show_trail.COLOURS[kind]) for kind in KINDS]
    return Text("   nodes: ") + Text("  ").join(words)


def step_lines(step: Step, position: int) -> list[Text]:
    """What a pass did on one line, and below it what it wants told."""
    found = step.delta.counts()
    row = Text.assemble((f"{position:>2} {step.name:<16}", "bold"))
    for kind in KINDS:
        row.append(f"{found.get(kind, ''):>6}", style=show_trail.COLOURS[kind])
    numbers = f"{format_db(step.sqnr):>11}{format_db(step.total_sqnr):>10}{step.seconds:>7.2f} s"
    row.append(numbers)
    told = [note for note in step.notes if not note.startswith(_PLACEMENT)]  # in the summary
    below = [Text(f"   {note}", style="dim") for note in told]
    if step.misses:
        below.append(Text(f"   {len(step.misses)} refused; fxq explain says why", style="dim"))
    return [row, *below]


def summary(rows: Sequence[tuple[str, str]], folder: str, commands: Sequence[str]) -> None:
    """What came out, and what to do next."""
    show.line()
    show.facts(rows, f"compiled to {folder}", "green")
    show.lines(["", *(f"  {command}" for command in commands)])


def proof_text(artifact: Artifact) -> str:
    """How many layers are exact on int8 kernels of every CPU, for people."""
    layers = sum(entry.layer and entry.where == "int8" for entry in artifact.ledger.entries)
    missing = len(artifact.unproven)
    if not missing:
        return f"{layers} of {layers} layers proven exact without VNNI"
    return f"{layers - missing} of {layers} layers proven exact without VNNI, float64 for the rest"


def placement_rows(journal: Journal) -> list[tuple[str, str]]:
    """What the quantize passes noted of which values have how many bits, a group per row."""
    notes = [note for step in journal for note in step.notes if note.startswith(_PLACEMENT)]
    parts = [part for note in notes for part in note.removeprefix(_PLACEMENT).split("; ")]
    lines = [line for part in parts for line in textwrap.wrap(part, _VALUE_WIDTH)]
    return [("" if position else "placement", line) for position, line in enumerate(lines)]


def score(source: str, text: str) -> None:
    """One measured network."""
    show.line(f"{text} on {source}")


def simulation_warning(warnings: Sequence[str]) -> None:
    """Layers of a simulation that compute in float: a loud frame."""
    for sentence in warnings:
        show.warning(sentence, "simulation only")


def coverage_warning(warnings: Sequence[str], accepted: bool) -> None:
    """Layers that run in float against the promise of the recipe: a loud frame, or one line."""
    if not warnings:
        return
    if accepted:
        show.notice(warnings[0])
        return
    shown = [*warnings[:8], f"and {len(warnings) - 8} more"] if len(warnings) > 9 else warnings
    show.warning("\n".join(shown), "below the promised coverage")
