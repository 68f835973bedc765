"""Top-1 accuracy of a network on labelled images."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxq.errors import DataError

from .datasets import ImageData
from .sequences import SequenceData


@dataclass(frozen=True)
class Accuracy:
    """How many images, or tokens of sequences, a network got right.

    Example:
        >>> str(Accuracy(correct=3, total=4))
        '75.00 % (3 of 4)'
    """

    correct: int
    total: int

    @property
    def top1(self) -> float:
        """The share of right answers, in 0..1."""
        return self.correct / self.total

    def __str__(self) -> str:
        """Per cent and counts."""
        return f"{100 * self.top1:.2f} % ({self.correct} of {self.total})"


def evaluate_top1(
    module: nn.Module,
    data: ImageData | SequenceData,
    batch_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
    *,
    limit: int | None = None,
) -> Accuracy:
    """The network's top-1 accuracy in eval mode; its training flags are as before afterwards.

    Args:
        module: Images ``[N, C, H, W]`` to logits ``[N, classes]``, or sequences ``[N, 2, T]`` to
            logits ``[N, classes, T]``, of which every token counts; inputs move to its device.
        data: Normalised as the network expects it.
        batch_size: Images, or sequences, per forward pass.
        progress: Called after each batch with those done and those there are in all.
        limit: Only the first so many.

    Raises:
        DataError: If the output is no logits of this shape, or a label lies beyond its classes.
    """
    count = len(data) if limit is None else min(limit, len(data))
    correct = total = done = 0
    device = device_of(module)
    with inference(module):
        for inputs, labels in data.batches(batch_size, limit=limit):
            correct += _count_correct(module(inputs.to(device)), labels, data.name)
            total, done = total + labels.numel(), done + len(labels)
            if progress is not None:
                progress(done, count)
    return Accuracy(correct, total)


@contextlib.contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """The network is in eval mode and keeps no gradients; afterwards its flags are as before."""
    training = {child for child in module.modules() if child.training}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child in training:
            child.training = True


def device_of(module: nn.Module) -> torch.device:
    """Where its first tensor is."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _count_correct(logits: Tensor, labels: Tensor, name: str) -> int:
    is_logits = isinstance(logits, Tensor) and logits.ndim >= 2
    if not is_logits or (len(logits), *logits.shape[2:]) != tuple(labels.shape):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"the network gives {shape}, not one row of logits per image")
    if int(labels.max()) >= logits.shape[1]:
        raise DataError(
            f"a label is {int(labels.max())}, but the network has {logits.shape[1]} classes",
            where=name,
        )
    return int((logits.argmax(1).to(labels.device) == labels).sum())
