"""The learning rate as a function of the step: warm-up, then half a cosine or milestones."""

from __future__ import annotations

import math

from fxq.training.options import Schedule, TrainingOptions


def rate_factor(step: int, steps_per_epoch: int, options: TrainingOptions) -> float:
    """What the learning rates are multiplied with at a step.

    During the first ``w = warmup * steps_per_epoch`` steps it is ``(step + 1) / w``; after them,
    with ``t`` the share of the other steps that is done, ``(1 + cos(pi t)) / 2``, or
    ``decay ** (milestones that are passed)``. Milestones count from the first step of all.

    Args:
        step: From 0.
        steps_per_epoch: At least 1.
        options: Schedule, epochs, warm-up, milestones and decay.

    Reference:
        Loshchilov, Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017,
        arXiv:1608.03983, Eq. 5 (without restarts); Goyal et al., arXiv:1706.02677, section 2.2.

    Example:
        >>> options = TrainingOptions(epochs=2, warmup=0.5)
        >>> [round(rate_factor(step, 4, options), 3) for step in range(8)]
        [0.5, 1.0, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]
    """
    total = options.epochs * steps_per_epoch
    warmup = min(round(options.warmup * steps_per_epoch), total - 1)
    if step < warmup:
        return (step + 1) / warmup
    if options.schedule is Schedule.STEP:
        passed = sum(step >= milestone * total for milestone in options.milestones)
        return float(options.decay**passed)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
