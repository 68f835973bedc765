"""How good a network is: top-1 with counts, mean IoU, mean AP, or what its file measures."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fxq.errors import DataError, FxqError

from .load import DETECTOR_BATCH, TASKS, Subject, described, open_data, zoo

if TYPE_CHECKING:
    from torch import nn

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Score:
    """What was measured.

    Attributes:
        correct: Right answers, where answers were counted.
        total: Answers in all; 0 where something else was measured.
        values: What else was measured, by name.
        in_percent: Whether the values are per cent.

    Example:
        >>> str(Score(3, 4)), str(Score(values={"psnr": 31.25}))
        ('75.00 % (3 of 4)', 'psnr 31.25')
        >>> str(Score(values={"mIoU": 63.1}, in_percent=True))
        'mIoU 63.10 %'
    """

    correct: int = 0
    total: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    in_percent: bool = False

    def __str__(self) -> str:
        if self.total:
            return f"{100 * self.correct / self.total:.2f} % ({self.correct} of {self.total})"
        shown = "{} {:.2f} %" if self.in_percent else "{} {:g}"
        return ", ".join(shown.format(name, value) for name, value in self.values.items())

    def to_json(self) -> dict[str, Any]:
        """The score as JSON-ready data."""
        if self.total:
            top1 = self.correct / self.total
            return {"top1": top1, "correct": self.correct, "total": self.total}
        return dict(self.values)


def difference(before: Score, after: Score) -> str:
    """By how much a score changed, in percentage points or in its own unit.

    Example:
        >>> difference(Score(90, 100), Score(88, 100))
        '−2.00 points'
    """
    if before.total and after.total:
        points = 100 * (after.correct / after.total - before.correct / before.total)
        return f"{points:+.2f} points".replace("-", "−")
    common = [name for name in before.values if name in after.values]
    shown = "{} {:+.2f} points" if before.in_percent else "{} {:+g}"
    changes = [shown.format(name, after.values[name] - before.values[name]) for name in common]
    return ", ".join(changes).replace("-", "−")


@dataclass(frozen=True)
class Evaluation:
    """A way to measure a network.

    Attributes:
        source: What it is measured with, for people.
        name: What the user gave, or would have to give to get the same.
        measure: Measures a network, reporting how far it is.
    """

    source: str
    name: str
    measure: Callable[[nn.Module, Progress | None], Score]


def evaluation_of(
    subject: Subject, data: str | None, *, limit: int | None, batch_size: int
) -> Evaluation | None:
    """How a network is measured: with ``data``, else with what its file or zoo entry brings.

    Raises:
        DataError: The data cannot be read as images of the network's shape.
    """
    model = subject.model
    if data is None and model.evaluate is not None:
        return Evaluation("evaluate() of the model file", "", _own_measure(model.evaluate))
    if data is None and model.eval_data is not None:
        return Evaluation("eval_data of the model file", "", _counting(model.eval_data, limit))
    images = open_data(subject, data, "test", TASKS)
    if images is None:
        return None
    count = len(images) if limit is None else min(limit, len(images))
    return Evaluation(
        described(count, images), data or subject.builtin, _measure(images, limit, batch_size)
    )


def _measure(
    images: Any, limit: int | None, batch_size: int
) -> Callable[[nn.Module, Progress | None], Score]:
    """What suits the images: of labels top-1, of masks mean IoU, of boxes mean precision."""
    task = getattr(images, "task", "classification")

    def measure(module: nn.Module, progress: Progress | None = None) -> Score:
        def tell(done: int, total: int) -> None:
            if progress is not None:
                progress("evaluate", done, total)

        if task == "detection":
            at_a_time = min(batch_size, DETECTOR_BATCH)
            values = zoo().evaluate_map(module, images, at_a_time, tell, limit=limit)
            return Score(values=values, in_percent=True)
        if task == "segmentation":
            values = zoo().evaluate_iou(module, images, batch_size, tell, limit=limit)
            return Score(values=values, in_percent=True)
        found = zoo().evaluate_top1(module, images, batch_size, tell, limit=limit)
        return Score(found.correct, found.total)

    return measure


def _counting(
    data: Iterable[Any], limit: int | None
) -> Callable[[nn.Module, Progress | None], Score]:
    def measure(module: nn.Module, progress: Progress | None = None) -> Score:
        import torch

        correct = total = 0
        with torch.no_grad(), evaluating(module):
            for batch in data:
                hits, count = _count(module, batch)
                correct, total = correct + hits, total + count
                if progress is not None:
                    progress("evaluate", total, limit)
                if limit is not None and total >= limit:
                    break
        if not total:
            raise DataError("eval_data holds nothing", hint="yield batches of (inputs, labels)")
        return Score(correct, total)

    return measure


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The network is in eval mode, and random data is the same each time.

    Its training flags, and torch's generator, are as before afterwards.
    """
    import torch

    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        for child in training:
            child.training = True


def _count(module: nn.Module, batch: Any) -> tuple[int, int]:
    """Right answers and answers of one batch of ``(inputs…, labels)``."""
    import torch

    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise DataError(
            f"a batch of eval_data is a {type(batch).__name__}",
            hint="yield (inputs, labels), where labels is [N] integers",
        )
    *inputs, labels = batch
    labels = torch.as_tensor(labels)
    try:
        logits = module(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(list(getattr(one, "shape", ()))) for one in inputs)
        raise DataError(
            f"the network fails on a batch of eval_data: {str(error).partition(chr(10))[0]}",
            where=f"inputs of shape {shapes}",
            hint="yield (inputs, labels) as the network takes them",
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != labels.numel():
        raise DataError(
            "the network does not give one row of logits per label",
            hint="define evaluate(module), which returns a number or a dict of numbers",
        )
    return int((logits.argmax(1) == labels.flatten()).sum()), labels.numel()


def _own_measure(
    evaluate: Callable[[nn.Module], Any],
) -> Callable[[nn.Module, Progress | None], Score]:
    def measure(module: nn.Module, progress: Progress | None = None) -> Score:
        import torch

        with torch.no_grad(), evaluating(module):
            return _as_score(evaluate(module))

    return measure


def _as_score(value: Any) -> Score:
    values = value if isinstance(value, Mapping) else {"score": value}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a value may still be part of a graph
            numbers = {str(name): float(one) for name, one in values.items()}
    except (TypeError, ValueError) as error:
        raise FxqError(
            f"evaluate() returned a {type(value).__name__}",
            hint="return a number, or a dict of numbers by name",
        ) from error
    if not numbers or not all(math.isfinite(one) for one in numbers.values()):
        raise FxqError(f"evaluate() returned {numbers}", hint="return finite numbers")
    return Score(values=numbers)
