"""What every kind of image storage offers, and the checks and pixel work they share."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from fxq.errors import DataError

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Shape = tuple[int, int, int]

_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP")  # none that starts another program
_SCALE = 256 / 224  # the shorter side is this much longer than the crop, as ImageNet is evaluated


class ImageSource(ABC):
    """Stored images of one shape with their labels.

    Attributes:
        name: Where they come from, for messages.
        shape: ``(C, H, W)`` of each image.
        labels: [N].
    """

    def __init__(self, name: str, shape: Shape, labels: Labels) -> None:
        self.name = name
        self.shape = shape
        self.labels = labels

    @abstractmethod
    def pixels(self, indices: npt.NDArray[np.int64]) -> Pixels:
        """``[len(indices), C, H, W]``, freshly allocated.

        Raises:
            DataError: If an image is damaged.
        """


class ArraySource(ImageSource):
    """Images that are in memory already, or mapped into it, ``[N, C, H, W]``."""

    def __init__(self, name: str, images: Pixels, labels: Labels) -> None:
        super().__init__(name, (images.shape[1], images.shape[2], images.shape[3]), labels)
        self._images = images

    def pixels(self, indices: npt.NDArray[np.int64]) -> Pixels:
        """The images at these positions."""
        return self._images[indices]


def checked_labels(labels: npt.NDArray[np.generic], count: int, where: str) -> Labels:
    """The labels as int64 ``[count]``.

    Raises:
        DataError: If they are no integers, negative, none at all, or not one per image.
    """
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"labels must be a list of integers, not {labels.dtype} {list(labels.shape)}",
            where=where,
        )
    if len(labels) != count:
        raise DataError(f"there are {count} images but {len(labels)} labels", where=where)
    if not count:
        raise DataError("there are no images", where=where)
    result = labels.astype(np.int64)
    if result.min() < 0:
        raise DataError(f"label {result.min()} of image {result.argmin()} is negative", where=where)
    return result


def check_shape(found: Shape, wanted: Shape, where: str) -> None:
    """Nothing happens when stored images have the shape the network takes.

    Raises:
        DataError: If they have another one.
    """
    if found != wanted:
        raise DataError(
            f"the images are {_times(found)}, the network takes {_times(wanted)}",
            where=where,
            hint="choose the data set the network was trained on",
        )


def decode(encoded: bytes | Path, shape: Shape, where: str) -> Pixels:
    """The image ``[C, H, W]``, scaled and centre-cropped unless it has the right size already.

    Args:
        encoded: A file in memory, or its path.
        shape: ``(C, size, size)``; C is 1 for grey and 3 for RGB.
        where: What a message calls the image.

    Raises:
        DataError: If Pillow cannot read it.
    """
    channels, _, size = shape
    return planes(_fitted(read_image(encoded, "L" if channels == 1 else "RGB", where), size))


def read_image(encoded: bytes | Path, mode: str | None, where: str) -> Image.Image:
    """The image as it is stored, all of it decoded.

    Args:
        encoded: A file in memory, or its path.
        mode: What Pillow calls its channels, ``"L"`` or ``"RGB"``; None leaves them.
        where: What a message calls the image.

    Raises:
        DataError: If there is no such file, or Pillow cannot read it.
    """
    stream = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    try:
        with Image.open(stream, formats=_FORMATS) as image:
            return image.copy() if mode is None else image.convert(mode)
    except FileNotFoundError as error:
        raise DataError("there is no such image", where=where) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the image cannot be decoded: {error}", where=where) from error


def planes(image: Image.Image) -> Pixels:
    """``[C, H, W]``: the pixels of a grey or an RGB image."""
    array = np.array(image, dtype=np.uint8).reshape(image.height, image.width, -1)
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def _fitted(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    if (width, height) == (size, size):
        return image
    short = round(size * _SCALE)
    scaled = (
        max(short, width * short // min(width, height)),
        max(short, height * short // min(width, height)),
    )
    image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _times(shape: Shape) -> str:
    return "x".join(str(side) for side in shape)
