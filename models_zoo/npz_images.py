"""Images in NumPy archives: pixels (``x``, ``y``) or JPEG files (``jpeg``, ``offsets``, ``y``).

Archives are opened without pickle. Pixels are read from the archive when the first image is asked
for; opening reads the labels and the header of ``x`` only.
"""

from __future__ import annotations

import lzma
import tokenize
import zipfile
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fxq.errors import DataError

from .image_source import ImageSource, Labels, Pixels, Shape, check_shape, checked_labels, decode

_DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    SyntaxError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
)


def open_npz(path: Path, shape: Shape) -> ImageSource:
    """The images of an archive in one of the two layouts.

    Args:
        path: An ``.npz`` file.
        shape: ``(C, H, W)`` the network takes.

    Raises:
        DataError: If the archive is damaged, has other arrays, or has images of another shape.
    """
    names = _array_names(path)
    if {"x", "y"} <= names:
        return PixelArchive(path, shape)
    if {"jpeg", "offsets", "y"} <= names:
        return JpegArchive(path, shape)
    raise DataError(
        f"the archive has the arrays {', '.join(sorted(names)) or '(none)'}",
        where=str(path),
        hint="x and y, or jpeg, offsets and y, are needed",
    )


class PixelArchive(ImageSource):
    """``x`` uint8 ``[N, C, H, W]`` and ``y`` integer ``[N]``."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self._path = path
        stored, dtype = _header(path, "x")
        if len(stored) != 4 or dtype != np.uint8:
            raise DataError(
                f"x must be uint8 [N, C, H, W], not {dtype} {list(stored)}", where=str(path)
            )
        check_shape((stored[1], stored[2], stored[3]), shape, str(path))
        super().__init__(path.name, shape, checked_labels(_array(path, "y"), stored[0], str(path)))

    @cached_property
    def _images(self) -> Pixels:
        return _array(self._path, "x").astype(np.uint8, copy=False)

    def pixels(self, indices: npt.NDArray[np.int64]) -> Pixels:
        """The images at these positions."""
        return self._images[indices]


class JpegArchive(ImageSource):
    """``jpeg`` uint8, all files in a row; ``offsets`` ``[N + 1]``; ``y`` integer ``[N]``."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self._path = path
        self._offsets = _checked_offsets(path)
        labels = checked_labels(_array(path, "y"), len(self._offsets) - 1, str(path))
        super().__init__(path.name, shape, labels)

    @cached_property
    def _files(self) -> Pixels:
        return _array(self._path, "jpeg").astype(np.uint8, copy=False)

    def pixels(self, indices: npt.NDArray[np.int64]) -> Pixels:
        """The decoded images at these positions."""
        return np.stack([self._decoded(int(index)) for index in indices])

    def _decoded(self, index: int) -> Pixels:
        encoded = self._files[self._offsets[index] : self._offsets[index + 1]].tobytes()
        return decode(encoded, self.shape, f"{self._path}, image {index}")


def _checked_offsets(path: Path) -> Labels:
    stored, dtype = _header(path, "jpeg")
    if len(stored) != 1 or dtype != np.uint8:
        raise DataError(f"jpeg must be uint8 [bytes], not {dtype} {list(stored)}", where=str(path))
    offsets = _array(path, "offsets")
    if offsets.ndim != 1 or not np.issubdtype(offsets.dtype, np.integer) or len(offsets) < 2:
        raise DataError("offsets must be a list of N + 1 integers", where=str(path))
    result = offsets.astype(np.int64)
    if result[0] != 0 or result[-1] != stored[0] or (np.diff(result) <= 0).any():
        raise DataError(
            f"offsets must rise from 0 to the {stored[0]} bytes of jpeg", where=str(path)
        )
    return result


def _array_names(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _header(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(member)
            return shape, dtype
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _array(path: Path, name: str) -> npt.NDArray[np.generic]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: npt.NDArray[np.generic] = archive[name]
            return array
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"the archive is damaged, or no NumPy archive: {error}",
        where=str(path),
        hint="download or write it again",
    )
