"""Observers: modules that pass a tensor through untouched and remember what they saw.

An observer gathers only while `enabled` is true. All it knows is in its buffers, so it survives a
state dict, a deep copy and a move between processes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxq.errors import CalibrationError, SpecError
from fxq.numerics.histogram import STATE_NAMES, Histogram, empty_state


class Observer(nn.Module):
    """The identity, which gathers statistics of its input while enabled.

    Args:
        channels: Statistics per index of dimension 1, or None for one set per tensor.

    Attributes:
        enabled: Whether forward gathers.
        batches: [] int64; how many forwards were gathered.
        values: [] int64; how many values were gathered.
    """

    fxq_kind = "observer"
    batches: Tensor
    values: Tensor

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.enabled = True
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("values", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """The very same tensor; its statistics are gathered when enabled.

        Args:
            x: [...], or [n, channels, ...] per channel.

        Raises:
            CalibrationError: x is empty, not finite, or has another number of channels.
        """
        if self.enabled:
            with torch.no_grad():
                self._gather(x.detach())
                self.batches += 1
                self.values += x.numel()
        return x

    @property
    def is_empty(self) -> bool:
        """Whether no batch has been gathered."""
        return int(self.batches) == 0

    def merge_(self, other: Observer) -> Self:
        """Holds the statistics of both, as if this one had also seen the other's batches.

        Raises:
            CalibrationError: The other is of another kind or shape.
        """
        if type(other) is not type(self) or other.channels != self.channels:
            raise CalibrationError(
                f"cannot merge {other} into {self}", hint="build both observers the same way"
            )
        if not other.is_empty:
            self._absorb(other)
            self.batches += other.batches
            self.values += other.values
        return self

    def all_reduce_(self) -> Self:
        """Every rank holds the statistics of all ranks; nothing happens in a single process.

        The ranks are merged in rank order everywhere, so all end with identical buffers.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self
        states: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(states, dict(self.named_buffers()))
        merged = self._fresh()
        for state in states:
            rank = self._fresh()
            rank.load_state_dict(state)
            merged.merge_(rank)
        self.load_state_dict(merged.state_dict())
        return self

    @abstractmethod
    def range(self) -> tuple[Tensor, Tensor]:
        """[C] or [] float32, twice: the low and high end."""

    @abstractmethod
    def mean(self) -> Tensor:
        """[C] or [] float64: the mean."""

    @abstractmethod
    def abs_deviation(self) -> Tensor:
        """[C] or [] float64: mean|x - mean(x)|, the Laplace b."""

    @abstractmethod
    def std(self) -> Tensor:
        """[C] or [] float64: the standard deviation."""

    @abstractmethod
    def _gather(self, x: Tensor) -> None: ...

    @abstractmethod
    def _absorb(self, other: Observer) -> None: ...

    @abstractmethod
    def _fresh(self) -> Self:
        """An empty observer built with the same arguments."""

    def extra_repr(self) -> str:
        """What it is per, what it has seen, and whether it is off."""
        per = "per-tensor" if self.channels is None else f"per-channel({self.channels})"
        off = "" if self.enabled else ", off"
        return f"{per}, batches={int(self.batches)}{off}"


class RangeObserver(Observer):
    """Remembers the smallest and largest value, or a moving average of them over batches.

    Args:
        channels: One range per index of dimension 1, or None for one per tensor.
        momentum: None for the true extremes. Else the weight of the *old* range, as papers use the
            word: `range = momentum * range + (1 - momentum) * batch`. (torch's
            `averaging_constant` is the weight of the new one.) A moving average depends on the
            order of the batches and cannot be merged exactly; merging averages the two by their
            numbers of batches.

    Raises:
        SpecError: Momentum outside [0, 1).

    Example:
        >>> observer = RangeObserver(momentum=0.75)
        >>> _ = observer(torch.tensor([0.0, 4.0])), observer(torch.tensor([0.0, 8.0]))
        >>> [end.item() for end in observer.range()]
        [0.0, 5.0]
    """

    low: Tensor
    high: Tensor

    def __init__(self, channels: int | None = None, momentum: float | None = None) -> None:
        super().__init__(channels)
        if momentum is not None and not 0 <= momentum < 1:
            raise SpecError(
                f"momentum {momentum} is not in [0, 1)",
                hint="it is the weight of the old range; typical 0.9, or None for true extremes",
            )
        self.momentum = momentum
        shape = () if channels is None else (channels,)
        self.register_buffer("low", torch.full(shape, math.inf))
        self.register_buffer("high", torch.full(shape, -math.inf))

    def range(self) -> tuple[Tensor, Tensor]:
        """[C] or [] float32, twice: the low and high end.

        Raises:
            CalibrationError: No batch has been gathered.
        """
        if self.is_empty:
            raise CalibrationError(
                "a range was asked of an observer that has seen no batch",
                hint="run at least one calibration batch with the observer enabled",
            )
        return self.low.clone(), self.high.clone()

    def mean(self) -> Tensor:
        """Always raises: a range has no mean.

        Raises:
            CalibrationError: Always.
        """
        raise _only_a_range("mean")

    def abs_deviation(self) -> Tensor:
        """Always raises: a range has no deviation.

        Raises:
            CalibrationError: Always.
        """
        raise _only_a_range("mean absolute deviation")

    def std(self) -> Tensor:
        """Always raises: a range has no standard deviation.

        Raises:
            CalibrationError: Always.
        """
        raise _only_a_range("standard deviation")

    def _gather(self, x: Tensor) -> None:
        low, high = _extremes(x, self.channels)
        if self.momentum is None or self.is_empty:
            self.low.copy_(torch.minimum(self.low, low))
            self.high.copy_(torch.maximum(self.high, high))
        else:
            self.low.lerp_(low, 1 - self.momentum)
            self.high.lerp_(high, 1 - self.momentum)

    def _absorb(self, other: Observer) -> None:
        if not isinstance(other, RangeObserver) or other.momentum != self.momentum:
            raise CalibrationError(
                f"cannot merge {other} into {self}", hint="give both the same momentum"
            )
        if self.momentum is None or self.is_empty:
            self.low.copy_(torch.minimum(self.low, other.low))
            self.high.copy_(torch.maximum(self.high, other.high))
        else:
            share = float(other.batches) / float(self.batches + other.batches)
            self.low.lerp_(other.low, share)
            self.high.lerp_(other.high, share)

    def _fresh(self) -> Self:
        return type(self)(self.channels, self.momentum)

    def extra_repr(self) -> str:
        """The momentum, too, when there is one."""
        momentum = "" if self.momentum is None else f", momentum={self.momentum}"
        return super().extra_repr() + momentum


