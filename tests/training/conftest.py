from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fxq.training import TrainingOptions


class Clip(nn.Module):
    """A learned clip, as quantizers have."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(alpha))

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(x, self.alpha)


class Net(nn.Module):
    """Batch norm, dropout and a clip: everything a checkpoint must carry."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.clip = Clip(2.0)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(4 * 64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.clip(torch.relu(self.norm(self.conv(x))))
        return self.fc(self.drop(x.flatten(1)))


@pytest.fixture(autouse=True)
def quick(one_thread: None) -> None:
    """Every test here runs on one thread."""


@pytest.fixture
def net() -> Callable[..., Net]:
    """Makes the same network each time."""

    def make(**options: Any) -> Net:
        torch.manual_seed(5)
        return Net(**options)

    return make


@pytest.fixture
def stripes() -> TensorDataset:
    """90 images with noise and one bright row, whose third of the image is the class."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(90) % 3
    images = 0.3 * torch.randn(90, 1, 8, 8, generator=generator)
    images[torch.arange(90), 0, labels * 3] += 1.5
    return TensorDataset(images, labels)


@pytest.fixture
def options() -> TrainingOptions:
    """Three epochs of five steps; 90 = 5 * 16 + 10."""
    return TrainingOptions(epochs=3, batch_size=16, lr=0.05, warmup=0.4)
