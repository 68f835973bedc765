"""A pooled value that a layer, and a later concatenation, read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.integer.reference import Reference

pytestmark = pytest.mark.usefixtures("one_thread")


class Tree(nn.Module):
    """As in deep layer aggregation: the root reads what was pooled two blocks before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.pool = nn.MaxPool2d(2)
        self.down = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.short = nn.Conv2d(8, 8, 1)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.root = nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        bottom = self.pool(x)
        y = torch.relu(self.down(x) + self.short(bottom))
        z = torch.relu(self.block(y) + y)
        return self.root(torch.cat([z, y, bottom], 1))


@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-4bit"])
def test_every_layer_runs_on_integers(recipe: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    result = fxq.compile(Tree(), x, recipe, calibration=[x])
    assert result.artifact.ledger.coverage() == 1
    assert torch.equal(result.module(x), Reference(result.artifact.integers)(x))
