"""Images with boxes around their objects, in the folders of COCO.

``annotations/instances_val2017.json`` says which objects are where, and ``val2017/`` has the
images; likewise ``train2017``, or any other name.

Papers:
    Lin et al., "Microsoft COCO: common objects in context", arXiv:1405.0312.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxq.errors import DataError

from .datasets import drawn
from .image_source import planes, read_image

_FOLDER, _PREFIX = "annotations", "instances_"
_HINT = "download the annotations anew; they are described at cocodataset.org/#format-data"

_INCOMPLETE = (LookupError, TypeError, ValueError, OverflowError, AttributeError)
_LIMIT = 2**24  # whole numbers below are exact in float32

Objects = dict[str, Tensor]
"""``boxes`` ``[K, 4]`` float32, ``labels`` ``[K]`` and ``iscrowd`` ``[K]`` int64."""


@dataclass(frozen=True)
class Annotations:
    """The objects of all images, one image after the other.

    Attributes:
        starts: ``[N + 1]`` int64: where the objects of each image begin.
        boxes: ``[M, 4]`` float32, corners ``x1, y1, x2, y2`` in pixels of the stored image.
        labels: ``[M]`` int64, category ids as in the file.
        crowds: ``[M]`` int64, 1 where a box is around many objects.
    """

    starts: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    crowds: npt.NDArray[np.int64]

    def of(self, index: int) -> Objects:
        """The objects of one image."""
        part = slice(self.starts[index], self.starts[index + 1])
        return {
            "boxes": torch.from_numpy(self.boxes[part]),
            "labels": torch.from_numpy(self.labels[part]),
            "iscrowd": torch.from_numpy(self.crowds[part]),
        }


class DetectionData:
    """Images in their own sizes with the boxes of their objects, decoded when they are read.

    Args:
        name: What it is called, for people.
        files: The images.
        annotations: Their objects.
    """

    task = "detection"
    unit = "images"

    def __init__(self, name: str, files: list[Path], annotations: Annotations) -> None:
        self.name = name
        self._files, self._annotations = files, annotations

    def __len__(self) -> int:
        """Number of images."""
        return len(self._files)

    def batches(
        self,
        batch_size: int,
        limit: int | None = None,
        start: int = 0,
        seed: int | None = None,
    ) -> Iterator[tuple[list[Tensor], list[Objects]]]:
        """Images ``[3, H, W]`` float32 in 0..1 and their objects, batch by batch.

        Args:
            batch_size: Images per batch; the last batch may be smaller.
            limit: At most so many images in all.
            start: Position of the first image.
            seed: Draw without replacement in the order this seed gives; None takes them in order.

        Raises:
            DataError: If a size is not positive, the start lies beyond the end, or an image is
                missing or damaged.
        """
        chosen = drawn(self.name, len(self), batch_size, limit, start, seed)
        for begin in range(0, len(chosen), batch_size):
            positions = chosen[begin : begin + batch_size].tolist()
            images = [_image(self._files[position]) for position in positions]
            yield images, [self._annotations.of(position) for position in positions]


def is_coco(place: Path) -> bool:
    """Whether this is a COCO folder, or one of its annotation files."""
    return place.suffix == ".json" or any(place.glob(f"{_FOLDER}/*.json"))


def open_coco(path: str | os.PathLike[str], *, split: str = "test") -> DetectionData:
    """The images with boxes in a COCO folder.

    Args:
        path: The folder, or one of its files ``annotations/instances_NAME.json``.
        split: ``"train"`` reads ``instances_train*.json``, ``"test"`` ``instances_val*.json``;
            where only one of the two is there, it is read.

    Raises:
        DataError: If there is no such file, several for the split, no folder of images beside it,
            or something else in it than images and objects.
    """
    file = _annotation_file(Path(path), split)
    folder = file.parent.parent / file.stem.removeprefix(_PREFIX)
    if not folder.is_dir():
        raise DataError(
            "the folder of the images is missing", where=str(folder), hint=f"{file.name} needs it"
        )
    data = _read(file)
    images = _images(data, file)
    positions = {image: position for position, (image, _) in enumerate(images)}
    if len(positions) < len(images):
        raise DataError("two images have the same id", where=str(file), hint=_HINT)
    files = [folder / name for _, name in images]
    return DetectionData(folder.name, files, _annotations(data, positions, file))


def _annotation_file(place: Path, split: str) -> Path:
    if place.suffix == ".json":
        if not place.is_file():
            raise DataError("there is no such file", where=str(place))
        return place
    for name in ("train", "val") if split == "train" else ("val", "train"):
        found = sorted(place.glob(f"{_FOLDER}/{_PREFIX}{name}*.json"))
        if len(found) > 1:
            raise DataError(
                f"there are several: {', '.join(file.name for file in found)}",
                where=str(place / _FOLDER),
                hint="name one of these files instead of the folder",
            )
        if found:
            return found[0]
    raise DataError(
        f"there is no {_PREFIX}train*.json and no {_PREFIX}val*.json",
        where=str(place / _FOLDER),
        hint="name a folder as COCO's, or one file of annotations",
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open(encoding="utf-8") as stream:
            data = json.load(stream, object_hook=_without_outline)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"the annotations cannot be read: {error}", where=str(file), hint=_HINT
        ) from error
    if not isinstance(data, dict):
        raise DataError("the file holds no images and annotations", where=str(file), hint=_HINT)
    return data


def _without_outline(item: dict[str, Any]) -> dict[str, Any]:
    """An object without its outline, which is most of the file and would be most of the memory."""
    item.pop("segmentation", None)
    return item


def _items(data: dict[str, Any], key: str, file: Path) -> list[Any]:
    items = data.get(key)
    if not isinstance(items, list):
        raise DataError(f"the file has no list of {key}", where=str(file), hint=_HINT)
    return items


def _images(data: dict[str, Any], file: Path) -> list[tuple[int, str]]:
    """Id and file name of each image."""
    found = []
    for number, item in enumerate(_items(data, "images", file)):
        try:
            image, name = int(item["id"]), str(item["file_name"])
        except _INCOMPLETE as error:
            raise _incomplete("image", number, error, file) from error
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"image {name} lies outside of its folder", where=str(file))
        found.append((image, name))
    if not found:
        raise DataError("the file lists no images", where=str(file))
    return found


def _annotations(data: dict[str, Any], positions: dict[int, int], file: Path) -> Annotations:
    """The objects in the order of their images."""
    rows = []
    for number, item in enumerate(_items(data, "annotations", file)):
        try:
            left, top, width, height = map(float, item["bbox"])
            place, label = positions[int(item["image_id"])], int(item["category_id"])
            crowd = int(item.get("iscrowd", 0))
        except _INCOMPLETE as error:
            raise _incomplete("annotation", number, error, file) from error
        row = (place, label, crowd, left, top, left + width, top + height)
        if min(width, height) < 0 or not all(abs(value) < _LIMIT for value in row):  # NaN, too
            raise DataError(
                f"annotation {number} has the box {item['bbox']} of category {label}",
                where=str(file),
            )
        rows.append(row)
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    table = table[np.argsort(table[:, 0], kind="stable")]
    starts = np.searchsorted(table[:, 0], np.arange(len(positions) + 1)).astype(np.int64)
    return Annotations(
        starts,
        boxes=table[:, 3:].astype(np.float32),
        labels=table[:, 1].astype(np.int64),
        crowds=table[:, 2].astype(np.int64),
    )


def _incomplete(kind: str, number: int, error: Exception, file: Path) -> DataError:
    told = f"{type(error).__name__} {error}"
    return DataError(f"{kind} {number} is not whole: {told}", where=str(file), hint=_HINT)


def _image(file: Path) -> Tensor:
    pixels = planes(read_image(file, "RGB", str(file)))
    return torch.from_numpy(pixels).to(torch.float32).div_(255)
