"""Images with a class for every pixel, in the folders of PASCAL VOC.

``JPEGImages/NAME.jpg``, ``SegmentationClass/NAME.png`` (a palette or grey image whose values are
the classes, 255 where nobody says) and ``ImageSets/Segmentation/{train,val}.txt`` with the names.

Papers:
    Everingham et al., "The PASCAL visual object classes (VOC) challenge", IJCV 88, 2010.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fxq.errors import DataError
from fxq.zoo_entry import Normalization

from .datasets import drawn, normalized
from .image_source import Pixels, planes, read_image

UNLABELLED = 255
"""The class of pixels that do not count: borders of objects, and what is hard to tell."""

_IMAGES, _MASKS, _LISTS = "JPEGImages", "SegmentationClass", Path("ImageSets", "Segmentation")


class SegmentationData:
    """Images with their masks, both scaled to the network's square input when they are read.

    Args:
        name: What it is called, for people.
        files: Image and mask of each.
        normalization: What turns pixels into network input.
        size: Side of the network's square input.
    """

    task = "segmentation"
    unit = "images"

    def __init__(
        self, name: str, files: list[tuple[Path, Path]], normalization: Normalization, size: int
    ) -> None:
        self.name = name
        self.normalization = normalization
        self._files, self._size = files, size

    def __len__(self) -> int:
        """Number of images."""
        return len(self._files)

    def batches(
        self,
        batch_size: int,
        limit: int | None = None,
        start: int = 0,
        seed: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images ``[N, C, H, W]`` float32 and masks ``[N, H, W]`` int64, as `ImageData` gives them.

        The whole image is scaled to the square, so that its sides may change their ratio; of the
        mask the nearest pixel is taken.

        Args:
            batch_size: Images per batch; the last batch may be smaller.
            limit: At most so many images in all.
            start: Position of the first image.
            seed: Draw without replacement in the order this seed gives; None takes them in order.

        Raises:
            DataError: If a size is not positive, the start lies beyond the end, or an image or a
                mask is missing, damaged, or not of the size of the other.
        """
        chosen = drawn(self.name, len(self), batch_size, limit, start, seed)
        for begin in range(0, len(chosen), batch_size):
            pairs = [self._pair(index) for index in chosen[begin : begin + batch_size].tolist()]
            images, masks = zip(*pairs, strict=True)
            inputs = normalized(np.stack(images), self.normalization)
            yield inputs, torch.from_numpy(np.stack(masks))

    def _pair(self, index: int) -> tuple[Pixels, npt.NDArray[np.int64]]:
        place, mask_place = self._files[index]
        mode = "L" if self.normalization.channels == 1 else "RGB"
        image = read_image(place, mode, str(place))
        mask = read_image(mask_place, None, str(mask_place))
        if mask.mode not in ("P", "L"):
            raise DataError(
                f"the mask is an image of mode {mask.mode}, whose values are no classes",
                where=str(mask_place),
                hint="save it as a palette or grey image with one class per pixel",
            )
        if mask.size != image.size:
            raise DataError(
                f"the mask has {_times(mask)} pixels, the image {_times(image)}",
                where=str(mask_place),
            )
        square = (self._size, self._size)
        classes = np.array(mask.resize(square, Image.Resampling.NEAREST), dtype=np.int64)
        return planes(image.resize(square, Image.Resampling.BILINEAR)), classes


def voc_roots(place: Path) -> list[Path]:
    """The folders that hold images or masks as VOC does: this one, or some below it, by year."""
    inside = [*sorted(place.glob("VOC2*")), *sorted(place.glob("VOCdevkit/VOC2*"))]
    return [
        root for root in (place, *inside) if (root / _MASKS).is_dir() or (root / _IMAGES).is_dir()
    ]


def open_voc(
    path: str | os.PathLike[str],
    *,
    normalization: Normalization,
    size: int,
    split: str = "test",
) -> SegmentationData:
    """The images with masks in a VOC folder, or one that holds it as ``VOCdevkit/VOC2012``.

    Args:
        path: The folder.
        normalization: What turns pixels into network input; its length is the channel count.
        size: Side of the network's square input.
        split: ``"train"`` reads ``train.txt``, ``"test"`` reads ``val.txt``; where only one of the
            two is there, it is read.

    Raises:
        DataError: If there is no such folder, several years, no list of names, or an empty one.
    """
    place = Path(path)
    roots = voc_roots(place)
    if len(roots) != 1:
        years = ", ".join(root.name for root in roots)
        what = f"the folder holds several: {years}" if roots else f"it has no {_MASKS}"
        raise DataError(what, where=str(place), hint=f"name the folder that holds {_MASKS}")
    root = roots[0]
    for name in (_IMAGES, _MASKS):
        if not (root / name).is_dir():
            raise DataError(
                f"there is no {name} beside {_IMAGES if name == _MASKS else _MASKS}",
                where=str(root),
                hint=f"segmentation needs {_IMAGES}, {_MASKS} and {_LISTS}",
            )
    file = _list_file(root, split)
    files = [
        (root / _IMAGES / f"{name}.jpg", root / _MASKS / f"{name}.png") for name in _names(file)
    ]
    return SegmentationData(f"{root.name} {file.stem}", files, normalization, size)


def _list_file(root: Path, split: str) -> Path:
    names = ("train", "val") if split == "train" else ("val", "train")
    for name in names:
        file = root / _LISTS / f"{name}.txt"
        if file.is_file():
            return file
    raise DataError(
        "there is neither train.txt nor val.txt", where=str(root / _LISTS), hint="unpack VOC anew"
    )


def _names(file: Path) -> list[str]:
    try:
        names = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list cannot be read: {error}", where=str(file)) from error
    if not names:
        raise DataError("the list names no images", where=str(file))
    if strange := next((name for name in names if Path(name).name != name), None):
        raise DataError(f"{strange!r} is not the name of an image", where=str(file))
    return names


def _times(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
