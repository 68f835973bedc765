"""What a pass promises about the numbers, and how the promise is checked on a probe batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import torch

from fxq.errors import ContractError
from fxq.trail.drift import Drift


class Contract(StrEnum):
    """The promise a pass makes about the program's output."""

    SAME_NUMBERS = "same-numbers"
    ANNOTATES_ONLY = "annotates-only"
    OBSERVES_ONLY = "observes-only"
    CHANGES_NUMBERS = "changes-numbers"


TOLERANCE = 1e-4
"""How far a same-numbers pass may move the output, relative to its largest magnitude."""

_ROUNDINGS = 8


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors in an output, whatever it is nested in."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def output_sqnr(reference: Any, actual: Any) -> float:
    """Signal-to-noise ratio of an output against a reference, in dB, over all its tensors.

    Infinite where they are equal; ``-inf`` where the actual output is not finite.

    Example:
        >>> round(output_sqnr(torch.tensor([1.0, -1.0]), torch.tensor([1.1, -1.1])), 1)
        20.0
    """
    signal, noise = 0.0, 0.0
    for want, have in _pairs(reference, actual):
        signal += float(want.double().square().sum())
        noise += float(_difference(want, have).square().sum())
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def relative_error(reference: Any, actual: Any) -> float:
    """The largest absolute difference over the largest magnitude of the reference."""
    worst, magnitude = 0.0, 0.0
    for want, have in _pairs(reference, actual):
        if want.shape != have.shape:
            return math.inf
        if want.numel():
            error = float(_difference(want, have).abs().max())
            worst = max(worst, error if math.isfinite(error) else math.inf)
            magnitude = max(magnitude, float(want.abs().nan_to_num(0, 0, 0).max()))
    return worst / magnitude if magnitude else (math.inf if worst else 0.0)


def output_drift(reference: Any, actual: Any) -> Drift:
    """How far an output is from a reference, over all its tensors; flips are of the first of them.

    Example:
        >>> output_drift(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 2.0]]))
        Drift(sqnr=7.958800173440752, largest=2.0, flips=1, decisions=1)
    """
    pairs = list(_pairs(reference, actual))
    apart = [_difference(want, have).abs() for want, have in pairs if want.numel()]
    largest = max((float(one.nan_to_num(nan=math.inf).max()) for one in apart), default=0.0)
    flips = _flips(*pairs[0]) if pairs else torch.empty(0)
    return Drift(output_sqnr(reference, actual), largest, int(flips.sum()), flips.numel())


def _flips(want: torch.Tensor, have: torch.Tensor) -> torch.Tensor:
    """Where the classes along dimension 1 have another argmax; empty where there are none."""
    if want.dim() < 2 or want.shape[1] < 2 or want.shape != have.shape or not want.numel():
        return torch.empty(0)
    return want.argmax(1) != have.argmax(1)


def _pairs(reference: Any, actual: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    wants, haves = list(tensors_of(reference)), list(tensors_of(actual))
    if len(wants) != len(haves):
        raise ContractError(
            f"the output had {len(wants)} tensors and has {len(haves)}",
            hint="a pass must leave the outputs of the network in place",
        )
    return zip(wants, haves, strict=True)


def _difference(want: torch.Tensor, have: torch.Tensor) -> torch.Tensor:
    """The difference in float64, zero where both are the same infinity or both are NaN."""
    same = (want == have) | (want.isnan() & have.isnan())
    return torch.where(same, 0.0, want.double() - have.double())


def _tolerance(outputs: Any) -> float:
    """What a same-numbers pass may move: `TOLERANCE`, or a few roundings of a narrower dtype."""
    widths = [torch.finfo(tensor.dtype).eps for tensor in tensors_of(outputs)]
    return max([TOLERANCE, *(_ROUNDINGS * eps for eps in widths)])


def check_contract(name: str, contract: Contract, before: Any, after: Any) -> None:
    """The output kept the promise of the pass.

    Args:
        name: The pass, for the error.
        contract: What it promised.
        before: The probe output before it ran.
        after: The probe output after.

    Raises:
        ContractError: A same-numbers pass moved the output by more than `TOLERANCE`, or an
            annotating or observing pass moved it at all.
    """
    if contract is Contract.CHANGES_NUMBERS:
        return
    error = relative_error(before, after)
    allowed = _tolerance(before) if contract is Contract.SAME_NUMBERS else 0.0
    if error > allowed:
        raise ContractError(
            f"{name} promised {contract.value} but moved the probe output by {error:.2e} of its "
            f"largest magnitude (allowed: {allowed:g})",
            where=name,
            hint="the pass is wrong for this model; leave it out of the recipe and report it",
        )
