"""Data that needs no file of the user's: inside the package, or generated."""

from __future__ import annotations

from fxq.errors import UnknownNameError

from .datasets import ImageData
from .digits import IMAGES_FILE, digits_images, embedded_file
from .sequences import SequenceData, sequence_data


def builtin_data(name: str, split: str) -> ImageData | SequenceData:
    """The data that networks of the zoo bring along.

    Args:
        name: ``"digits"``: 1347 images to train and calibrate on, 450 others to test on;
            ``"rewriting"``: 16384 pairs of sequences to train on, 2048 others to test on.
        split: ``"train"`` or ``"test"``.

    Raises:
        UnknownNameError: If there is no such data or split.
    """
    if name == "digits":
        return digits_images(embedded_file(IMAGES_FILE), split)
    if name == "rewriting":
        return sequence_data(split)
    raise UnknownNameError("built-in data source", name, ["digits", "rewriting"])
