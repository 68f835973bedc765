"""The plugin's own network."""

from __future__ import annotations

from torch import nn


def small() -> nn.Module:
    """A convolution and a linear. ``[N, 3, 8, 8]`` to ``[N, 4]``."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
