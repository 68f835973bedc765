"""The log of a training: ``steps.csv``, ``log.csv`` and ``curves.png``."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from torch import nn

from fxq.training.checkpoint import Row
from fxq.training.optimizer import is_alpha
from fxq.training.widths import write_widths

if TYPE_CHECKING:
    from fxq.picture import Picture

LOG, STEPS, CURVES = "log.csv", "steps.csv", "curves.png"


class Log:
    """The CSV files of a training. What they hold comes from the checkpoint first.

    Args:
        folder: Where they are.
        per_epoch: Steps in an epoch.
        rate: The learning rate of a step.
        losses: The loss of every step that was made.
        rows: What is known of every epoch that is finished.
    """

    def __init__(
        self,
        folder: Path,
        per_epoch: int,
        rate: Callable[[int], float],
        losses: Sequence[float],
        rows: Sequence[Row],
    ) -> None:
        self._folder, self._per_epoch, self._rate = folder, per_epoch, rate
        known = (self._fields(step, loss) for step, loss in enumerate(losses))
        _replace(folder / STEPS, [("step", "epoch", "lr", "loss"), *known])
        self.write_rows(rows)
        self._file: TextIO = (folder / STEPS).open(
            "a", encoding="utf-8", newline="", buffering=1
        )  # one line at a time: it can be watched
        self._writer = csv.writer(self._file, lineterminator="\n")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, step: int, loss: float) -> None:
        """A step was made."""
        self._writer.writerow(self._fields(step, loss))

    def write_rows(self, rows: Sequence[Row]) -> None:
        """``log.csv`` holds these epochs; its columns are all that any of them knows."""
        head = list(dict.fromkeys(name for row in rows for name in row))
        cells = [["" if row.get(name) is None else row[name] for name in head] for row in rows]
        _replace(self._folder / LOG, [head, *cells])

    def write_widths(self, module: nn.Module, epoch: int) -> None:
        """``widths.csv`` holds the fixed-point widths up to this epoch, where there are any."""
        write_widths(self._folder, module, epoch)

    def _fields(self, step: int, loss: float) -> tuple[Any, ...]:
        return step + 1, step // self._per_epoch + 1, self._rate(step), loss


def _replace(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(buffer.getvalue(), encoding="utf-8")
    beside.replace(path)


def read_log(folder: Path) -> tuple[list[float], list[Row]]:
    """The loss of every step and the row of every epoch, as the files in the folder have them.

    Raises:
        OSError: A file is missing.
        ValueError: One holds something else.
    """
    try:
        losses = [float(line["loss"]) for line in _lines(folder / STEPS)]
        rows = [
            {name: float(cell) if cell else None for name, cell in line.items()}
            for line in _lines(folder / LOG)
        ]
    except (KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"it is no log of a training: {error}") from error
    return losses, rows


def _lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def alpha_columns(module: nn.Module) -> dict[str, float]:
    """Smallest, mean and largest clipping threshold for each kind of quantizer.

    Example:
        >>> import torch
        >>> class Clip(nn.Module):
        ...     def __init__(self, alpha):
        ...         super().__init__()
        ...         self.alpha = nn.Parameter(torch.tensor(alpha))
        >>> alpha_columns(nn.Sequential(Clip(1.0), Clip(2.0)))
        {'Clip alpha min': 1.0, 'Clip alpha mean': 1.5, 'Clip alpha max': 2.0}
    """
    values: dict[str, list[float]] = {}
    for name, parameter in module.named_parameters():
        if is_alpha(name):
            kind = type(module.get_submodule(name.rpartition(".")[0])).__name__
            values.setdefault(kind, []).extend(parameter.detach().flatten().tolist())
    return {
        f"{kind} alpha {which}": value
        for kind, found in values.items()
        for which, value in (
            ("min", min(found)),
            ("mean", sum(found) / len(found)),
            ("max", max(found)),
        )
    }


def draw_curves(folder: Path, losses: Sequence[float], rows: Sequence[Row]) -> None:
    """``curves.png`` shows the loss of every step, the accuracies and the mean alphas."""
    curves_picture(losses, rows).savefig(folder / CURVES, dpi=120)


def curves_picture(losses: Sequence[float], rows: Sequence[Row]) -> Picture:
    """The loss of every step, the accuracies and the mean alphas of every epoch."""
    from fxq.picture import Picture

    alphas = [name for name in rows[-1] if name.endswith(" alpha mean")] if rows else []
    picture = Picture(5 * (3 if alphas else 2), 3.6)
    panels = picture.subplots(1, 3 if alphas else 2)
    ends = [row["step"] for row in rows]
    panels[0].plot(range(1, len(losses) + 1), losses, linewidth=0.5, color="#9ecae1")
    panels[0].plot(ends, _column(rows, "train_loss"), marker=".", color="#4c78a8")
    panels[0].set(xlabel="step", ylabel="loss", yscale="log")
    for name in ("train_accuracy", "test_accuracy"):
        panels[1].plot(ends, _column(rows, name), marker=".", label=name.replace("_", " "))
    panels[1].set(xlabel="step", ylabel="accuracy")
    panels[1].legend()
    for name in alphas:
        panels[2].plot(ends, _column(rows, name), marker=".", label=name.removesuffix(" mean"))
    if alphas:
        panels[2].set(xlabel="step", ylabel="mean alpha")
        panels[2].legend()
    return picture


def _column(rows: Sequence[Row], name: str) -> list[float]:
    values = (row.get(name) for row in rows)
    return [float("nan") if value is None else float(value) for value in values]
