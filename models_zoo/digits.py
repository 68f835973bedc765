"""Handwritten digits, 8x8 grey: a trained network and its images, both inside the package.

Papers:
    Alpaydin, Kaynak, "Optical recognition of handwritten digits", UCI machine learning
    repository, 1998, doi:10.24432/C50P49 (its test part, as scikit-learn carries it).
"""

from __future__ import annotations

import importlib.resources
import io

import numpy as np
import safetensors.torch
from torch import Tensor, nn

from fxq.errors import DataError, UnknownNameError

from .catalog import DIGITS
from .datasets import ImageData
from .image_source import ArraySource

WEIGHTS_FILE = "digits_convnet.safetensors"
IMAGES_FILE = "digits.npz"
_SPLITS = ("train", "test")


class DigitsConvNet(nn.Module):
    """Four 3x3 convolutions, one residual add. ``[N, 1, 8, 8]`` to ``[N, 10]`` logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(32)
        self.relu4 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.pool(self.relu2(self.bn2(self.conv2(x))))
        out = self.relu3(self.bn3(self.conv3(x)))
        out = self.bn4(self.conv4(out))
        x = self.relu4(out + x)
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def digits_convnet() -> DigitsConvNet:
    """The network with the weights that ``train_digits`` trained, in eval mode."""
    network = DigitsConvNet()
    network.load_state_dict(safetensors.torch.load(embedded_file(WEIGHTS_FILE)))
    return network.eval()


def digits_images(archive: bytes, split: str) -> ImageData:
    """The images of a split, normalised with the statistics of the training images.

    Args:
        archive: Content of ``digits.npz``.
        split: ``"train"`` or ``"test"``.

    Raises:
        UnknownNameError: If there is no such split.
    """
    if split not in _SPLITS:
        raise UnknownNameError("split", split, _SPLITS, where="digits")
    with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"].astype(np.int64)
    return ImageData(ArraySource(f"digits {split}", images, labels), DIGITS)


def embedded_file(name: str) -> bytes:
    """The content of a file in the package's ``weights`` folder.

    Raises:
        DataError: If the package was installed without it.
    """
    place = importlib.resources.files("fxq.models_zoo") / "weights" / name
    try:
        return place.read_bytes()
    except OSError as error:
        raise DataError(
            "a file of the package is missing", where=str(place), hint="install fxq again"
        ) from error
