"""Quantizers of values that are trained, or that follow the values while something trains.

Papers:
    Li, Dong, Wang, "Additive Powers-of-Two Quantization", ICLR 2020, arXiv:1909.13144, Eq. 7 and 8
        (reparameterized clipping).
    Jacob et al., "Quantization and training of neural networks for efficient
        integer-arithmetic-only inference", CVPR 2018, arXiv:1712.05877 (moving ranges).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxq.numerics.affine import MIN_SCALE, grid_from_range, short_scale
from fxq.numerics.learned_clip import ClipGradient, project
from fxq.numerics.levels import level_table
from fxq.quant.quantizers import ActivationQuantizer, LevelQuantizer
from fxq.quant.uncompiled import uncompiled

LEAST_CLIP = 1e-8
"""A frozen clip is never smaller than this."""


class LearnedLevels(nn.Module):
    """Rounds its input to ``alpha * level / largest level``, with ``alpha`` a parameter.

    Args:
        alpha: The clip to start with, in the units of the tensor.
        levels: ``[count]`` integer magnitudes, ascending from 0.
        signed: Whether values below zero have levels, too.
        bits: Bits per value, for reports.
        gradient: Which gradient the clip gets.
        level_set: The name of the levels, for reports.

    Attributes:
        alpha: ``[]``; the clip.
    """

    fxq_kind = "quantizer"
    levels: Tensor
    table: Tensor

    def __init__(
        self,
        alpha: float,
        levels: Tensor,
        *,
        signed: bool,
        bits: int,
        gradient: ClipGradient = ClipGradient.RCF,
        level_set: str = "apot",
    ) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(max(float(alpha), LEAST_CLIP)))
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("table", level_table(levels, signed=signed).float(), persistent=False)
        self._magnitudes = tuple(levels.tolist())
        self.signed = signed
        self.bits = bits
        self.gradient = gradient
        self.level_set = level_set

    def forward(self, x: Tensor) -> Tensor:
        """The nearest levels; ``x: [...]``."""
        return project(
            x,
            self.alpha,
            self.table,
            signed=self.signed,
            gradient=self.gradient,
            levels=self._magnitudes,
        )

    def frozen(self) -> ActivationQuantizer | LevelQuantizer:
        """The quantizer with the clip learned so far, its scale a short one."""
        top = int(self.levels[-1])
        scale = short_scale(self.alpha.detach().clamp(min=LEAST_CLIP) / top)
        if not self.signed and len(self.levels) == top + 1:
            return ActivationQuantizer(scale, torch.tensor(0), self.bits)
        return LevelQuantizer(scale, self.levels, self.signed, self.bits)

    def describe(self) -> str:
        """Bits, levels and clip, for listings."""
        sign = " signed" if self.signed else ""
        return f"{self.bits}-bit{sign} {self.level_set} clip {self.alpha.item():.4g}"

    def extra_repr(self) -> str:
        """Shown in the module's repr."""
        return self.describe()


class _Range(nn.Module):
    """A range, and how it follows the batches."""

    fxq_kind = "quantizer"
    low: Tensor
    high: Tensor

    def __init__(self, low: float, high: float, bits: int, momentum: float) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(float(low)))
        self.register_buffer("high", torch.tensor(float(high)))
        self.bits = bits
        self.momentum = momentum

    def _move(self, x: Tensor, momentum: float) -> None:
        low, high = _extremes(x)
        self.low.lerp_(low, 1 - momentum)
        self.high.lerp_(high, 1 - momentum)

    def ends(self) -> tuple[Tensor, Tensor]:
        """``[]`` twice: where the range starts and ends when it is deployed."""
        return self.low, self.high

    def frozen(self) -> ActivationQuantizer:
        """The quantizer with the range of now."""
        scale, zero_point = grid_from_range(*self.ends(), self.bits)
        return ActivationQuantizer(scale.float(), zero_point, self.bits)

    def describe(self) -> str:
        """Bits and range, for listings."""
        return f"{self.bits}-bit range {float(self.low):.4g}..{float(self.high):.4g}"

    def extra_repr(self) -> str:
        """Shown in the module's repr."""
        return self.describe()


