"""A folder with one folder of image files per class, the way ImageNet is unpacked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from fxq.errors import DataError

from .image_source import ImageSource, Pixels, Shape, decode

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp"))


class ClassFolder(ImageSource):
    """Image files, decoded when asked for.

    Attributes:
        classes: Folder names; the label is the position.
    """

    def __init__(
        self, folder: Path, shape: Shape, classes: tuple[str, ...], files: list[tuple[Path, int]]
    ) -> None:
        labels = np.array([label for _, label in files], dtype=np.int64)
        super().__init__(folder.name, shape, labels)
        self.classes = classes
        self._files = [file for file, _ in files]

    def pixels(self, indices: npt.NDArray[np.int64]) -> Pixels:
        """The decoded images at these positions."""
        return np.stack(
            [decode(self._files[i], self.shape, str(self._files[i])) for i in indices.tolist()]
        )


def split_folder(folder: Path, split: str) -> Path:
    """The folder of a split, where train and test images lie side by side; else the folder itself.

    Args:
        folder: May hold ``train`` beside ``val`` or ``test``.
        split: ``"train"`` or ``"test"``; ``"test"`` prefers ``val``, which in ImageNet has labels.
    """
    held_out = [folder / name for name in ("val", "test") if (folder / name).is_dir()]
    if not held_out or not (folder / "train").is_dir():
        return folder
    return folder / "train" if split == "train" else held_out[0]


def open_class_folder(folder: Path, shape: Shape) -> ClassFolder:
    """All image files below a folder of class folders, ordered by class, then by path.

    Args:
        folder: Its subfolders in sorted order are the labels 0, 1, ….
        shape: ``(C, size, size)`` the network takes.

    Raises:
        DataError: If there is no subfolder, or one without images.
    """
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise DataError(
            "the folder has no class folders",
            where=str(folder),
            hint="put the images of each class in a folder of its own",
        )
    files: list[tuple[Path, int]] = []
    for label, place in enumerate(classes):
        images = sorted(p for p in place.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not images:
            raise DataError("the class folder has no images", where=str(place))
        files.extend((image, label) for image in images)
    return ClassFolder(folder, shape, tuple(place.name for place in classes), files)
