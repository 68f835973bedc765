"""Networks that cannot be traced whole, each for another reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x))) + x


class Router(nn.Module):
    """Chooses by value which block runs, and how often; some blocks never do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())
        self.often = Block(8)
        self.never = Block(8)
        self.heads = nn.ModuleList([nn.Linear(8, 4) for _ in range(2)])

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.stem(x) * scale
        if x.mean() > 1000:
            x = self.never(x)
        for _ in range(2 + int(x.amax() > 1000)):
            x = self.often(x)
        pooled = x.mean((2, 3)) / self.often.channels
        return torch.stack([head(pooled) for head in self.heads], 1).flatten(1)


class Pyramid(nn.Module):
    """A head that several levels of a pyramid share, which it takes as a list."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
            self.score = nn.Conv2d(8, 2, 1)

        def forward(self, levels: list[Tensor]) -> list[Tensor]:
            return [self.score(self.tower(level)) for level in levels]

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = self.Head()

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        found = self.stem(torch.stack(images))
        return self.head([found, found[:, :, ::2, ::2], found[:, :, ::4, ::4]])


class Reader(nn.Module):
    """Reads the weight of a part instead of calling it, beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block(4)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if float(y.sum()) > 1e9:
            return y
        y = y * self.inner.conv.weight.abs().mean()
        return self.out(y.mean((2, 3)))


class Noisy(nn.Module):
    """One part draws random numbers; one is called with another flag each time."""

    class Dice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + torch.rand(())

    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, negate: bool = False) -> Tensor:
            y = self.linear(x)
            return -y if negate else y

    def __init__(self) -> None:
        super().__init__()
        self.dice, self.flagged = self.Dice(), self.Flagged()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.dice(self.flagged(x) + self.flagged(x, negate=True))


NETWORKS = {kind.__name__: kind for kind in (Router, Pyramid, Reader, Noisy)}

Make = Callable[[Any], nn.Module]


@pytest.fixture(scope="session")
def make() -> Make:
    """A network of a class, or of one of those above by name, always with the same weights."""

    def build(kind: str | type[nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        return (NETWORKS[kind] if isinstance(kind, str) else kind)().eval()

    return build
