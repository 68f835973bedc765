"""CIFAR-10 as its authors publish it: binary batches, or pickles of NumPy arrays.

The pickles go through an unpickler that can rebuild NumPy arrays and nothing else.

Papers:
    Krizhevsky, "Learning multiple layers of features from tiny images", 2009, chapter 3.
"""

from __future__ import annotations

import _codecs
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from fxq.errors import DataError

from .image_source import (
    ArraySource,
    ImageSource,
    Labels,
    Pixels,
    Shape,
    check_shape,
    checked_labels,
)

_SHAPE: Shape = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_RECORD = 1 + _PIXELS  # label byte, then red, green and blue planes
_FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
_BATCHES = {"test": ("test_batch",), "train": tuple(f"data_batch_{i}" for i in range(1, 6))}


def cifar_batch_files(folder: Path, split: str) -> list[Path]:
    """The batch files of a split, if this is a CIFAR-10 folder or holds one; else none.

    Raises:
        DataError: If the folder has only some of the files.
    """
    for place in (folder, *(folder / name for name in _FOLDERS)):
        for suffix in (".bin", ""):
            if (place / f"test_batch{suffix}").is_file():
                return _split_files(place, suffix, split)
    return []


def is_cifar_batch(path: Path) -> bool:
    """Whether the file is named like a CIFAR-10 batch."""
    known = {name for names in _BATCHES.values() for name in names}
    return path.stem in known and path.suffix in ("", ".bin")


def open_cifar_batches(files: Sequence[Path], shape: Shape, place: Path) -> ImageSource:
    """The images of some batch files in order.

    Args:
        files: Batch files, binary (``.bin``) or pickled.
        shape: ``(C, H, W)`` the network takes.
        place: What messages call the whole.

    Raises:
        DataError: If a file is damaged, or the network takes another shape.
    """
    check_shape(_SHAPE, shape, str(place))
    parts = [_read_binary(file) if file.suffix == ".bin" else _read_pickle(file) for file in files]
    images = np.concatenate([part[0] for part in parts]) if len(parts) > 1 else parts[0][0]
    return ArraySource(place.name, images, np.concatenate([part[1] for part in parts]))


def _split_files(folder: Path, suffix: str, split: str) -> list[Path]:
    files = [folder / f"{name}{suffix}" for name in _BATCHES[split]]
    for file in files:
        if not file.is_file():
            raise DataError("a batch file is missing", where=str(file), hint="unpack CIFAR-10 anew")
    return files


def _read_binary(file: Path) -> tuple[Pixels, Labels]:
    length = file.stat().st_size
    if not length or length % _RECORD:
        raise DataError(
            f"the file has {length} bytes, which is no multiple of {_RECORD}",
            where=str(file),
            hint="it is cut short, or no CIFAR-10 batch",
        )
    records = np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, _RECORD)
    labels = _checked_classes(np.array(records[:, 0]), len(records), file)
    return records[:, 1:].reshape(-1, *_SHAPE), labels


def _read_pickle(file: Path) -> tuple[Pixels, Labels]:
    try:
        with file.open("rb") as stream:
            batch = ArrayUnpickler(stream).load()
    except DataError as error:
        raise DataError(error.what, where=str(file), hint=error.hint) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"the pickle is damaged: {error}", where=str(file)) from error
    images = batch.get(b"data") if isinstance(batch, dict) else None
    labels = batch.get(b"labels") if isinstance(batch, dict) else None
    if not isinstance(images, np.ndarray) or not isinstance(labels, list):
        raise DataError("the pickle has no data array or no label list", where=str(file))
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != _PIXELS:
        raise DataError(
            f"data must be uint8 [N, {_PIXELS}], not {images.dtype} {list(images.shape)}",
            where=str(file),
        )
    return images.reshape(-1, *_SHAPE), _checked_classes(_as_array(labels), len(images), file)


def _as_array(labels: list[object]) -> npt.NDArray[np.generic]:
    if not all(isinstance(label, int) for label in labels):
        return np.array([str(label) for label in labels])  # refused below, as no integers
    return np.array(labels, dtype=np.int64)


def _checked_classes(labels: npt.NDArray[np.generic], count: int, file: Path) -> Labels:
    checked = checked_labels(labels, count, str(file))
    if checked.max() > 9:
        raise DataError(f"label {checked.max()} is none of CIFAR-10's", where=str(file))
    return checked


_reconstruct: Callable[..., object] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]

_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _codecs.encode,
}


class ArrayUnpickler(pickle.Unpickler):
    """Rebuilds NumPy arrays, lists, dicts, numbers and strings; refuses every other name.

    Raises:
        DataError: From ``load``, if the pickle asks for anything else.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoding="bytes")

    def find_class(self, module_name: str, global_name: str) -> object:
        """The allowed object of this name."""
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise DataError(
                f"the pickle asks for {module_name}.{global_name}, which CIFAR-10 does not need",
                hint="do not use this file: opening it normally could run code",
            ) from None
