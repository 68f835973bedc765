"""`CalibrationData`: the user's batches, which several passes of one compilation can read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch

from fxq.errors import CalibrationError

_HINT = "give a list, a generator or a data loader of batches"


def on_cpu(value: Any) -> Any:
    """Tensors moved to where the integer kernels are."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, (list, tuple)):
        moved = [on_cpu(item) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


class CalibrationData:
    """Batches that can be read again and again.

    A list or a loader is read anew each time. A generator can be read only once: its first batches
    are kept while it is, as many as later passes asked for, and later readings get those.

    Args:
        source: The user's batches.
        keep: How many images of a generator to keep.

    Raises:
        CalibrationError: It is no source of batches, or it is empty.

    Example:
        >>> data = CalibrationData((torch.zeros(2, 3) for _ in range(4)), keep=3)
        >>> [sum(len(batch) for batch in data) for _ in range(3)]
        [8, 4, 4]
    """

    def __init__(self, source: Iterable[Any], keep: int = 0) -> None:
        if isinstance(source, torch.Tensor):
            raise CalibrationError(
                "calibration must be batches, not one tensor", hint="wrap it in a list: [images]"
            )
        try:
            batches = iter(source)
        except TypeError as error:
            raise CalibrationError(
                f"calibration must be batches, not a {type(source).__name__}", hint=_HINT
            ) from error
        self._source = source
        self._once = batches is source
        self._keep = keep
        self._kept: list[Any] = []
        first = next(batches, None)
        if first is None:
            raise CalibrationError(
                "0 batches were calibrated", hint="the calibration data is empty; give some images"
            )
        self.first = on_cpu(first)
        self._rest: Iterator[Any] | None = itertools.chain([first], batches)

    @property
    def is_exhausted(self) -> bool:
        """Whether only kept batches are left of a source that can be read once."""
        return self._once and self._rest is None

    def __iter__(self) -> Iterator[Any]:
        """The batches, on the CPU."""
        if self.is_exhausted:
            yield from self._kept
            return
        batches, self._rest = self._rest, None
        for batch in self._source if batches is None else batches:
            moved = on_cpu(batch)
            if self._once and sum(map(batch_size, self._kept)) < self._keep:
                self._kept.append(moved)
            yield moved

    def length(self) -> int | None:
        """How many batches a reading gives, where that is known."""
        if self.is_exhausted:
            return len(self._kept)
        return len(self._source) if isinstance(self._source, Sized) else None


def is_batch_of(value: Any, images: int) -> bool:
    """Whether an argument holds so many images; a mask for all of them does not."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == images


def pieces(inputs: tuple[Any, ...], elements: int) -> Iterator[tuple[Any, ...]]:
    """A batch of arguments, cut into pieces of about so many elements, of one image at least.

    What is no batch of images goes with every piece.

    Example:
        >>> [len(x) for x, mask in pieces((torch.zeros(5, 4), torch.zeros(1, 4)), 8)]
        [2, 2, 1]
    """
    images = batch_size(inputs)
    batched = [is_batch_of(value, images) for value in inputs]
    total = sum(v.numel() for v, is_batch in zip(inputs, batched, strict=True) if is_batch)
    step = max(1, elements * images // max(1, total))
    for start in range(0, max(1, images), step):  # an empty batch is one piece
        end = start + step
        yield tuple(v[start:end] if b else v for v, b in zip(inputs, batched, strict=True))


def batch_size(batch: Any) -> int:
    """Images in a batch: the length of its first tensor."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    return len(first) if isinstance(first, torch.Tensor) and first.dim() else 1