class MovingRange(_Range):
    """Rounds its input to 8 bits, or so, over a range that follows the batches in training.

    Args:
        low: Where the range starts.
        high: Where it ends.
        bits: Bits per code, 1 to 8.
        momentum: Weight of the range so far against that of a batch.

    Attributes:
        low: ``[]``.
        high: ``[]``.
    """

    def __init__(self, low: float, high: float, bits: int, momentum: float = 0.99) -> None:
        super().__init__(low, high, bits, momentum)
        self._watching = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it nothing is rounded; afterwards the range is that of all that was seen."""
        self._watching = True
        self.low.fill_(math.inf)
        self.high.fill_(-math.inf)
        try:
            yield
        finally:
            self._watching = False

    def forward(self, x: Tensor) -> Tensor:
        """The nearest codes' values; ``x: [...]``."""
        if self._watching:
            return self._seen(x)
        if self.training:
            self._move(x.detach(), self.momentum)
        top = 2**self.bits - 1
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        scale = ((high - low) / top).clamp(min=MIN_SCALE)
        zero_point = torch.round(-low / scale)
        if torch.compiler.is_compiling():  # into one loop with its neighbours
            fused: Tensor = _OnGrid.apply(x.float(), scale, zero_point, top)  # type: ignore[no-untyped-call]
            return fused
        result: Tensor = torch.fake_quantize_per_tensor_affine(
            x.float(), scale, zero_point.to(torch.int32), 0, top
        )
        return result

    def _seen(self, x: Tensor) -> Tensor:
        low, high = _extremes(x.detach())
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))
        return x


class _OnGrid(torch.autograd.Function):
    """What ``fake_quantize_per_tensor_affine`` computes, as operations that a compiler fuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
        """The nearest codes' values."""
        steps = torch.round(x / scale) + zero_point
        ctx.save_for_backward((steps >= 0) & (steps <= top))
        return (steps.clamp(0, top) - zero_point) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Straight through, but for what lies beyond the ends."""
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


class FollowedRange(_Range):
    """The identity, which remembers in training what range its input has; rounded when deployed.

    The first 16 batches and then one in eight moves the range; the very first one sets it.

    Args:
        bits: Bits per code when it is deployed, 1 to 8.
        nonneg: Whether no value is below zero.
        upper: A bound of the values, where they have one.
        momentum: Weight of the range so far against that of a batch.

    Attributes:
        low: ``[]``.
        high: ``[]``.
        batches: ``[]`` int64; how many were seen in training.
    """

    batches: Tensor

    def __init__(
        self, bits: int, *, nonneg: bool, upper: float | None = None, momentum: float = 0.9
    ) -> None:
        super().__init__(0.0, 0.0, bits, momentum)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.nonneg = nonneg
        self.upper = upper

    def forward(self, x: Tensor) -> Tensor:
        """The very same tensor, ``x: [...]``."""
        if self.training and x.numel():
            self._follow(x.detach())
        return x

    @uncompiled
    def _follow(self, x: Tensor) -> None:
        seen = int(self.batches)
        self.batches += 1
        if seen >= 16 and seen % 8:
            return
        ordered = x.permute(0, 2, 3, 1) if x.dim() == 4 else x  # as memory lies
        self._move(ordered, min(self.momentum, seen / (seen + 1)))

    def ends(self) -> tuple[Tensor, Tensor]:
        """The range of now, within what is known of the values."""
        low = torch.zeros_like(self.low) if self.nonneg else self.low
        high = self.high if self.upper is None else self.high.clamp(max=self.upper)
        return low, torch.maximum(low, high)


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(x)
    return low.float(), high.float()
