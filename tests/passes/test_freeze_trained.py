"""freeze-trained: what was trained becomes the integers that lowering knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.errors import VerifyError
from fxq.models_zoo import tiny_residual
from fxq.passes import FreezeTrained, InsertObservers, JoinBatchNorm, MarkRelu, QuantizeApot
from fxq.passes.calibrate import Calibrate
from fxq.passes.insert_observers import Statistics
from fxq.quant.learned import Learned
from fxq.quant.quantizers import QuantizedLayer

BEFORE = (
    JoinBatchNorm(),
    MarkRelu(),
    InsertObservers(statistics=Statistics.HISTOGRAM),
    Calibrate(),
)


class Twice(nn.Module):
    """One convolution called twice, with its batch norm left apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(torch.relu(self.first(x))))
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Flagged(nn.Module):
    """A module of the user's, with an attribute that is called as our method is."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = True

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.fixture
def frozen(run_passes: Any, images: Tensor) -> Any:
    """Call it as ``frozen(model)``: what ran, with freeze-trained last."""

    def run(model: nn.Module, **options: Any) -> Any:
        options = {"weight_bits": 4, "activation_bits": 4, **options}
        passes = [*BEFORE, QuantizeApot(**options), FreezeTrained()]
        return run_passes(passes, model, images[:2], calibration=[images])

    return run


def test_nothing_is_left_to_train(frozen: Any, images: Tensor) -> None:
    ran = frozen(tiny_residual())
    modules = [ran.program.submodule(node) for node in ran.program.nodes()]
    assert not [module for module in modules if isinstance(module, Learned)]
    census = ran.step.census
    assert census["QuantizedConv2d"] == 3
    assert census["LearnedConv2d+BatchNorm2d"] == -3
    assert census["LearnedLevels"] == -census["LevelQuantizer"] == -2
    assert census["MovingRange"] == -census["ActivationQuantizer"]
    assert len(ran.step.hits) == 4 + 2 + census["ActivationQuantizer"]
    assert ran.step.sqnr > 40


def test_a_layer_called_twice_is_frozen_once(frozen: Any, images: Tensor) -> None:
    model = Twice().eval()
    ran = frozen(model)
    nodes = [node for node in ran.program.nodes() if node.target == "conv"]
    assert len(nodes) == 2
    assert isinstance(ran.program.submodule(nodes[0]), QuantizedLayer)
    assert {node.name for node in nodes} <= set(ran.step.hits)
    assert ran.step.sqnr > 40
    with torch.no_grad():
        assert ran.error(images) < 0.5
    assert fxq.lower(ran.program).ledger.coverage() == 1.0


def test_a_layer_that_stays_in_float_loses_its_norm(run_passes: Any, images: Tensor) -> None:
    passes = [*BEFORE, QuantizeApot(weight_bits=4, activation_bits=4), FreezeTrained()]
    layers = {"conv2": {"skip": True}}
    ran = run_passes(
        passes, tiny_residual(), images[:2], calibration=[images], layers=layers, check=False
    )
    (node,) = [node for node in ran.program.nodes() if node.name == "conv2"]
    assert type(ran.program.submodule(node)) is nn.Conv2d


def test_modules_of_the_users_are_left_alone(run_passes: Any, images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Flagged(), nn.Conv2d(4, 4, 3)).eval()
    passes = [*BEFORE, QuantizeApot(), FreezeTrained()]
    ran = run_passes(passes, model, images[:2], calibration=[images], leaf_modules=(Flagged,))
    assert ran.error(images) < 0.05


@pytest.mark.parametrize("part", ["layer.weight", "norm.weight", "norm.running_var", "alpha"])
def test_training_that_diverged(part: str, run_passes: Any, images: Tensor) -> None:
    passes = [*BEFORE, QuantizeApot(weight_bits=4, activation_bits=4)]
    ran = run_passes(passes, tiny_residual(), images[:2], calibration=[images])
    state = ran.program.module.state_dict()
    name = next(name for name in state if name.startswith("conv1") and name.endswith(part))
    state[name].view(-1)[0] = float("nan")
    with pytest.raises(VerifyError, match=f"its (weights.)?{part} is not finite") as caught:
        fxq.pipeline.Pipeline(FreezeTrained()).run(ran.program)
    assert "%conv1" in str(caught.value)
