"""join-batch-norm: one node per layer and norm, the same numbers, and a norm that still learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq.errors import SpecError
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual
from fxq.passes import Calibrate, FoldBatchNorm, InsertObservers, JoinBatchNorm, QuantizeMinmax
from fxq.quant.normalized import NormalizedLayer

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


class Twice(nn.Module):
    """One convolution called twice, and a norm behind one of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x)))


class Read(nn.Module):
    """A convolution that a norm and a sum read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


@pytest.mark.parametrize(
    ("build", "x", "census"),
    [
        (
            tiny_residual,
            IMAGES,
            {"Conv2d": -3, "BatchNorm2d": -3, "Conv2d+BatchNorm2d": 3},
        ),
        (tiny_conv, IMAGES, {"Conv2d": -2, "BatchNorm2d": -2, "Conv2d+BatchNorm2d": 2}),
        (tiny_concat, IMAGES, {"Conv2d": -3, "BatchNorm2d": -3, "Conv2d+BatchNorm2d": 3}),
        (tiny_depthwise, IMAGES, {"Conv2d": -3, "BatchNorm2d": -3, "Conv2d+BatchNorm2d": 3}),
        (tiny_mlp, VECTORS, {"Linear": -1, "BatchNorm1d": -1, "Linear+BatchNorm1d": 1}),
    ],
)
def test_tiny_networks(build: Any, x: Tensor, census: dict[str, int], run_one: Any) -> None:
    ran = run_one(JoinBatchNorm(), build(), x)
    assert ran.step.census == census
    assert len(ran.step.hits) == census[next(name for name in census if "+" in name)]
    assert not ran.step.misses
    assert ran.error(x) == 0


def test_the_node_keeps_its_name_and_path(run_one: Any) -> None:
    program = run_one(JoinBatchNorm(), tiny_conv(), IMAGES).program
    names = " ".join(node.name for node in program.nodes())
    assert names == "x conv1 relu1 pool conv2 relu2 avgpool flatten fc output"
    joined = program.module.get_submodule("conv1")
    assert isinstance(joined, NormalizedLayer)
    assert isinstance(joined.norm, nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Twice(), "%conv_1 is called 2 times with the same weights"),
        (Read(), "%conv feeds 2 nodes"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
            "it keeps no running statistics",
        ),
    ],
)
def test_refusals(model: nn.Module, why: str, run_one: Any) -> None:
    ran = run_one(JoinBatchNorm(), model, IMAGES)
    assert [miss.why[: len(why)] for miss in ran.step.misses] == [why]
    assert ran.step.census == {}
    assert ran.error(IMAGES) == 0


def test_a_norm_before_a_layer_stays_apart(run_one: Any) -> None:
    """It would be folded where the network is only run."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    assert run_one(JoinBatchNorm(), model, IMAGES).step.census == {}
    assert run_one(FoldBatchNorm(), model, IMAGES).step.census == {"BatchNorm2d": -1}


def test_the_norm_still_learns(run_one: Any) -> None:
    model = tiny_conv()
    joined = run_one(JoinBatchNorm(), model, IMAGES).program.module.train()
    reference = tiny_conv().train()
    torch.testing.assert_close(joined(IMAGES), reference(IMAGES))
    norm: Any = joined.get_submodule("conv1").norm
    assert torch.equal(norm.running_mean, reference.bn1.running_mean)
    assert not torch.equal(norm.running_mean, model.bn1.running_mean)


def test_recipes_without_training_want_it_folded(run_passes: Any) -> None:
    passes = [JoinBatchNorm(), InsertObservers(), Calibrate(), QuantizeMinmax()]
    with pytest.raises(SpecError, match="holds a batch norm") as caught:
        run_passes(passes, tiny_conv(), IMAGES, calibration=[IMAGES])
    assert "use fold-batch-norm instead of join-batch-norm" in str(caught.value)
    assert "%conv1" in str(caught.value)
