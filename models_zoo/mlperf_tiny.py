"""The image classification network of MLPerf Tiny: ResNet-8 on raw pixel values.

Papers:
    Banbury et al., "MLPerf Tiny benchmark", NeurIPS 2021 datasets and benchmarks,
    arXiv:2106.07597, table 1.
"""

from __future__ import annotations

from torch import Tensor, nn

from .padding import own_padding, pad_same

_EPS = 1e-3  # Keras' batch norm


class Stack(nn.Module):
    """Two biased 3x3 convolutions with batch norm, and a 1x1 shortcut where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        padding = own_padding(stride)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding)
        self.bn1 = nn.BatchNorm2d(out_channels, eps=_EPS)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=_EPS)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride) if stride != 1 else None
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in, H, W]`` to ``[N, out, H/stride, W/stride]``."""
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.relu1(self.bn1(self.conv1(pad_same(x, self.stride))))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + identity)  # type: ignore[no-any-return]


class MlperfResNet8(nn.Module):
    """``[N, 3, 32, 32]`` raw pixels 0..255 to ``[N, 10]`` logits."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16, eps=_EPS)
        self.relu = nn.ReLU()
        self.stack1 = Stack(16, 16, 1)
        self.stack2 = Stack(16, 32, 2)
        self.stack3 = Stack(32, 64, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.stack3(self.stack2(self.stack1(x)))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def resnet8() -> MlperfResNet8:
    """ResNet-8 of MLPerf Tiny."""
    return MlperfResNet8()
