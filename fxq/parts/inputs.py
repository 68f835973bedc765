"""What parts of a model are calibrated on: the tensors it calls them with on the batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from fxq.calibration import CalibrationData
from fxq.errors import CalibrationError
from fxq.parts.calls import bind, hooked, run
from fxq.parts.composition import Part

BUDGET = 2**29
"""Bytes of parts' inputs that are kept, so that the model need not run again for them."""

_Calls = list[tuple[Tensor, ...]]


class PartInputs:
    """The inputs of every part, whenever it reads them: kept from an earlier run, or of a new one.

    A run of the model on a batch gives the inputs of all parts at once. They are kept for parts
    still to come as long as there is room; for the rest the model runs again, so that memory does
    not grow with the number of batches.

    Args:
        model: The model as it was written.
        parts: Its parts, by path.
        source: Batches of the model's inputs; all are kept of a generator.
        entries: How many arguments the model takes; further entries of a batch are left out.
        budget: Bytes that may be kept.

    Raises:
        CalibrationError: The source is no source of batches, or it is empty.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: dict[str, Part],
        source: Iterable[Any],
        entries: int,
        budget: int = BUDGET,
    ) -> None:
        self._model, self._entries, self._room = model, entries, budget
        self._parts = dict(parts)
        data = CalibrationData(source)
        self._batches = list(data) if isinstance(source, Iterator) else data
        self._kept: dict[tuple[str, int], _Calls] = {}

    def of(self, path: str) -> PartData:
        """The inputs of one part."""
        return PartData(self, path)

    def forget(self, path: str) -> None:
        """Nothing is kept any longer for a part."""
        del self._parts[path]
        for key in [key for key in self._kept if key[0] == path]:
            self._room += _size(self._kept.pop(key))

    def batches(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """The batches as arguments of the model, with their positions."""
        for index, batch in enumerate(self._batches):
            arguments = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            yield index, arguments[: self._entries]

    def calls(self, path: str, index: int, batch: tuple[Any, ...]) -> _Calls:
        """What the model calls a part with on a batch; empty tensors are left out."""
        known = self._kept.get((path, index))
        return self._recorded(path, index, batch) if known is None else known

    def _recorded(self, path: str, index: int, batch: tuple[Any, ...]) -> _Calls:
        others = [one for one in self._parts if one != path and (one, index) not in self._kept]
        found: dict[str, _Calls] = {one: [] for one in (path, *others)}
        handles = [self._watch(one, found, is_wanted=one == path) for one in list(found)]
        with hooked(handles):
            run(self._model, batch)
        self._room += sum(_size(calls) for one, calls in found.items() if one != path)
        for one, calls in found.items():
            if _size(calls) <= self._room:
                self._room -= _size(calls)
                self._kept[one, index] = calls
        return found[path]

    def _watch(self, path: str, found: dict[str, _Calls], *, is_wanted: bool) -> Any:
        """A hook that notes the inputs of a part; it gives up on one there is no room for."""
        module, names = self._model.get_submodule(path), self._parts[path].arguments.tensors
        signature = inspect.signature(module.forward)

        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in found:
                return
            bound = bind(signature, args, kwargs)
            tensors = tuple(bound[name] for name in names)
            if not all(tensor.numel() for tensor in tensors):
                return
            if not is_wanted:
                self._room -= _size([tensors])
                if self._room < 0:
                    self._room += _size([tensors, *found.pop(path)])
                    return
            # Copies: a later operator may write into what was passed.
            found[path].append(tuple(tensor.clone() for tensor in tensors))

        return module.register_forward_pre_hook(note, with_kwargs=True)


class PartData:
    """The inputs of one part, call by call; can be read repeatedly.

    Args:
        inputs: Those of all parts.
        path: Of the part.
    """

    def __init__(self, inputs: PartInputs, path: str) -> None:
        self._inputs, self._path = inputs, path

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """The tensors of one call after the other.

        Raises:
            CalibrationError: No batch leads to a call.
        """
        found = False
        for index, batch in self._inputs.batches():
            for tensors in self._inputs.calls(self._path, index, batch):
                found = True
                yield tensors
        if not found:
            raise CalibrationError(
                "no batch of the calibration data leads to a call of this part",
                hint="calibrate on inputs like those of the example, which did",
            )


def _size(calls: _Calls) -> int:
    return sum(tensor.numel() * tensor.element_size() for call in calls for tensor in call)
