"""Write the artifact of today's format that later versions have to read, and what it computes.

    python tests/artifacts/make.py

Run it once per format, and keep what earlier versions wrote.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import fxq
from fxq.integer.program import FORMAT


class Small(nn.Module):
    """A convolution, a depthwise one, an add, a pool, a linear and a float softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.last = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.deep(x) + x)
        return self.last(self.pool(x).flatten(1)).softmax(1)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 6, 6)
    artifact = fxq.compile(Small(), x[:1], "aciq-4bit", calibration=[x], check=False).artifact
    artifact.journal = None
    folder = Path(__file__).parent / f"format-{FORMAT}"
    artifact.save(folder, force=True)
    known = {"x": x, "y": artifact(x)}
    safetensors.torch.save_file(known, Path(__file__).parent / f"format-{FORMAT}.safetensors")


if __name__ == "__main__":
    main()
