"""How wide the numbers of a fixed-point training are, over time: ``widths.csv``, ``widths.png``."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fxq.numerics.adaptive import FLOAT_BITS, Adaptation
from fxq.quant.controller import Controller
from fxq.quant.fixed_point_layers import FixedPointModule

if TYPE_CHECKING:
    from fxq.picture import Picture

WIDTHS, PICTURE = "widths.csv", "widths.png"
HEAD = ("epoch", "layer", "tensor", "bits", "exponent", "diff", "steps", "adjustments")
TENSORS = ("weights", "values", "gradients")


def begin_training(module: nn.Module, steps_per_epoch: int) -> None:
    """Every part of a network that wants to know how long an epoch is has been told."""
    for child in module.modules():
        if isinstance(child, FixedPointModule):
            child.begin_training(steps_per_epoch)


def controllers(module: nn.Module) -> Iterator[tuple[str, str, Controller]]:
    """Layer, tensor and controller of all that were in use."""
    for name, child in module.named_modules():
        if isinstance(child, FixedPointModule):
            for tensor in TENSORS:
                controller = getattr(child, tensor)
                if controller.adaptation().step:
                    yield name.removeprefix("network."), tensor, controller


def width_columns(module: nn.Module) -> dict[str, float]:
    """The share of layers by the width of their gradients, and what choosing widths came to.

    ``int8 gradients`` and so on are shares; weights and values that are wider than 8 bits are
    counted together. ``adjusted`` is the share of steps, so far, at which a width was chosen.

    Example:
        >>> width_columns(nn.Linear(1, 1))
        {}
    """
    found = [(tensor, c.adaptation()) for _, tensor, c in controllers(module)]
    if not found:
        return {}
    gradients = [known.bits for tensor, known in found if tensor == "gradients"]
    others = [known.bits for tensor, known in found if tensor != "gradients"]
    columns = {
        f"{_name(bits)} gradients": gradients.count(bits) / len(gradients)
        for bits in sorted({8, 16, *gradients})
        if gradients
    }
    columns["wider operands"] = sum(bits > 8 for bits in others) / max(1, len(others))
    adjustments = sum(known.adjustments for _, known in found)
    columns["adjusted"] = adjustments / sum(known.step for _, known in found)
    return columns


def _name(bits: int) -> str:
    return "float" if bits == FLOAT_BITS else f"int{bits}"


def write_widths(folder: Path, module: nn.Module, epoch: int) -> None:
    """``widths.csv`` holds every controller at the end of each epoch up to this one."""
    now = [
        (
            epoch,
            layer,
            tensor,
            known.bits,
            known.exponent,
            known.diff,
            known.step,
            known.adjustments,
        )
        for layer, tensor, controller in controllers(module)
        for known in (controller.adaptation(),)
    ]
    if not now:
        return
    path = folder / WIDTHS
    before = [row for row in read_widths(path) if int(row["epoch"]) < epoch]
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEAD)
        writer.writerows([row[name] for name in HEAD] for row in before)
        writer.writerows(now)
    beside.replace(path)


def _fields(known: Adaptation) -> tuple[Any, ...]:
    return known.bits, known.exponent, known.diff, known.step, known.adjustments


def read_widths(path: Path) -> list[dict[str, str]]:
    """The rows of a ``widths.csv``; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def draw_widths(folder: Path) -> None:
    """``widths.png`` shows the widths of a training, where ``widths.csv`` holds any."""
    rows = read_widths(folder / WIDTHS)
    if rows:
        widths_picture(rows).savefig(folder / PICTURE, dpi=120)


def widths_picture(rows: Sequence[dict[str, str]]) -> Picture:
    """The share of each gradient width, and how often widths were chosen, over epochs.

    As Fig. 8 of Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020.

    Args:
        rows: As `read_widths` gives them, at least one.
    """
    from fxq.picture import Picture

    epochs = sorted({int(row["epoch"]) for row in rows})
    by_epoch = {epoch: [row for row in rows if int(row["epoch"]) == epoch] for epoch in epochs}
    picture = Picture(10, 3.6)
    shares, frequency = picture.subplots(1, 2)
    gradients = {e: _bits(by_epoch[e], ("gradients",)) for e in epochs}
    widths = sorted({bits for found in gradients.values() for bits in found})
    stacks = [[gradients[e].count(bits) / len(gradients[e]) for e in epochs] for bits in widths]
    shares.stackplot(epochs, stacks, labels=[_name(bits) for bits in widths])
    shares.set(xlabel="epoch", ylabel="share of layers, by gradient width", ylim=(0, 1))
    shares.legend(loc="lower left")
    for tensor in TENSORS:
        counts = [_counts(by_epoch[e], tensor) for e in epochs]
        frequency.plot(epochs, list(_frequencies(counts)), marker=".", label=tensor)
    frequency.set(xlabel="epoch", ylabel="share of steps that chose anew", yscale="log")
    frequency.legend()
    return picture


def _bits(rows: Sequence[dict[str, str]], tensors: tuple[str, ...]) -> list[int]:
    return [int(row["bits"]) for row in rows if row["tensor"] in tensors]


def _counts(rows: Sequence[dict[str, Any]], tensor: str) -> tuple[int, int]:
    own = [row for row in rows if row["tensor"] == tensor]
    return sum(int(row["steps"]) for row in own), sum(int(row["adjustments"]) for row in own)


def _frequencies(counts: list[tuple[int, int]]) -> Iterator[float]:
    """Within each epoch, from counts since the beginning."""
    before = (0, 0)
    for steps, adjustments in counts:
        made = max(1, steps - before[0])
        yield (adjustments - before[1]) / made or float("nan")
        before = (steps, adjustments)


def last_widths(module: nn.Module) -> dict[str, dict[int, float]]:
    """For each kind of tensor, the share of layers of each width, as the paper's Table 1."""
    found: dict[str, list[int]] = {}
    for _, tensor, controller in controllers(module):
        found.setdefault(tensor, []).append(controller.adaptation().bits)
    return {
        tensor: {width: bits.count(width) / len(bits) for width in sorted(set(bits))}
        for tensor, bits in found.items()
    }
