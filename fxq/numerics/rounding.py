"""Rounding weights up or down so that the layer's output changes least, instead of to the nearest.

Two solvers: `anneal_rounding` is AdaRound, gradient descent on a soft rounding that a
regularizer drives to 0 or 1; `descend_rounding` moves one weight of each channel at a time to its
best code, the errors of earlier ones made up for by later ones.

Papers:
    Nagel, Amjad, van Baalen, Louizos, Blankevoort, "Up or Down? Adaptive Rounding for Post-Training
        Quantization", ICML 2020, arXiv:2004.10568: Eq. 22 (soft rounding), 23 (rectified sigmoid),
        24 (regularizer), 25 (asymmetric reconstruction; here without the activation function).
    Frantar, Alistarh, "Optimal Brain Compression", NeurIPS 2022, arXiv:2208.11580: later weights
        make up for the rounding of earlier ones, as in the first sweep of `descend_rounding`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from fxq.errors import SpecError
from fxq.numerics.reconstruction import GramProblem, Grid

ZETA, GAMMA = 1.1, -0.1
"""How far the rectified sigmoid is stretched beyond 1 and 0, so that it reaches both."""

_BLOCK = 128  # weights whose changes are carried to the rest of a channel together


class Schedule(StrEnum):
    """How the exponent of the regularizer falls."""

    COSINE = "cosine"
    LINEAR = "linear"


@dataclass(frozen=True)
class Annealing:
    """How soft rounding is made hard.

    Args:
        iterations: Steps of Adam.
        learning_rate: Of Adam.
        regularization: Weight of the regularizer, which is summed over weights, against the error,
            which is summed over channels and averaged over everything else.
        warm_start: The share of the iterations before the regularizer sets in.
        beta_start: Its first exponent: high ones leave values alone that are far from 0 and 1.
        beta_end: Its last exponent.
        schedule: How the exponent falls; the paper's authors publish a cosine (AIMET), BRECQ's
            and other reimplementations a line.

    Raises:
        SpecError: A number is out of range.
    """

    iterations: int = 2000
    learning_rate: float = 1e-2
    regularization: float = 0.01
    warm_start: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    schedule: Schedule = Schedule.COSINE

    def __post_init__(self) -> None:
        for name in ("iterations", "learning_rate", "beta_end"):
            if not getattr(self, name) > 0:
                raise SpecError(f"{name} must be positive, not {getattr(self, name)!r}")
        if not self.regularization >= 0:
            raise SpecError(f"regularization must not be negative: {self.regularization!r}")
        if not 0 <= self.warm_start <= 1:
            raise SpecError(f"warm_start is a share, 0 to 1, not {self.warm_start!r}")
        if not self.beta_start >= self.beta_end:
            raise SpecError("beta_start must not be below beta_end")

    def beta(self, iteration: int) -> float | None:
        """The exponent at an iteration; None before the regularizer sets in.

        Example:
            >>> annealing = Annealing(iterations=100, warm_start=0.2, schedule=Schedule.LINEAR)
            >>> annealing.beta(19), annealing.beta(20), annealing.beta(60)
            (None, 20.0, 11.0)
        """
        start = self.warm_start * self.iterations
        if iteration < start:
            return None
        progress = (iteration - start) / (self.iterations - start)
        left = 1 - progress
        if self.schedule is Schedule.COSINE:
            left = (1 + math.cos(math.pi * progress)) / 2
        return self.beta_end + (self.beta_start - self.beta_end) * left


def rectified_sigmoid(v: Tensor) -> Tensor:
    """clamp(sigmoid(v) * (zeta - gamma) + gamma, 0, 1), which reaches 0 and 1 (Eq. 23).

    Args:
        v: [...] the variable that is optimized.

    Returns:
        [...] in [0, 1]; 0.5 at 0.

    Example:
        >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The v at which the rectified sigmoid is h: -ln((zeta - gamma) / (h - gamma) - 1).

    Args:
        h: [...] in [0, 1].

    Example:
        >>> rectified_sigmoid(inverse_rectified_sigmoid(torch.tensor([0.0, 0.3, 1.0])))
        tensor([0.0000, 0.3000, 1.0000])
    """
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def rounding_regularizer(h: Tensor, beta: float) -> Tensor:
    """sum(1 - |2h - 1|^beta): the number of weights that are not decided yet (Eq. 24).

    Args:
        h: [...] in [0, 1].
        beta: The exponent.

    Returns:
        [].

    Example:
        >>> rounding_regularizer(torch.tensor([0.0, 0.5, 0.75]), 2.0).item()
        1.75
    """
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def anneal_rounding(
    problem: Grid,
    annealing: Annealing | None = None,
    *,
    start: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """AdaRound: each weight is rounded up or down, with the smallest error of the output found.

    Never worse than rounding to the nearest, nor than the start. Starts at the exact weights, or
    half-way between them and the given codes.

    Args:
        problem: The weights, the grid and the error.
        annealing: How soft rounding is made hard.
        start: [groups, out, n] codes to improve on; a weight chooses between its code there and
            the next one towards its exact value.
        seed: For samples that are drawn.

    Returns:
        codes: [groups, out, n] int32.

    Example:
        >>> gram = torch.tensor([[[1.0, 0.99], [0.99, 1.0]]])  # two inputs, nearly the same
        >>> weight, one = torch.tensor([[[0.4, 0.3]]]), torch.ones(1, 1)
        >>> problem = GramProblem(weight, one, -7 * one, 7 * one, gram)
        >>> problem.nearest().tolist(), int(anneal_rounding(problem).sum())
        ([[[0.0, 0.0]]], 1)
    """
    settings = annealing or Annealing()
    draw = torch.Generator().manual_seed(seed)
    steps = problem.steps
    floor = steps.floor() if start is None else start - (steps < start).double()
    share = steps - floor if start is None else 0.25 + 0.5 * (start - floor)
    low, high = (problem.clamp(end).float() for end in (floor, floor + 1))
    base, v = floor.float(), inverse_rectified_sigmoid(share.float())
    adam = torch.optim.Adam([v], lr=settings.learning_rate)
    for iteration in range(settings.iterations):
        sigmoid = torch.sigmoid(v)
        h = (sigmoid * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        codes = base + h
        slope = problem.slope(codes.clamp(low, high), draw)
        slope *= (codes >= low) & (codes <= high)
        beta = settings.beta(iteration)
        if beta is not None:
            side = 2 * h - 1
            slope -= settings.regularization * 2 * beta * side.sign() * side.abs().pow(beta - 1)
        v.grad = slope * (sigmoid * (1 - sigmoid) * (ZETA - GAMMA)) * ((h > 0) & (h < 1))
        adam.step()
    found = problem.clamp(floor + (v >= 0))
    known = [problem.nearest()] if start is None else [problem.nearest(), start.double()]
    return problem.best(*known, found)


def descend_rounding(
    problem: GramProblem, *, start: Tensor | None = None, reach: int = 0, sweeps: int = 20
) -> Tensor:
    """Coordinate descent: no change of a single weight makes the error of the output smaller.

    Weights are visited in order; each goes to the code at which the error is smallest, the others
    being what they are (closed form: the error is a parabola of each). Starts at the real-valued
    weights of least error, so that in the first sweep later weights make up for the rounding of
    earlier ones. Never worse than rounding to the nearest.

    Args:
        problem: The weights, the grid and the error.
        start: [groups, out, n] codes to improve on instead.
        reach: How many codes beyond the two neighbours of its exact value a weight may go.
        sweeps: How often each weight is visited at most.

    Returns:
        codes: [groups, out, n] int32.

    Example:
        >>> gram = torch.tensor([[[1.0, 0.99], [0.99, 1.0]]])
        >>> weight, one = torch.tensor([[[0.4, 0.3]]]), torch.ones(1, 1)
        >>> problem = GramProblem(weight, one, -7 * one, 7 * one, gram)
        >>> int(descend_rounding(problem).sum())
        1
    """
    floor = problem.steps.floor()
    low, high = (problem.clamp(end).float() for end in (floor - reach, floor + 1 + reach))
    gram = problem.gram.float()
    codes = (problem.least_squares() if start is None else start).float()
    for _ in range(sweeps):
        before = codes.clone()
        residual = codes @ gram - problem.target.float()
        for begin in range(0, codes.shape[-1], _BLOCK):
            block = slice(begin, begin + _BLOCK)
            change = _descend_block(
                codes[..., block], residual[..., block], gram[:, block, block],
                low[..., block], high[..., block],
            )  # fmt: skip
            residual += change @ gram[:, block]
        if torch.equal(before, codes):
            break
    known = [problem.nearest()] if start is None else [problem.nearest(), start.double()]
    return problem.best(*known, codes.double())


def _descend_block(
    codes: Tensor, residual: Tensor, gram: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """[groups, out, block]: how the codes, changed in place, have changed; residual is q G - t."""
    before, residual = codes.clone(), residual.clone()
    for column in range(codes.shape[-1]):
        curvature = gram[:, column, column].unsqueeze(1)
        gain = torch.where(curvature > 0, residual[..., column] / curvature, 0)
        code = codes[..., column]
        moved = (code - gain).round().clamp(low[..., column], high[..., column])
        residual += (moved - code).unsqueeze(-1) * gram[:, column].unsqueeze(1)
        codes[..., column] = moved
    return codes - before
