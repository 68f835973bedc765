"""What a command works on: the network, its weights, and the data to calibrate and measure with."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import CalibrationError, DataError, FxqError
from fxq.zoo_entry import Normalization

if TYPE_CHECKING:
    from fxq.model_file import NamedModel

RANDOM = "random"
DEFAULT_IMAGES = 512
DETECTOR_BATCH = 4
"""Images that a detector is given at a time at most: it scales each to about a megapixel."""

TASKS = ("classification", "segmentation", "detection")


def zoo() -> Any:
    """The zoo wing, which holds the datasets; reached by name, as the registry does."""
    return importlib.import_module("fxq.models_zoo")


@dataclass(frozen=True)
class Subject:
    """A network with its weights, and how images become its input.

    Attributes:
        model: The network.
        weights: Where its weights come from, for people.
        normalization: From ``--mean`` and ``--std``, else from the zoo; None where neither says.
    """

    model: NamedModel
    weights: str
    normalization: Normalization | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its first input; empty where that is no tensor."""
        return tuple(getattr(self.model.example_inputs[0], "shape", ()))

    @property
    def takes_list(self) -> bool:
        """Whether its input is a list of images, as of detectors."""
        return isinstance(self.model.example_inputs[0], list)

    @property
    def builtin(self) -> str:
        """Name of the data inside the package that it goes with, or nothing."""
        return self.model.entry.data if self.model.entry is not None else ""


def load_subject(
    spec: str,
    *,
    weights: Path | None = None,
    input_shape: tuple[int, ...] | None = None,
    normalization: Normalization | None = None,
    seed: int = 0,
) -> Subject:
    """The network of that name, with these weights."""
    from fxq.model_file import load_model

    model = load_model(spec, input_shape=input_shape, seed=seed)
    entry = model.entry
    if weights is not None:
        zoo().load_weights(model.module, weights)
        source = str(weights)
    elif entry is not None:
        source = entry.weights
    else:
        source = "as the model file makes them"
    known = normalization or (entry.normalization if entry is not None else None)
    return Subject(model, source, known)


@dataclass(frozen=True)
class Batches:
    """Batches to calibrate on, and where they come from.

    Attributes:
        source: For people.
        name: What the user gave, or would have to give to get the same.
        data: The batches; can be read repeatedly, unless the user's own cannot.
    """

    source: str
    name: str
    data: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


