"""Which width and resolution a tensor of a training step gets, and when to look at it again.

Decisions on scalars only: whoever has the tensor hands in its statistics, and every process that is
given the same ones (reduced over all processes) decides the same.

Papers:
    Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020 (section 4.1, Eq. 2: the error
        Diff; section 4.2, Eq. 3: the moving range and the interval; section 5.3: the constants;
        appendix E: widths that begin at 4 bits).

Departures, each where the paper is silent or cannot be meant:
    The moving range is that of log2(Z): as printed, in the units of the tensor, the same network
        with its loss scaled by 1000 would be adjusted at other times.
    The interval is rounded down, at least 1 and at most `longest_interval`. It is 1 after the first
        look, which cannot know how fast the range changes.
    A width still in error at `top_bits` ends in float (32).
    A tensor of zeros teaches nothing, nor does one too small for any resolution (all below 1e-36 at
        8 bits): everything is kept, and the next step looks again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum

from fxq.errors import SpecError
from fxq.numerics.fixed_point import MIN_EXPONENT, TOP_BITS, largest_code, resolution_exponent
from fxq.numerics.quantization_error import mean_shift_bits

FLOAT_BITS = 32
"""The width of a tensor that no fixed-point width was enough for: it stays in float."""

RoundedSum = Callable[[int, int], float]
"""(bits, exponent) -> sum of the absolute values of the tensor rounded to them."""


class Mode(StrEnum):
    """Where the search for a width begins: afresh each time, or at the width it ended with."""

    RECURSIVE = "mode1"
    MONOTONE = "mode2"


@dataclass(frozen=True)
class AdaptationOptions:
    """How widths are chosen; the defaults are the paper's.

    Attributes:
        mode: Whether a width may become smaller again (mode1) or never does (mode2).
        start_bits: The first width tried, 2 to `top_bits`.
        growth: Widths tried next are its multiples: 8, 16, 24; from 4 bits also 8, 16, 24.
        top_bits: The last fixed-point width; then comes float. A multiple of `growth`, or
            `start_bits` itself; at most 24.
        alpha: Weight of the newest range in the moving range, above 0 and at most 1.
        beta: The interval times the change it answers to, in steps, > 0.
        delta: What a squared error counts against a change of range, >= 0.
        gamma: Steps taken off every interval, >= 0.
        threshold: The largest Diff that a width may have, in bits, > 0; infinite: widths stay.
        initial_steps: Steps at the beginning that are all adjusted; the paper's are a tenth of the
            first epoch.
        longest_interval: In steps, at least 1. That of 1000 is the paper's final frequency, 0.1 %.

    Raises:
        SpecError: An option is out of its range.

    Example:
        >>> AdaptationOptions(start_bits=4).next_bits(4), AdaptationOptions().next_bits(24)
        (8, 32)
    """

    mode: Mode = Mode.MONOTONE
    start_bits: int = 8
    growth: int = 8
    top_bits: int = TOP_BITS
    alpha: float = 0.04
    beta: float = 0.1
    delta: float = 100.0
    gamma: float = 2.0
    threshold: float = 0.03
    initial_steps: int = 0
    longest_interval: int = 1000

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check()

    @classmethod
    def static(cls, bits: int) -> AdaptationOptions:
        """Options under which the width stays `bits` and only the resolution follows the range.

        Raises:
            SpecError: Impossible bits.

        Example:
            >>> AdaptationOptions.static(16).start_bits
            16
        """
        return cls(start_bits=bits, top_bits=bits, threshold=math.inf)

    def check(self) -> None:
        """Raise a SpecError that names the option, if one is out of its range."""
        whole_growths = self.growth > 0 and self.top_bits % self.growth == 0
        allowed = {
            "mode": self.mode in tuple(Mode),
            "start_bits": 2 <= self.start_bits <= self.top_bits,
            "growth": self.growth > 0,
            "top_bits": self.top_bits <= TOP_BITS
            and (whole_growths or self.top_bits == self.start_bits),
            "alpha": 0 < self.alpha <= 1,
            "beta": 0 < self.beta < math.inf,
            "delta": 0 <= self.delta < math.inf,
            "gamma": 0 <= self.gamma < math.inf,
            "threshold": self.threshold > 0,
            "initial_steps": self.initial_steps >= 0,
            "longest_interval": self.longest_interval >= 1,
        }
        for name, fine in allowed.items():
            if not fine:
                raise SpecError(
                    f"{name} cannot be {getattr(self, name)!r}",
                    where=name,
                    hint="see AdaptationOptions for what it may be",
                )

    def next_bits(self, bits: int) -> int:
        """The width tried after `bits`: the next multiple of `growth`, or float above the top."""
        wider = (bits // self.growth + 1) * self.growth
        return wider if wider <= self.top_bits else FLOAT_BITS


@dataclass(frozen=True)
class Adaptation:
    """What is known of one tensor between two steps: all of it numbers, so it fits a buffer.

    Attributes:
        bits: Its width; `FLOAT_BITS` for float.
        exponent: log2 of its resolution; in float, that of the widest codes.
        moving_range: Moving average of log2 of its largest absolute value; -inf before the first.
        step: Steps taken so far, which is the number of the next one.
        next_step: The step at which it is looked at again.
        adjustments: How often that has happened.
        diff: The error found the last time, in bits (Eq. 2).
    """

    bits: int
    exponent: int = 0
    moving_range: float = -math.inf
    step: int = 0
    next_step: int = 0
    adjustments: int = 0
    diff: float = 0.0

    @classmethod
    def start(cls, options: AdaptationOptions) -> Adaptation:
        """Before the first step, at which it is looked at."""
        return cls(options.start_bits)

    def to_numbers(self) -> list[float]:
        """The fields in their order; float64 holds each exactly.

        Example:
            >>> Adaptation(8, exponent=-3, moving_range=4.0).to_numbers()
            [8.0, -3.0, 4.0, 0.0, 0.0, 0.0, 0.0]
        """
        return [float(getattr(self, field.name)) for field in fields(self)]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Adaptation:
        """What `to_numbers` was called on.

        Raises:
            SpecError: These are not the numbers of an `Adaptation`.
        """
        values = [float(number) for number in numbers]
        whole = [*values[:2], *values[3:6]]
        if len(values) != NUMBERS or any(map(math.isnan, values)) or any(n % 1 for n in whole):
            raise SpecError(
                f"{values} is no state of an adaptive tensor",
                hint="the checkpoint is damaged, or of another version",
            )
        bits, exponent, step, next_step, adjustments = map(int, whole)
        return cls(bits, exponent, values[2], step, next_step, adjustments, values[6])


NUMBERS = len(fields(Adaptation))
"""How many numbers a state is."""


def is_due(state: Adaptation) -> bool:
    """Whether the coming step must be `adjusted`; otherwise it may `advance`."""
    return state.step >= state.next_step


def is_within(state: Adaptation, largest: float) -> bool:
    """Whether no value of a tensor would be clipped; not, where the largest one is NaN.

    Example:
        >>> is_within(Adaptation(8, exponent=0), 127.0), is_within(Adaptation(8, exponent=0), 128.0)
        (True, False)
    """
    if state.bits == FLOAT_BITS:
        return largest < math.inf
    return largest <= largest_code(state.bits) * 2.0**state.exponent


def advance(state: Adaptation) -> Adaptation:
    """The state after a step that kept the width and the resolution."""
    return replace(state, step=state.step + 1)


def adjusted(
    state: Adaptation,
    options: AdaptationOptions,
    largest: float,
    sum_abs: float,
    rounded_sum: RoundedSum,
) -> Adaptation:
    """The state after a step that chose the width and the resolution anew; the step uses them.

    The width is the first, from that of the mode on, whose Diff is within the threshold.

    Args:
        state: Before the step.
        options: How to choose.
        largest: The largest absolute value Z of the tensor.
        sum_abs: The sum of its absolute values, in float64.
        rounded_sum: The same sum after rounding to a width and resolution; called once for each
            fixed-point width tried.

    Raises:
        SpecError: A statistic is NaN, infinite or negative: the tensor held NaN or infinite values.

    Example:
        >>> options = AdaptationOptions()
        >>> state = Adaptation(bits=8, moving_range=0.0)
        >>> state = adjusted(state, options, 1.0, 10.0, lambda bits, exponent: 9.99)
        >>> state.bits, state.exponent, state.next_step
        (8, -6, 478)

    Reference:
        Zhang et al., CVPR 2020, algorithm 1 and section 4.2.
    """
    _check_statistics(largest, sum_abs)
    if resolution_exponent(largest, options.start_bits) == MIN_EXPONENT:
        return replace(
            state,
            step=state.step + 1,
            next_step=state.step + 1,
            adjustments=state.adjustments + 1,
            diff=0.0,
        )
    bits, diff = _enough_bits(state, options, largest, sum_abs, rounded_sum)
    range_now = math.log2(largest)
    first = state.moving_range == -math.inf
    before = range_now if first else state.moving_range
    moved = options.alpha * (range_now - before)
    at_once = first or state.step < options.initial_steps
    interval = 1 if at_once else _interval(options, max(options.delta * diff * diff, abs(moved)))
    return Adaptation(
        bits=bits,
        exponent=resolution_exponent(largest, min(bits, TOP_BITS)),
        moving_range=before + moved,
        step=state.step + 1,
        next_step=state.step + interval,
        adjustments=state.adjustments + 1,
        diff=diff,
    )


def _enough_bits(
    state: Adaptation,
    options: AdaptationOptions,
    largest: float,
    sum_abs: float,
    rounded_sum: RoundedSum,
) -> tuple[int, float]:
    """The first width whose Diff is within the threshold, and that Diff; float has none."""
    bits = options.start_bits if options.mode == Mode.RECURSIVE else state.bits
    while bits != FLOAT_BITS:
        total = rounded_sum(bits, resolution_exponent(largest, bits))
        _check_statistics(largest, total)
        diff = mean_shift_bits(abs(sum_abs - total) / sum_abs) if sum_abs else 0.0
        if diff <= options.threshold:
            return bits, diff
        bits = options.next_bits(bits)
    return FLOAT_BITS, 0.0


def _interval(options: AdaptationOptions, change: float) -> int:
    """Steps until the next look: beta / max(I1, I2) - gamma, within 1 .. longest_interval."""
    if change == 0:
        return options.longest_interval
    return max(1, math.floor(min(options.beta / change - options.gamma, options.longest_interval)))


def _check_statistics(*statistics: float) -> None:
    if not all(0 <= value < math.inf for value in statistics):
        raise SpecError(
            f"the largest absolute value and a sum of absolute values are {statistics}",
            hint="the tensor holds NaN or infinite values: skip the step, or lower the rate",
        )
