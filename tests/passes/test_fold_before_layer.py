"""fold-batch-norm in front of a layer: exact or refused; and every other refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq.passes import FoldBatchNorm


def norm(channels: int, dims: int = 2, shift: bool = True) -> Any:
    """A batch norm far from the identity; without a shift it only scales."""
    torch.manual_seed(3)
    module = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](channels)
    with torch.no_grad():
        module.weight.uniform_(-2, 2)
        module.running_var.uniform_(0.2, 3)
        if shift:
            module.bias.uniform_(-1, 1)
            module.running_mean.uniform_(-1, 1)
    return module


def fold(model: nn.Module, x: Tensor, run_one: Any) -> Any:
    ran = run_one(FoldBatchNorm(), model.double().eval(), x.double())
    assert ran.error(torch.randn(x.shape, dtype=torch.float64)) < 1e-12
    return ran


EXACT = [
    ("Conv1d", lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    ("Conv2d", lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 7)),
    ("Conv3d", lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    ("strided", lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, bias=False), (2, 4, 9, 9)),
    ("grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    ("depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 7)),
    ("valid", lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 7)),
    ("reflect", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    ("circular", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 7)),
    ("replicate", lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (2, 4, 7)),
    ("Linear", lambda: nn.Linear(4, 6), (3, 4)),
    ("Linear without bias", lambda: nn.Linear(4, 6, bias=False), (3, 4)),
]


@pytest.mark.parametrize(("name", "build", "shape"), EXACT, ids=[name for name, _, _ in EXACT])
def test_exact_without_zero_padding(name: str, build: Any, shape: Any, run_one: Any) -> None:
    model = nn.Sequential(norm(4, max(len(shape) - 2, 1)), build())
    ran = fold(model, torch.randn(shape), run_one)
    assert sum(ran.step.census.values()) == -1
    assert not ran.step.misses


PADDED = [
    ("padding", lambda: nn.Conv2d(4, 6, 3, padding=1)),
    ("one side", lambda: nn.Conv2d(4, 6, 3, padding=(0, 1))),
    ("same", lambda: nn.Conv2d(4, 6, 3, padding="same")),
    ("transposed", lambda: nn.ConvTranspose2d(4, 6, 3, groups=2)),
]


@pytest.mark.parametrize(("name", "build"), PADDED, ids=[name for name, _ in PADDED])
def test_zero_padding_is_refused_unless_nothing_is_shifted(
    name: str, build: Any, run_one: Any
) -> None:
    x = torch.randn(2, 4, 7, 7)
    refused = fold(nn.Sequential(norm(4), build()), x, run_one)
    assert not refused.step.delta
    assert refused.why("_0") == ["%_1 pads with zeros, and the batch norm would have shifted them"]
    only_scales = fold(nn.Sequential(norm(4, shift=False), build()), x, run_one)
    assert only_scales.step.census == {"BatchNorm2d": -1}


# ---- refusals --------------------------------------------------------------------------------


class Net(nn.Module):
    """Parts for the cases below; its forward is the case."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 1)
        self.bn, self.other = norm(4), norm(4)
        self.plain = nn.BatchNorm2d(4, track_running_stats=False)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(6, 4)
        self.bn1 = norm(4, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


CALLED_TWICE = "%conv is called 2 times with the same weights; folding would change the other calls"
REFUSED = [
    (
        "shared convolution",
        lambda n, x: n.bn(n.conv(x)) + n.conv(x),
        {"bn": CALLED_TWICE},
    ),
    (
        "shared convolution, two batch norms",
        lambda n, x: n.bn(n.conv(x)) + n.other(n.conv(2 * x)),
        {"bn": CALLED_TWICE, "other": CALLED_TWICE.replace("%conv", "%conv_1")},
    ),
    (
        "several users",
        lambda n, x: n.bn(y := n.conv(x)) + y,
        {"bn": "%conv feeds 2 nodes; folding would change the others"},
    ),
    (
        "no running statistics",
        lambda n, x: n.plain(n.conv(x)),
        {"plain": "it keeps no running statistics, so it depends on each batch"},
    ),
    (
        "after an add",
        lambda n, x: n.bn(n.conv(x) + n.second(n.conv(x))),
        {"bn": "it reads %add (add) and feeds %output: no convolution or linear to fold into"},
    ),
    (
        "after a ReLU",
        lambda n, x: n.bn(n.relu(n.conv(x))).flatten(1),
        {"bn": "it reads %relu (relu) and feeds %flatten: no convolution or linear to fold into"},
    ),
    (
        "after a concatenation",
        lambda n, x: n.bn(torch.cat([n.conv(x)[:, :2], x[:, :2]], 1)).relu(),
        {"bn": "it reads %cat (cat) and feeds %relu: no convolution or linear to fold into"},
    ),
    (
        "before two layers",
        lambda n, x: n.second(y := n.bn(n.relu(n.conv(x)))) + y,
        {
            "bn": "it reads %relu (relu) and feeds %second, %add: no convolution or linear to "
            "fold into"
        },
    ),
    (
        "before a shared layer",
        lambda n, x: n.second(n.bn(n.relu(n.conv(x)))) + n.second(n.conv(x)),
        {
            "bn": "%second is called 2 times with the same weights; folding would change the "
            "other calls"
        },
    ),
    (
        "after a linear of three dimensions",
        lambda n, x: n.bn1(n.linear(x[:, 0])).flatten(1),
        {"bn1": "the channels of a 3-d value are not the linear's"},
    ),
    (
        "before a linear of three dimensions",
        lambda n, x: n.linear(n.bn1(torch.cat([x[:, 0], x[:, 0]], 1)[:, :4])),
        {"bn1": "the channels of a 3-d value are not the linear's"},
    ),
]


@pytest.mark.parametrize(("name", "function", "misses"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused_with_the_reason(
    name: str, function: Any, misses: dict[str, str], run_one: Any
) -> None:
    size = (4, 6) if "three dimensions" in name else (6, 6)
    ran = fold(Net(function), torch.randn(2, 3, *size), run_one)
    assert {miss.node: miss.why for miss in ran.step.misses} == misses
    assert not ran.step.delta
    assert not ran.step.hits


def test_a_batch_norm_shared_by_two_layers_folds_into_both(run_one: Any) -> None:
    model = Net(lambda n, x: n.bn(n.conv(x)) * n.bn(n.second(n.relu(n.conv(x[:, [2, 1, 0]])))))
    model.third = nn.Conv2d(3, 4, 3, padding=1)
    model.function = lambda n, x: n.bn(n.conv(x)) * n.bn(n.second(n.relu(n.third(x))))
    ran = fold(model, torch.randn(2, 3, 6, 6), run_one)
    assert ran.step.census == {"BatchNorm2d": -2}


def test_two_names_of_one_layer_are_one_layer(run_one: Any) -> None:
    model = Net(lambda n, x: n.bn(n.conv(x)) + n.alias(x))
    model.alias = model.conv
    ran = fold(model, torch.randn(2, 3, 6, 6), run_one)
    assert "called 2 times" in ran.step.misses[0].why


def test_two_layers_of_one_weight_are_told_apart(run_one: Any) -> None:
    model = Net(lambda n, x: n.bn(n.conv(x)) + n.tied(x))
    model.tied = nn.Conv2d(3, 4, 3, padding=1)
    model.tied.weight = model.conv.weight
    ran = fold(model, torch.randn(2, 3, 6, 6), run_one)
    assert ran.step.census == {"BatchNorm2d": -1}
