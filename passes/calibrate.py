"""calibrate: the observers have seen the calibration data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fxq.calibration import CalibrationData, batch_size, is_batch_of, pieces
from fxq.contracts import Contract
from fxq.errors import CalibrationError
from fxq.graph.program import Program
from fxq.graph.rewrite import Editor
from fxq.pipeline import Pass
from fxq.quant.observers import Observer
from fxq.world import World

SAMPLE_ELEMENTS = 5 * 2**17
"""How many input elements are kept, and losses of single layers are measured on.

Four photographs of 224 x 224 pixels, two hundred images of 32 x 32. What is estimated on them are
differences on the same image, which vary little from image to image.
"""

PIECE_ELEMENTS = 2**21
"""Larger batches are run in pieces (13 photographs), so that their size does not cost memory."""

NO_DATA = "give fxq.compile a calibration loader, or fxq compile --calibration"


@dataclass(frozen=True)
class Calibrate(Pass):
    """Every observer holds the statistics of the calibration batches, merged over all ranks.

    Batches are streamed, so memory does not depend on their number; only the first few images stay
    with the program, to rank its layers on after the compilation. A batch is a tensor, a tuple of
    arguments, or ``(inputs, labels)``; what the model does not take is left out.

    Args:
        batches: How many batches to read at most; 0 reads all.

    Raises:
        CalibrationError: There is no data, or a batch is empty, not finite or of the wrong shape.
    """

    name: ClassVar[str] = "calibrate"
    after: ClassVar[tuple[str, ...]] = ("insert-observers",)
    contract: ClassVar[Contract] = Contract.OBSERVES_ONLY

    batches: int = 0

    def apply(self, program: Program, edit: Editor) -> None:
        """The calibration batches are run through the graph once."""
        if program.calibration is None:
            raise CalibrationError("there is no calibration data", hint=NO_DATA)
        observers = [m for m in program.module.modules() if isinstance(m, Observer)]
        source = batches_of(program, program.calibration)
        total = self._total(program.calibration)
        count = images = 0
        _enable(observers, True)
        try:
            for inputs in itertools.islice(source, self.batches or None):
                whole = not _mergeable(observers) or not _all_batched(inputs)
                for piece in (inputs,) if whole else pieces(inputs, PIECE_ELEMENTS):
                    _run(program, piece, count)
                _keep(program, inputs)
                count += 1
                images += batch_size(inputs)
                program.report_progress("calibrate", count, total)
        finally:
            _enable(observers, False)
        if count == 0:
            raise CalibrationError("0 batches were calibrated", hint=NO_DATA)
        world = World.current()
        for observer in observers:
            observer.all_reduce_()
        program.sample = world.gathered(program.sample)[0]
        count, images = (sum(own) for own in zip(*world.gathered((count, images)), strict=True))
        edit.note(f"{count} batches, {images} images, {len(observers)} observers")

    def _total(self, source: Iterable[Any]) -> int | None:
        limits = [count for count in (_length(source), self.batches) if count]
        return min(limits, default=None)


def batches_of(program: Program, source: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """The arguments of the model for each batch; labels and other extras are left out."""
    wanted = sum(node.op == "placeholder" for node in program.nodes())
    for batch in source:
        if isinstance(batch, torch.Tensor):
            yield (batch,)
        elif isinstance(batch, (tuple, list)) and len(batch) >= wanted:
            yield tuple(batch[:wanted])
        else:
            raise CalibrationError(
                f"a calibration batch is a {type(batch).__name__}; the model takes {wanted} inputs",
                hint="yield a tensor, a tuple of arguments, or (inputs, labels)",
            )


def _mergeable(observers: list[Observer]) -> bool:
    """Whether what the observers hold does not depend on how the data is cut into batches."""
    return all(getattr(observer, "momentum", None) is None for observer in observers)


def _all_batched(inputs: tuple[Any, ...]) -> bool:
    """Whether every argument is a batch of as many images."""
    return all(is_batch_of(value, batch_size(inputs)) for value in inputs)


def _run(program: Program, inputs: tuple[Any, ...], position: int) -> None:
    for value in inputs:
        if isinstance(value, torch.Tensor):
            _check_finite(value, position)
    try:
        program.run(*inputs)
    except CalibrationError as error:
        error.where = error.where or f"calibration batch {position}"
        raise
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        shapes = [list(v.shape) for v in inputs if isinstance(v, torch.Tensor)]
        expected = [list(v.shape) for v in program.example_inputs if isinstance(v, torch.Tensor)]
        raise CalibrationError(
            f"the model fails on a calibration batch: {str(error).splitlines()[0]}",
            where=f"calibration batch {position}, shapes {shapes}",
            hint=f"batches must look like the example input {expected}, batch size apart",
        ) from error


def _keep(program: Program, inputs: tuple[Any, ...]) -> None:
    """The first inputs stay with the program, up to a fixed number of elements."""
    held = sum(_elements(batch) for batch in program.sample)
    room = (SAMPLE_ELEMENTS - held) * batch_size(inputs) // max(1, _elements(inputs))
    if room > 0 or not program.sample:
        program.sample.append(tuple(_first(value, max(room, 1)) for value in inputs))


def _elements(inputs: tuple[Any, ...]) -> int:
    return sum(value.numel() for value in inputs if isinstance(value, torch.Tensor))


def _first(value: Any, count: int) -> Any:
    return value[:count].clone() if isinstance(value, torch.Tensor) and value.dim() else value


def _check_finite(value: torch.Tensor, position: int) -> None:
    if value.numel() == 0:
        raise CalibrationError(
            "a calibration batch is empty",
            where=f"batch {position}, shape {list(value.shape)}",
            hint="leave empty batches out",
        )
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise CalibrationError(
            "a calibration batch holds NaN or infinity",
            where=f"batch {position}",
            hint="check the images and their normalization",
        )


def _enable(observers: list[Observer], on: bool) -> None:
    for observer in observers:
        observer.enabled = on


def _length(source: Iterable[Any]) -> int | None:
    if isinstance(source, CalibrationData):
        return source.length()
    try:
        return len(source)  # type: ignore[arg-type]
    except TypeError:
        return None
