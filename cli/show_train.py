"""How a training looks: a bar with loss, accuracy and time left, a line per epoch, a summary."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.progress import TaskID
from rich.text import Text

from . import show, show_compile
from .compile import coverage_text, float_bytes, folder_bytes, sizes_text

if TYPE_CHECKING:
    from fxq.training import TrainingOptions
    from fxq.training.checkpoint import Row
    from fxq.training.watch import Moment

    from .train import Outcome

_NAMES = {"epoch", "step", "lr", "train_loss", "train_accuracy", "test_accuracy", "seconds"}
"""The columns that each line shows in a place of its own; all others follow by name."""

_SHOWN_OF_ALPHA = " mean"


class TrainingMeter(show_compile.Reporter):
    """Tells of each pass and each epoch on one line; between them a bar shows every step."""

    def __init__(self) -> None:
        super().__init__()
        self._task: TaskID | None = None
        self._began, self._first = 0.0, 0
        self._has_heading = False

    def moment(self, moment: Moment) -> None:
        """A step was made."""
        done = (moment.epoch - 1) * moment.steps + moment.step
        total = moment.epochs * moment.steps
        if self._task is None:
            self._task = self._bars.add_task("", total=total)
            self._began, self._first = time.monotonic(), done
        passed = time.monotonic() - self._began
        left = passed / max(1, done - self._first) * (total - done)
        text = (
            f"epoch {moment.epoch}/{moment.epochs}  loss {moment.loss:.4f}  "
            f"accuracy {100 * moment.accuracy:.1f} %  {duration(left)} left"
        )
        self._bars.update(self._task, completed=done, description=text)

    def epoch(self, row: Row) -> None:
        """An epoch is finished."""
        if not self._has_heading:
            self._line(Text(f"{'epoch':>5}  {'lr':>8}  {'loss':>7}  {'train':>8}  {'test':>8}"))
        self._has_heading = True
        self._line(epoch_line(row))

    def tell(self, sentence: str) -> None:
        """Something that users should read."""
        self._line(Text(sentence, style="dim"))


def epoch_line(row: Row) -> str:
    """What is known of an epoch.

    Example:
        >>> row = {"epoch": 3, "lr": 0.01, "train_loss": 0.25, "train_accuracy": 0.9, "seconds": 7}
        >>> epoch_line(row | {"test_accuracy": None, "Clip alpha mean": 1.5})
        '    3      0.01   0.2500   90.00 %         -  7 s  Clip alpha 1.5'
    """
    cells = [
        f"{row['epoch']:>5}",
        f"{row['lr']:>8.3g}",
        f"{row['train_loss']:>7.4f}",
        _per_cent(row["train_accuracy"]),
        _per_cent(row["test_accuracy"]),
        duration(float(row["seconds"] or 0)),
    ]
    for name, value in row.items():
        if name not in _NAMES and not name.endswith((" min", " max")):
            cells.append(f"{name.removesuffix(_SHOWN_OF_ALPHA)} {value:.3g}")
    return "  ".join(cells)


def _per_cent(value: float | int | None) -> str:
    return f"{'-':>8}" if value is None else f"{100 * value:>6.2f} %"


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> [duration(seconds) for seconds in (7.4, 150, 7300)]
        ['7 s', '2 min 30 s', '2 h 01 min']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def announce(source: str, options: TrainingOptions, processes: int) -> None:
    """What is about to happen."""
    shared = f" shared by {processes} processes" if processes > 1 else ""
    show.line(
        f"training on {source}: {show.plural(options.epochs, 'epoch')}, batches of "
        f"{options.batch_size}{shared}, learning rate {options.lr:g} ({options.schedule})"
    )


def summary(outcome: Outcome) -> None:
    """What came out, and what to do next."""
    plan, artifact, training = outcome.plan, outcome.artifact, outcome.training
    seconds = sum(float(row["seconds"] or 0) for row in training.rows)
    losses = [row["train_loss"] for row in training.rows]
    rows = [
        ("network", plan.subject.model.spec),
        ("recipe", f"{plan.recipe.name} on {artifact.backend}"),
        (
            "training",
            f"{show.plural(len(losses), 'epoch')}, {len(training.losses)} steps, "
            f"{duration(seconds)}; loss {losses[0]:.4f} -> {losses[-1]:.4f}",
        ),
        ("weights", sizes_text(float_bytes(plan.subject.model.module), artifact.size_after)),
        ("coverage", coverage_text(artifact.ledger)),
        *_score_rows(outcome),
        ("disk", show.size_text(folder_bytes(plan.folder))),
    ]
    run = str(plan.folder)
    show.line()
    show.facts(rows, f"trained to {run}", "green")
    commands = [f"fxq eval {run}", f"fxq export {run}", f"fxq bench {run}"]
    show.lines(["", f"  {run}/training/curves.png", *(f"  {one}" for one in commands)])
    if artifact.simulation:
        show_compile.simulation_warning(artifact.warnings)
    else:
        show_compile.coverage_warning(artifact.warnings, accepted=False)


def _score_rows(outcome: Outcome) -> list[tuple[str, str]]:
    from .score import difference

    evaluation = outcome.plan.evaluation
    before, trained, lowered = outcome.float_score, outcome.trained, outcome.lowered
    if evaluation is None or before is None or trained is None or lowered is None:
        return [("accuracy", "not measured; --eval DATA measures it after every epoch")]
    return [
        ("measured on", evaluation.source),
        ("float", str(before)),
        ("trained", f"{trained}, {difference(before, trained)}"),
        ("on integers", f"{lowered}, {difference(before, lowered)}"),
    ]
