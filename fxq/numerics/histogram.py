"""A streaming histogram whose result depends only on the values, not on how they arrived.

Bin i covers [i * 2**k, (i + 1) * 2**k). When a value falls outside the capacity, k grows and pairs
of neighbouring bins merge; nothing is ever split or estimated, so counts, k, minimum and maximum
are the same for any order, any batching and any order of merging.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Tensor

from fxq.errors import CalibrationError, SpecError

STATE_NAMES = ("counts", "exponent", "low", "high", "total", "total_square")

_MIN_EXPONENT = -149  # the quantum of float32: every value is a whole number of these bins
# Values per pass: the float64 scratch stays in cache, and torch does not split so few over threads,
# which would cost more in barriers than it gains.
_CHUNK = 1 << 15


class Histogram:
    """Counts of every value seen, in power-of-two bins around 0; one row per channel.

    Args:
        channels: Number of channels (dimension 1 of the input), or None for one shared row.
        bins_per_sign: Bins on each side of 0, a power of two. Default 2048, or 512 with channels:
            the width is then below a 1024th (256th) of the largest magnitude.

    Attributes:
        counts: [rows, 2 * bins_per_sign] int64; column bins_per_sign starts at 0.
        exponent: [rows] int64; the bin width is 2**exponent.
        low: [rows] float32, the exact minimum (+inf when empty).
        high: [rows] float32, the exact maximum (-inf when empty).
        total: [rows] float64, the sum of the values.
        total_square: [rows] float64, the sum of their squares.

    Raises:
        SpecError: A channel or bin count that is not possible.

    Example:
        >>> histogram = Histogram()
        >>> histogram.update(torch.tensor([1.0, 2.0, 3.0, 6.0]))
        >>> histogram.mean().item(), round(histogram.abs_deviation().item(), 2)
        (3.0, 1.5)
    """

    counts: Tensor
    exponent: Tensor
    low: Tensor
    high: Tensor
    total: Tensor
    total_square: Tensor

    def __init__(self, channels: int | None = None, bins_per_sign: int | None = None) -> None:
        self.per_channel = channels is not None
        for name, tensor in empty_state(channels, bins_per_sign).items():
            setattr(self, name, tensor)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], per_channel: bool | None = None) -> Self:
        """A histogram that shares the tensors of `state()`, so updates are seen in both.

        Args:
            state: The tensors named in STATE_NAMES.
            per_channel: Whether rows are channels; default: when there is more than one row.

        Raises:
            CalibrationError: A tensor is missing or of another shape than the counts say.
        """
        missing = [name for name in STATE_NAMES if name not in state]
        if missing or state["counts"].dim() != 2:
            raise CalibrationError(f"not the state of a histogram; missing: {missing}")
        rows = state["counts"].shape[0]
        for name in STATE_NAMES[1:]:
            if state[name].shape != (rows,):
                raise CalibrationError(f"{name} is {list(state[name].shape)}, not [{rows}]")
        histogram = cls.__new__(cls)
        histogram.per_channel = rows > 1 if per_channel is None else per_channel
        for name in STATE_NAMES:
            setattr(histogram, name, state[name])
        return histogram

    def state(self) -> dict[str, Tensor]:
        """The tensors that make up the histogram, not copied."""
        return {name: getattr(self, name) for name in STATE_NAMES}

    # --- gathering ------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Every value of x is counted, as float32.

        Args:
            x: [...], or [n, channels, ...] per channel; at least one value.

        Raises:
            CalibrationError: x is empty, not finite, or has another number of channels.
        """
        rows = self._rows(x.detach())
        low, high = rows.amin(dim=1).to(torch.float32), rows.amax(dim=1).to(torch.float32)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise CalibrationError(
                f"a calibration tensor of shape {list(x.shape)} holds NaN or infinity",
                hint="look for an overflow in the float model, or bad input images",
            )
        self._widen(_exponent_for(low, high, self.bins_per_sign))
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))
        self._count(rows)

    def merge(self, other: Histogram) -> None:
        """Afterwards as if every value of the other had been given to this one, too.

        Raises:
            CalibrationError: The two have other rows or capacities.
        """
        if self.counts.shape != other.counts.shape:
            raise CalibrationError(
                f"histograms of shape {list(self.counts.shape)} and {list(other.counts.shape)} "
                "do not merge",
                hint="build both with the same channels and bins_per_sign",
            )
        self._widen(other.exponent)
        shift = self.exponent - other.exponent
        self.counts.add_(_coarsen(other.counts, shift))
        self.low.copy_(torch.minimum(self.low, other.low))
        self.high.copy_(torch.maximum(self.high, other.high))
        self.total.add_(other.total)
        self.total_square.add_(other.total_square)

    def _rows(self, x: Tensor) -> Tensor:
        """[rows, n]; a view per tensor, channels-last too: order within a row does not matter."""
        if x.numel() == 0:
            raise CalibrationError(f"a calibration tensor is empty: {list(x.shape)}")
        if self.per_channel:
            channels = self.counts.shape[0]
            if x.dim() < 2 or x.shape[1] != channels:
                raise CalibrationError(
                    f"expected {channels} channels in dimension 1, got shape {list(x.shape)}"
                )
            return x.movedim(1, 0).reshape(channels, -1).contiguous()
        by_stride = sorted(range(x.dim()), key=lambda dim: -x.stride()[dim])
        return x.permute(by_stride).reshape(1, -1)

    def _count(self, rows: Tensor) -> None:
        width = self.counts.shape[1]
        inverse = torch.ldexp(torch.ones_like(self.total), -self.exponent).unsqueeze(1)
        first = self.bins_per_sign + torch.arange(len(rows)).mul_(width).unsqueeze(1)
        for exact in _float64_chunks(rows, self.counts.numel()):
            self.total.add_(exact.sum(dim=1))
            self.total_square.add_(torch.linalg.vecdot(exact, exact))
            # Scaling by a power of two and floor are exact in float64 for every float32.
            index = exact.mul_(inverse).floor_().add_(first).to(torch.int32)
            counted = torch.bincount(index.flatten(), minlength=self.counts.numel())
            self.counts.add_(counted.view_as(self.counts))

    def _widen(self, exponent: Tensor) -> None:
        target = torch.maximum(self.exponent, exponent)
        shift = target - self.exponent
        if bool(shift.any()):
            self.counts.copy_(_coarsen(self.counts, shift))
            self.exponent.copy_(target)

    # --- reading --------------------------------------------------------------------------

    @property
    def bins_per_sign(self) -> int:
        """Bins on each side of 0."""
        return self.counts.shape[1] // 2

    @property
    def is_empty(self) -> bool:
        """Whether no value has been counted yet."""
        return not bool(self.counts.any())

    def count(self) -> Tensor:
        """[C] or [] int64: the number of values."""
        return self._shaped(self.counts.sum(dim=1))

    def range(self) -> tuple[Tensor, Tensor]:
        """[C] or [] float32, twice: the exact minimum and maximum.

        Raises:
            CalibrationError: Nothing was counted.
        """
        self._require_values()
        return self._shaped(self.low.clone()), self._shaped(self.high.clone())

    def edges(self) -> Tensor:
        """[rows, bins + 1] float64: where the bins begin and end, in the units of the values."""
        index = torch.arange(-self.bins_per_sign, self.bins_per_sign + 1, dtype=torch.float64)
        return torch.ldexp(index.expand(len(self.exponent), -1), self.exponent.unsqueeze(1))

    def mean(self) -> Tensor:
        """[C] or [] float64: the mean, rounded to a 1024th of a bin.

        Float64 sums depend on the order of the values in their last bits; the rounding hides that
        (but for about one mean in 2**28, which sits on a rounding boundary).

        Raises:
            CalibrationError: Nothing was counted.
        """
        return self._shaped(self._steady(self.total / self._counted()))

    def std(self) -> Tensor:
        """[C] or [] float64: the unbiased standard deviation, rounded to a 1024th of a bin.

        Raises:
            CalibrationError: Nothing was counted.
        """
        n = self._counted()
        spread = (self.total_square - self.total**2 / n).clamp(min=0)
        return self._shaped(self._steady((spread / (n - 1).clamp(min=1)).sqrt()))

    def abs_deviation(self) -> Tensor:
        """[C] or [] float64: mean|x - mean(x)|, the Laplace b, taking each bin as uniform.

        Raises:
            CalibrationError: Nothing was counted.
        """
        n = self._counted()
        centre = self._steady(self.total / n).unsqueeze(1)
        left, right = self._inner_edges()
        below, above = (centre - left).clamp(min=0), (right - centre).clamp(min=0)
        straddles = (left < centre) & (centre < right)
        # Mean of |x - c| over a uniform bin: quadratic inside, distance to the middle outside.
        inside = (below**2 + above**2) / (2 * (right - left).clamp(min=1e-300))
        distance = torch.where(straddles, inside, ((left + right) / 2 - centre).abs())
        return self._shaped((self.counts * distance).sum(dim=1) / n)

    def quantile(self, fraction: float) -> Tensor:
        """[C] or [] float64: the value below which this fraction lies, linear inside a bin.

        Raises:
            SpecError: The fraction is outside 0..1.
            CalibrationError: Nothing was counted.
        """
        if not 0 <= fraction <= 1:
            raise SpecError(f"the quantile {fraction} does not exist", hint="use 0 to 1")
        wanted = (fraction * self._counted()).unsqueeze(1)
        reached = self.counts.cumsum(dim=1).to(torch.float64)
        # The first bin that reaches the rank; at rank 0 the first bin that holds anything.
        column = torch.searchsorted(reached, wanted.clamp(min=0.5))
        column = column.clamp(max=self.counts.shape[1] - 1)
        held = self.counts.gather(1, column)
        part = 1 - (reached.gather(1, column) - wanted) / held
        left, right = (edge.gather(1, column) for edge in self._inner_edges())
        return self._shaped((left + part.clamp(0, 1) * (right - left)).squeeze(1))

    def _inner_edges(self) -> tuple[Tensor, Tensor]:
        """[rows, bins] twice: bin edges, cut to the values that did occur."""
        edges = self.edges()
        low = self.low.to(torch.float64).unsqueeze(1)
        high = self.high.to(torch.float64).unsqueeze(1)
        return edges[:, :-1].clamp(low, high), edges[:, 1:].clamp(low, high)

    def _steady(self, value: Tensor) -> Tensor:
        """Rounded to 2**(exponent - 10), a 1024th of a bin."""
        fine = self.exponent - 10
        return torch.ldexp(torch.ldexp(value, -fine).round(), fine)

    def _counted(self) -> Tensor:
        self._require_values()
        return self.counts.sum(dim=1).to(torch.float64)

    def _require_values(self) -> None:
        if self.is_empty:
            raise CalibrationError(
                "statistics were asked of a histogram that has counted nothing",
                hint="run at least one calibration batch through the model",
            )

    def _shaped(self, rows: Tensor) -> Tensor:
        return rows if self.per_channel else rows.squeeze(0)


