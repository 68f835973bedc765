"""torch.compile in `fit`: one graph, compiled once."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import TensorDataset

import fxq
from fxq.training import TrainingOptions, Watch, fit
from fxq.training.loop import FIRST_STEP

COMPILE = torch.compile

pytestmark = pytest.mark.filterwarnings(  # what torch tells itself of autograd functions
    "ignore:.*should not be instantiated:DeprecationWarning"
)


class Residual(nn.Module):
    """A first layer, two in the middle that share their input and a sum, and a last one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.one = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.two = nn.Conv2d(4, 4, 1, bias=False)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norms[0](self.first(x)))
        x = torch.relu(self.norms[1](self.one(x)) + self.norms[2](self.two(x)))
        return self.fc(x.mean((2, 3)))


def test_a_training_module_is_one_graph_compiled_once(
    stripes: TensorDataset, options: TrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through epochs, evaluation on integers in between, and changing learning rates."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(
        torch, "compile", lambda module: COMPILE(module, backend=counter, fullgraph=True)
    )
    monkeypatch.setattr("fxq.training.loop.compiler_trouble", lambda device: "")
    images, labels = stripes.tensors
    module = fxq.compile(Residual(), images[:1], "apot-4bit", calibration=[images]).module
    eager = fit(copy.deepcopy(module), stripes, options)
    told: list[str] = []
    training = fit(
        module,
        stripes,
        replace(options, compile=True),
        evaluate=lambda own: float((own(images).argmax(1) == labels).float().mean()),
        watch=Watch(tell=told.append),
    )
    assert (counter.frame_count, told) == (1, [FIRST_STEP])
    assert all(row["test_accuracy"] is not None for row in training.rows)
    assert training.losses == pytest.approx(eager.losses, rel=1e-4)
