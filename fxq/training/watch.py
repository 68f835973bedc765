"""What is known during a training, and after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fxq.training.checkpoint import Row


@dataclass(frozen=True)
class Moment:
    """What is known after a step.

    Attributes:
        epoch: The current epoch, from 1.
        epochs: How many there will be.
        step: Steps that were made in this epoch.
        steps: Steps in an epoch.
        loss: Mean loss of this epoch so far.
        accuracy: Share of right answers in this epoch so far.
        lr: The learning rate of the weights.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    lr: float


@dataclass(frozen=True)
class Training:
    """A training that is finished.

    Attributes:
        module: The network, trained, in train mode.
        rows: What is known of each epoch, as ``log.csv`` holds it.
        losses: The loss of each step.
        continued_at: The step it continued at; 0 where it began anew.
    """

    module: nn.Module
    rows: tuple[Row, ...]
    losses: tuple[float, ...]
    continued_at: int = 0


@dataclass(frozen=True)
class Watch:
    """What is called during a training; by the first process only.

    Attributes:
        on_step: After every step.
        on_epoch: After every epoch, with its row.
        tell: With a sentence that users should read.
    """

    on_step: Callable[[Moment], None] = lambda moment: None
    on_epoch: Callable[[Row], None] = lambda row: None
    tell: Callable[[str], None] = lambda sentence: None
