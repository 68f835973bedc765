"""`TrainingOptions`: everything that decides what `fit` computes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from fxq.errors import SpecError
from fxq.quant.augment import Augmentation


class Schedule(StrEnum):
    """How the learning rate falls: along half a cosine, or by a factor at milestones."""

    COSINE = "cosine"
    STEP = "step"


@dataclass(frozen=True)
class TrainingOptions:
    """How to train: stochastic gradient descent with momentum.

    Attributes:
        epochs: Passes over the data.
        batch_size: Samples per step, over all processes; an incomplete last batch is left out,
            because batch normalization cannot be trained on one sample.
        lr: Learning rate at the top of the schedule.
        alpha_lr: That of parameters named ``alpha``, the clipping thresholds of learned
            quantizers; ``lr`` if None.
        momentum: Of the gradients; 0 for none.
        nesterov: Whether the momentum looks one step ahead.
        weight_decay: L2 penalty of weights; norms and biases have none.
        alpha_weight_decay: That of parameters named ``alpha``; ``weight_decay`` if None.
        schedule: How the learning rates fall.
        warmup: Epochs over which they rise linearly at first; a fraction will do.
        milestones: Where the step schedule lowers them, as shares of all steps.
        decay: By what factor it does.
        label_smoothing: Share of the target that goes to all classes evenly.
        distill: Share of the loss that is the divergence from a teacher's outputs; the rest is the
            cross entropy of the labels.
        temperature: What logits are divided by before they are compared with the teacher's.
        clip_gradients: Largest norm of all gradients together; None for any.
        augmentation: What is done to images at random.
        amp: Whether the forward pass is autocast to bfloat16.
        compile: Whether the network goes through ``torch.compile``, where that works.
        seed: Decides the order of the samples and everything else that is drawn.

    Raises:
        SpecError: An option is out of its range.

    Example:
        >>> TrainingOptions(epochs=3, lr=0.1).alpha_rate
        0.1
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.01
    alpha_lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    alpha_weight_decay: float | None = None
    schedule: Schedule = Schedule.COSINE
    warmup: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    decay: float = 0.1
    label_smoothing: float = 0.0
    distill: float = 0.0
    temperature: float = 4.0
    clip_gradients: float | None = None
    augmentation: Augmentation = Augmentation.FLIP_SHIFT
    amp: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, is_fine, wanted in self._rules():
            if not is_fine:
                raise SpecError(
                    f"{name.replace('_', ' ')} must be {wanted}, not {getattr(self, name)}",
                    where=f"training option {name}",
                )

    def _rules(self) -> tuple[tuple[str, bool, str], ...]:
        return (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", _is_positive(self.lr), "positive"),
            ("alpha_lr", self.alpha_lr is None or _is_positive(self.alpha_lr, 0), "0 or more"),
            ("momentum", 0 <= self.momentum < 1, "from 0 to below 1"),
            ("nesterov", not self.nesterov or self.momentum > 0, "off where momentum is 0"),
            ("weight_decay", _is_positive(self.weight_decay, 0), "0 or more"),
            (
                "alpha_weight_decay",
                self.alpha_weight_decay is None or _is_positive(self.alpha_weight_decay, 0),
                "0 or more",
            ),
            ("warmup", 0 <= self.warmup < self.epochs, "from 0 to below the epochs"),
            (
                "milestones",
                all(0 < one < 1 for one in self.milestones)
                and list(self.milestones) == sorted(self.milestones),
                "rising shares between 0 and 1",
            ),
            ("decay", _is_positive(self.decay) and self.decay <= 1, "above 0 and at most 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1"),
            ("distill", 0 <= self.distill <= 1, "from 0 to 1"),
            ("temperature", _is_positive(self.temperature), "positive"),
            (
                "clip_gradients",
                self.clip_gradients is None or _is_positive(self.clip_gradients),
                "positive",
            ),
            ("seed", self.seed >= 0, "0 or more"),
        )

    @property
    def alpha_rate(self) -> float:
        """The learning rate of parameters named ``alpha``."""
        return self.lr if self.alpha_lr is None else self.alpha_lr

    @property
    def alpha_decay(self) -> float:
        """The weight decay of parameters named ``alpha``."""
        return self.weight_decay if self.alpha_weight_decay is None else self.alpha_weight_decay

    def to_json(self) -> dict[str, Any]:
        """The options as JSON-ready data."""
        return {**asdict(self), "milestones": list(self.milestones)}


def _is_positive(value: float, least: float | None = None) -> bool:
    """Whether a number is finite and above zero, or not below ``least``."""
    return math.isfinite(value) and (value > 0 if least is None else value >= least)
