"""What rounding the weights of a layer does to its output: the errors that rounding makes small.

The error is quadratic in the weights, and every output channel is a problem of its own: with
inputs x of the float network and xq of the quantized one,

    E|w x - wq xq|^2 = wq G wq^T - 2 t wq^T + const,    G = E[xq xq^T],    t = E[(w x) xq^T].

So G and t, gathered once, stand for all images: an evaluation costs the same for one image as for
thousands. Where n is too large for an n x n matrix, or the error is measured behind the activation
function, samples of the inputs take their place.

Papers:
    Nagel, Amjad, van Baalen, Louizos, Blankevoort, "Up or Down? Adaptive Rounding for Post-Training
        Quantization", ICML 2020, arXiv:2004.10568: Eq. 20 (layer-wise), Eq. 25 (asymmetric, behind
        the activation function).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from fxq.errors import SpecError


@dataclass(frozen=True)
class Grid(ABC):
    """Weights to round, and the codes there are; a layer without groups has one group.

    Args:
        weight: [groups, out, n] before rounding, as real values.
        scale: [groups, out]; a code's weight is ``code * scale``.
        low: [groups, out] the smallest code.
        high: [groups, out] the largest.
    """

    weight: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor

    @property
    def steps(self) -> Tensor:
        """[groups, out, n] float64: the weights in units of the scale."""
        return self.weight.double() / self.scale.double().unsqueeze(-1)

    def clamp(self, codes: Tensor) -> Tensor:
        """[groups, out, n] float64: the nearest possible codes."""
        low, high = (end.double().unsqueeze(-1) for end in (self.low, self.high))
        return codes.double().clamp(low, high)

    def nearest(self) -> Tensor:
        """[groups, out, n] float64: the codes of rounding to the nearest, ties to even."""
        return self.clamp(self.steps.round())

    @abstractmethod
    def loss(self, codes: Tensor) -> Tensor:
        """[groups, out] float64: the mean squared error of each output channel, up to a constant.

        Args:
            codes: [groups, out, n].
        """

    @abstractmethod
    def slope(self, codes: Tensor, draw: torch.Generator) -> Tensor:
        """[groups, out, n] float32: the derivative of the loss by each code.

        Args:
            codes: [groups, out, n] float32, which need not be whole numbers.
            draw: Where an estimate from a few samples gets its samples.
        """

    def best(self, *candidates: Tensor) -> Tensor:
        """[groups, out, n] int32: the codes with the smallest error, channel by channel."""
        losses = torch.stack([self.loss(codes) for codes in candidates])
        winner = losses.argmin(0)[None, :, :, None].expand(1, *self.weight.shape)
        return torch.stack(candidates).gather(0, winner)[0].to(torch.int32)


@dataclass(frozen=True)
class GramProblem(Grid):
    """A rounding whose effect on the output is known from second moments of the layer's input.

    Args:
        gram: [groups, n, n] G, of what the quantized layer reads.
        correlation: [groups, out, n] t, of what the float layer computes with that; without it the
            float layer reads the same.

    Raises:
        SpecError: The shapes do not fit, or a number is not finite.
    """

    gram: Tensor
    correlation: Tensor | None = None

    def __post_init__(self) -> None:
        groups, out, n = self.weight.shape
        wanted = {"scale": [groups, out], "gram": [groups, n, n], "correlation": [groups, out, n]}
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is None:
                continue
            if list(value.shape) != shape or not bool(value.isfinite().all()):
                raise SpecError(f"{name} is {list(value.shape)}, or not finite; wanted {shape}")

    def damped(self, samples: int, strength: float) -> Self:
        """The problem as if white inputs of the same power had been seen, too.

        With few samples many weights look as if they made no difference; this keeps them near
        their float values, where a whole code is worth ``strength`` samples per input.

        Args:
            samples: How many inputs the moments are means of.
            strength: How many white inputs to add per weight of a channel.
        """
        n = self.weight.shape[-1]
        power = self.gram.diagonal(dim1=-2, dim2=-1).mean(-1) * strength * n / samples
        gram = self.gram + power[:, None, None] * torch.eye(n, dtype=self.gram.dtype)
        if self.correlation is None:
            return replace(self, gram=gram)
        return replace(
            self, gram=gram, correlation=self.correlation + power[:, None, None] * self.weight
        )

    @cached_property
    def target(self) -> Tensor:
        """[groups, out, n] float64: t in units of the scale."""
        if self.correlation is None:
            return self.steps @ self.gram.double()
        return self.correlation.double() / self.scale.double().unsqueeze(-1)

    @cached_property
    def _single(self) -> tuple[Tensor, Tensor, Tensor]:
        """G, t and the derivative of the squared scale, in the precision of the iterations."""
        area = 2 * self.scale.float().square().unsqueeze(-1)
        return self.gram.float(), self.target.float(), area

    def loss(self, codes: Tensor) -> Tensor:
        """What depends on the codes: wq G wq^T - 2 t wq^T."""
        codes = codes.double()
        error = (codes @ self.gram.double() - 2 * self.target) * codes
        return error.sum(-1) * self.scale.double().square()

    def slope(self, codes: Tensor, draw: torch.Generator) -> Tensor:
        """2 s^2 (q G - t): exact, so nothing is drawn."""
        gram, target, area = self._single
        return area * (codes @ gram - target)

    def least_squares(self) -> Tensor:
        """[groups, out, n] float64: the real codes without any error that can be avoided."""
        gram = self.gram.double()
        floor = 1e-6 * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(torch.float64).tiny
        regular = gram + floor[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype)
        target = self.target + floor[:, None, None] * self.steps
        real: Tensor = torch.linalg.solve(regular, target.mT)
        return real.mT


@dataclass(frozen=True)
class SampleProblem(Grid):
    """A rounding whose effect is seen on samples, through the layer's activation function.

    Args:
        inputs: [groups, samples, n] float32: what the quantized layer reads.
        outputs: [groups, samples, out] float32: what the float layer computes, without `offset`.
        offset: [groups, out] float32: added to both outputs before the activation function.
        bounds: The bounds of that function: (0, inf) of a ReLU, (0, 6) of a ReLU6.
        batch: Samples per estimate of the slope.
    """

    inputs: Tensor
    outputs: Tensor
    offset: Tensor
    bounds: tuple[float, float] = (-math.inf, math.inf)
    batch: int = 256

    def channels(self, chosen: slice) -> Self:
        """The problem of some output channels of every group; channels are independent."""
        names = ("weight", "scale", "low", "high", "offset")
        cut = {name: getattr(self, name)[:, chosen] for name in names}
        return replace(self, outputs=self.outputs[..., chosen], **cut)

    def loss(self, codes: Tensor) -> Tensor:
        """The mean of |f(W x) - f(Wq xq)|^2 of each channel (the paper's Eq. 25)."""
        return self._error(codes, self.inputs, self.outputs)[0].double().square().mean(1)

    def slope(self, codes: Tensor, draw: torch.Generator) -> Tensor:
        """Estimated from a batch of samples."""
        chosen = torch.randint(self.inputs.shape[1], (self.batch,), generator=draw)
        inputs, outputs = self.inputs[:, chosen], self.outputs[:, chosen]
        error, passes = self._error(codes, inputs, outputs)
        scale = self.scale.float().unsqueeze(-1) * (2 / self.batch)
        return (error * passes).mT @ inputs * scale

    def _error(self, codes: Tensor, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """[groups, samples, out], twice: f(Wq xq) - f(W x), and where f lets a change through."""
        weight = codes.float() * self.scale.float().unsqueeze(-1)
        found = inputs @ weight.mT + self.offset.unsqueeze(1)
        wanted = outputs + self.offset.unsqueeze(1)
        low, high = self.bounds
        return found.clamp(low, high) - wanted.clamp(low, high), (found > low) & (found < high)
