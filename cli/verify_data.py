"""What ``fxq verify`` compares on: what a run was measured on, other data, or random inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fxq.errors import ArtifactError, DataError

from .load import RANDOM, open_data

if TYPE_CHECKING:
    from fxq.artifact import Artifact
    from fxq.integer.program import Example, IntegerProgram
    from fxq.zoo_entry import Normalization

SEED = 0


@dataclass(frozen=True)
class Inputs:
    """Batches of inputs.

    Attributes:
        source: What they are images of, for people.
        batches: Tuples of the program's inputs.
        limit: How many images to take of them.
        for_want: Whether they are random for want of data.
    """

    source: str
    batches: Iterable[Any]
    limit: int
    for_want: bool = False

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """The batches, up to the limit."""
        done = 0
        for batch in self.batches:
            if count := min(images_in(batch), self.limit - done):
                yield part(batch, 0, count)
            done += count
            if done >= self.limit:
                return


def images_in(inputs: tuple[Any, ...]) -> int:
    """The batch size: the first dimension of the first input."""
    return len(inputs[0]) if inputs and inputs[0].dim() else 1


def part(inputs: tuple[Any, ...], start: int, stop: int) -> tuple[Any, ...]:
    """Some images of a batch; what is not one per image stays whole."""
    count = images_in(inputs)
    if start == 0 and stop >= count:
        return inputs
    return tuple(
        value[start:stop] if value.dim() and len(value) == count else value for value in inputs
    )


def inputs_of(
    artifact: Artifact,
    data: str | None,
    *,
    limit: int,
    batch_size: int,
    normalization: Normalization | None,
) -> Inputs:
    """The inputs to compare on.

    Args:
        artifact: The run.
        data: A path, a model.py, ``random``, or None for what the run was measured on.
        limit: How many images.
        batch_size: Images per batch, where batches are cut here.
        normalization: How pixels become input, where the run does not say.

    Raises:
        ArtifactError: The metadata is damaged.
        DataError: The data cannot be read as inputs of the network.
    """
    from .evaluate import subject_of

    about = artifact.metadata.get("model", {})
    if not isinstance(about, dict):
        raise ArtifactError("its metadata is damaged", hint="compile again")
    if data == RANDOM:
        return _random(artifact.integers, limit, batch_size)
    subject, chosen = subject_of(about, data, normalization)
    model, wanted = subject.model, len(artifact.integers.inputs)
    for name in ("eval_data", "calibration_data"):
        own = getattr(model, name)
        if chosen is None and own is not None:
            return Inputs(f"{name} of the model file", _Batches(own, name, wanted), limit)
    images = open_data(subject, chosen, "test", ("classification", "segmentation"))
    if images is not None:
        count = min(limit, len(images))
        batches = ((batch,) for batch, _ in images.batches(batch_size, limit=count))
        return Inputs(images.name, batches, count)
    if data is not None:
        raise DataError(
            "the model file has neither eval_data nor calibration_data",
            where=data,
            hint=f"define one, or pass --data PATH or --data {RANDOM}",
        )
    return replace(_random(artifact.integers, limit, batch_size), for_want=True)


class _Batches:
    """The user's batches without their labels."""

    def __init__(self, data: Iterable[Any], name: str, wanted: int) -> None:
        self._data, self._name, self._wanted = data, name, wanted

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        import torch

        for batch in self._data:
            items = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            inputs = items[: self._wanted]
            if len(inputs) < self._wanted or not all(
                isinstance(value, torch.Tensor) for value in inputs
            ):
                raise DataError(
                    f"a batch of {self._name} is a {type(batch).__name__}",
                    hint=f"yield tensors: {self._wanted} inputs, and labels after them if you like",
                )
            yield inputs


def _random(program: IntegerProgram, limit: int, batch_size: int) -> Inputs:
    """Inputs of the example's shape.

    Raises:
        DataError: That is not known, or they are no floats, of which any value would do.
    """
    examples = program.examples
    usable = all(one.shape and one.dtype.startswith("float") for one in examples)
    if len(examples) != len(program.inputs) or not usable:
        raise DataError(
            "there is nothing to compare on, and random inputs would not suit this network",
            where=", ".join(f"{one.dtype}{list(one.shape)}" for one in examples) or None,
            hint="pass --data with a path, or with a model.py that has eval_data",
        )
    return Inputs("noise from N(0, 1)", _noise(examples, limit, batch_size), limit)


def _noise(examples: tuple[Example, ...], limit: int, batch_size: int) -> Iterator[tuple[Any, ...]]:
    import torch

    generator = torch.Generator().manual_seed(SEED)
    for start in range(0, limit, batch_size):
        count = min(batch_size, limit - start)
        yield tuple(
            torch.randn(count, *one.shape[1:], generator=generator, dtype=getattr(torch, one.dtype))
            for one in examples
        )
