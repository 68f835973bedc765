"""Calibration images for passes that optimize or compare, as one batch."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from fxq.errors import CalibrationError
from fxq.graph.program import Program
from fxq.world import World

from .calibrate import NO_DATA, batches_of


def calibration_images(program: Program, count: int, *, elements: int = 0) -> tuple[Any, ...]:
    """The first calibration images as one batch, laid out for the program.

    Where several processes calibrate, each on batches of its own, all get the same images: those of
    the first batch of each process in turn, then of the second.

    Args:
        program: A program that is being compiled.
        count: How many images at most.
        elements: How many input elements at most (at least one image is given); 0 for no limit.

    Returns:
        The arguments of the model; what is no batch (a mask for all images) is given once.

    Raises:
        CalibrationError: There is no calibration data.
    """
    if program.calibration is None:
        raise CalibrationError("there is no calibration data", hint=NO_DATA)
    batches: list[tuple[Any, ...]] = []
    world = World.current()
    held = wanted = 0
    for inputs in batches_of(program, program.calibration):
        batches.append(inputs)
        held += world.processes * (_size(inputs[0]) or 1)
        wanted = min(count, _room(inputs, elements) if elements else count)
        if held >= wanted:
            break
    batches = _in_turn(world.gathered(batches))
    if not batches:
        raise CalibrationError("0 batches were calibrated", hint="give some images")
    return program.laid_out(joined(batches, max(wanted, 1)))


def _in_turn(shares: list[list[tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
    turns = itertools.zip_longest(*shares)
    return [batch for turn in turns for batch in turn if batch is not None]


def joined(batches: list[tuple[Any, ...]], images: int) -> tuple[Any, ...]:
    """Batches as one of at most so many images; inputs that are no batch are taken once."""
    sizes = [_size(batch[0]) for batch in batches]
    columns = list(zip(*batches, strict=True))
    batched = [[_size(value) for value in column] == sizes for column in columns]
    pairs = list(zip(columns, batched, strict=True))
    if not all(_can_join(column) for column, is_batch in pairs if is_batch):
        return batches[0]
    return tuple(torch.cat(column)[:images] if b else column[0] for column, b in pairs)


def _room(inputs: tuple[Any, ...], elements: int) -> int:
    """How many images like these have so many elements."""
    each = sum(value.numel() for value in inputs if isinstance(value, torch.Tensor))
    return max(1, elements * (_size(inputs[0]) or 1) // max(1, each))


def _size(value: Any) -> int | None:
    return len(value) if isinstance(value, torch.Tensor) and value.dim() else None


def _can_join(column: tuple[Any, ...]) -> bool:
    if not all(isinstance(value, torch.Tensor) and value.dim() for value in column):
        return False
    return len({value.shape[1:] for value in column}) == 1