class _Images:
    """A seeded draw of images, batch by batch."""

    def __init__(self, data: Any, batch_size: int, limit: int, seed: int) -> None:
        self._data, self._batch_size, self._seed = data, batch_size, seed
        self._limit = min(limit, len(data))

    def __len__(self) -> int:
        return -(-self._limit // self._batch_size)

    def __iter__(self) -> Iterator[Any]:
        return ((images,) for images, _ in self.labelled())

    def labelled(self) -> Iterator[tuple[Any, Any]]:
        """The same images with their labels, batch by batch."""
        batches: Iterator[tuple[Any, Any]] = self._data.batches(
            self._batch_size, limit=self._limit, seed=self._seed
        )
        return batches


class _Drawn:
    """A seeded draw of inputs from the model file's own training data, batch by batch."""

    def __init__(self, data: Any, batch_size: int, limit: int, seed: int) -> None:
        self._data, self._batch_size, self._seed = data, batch_size, seed
        self._limit = min(limit, len(data))

    def __len__(self) -> int:
        return -(-self._limit // self._batch_size)

    def __iter__(self) -> Iterator[Any]:
        from fxq.training.data import epoch_order, fetch

        order = epoch_order(len(self._data), self._seed, 0)[: self._limit].tolist()
        for start in range(0, self._limit, self._batch_size):
            inputs, _ = fetch(self._data, order[start : start + self._batch_size])
            yield tuple(inputs)


class _Noise:
    """Inputs drawn from N(0, 1) in the shape of the example; lists of images evenly from 0 to 1."""

    def __init__(self, example: Any, batch_size: int, limit: int, seed: int) -> None:
        self._example, self._batch_size, self._limit, self._seed = example, batch_size, limit, seed

    def __len__(self) -> int:
        return -(-self._limit // self._batch_size)

    def __iter__(self) -> Iterator[Any]:
        import torch

        generator = torch.Generator().manual_seed(self._seed)
        for start in range(0, self._limit, self._batch_size):
            count = min(self._batch_size, self._limit - start)
            if isinstance(self._example, list):
                shape = self._example[0].shape
                yield ([torch.rand(shape, generator=generator) for _ in range(count)],)
            else:
                yield (torch.randn(count, *self._example.shape[1:], generator=generator),)


def calibration_of(
    subject: Subject,
    data: str | None,
    *,
    images: int | None,
    batch_size: int,
    seed: int,
    default: int = DEFAULT_IMAGES,
) -> Batches:
    """The batches a network is calibrated on: ``data``, else what its file or zoo entry brings.

    Args:
        subject: The network.
        data: A path, ``random``, or None.
        images: How many images to draw; None draws the default, and takes all of the model file's
            own.
        default: How many images to draw where nobody says.
        batch_size: Images per batch.
        seed: Draws the images.

    Raises:
        CalibrationError: There is no data.
        DataError: It cannot be read as images of the network's shape.
    """
    limit = images or default
    batch_size = min(batch_size, DETECTOR_BATCH) if subject.takes_list else batch_size
    if data == RANDOM:
        noise = _Noise(_random_example(subject), batch_size, limit, seed)
        return Batches(f"{limit} random inputs", RANDOM, noise)
    if data is None and subject.model.calibration_data is not None:
        own = subject.model.calibration_data
        if images is not None:
            own = _Some(own, images)
        return Batches("calibration_data of the model file", "", own)
    own_data = own_train_data(subject) if data is None else None
    if own_data is not None:
        drawn = _Drawn(own_data, batch_size, limit, seed)
        return Batches(described(min(limit, len(own_data)), own_data), "", drawn)
    opened = open_data(subject, data, "train", TASKS)
    if opened is None:
        raise CalibrationError(
            "there is no calibration data",
            where=subject.model.spec,
            hint="pass --calibration DATA, or define calibration_data in the model file; "
            "--calibration random is for trying speed and structure only",
        )
    source = described(min(limit, len(opened)), opened)
    return Batches(source, data or subject.builtin, _Images(opened, batch_size, limit, seed))


def _random_example(subject: Subject) -> Any:
    """What random inputs look like.

    Raises:
        CalibrationError: The network takes something else than a tensor or a list of images.
    """
    inputs = subject.model.example_inputs
    if len(inputs) != 1 or not (subject.takes_list or len(subject.shape) >= 2):
        raise CalibrationError(
            "random calibration needs a network with one tensor as its input, or a list of images",
            where=subject.model.spec,
            hint="define calibration_data in the model file",
        )
    return inputs[0]


def own_train_data(subject: Subject) -> Any:
    """The data set that the model file defines to train on; None where it does not.

    Raises:
        DataError: It has no length or no positions, or holds nothing.
    """
    own = subject.model.train_data
    data = own() if callable(own) else own
    if data is None:
        return None
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or not len(data):
        raise DataError(
            f"train_data is a {type(data).__name__} that is empty or has no positions",
            where=subject.model.spec,
            hint="define a map-style data set of (input, label), such as TensorDataset",
        )
    return data


def described(count: int, images: Any) -> str:
    """How many of the images, or other samples, at a place are used, for people."""
    all_or_some = f"{count}" if count == len(images) else f"{count} of {len(images)}"
    unit = getattr(images, "unit", "images")
    return f"{all_or_some} {unit} of {getattr(images, 'name', 'the model file')}"


class _Some:
    """The first batches of a source, until so many inputs have been read."""

    def __init__(self, data: Iterable[Any], limit: int) -> None:
        self._data, self._limit = data, limit

    def __iter__(self) -> Iterator[Any]:
        done = 0
        for batch in self._data:
            if done >= self._limit:
                return
            yield batch
            first = batch[0] if isinstance(batch, (tuple, list)) else batch
            done += len(first) if isinstance(first, Sized) else 1


def open_data(
    subject: Subject, data: str | None, split: str, tasks: Sequence[str] = TASKS[:1]
) -> Any:
    """The images at a path, else those inside the package; None where there are neither.

    Args:
        subject: The network.
        data: A path, whose layout decides between labels, masks and boxes; or None.
        split: ``"train"`` or ``"test"``.
        tasks: What the images may be for.

    Raises:
        DataError: They cannot be read as images of the network's shape, or are for another task.
    """
    if data is None:
        return zoo().builtin_data(subject.builtin, split) if subject.builtin else None
    task = zoo().task_of(data)
    if task not in tasks:
        raise DataError(
            f"these are images for {task}, where {' or '.join(tasks)} is needed", where=data
        )
    if task == "detection":
        return _boxes(subject, data, split)
    normalization = _normalization(subject, data)
    read = zoo().open_voc if task == "segmentation" else zoo().open_images
    return read(data, normalization=normalization, size=subject.shape[-1], split=split)


def _boxes(subject: Subject, data: str, split: str) -> Any:
    if subject.shape:
        raise DataError(
            f"images with boxes need a network that takes a list of images, not "
            f"{list(subject.shape)}",
            where=data,
            hint="detectors of `fxq models torchvision` do; in a model file, define "
            "example_inputs = ([image],)",
        )
    return zoo().open_coco(data, split=split)


def _normalization(subject: Subject, data: str) -> Normalization:
    """How pixels become the network's input of square images.

    Raises:
        FxqError: It takes something else, or nobody says.
    """
    shape = subject.shape
    if len(shape) != 4 or shape[2] != shape[3]:
        raise DataError(
            f"images need a network that takes [N, C, H, H], not {list(shape)}",
            where=data,
            hint="define calibration_data and eval_data in the model file; detectors read folders "
            "as COCO's",
        )
    if subject.normalization is None:
        raise FxqError(
            "how pixels become the network's input is unknown",
            where=subject.model.spec,
            hint="pass --mean and --std, for example --mean 0.485,0.456,0.406 "
            "--std 0.229,0.224,0.225",
        )
    if subject.normalization.channels != shape[1]:
        raise FxqError(
            f"--mean and --std have {subject.normalization.channels} channels, the network takes "
            f"{shape[1]}",
            where=subject.model.spec,
        )
    return subject.normalization


def renormalized(subject: Subject, normalization: Normalization | None) -> Subject:
    """The subject with another normalization, where one is given."""
    return replace(subject, normalization=normalization) if normalization else subject


def load_plugins(files: list[Path] | None) -> None:
    """The passes, backends and networks of these files are known by name."""
    from fxq.registry import load_plugin

    for file in files or []:
        load_plugin(file)


def set_threads(count: int | None) -> None:
    """Torch computes on so many threads; None leaves its own choice."""
    if count is not None:
        import torch

        torch.set_num_threads(count)