class HistogramObserver(Observer):
    """Remembers a histogram: exact extremes, mean, deviations and quantiles of all values seen.

    Merging is exact: counts, extremes and bin width do not depend on order or batching.

    Args:
        channels: One histogram per index of dimension 1, or None for one per tensor.
        bins_per_sign: As in `fxq.numerics.histogram.Histogram`.

    Raises:
        SpecError: A channel or bin count that is not possible.

    Example:
        >>> observer = HistogramObserver()
        >>> x = torch.tensor([1.0, 2.0, 3.0, 6.0])
        >>> observer(x) is x, observer.mean().item()
        (True, 3.0)
    """

    def __init__(self, channels: int | None = None, bins_per_sign: int | None = None) -> None:
        super().__init__(channels)
        self.bins_per_sign = bins_per_sign
        for name, tensor in empty_state(channels, bins_per_sign).items():
            self.register_buffer(name, tensor)

    @property
    def histogram(self) -> Histogram:
        """The histogram itself; it shares the buffers, so it is live."""
        state = {name: self.get_buffer(name) for name in STATE_NAMES}
        return Histogram.from_state(state, per_channel=self.channels is not None)

    def range(self) -> tuple[Tensor, Tensor]:
        """[C] or [] float32, twice: the exact minimum and maximum.

        Raises:
            CalibrationError: No batch has been gathered.
        """
        return self.histogram.range()

    def mean(self) -> Tensor:
        """[C] or [] float64: the mean.

        Raises:
            CalibrationError: No batch has been gathered.
        """
        return self.histogram.mean()

    def abs_deviation(self) -> Tensor:
        """[C] or [] float64: mean|x - mean(x)|, the Laplace b.

        Raises:
            CalibrationError: No batch has been gathered.
        """
        return self.histogram.abs_deviation()

    def std(self) -> Tensor:
        """[C] or [] float64: the unbiased standard deviation.

        Raises:
            CalibrationError: No batch has been gathered.
        """
        return self.histogram.std()

    def quantile(self, fraction: float) -> Tensor:
        """[C] or [] float64: the value below which this fraction lies.

        Raises:
            SpecError: The fraction is outside 0..1.
            CalibrationError: No batch has been gathered.
        """
        return self.histogram.quantile(fraction)

    def _gather(self, x: Tensor) -> None:
        self.histogram.update(x)

    def _absorb(self, other: Observer) -> None:
        if isinstance(other, HistogramObserver):
            self.histogram.merge(other.histogram)

    def _fresh(self) -> Self:
        return type(self)(self.channels, self.bins_per_sign)


def _extremes(x: Tensor, channels: int | None) -> tuple[Tensor, Tensor]:
    """[C] or [] float32, twice: minimum and maximum of finite, non-empty data."""
    if x.numel() == 0:
        raise CalibrationError(f"a calibration tensor is empty: {list(x.shape)}")
    if channels is None:
        is_image = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        # A view in memory order: aminmax would copy a channels-last tensor first.
        low, high = torch.aminmax(x.permute(0, 2, 3, 1) if is_image else x)
    elif x.dim() < 2 or x.shape[1] != channels:
        raise CalibrationError(
            f"expected {channels} channels in dimension 1, got shape {list(x.shape)}"
        )
    else:
        others = [dim for dim in range(x.dim()) if dim != 1]
        low, high = x.amin(dim=others), x.amax(dim=others)  # faster than aminmax with a dim
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise CalibrationError(
            f"a calibration tensor of shape {list(x.shape)} holds NaN or infinity",
            hint="look for an overflow in the float model, or bad input images",
        )
    return low.to(torch.float32), high.to(torch.float32)


def _only_a_range(statistic: str) -> CalibrationError:
    return CalibrationError(
        f"a RangeObserver does not know the {statistic}",
        hint="use a HistogramObserver where a pass needs more than the range",
    )
