"""Teaching networks, small enough to read as a graph, with batch norm that shows a broken fold.

A fresh batch norm is nearly the identity, so folding it wrongly changes little. Here its mean,
variance, weight and bias are drawn from a fixed seed, and of each batch norm's weights one is
negative and one zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

_SEED = 7
_Network = TypeVar("_Network", bound=nn.Module)


class TinyConv(nn.Module):
    """Convolution, batch norm, ReLU, twice; pooled and classified. ``[N, 3, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 10]``."""
        x = self.pool(self.relu1(self.bn1(self.conv1(x))))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


class TinyResidual(nn.Module):
    """A stem and one residual block. ``[N, 3, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.stem_relu = nn.ReLU()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 10]``."""
        x = self.stem_relu(self.stem_bn(self.stem(x)))
        out = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(out)) + x)
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


class TinyDepthwise(nn.Module):
    """A depthwise separable layer with ReLU6 and a linear bottleneck. ``[N, 3, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1, bias=False)
        self.expand_bn = nn.BatchNorm2d(12)
        self.expand_relu = nn.ReLU6()
        self.depthwise = nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(12)
        self.depthwise_relu = nn.ReLU6()
        self.project = nn.Conv2d(12, 8, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(8)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 10]``."""
        x = self.expand_relu(self.expand_bn(self.expand(x)))
        x = self.depthwise_relu(self.depthwise_bn(self.depthwise(x)))
        x = self.project_bn(self.project(x))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


class TinyConcat(nn.Module):
    """Two branches of one input, joined channel-wise. ``[N, 3, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(3, 4, 1, bias=False)
        self.narrow_bn = nn.BatchNorm2d(4)
        self.narrow_relu = nn.ReLU()
        self.wide = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.wide_bn = nn.BatchNorm2d(8)
        self.wide_relu = nn.ReLU()
        self.join = nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.join_bn = nn.BatchNorm2d(8)
        self.join_relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 10]``."""
        narrow = self.narrow_relu(self.narrow_bn(self.narrow(x)))
        wide = self.wide_relu(self.wide_bn(self.wide(x)))
        x = self.join_relu(self.join_bn(self.join(torch.cat([narrow, wide], dim=1))))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


class TinyMlp(nn.Module):
    """Three linear layers, the first with batch norm. ``[N, 16]``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.bn1 = nn.BatchNorm1d(32)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(32, 32)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 10]``."""
        x = self.relu1(self.bn1(self.fc1(x)))
        return self.fc3(self.relu2(self.fc2(x)))  # type: ignore[no-any-return]


def tiny_conv() -> TinyConv:
    """Two convolutions with batch norm, in eval mode."""
    return _seeded(TinyConv)


def tiny_residual() -> TinyResidual:
    """One residual block, in eval mode."""
    return _seeded(TinyResidual)


def tiny_depthwise() -> TinyDepthwise:
    """A depthwise separable layer, in eval mode."""
    return _seeded(TinyDepthwise)


def tiny_concat() -> TinyConcat:
    """Two concatenated branches, in eval mode."""
    return _seeded(TinyConcat)


def tiny_mlp() -> TinyMlp:
    """Three linear layers, in eval mode."""
    return _seeded(TinyMlp)


def _seeded(build: Callable[[], _Network]) -> _Network:
    """The network with all numbers drawn from one seed, torch's global generator untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        network = build()
        for module in network.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                _scatter(module)
    return network.eval()


def _scatter(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.weight[1] = -norm.weight[1]
        norm.weight[2] = 0.0
        norm.bias.uniform_(-0.5, 0.5)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.5, 2.0)