def empty_state(channels: int | None = None, bins_per_sign: int | None = None) -> dict[str, Tensor]:
    """The state of a histogram that has counted nothing.

    Raises:
        SpecError: A channel or bin count that is not possible.

    Example:
        >>> empty_state(channels=3)["counts"].shape
        torch.Size([3, 1024])
    """
    rows = 1 if channels is None else channels
    bins = bins_per_sign or (2048 if channels is None else 512)
    if rows < 1 or bins < 2 or bins & (bins - 1):
        raise SpecError(
            f"a histogram of {rows} rows and {bins} bins per sign is not possible",
            hint="bins_per_sign must be a power of two, at least 2",
        )
    return {
        "counts": torch.zeros(rows, 2 * bins, dtype=torch.int64),
        "exponent": torch.full((rows,), _MIN_EXPONENT, dtype=torch.int64),
        "low": torch.full((rows,), math.inf),
        "high": torch.full((rows,), -math.inf),
        "total": torch.zeros(rows, dtype=torch.float64),
        "total_square": torch.zeros(rows, dtype=torch.float64),
    }


def _exponent_for(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """The smallest exponent whose bins hold [low, high]; monotone in both ends."""
    capacity = bins.bit_length() - 1
    _, above = torch.frexp(high.to(torch.float64).clamp(min=0))
    mantissa, below = torch.frexp(low.to(torch.float64).clamp(max=0))
    # -2**e itself is the left edge of the last negative bin, so it needs one doubling less.
    below = torch.where(mantissa == -0.5, below - 1, below)
    above = torch.where(high > 0, above, _MIN_EXPONENT)
    below = torch.where(low < 0, below, _MIN_EXPONENT)
    return (torch.maximum(above, below) - capacity).clamp(min=_MIN_EXPONENT).to(torch.int64)


def _coarsen(counts: Tensor, shift: Tensor) -> Tensor:
    """[rows, 2 * bins]: bins merged 2**shift at a time, each row by its own shift."""
    half = counts.shape[1] // 2
    result = torch.zeros_like(counts)
    index = torch.arange(-half, half).expand_as(counts)
    # floor(i / 2**s); an int64 shift by 63 already sends every index to 0 or -1.
    target = (index >> shift.clamp(max=63).unsqueeze(1)) + half
    return result.scatter_add_(1, target, counts)


def _float64_chunks(rows: Tensor, bins: int) -> Iterator[Tensor]:
    """Float64 copies of column blocks of [rows, n]; each is valid until the next is taken."""
    step = max(1, max(_CHUNK, bins) // len(rows))
    scratch = torch.empty(len(rows), min(step, rows.shape[1]), dtype=torch.float64)
    for start in range(0, rows.shape[1], step):
        block = rows[:, start : start + step]
        yield scratch[:, : block.shape[1]].copy_(block.to(torch.float32))
