"""Labelled images as network input: opened by path, read on demand, without running any code.

``open_images`` recognises four layouts: the two ``.npz`` layouts, the CIFAR-10 folders as their
authors publish them, and a folder of class folders in the manner of ImageNet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxq.errors import DataError
from fxq.zoo_entry import Normalization

from .cifar_folder import cifar_batch_files, is_cifar_batch, open_cifar_batches
from .class_folder import open_class_folder, split_folder
from .image_source import ImageSource, Pixels
from .npz_images import open_npz


class ImageData:
    """A sequence of ``(image, label)``: image ``[C, H, W]`` float32 normalised, label an int.

    It works as a map-style dataset of ``torch.utils.data.DataLoader``.

    Args:
        source: Where the pixels and labels come from.
        normalization: What turns pixels into network input.
    """

    def __init__(self, source: ImageSource, normalization: Normalization) -> None:
        self._source = source
        self.normalization = normalization

    @property
    def name(self) -> str:
        """The file or folder the images come from."""
        return self._source.name

    @property
    def labels(self) -> Tensor:
        """[N] int64."""
        return torch.from_numpy(self._source.labels.copy())

    def __len__(self) -> int:
        """Number of images."""
        return len(self._source.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image and label at a position; negative positions count from the end.

        Raises:
            IndexError: If there is no such position.
            DataError: If the image is damaged.
        """
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self._images(np.array([position]))[0], int(self._source.labels[position])

    def __getitems__(self, positions: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The images and labels at these positions; torch's data loaders ask for a batch so.

        Raises:
            DataError: If an image is damaged.
        """
        chosen = np.asarray(positions, dtype=np.int64)
        return list(zip(self._images(chosen), self._source.labels[chosen].tolist(), strict=True))

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        """All images in order."""
        return (self[index] for index in range(len(self)))

    def batches(
        self,
        batch_size: int,
        limit: int | None = None,
        start: int = 0,
        seed: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images ``[N, C, H, W]`` float32 and labels ``[N]`` int64, batch by batch.

        Args:
            batch_size: Images per batch; the last batch may be smaller.
            limit: At most so many images in all.
            start: Position of the first image.
            seed: Draw without replacement from all images in the order this seed gives; None takes
                them in stored order. The same seed gives the same images everywhere.

        Raises:
            DataError: If a size is not positive, the start lies beyond the end, or an image is
                damaged.
        """
        chosen = drawn(self.name, len(self), batch_size, limit, start, seed)
        for begin in range(0, len(chosen), batch_size):
            indices = chosen[begin : begin + batch_size]
            yield self._images(indices), torch.from_numpy(self._source.labels[indices])

    def describe(self) -> str:
        """One line: where from, how many, which shape, how many classes."""
        channels, height, width = self._source.shape
        classes = len(np.unique(self._source.labels))
        return f"{self.name}: {len(self)} images {channels}x{height}x{width}, {classes} classes"

    def _images(self, indices: npt.NDArray[np.int64]) -> Tensor:
        return normalized(self._source.pixels(indices), self.normalization)


def normalized(pixels: Pixels, normalization: Normalization) -> Tensor:
    """Pixels ``[N, C, H, W]`` as float32 network input of the same shape."""
    mean = torch.tensor(normalization.mean).view(-1, 1, 1)
    std = torch.tensor(normalization.std).view(-1, 1, 1)
    return torch.from_numpy(pixels).to(torch.float32).div_(255).sub_(mean).div_(std)


def drawn(
    name: str, count: int, batch_size: int, limit: int | None, start: int, seed: int | None
) -> npt.NDArray[np.int64]:
    """The positions that are read of a data set, in their order.

    Args:
        name: The data set, for people.
        count: Samples in it.
        batch_size: Samples per batch.
        limit: At most so many.
        start: Place of the first within the order.
        seed: Decides the order; None for the stored one.

    Raises:
        DataError: If a size is not positive, or the start lies beyond the end.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise DataError("the batch size and the limit must be at least 1", where=name)
    if not 0 <= start < count:
        raise DataError(f"there is no image {start} of {count}", where=name)
    order = np.arange(count)
    if seed is not None:
        order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    return order[start:] if limit is None else order[start : start + limit]


def open_images(
    path: str | os.PathLike[str],
    *,
    normalization: Normalization,
    size: int,
    split: str = "test",
) -> ImageData:
    """The labelled images at a path.

    * ``.npz`` with ``x`` (uint8 ``[N, C, H, W]``) and ``y``;
    * ``.npz`` with ``jpeg`` (all files, one after the other), ``offsets`` (``[N + 1]``) and ``y``;
    * a CIFAR-10 folder, ``cifar-10-batches-bin`` or ``cifar-10-batches-py``, or one of its files;
    * a folder with one folder of images per class, whose sorted names are the labels 0, 1, …; or
      one that holds such folders as ``train`` and ``val`` or ``test``.

    Encoded images that are not ``size`` square are scaled until the shorter side is
    ``size * 256 / 224`` and cropped at the centre.

    Args:
        path: File or folder.
        normalization: What turns pixels into network input; its length is the channel count.
        size: Side of the network's square input.
        split: ``"train"`` or ``"test"``, where the path has both.

    Raises:
        DataError: If nothing is there, the layout is none of these, the content is damaged, or the
            images have another shape than the network's input.
    """
    place = Path(path)
    if split not in ("train", "test"):
        raise DataError(f"the split must be 'train' or 'test', not {split!r}", where=str(place))
    channels = normalization.channels
    if size < 1 or channels not in (1, 3):
        raise DataError(f"images have 1 or 3 channels and a positive size, not {channels}, {size}")
    return ImageData(_open_source(place, (channels, size, size), split), normalization)


def _open_source(place: Path, shape: tuple[int, int, int], split: str) -> ImageSource:
    if not place.exists():
        raise DataError("there is no such file or folder", where=str(place))
    if place.suffix == ".npz":
        return open_npz(place, shape)
    if place.is_dir():
        batches = cifar_batch_files(place, split)
        if batches:
            return open_cifar_batches(batches, shape, place)
        return open_class_folder(split_folder(place, split), shape)
    if is_cifar_batch(place):
        return open_cifar_batches([place], shape, place)
    raise DataError(
        "the file is none of the image layouts fxq reads",
        where=str(place),
        hint="give an .npz file, a CIFAR-10 folder, or a folder with one folder per class",
    )
