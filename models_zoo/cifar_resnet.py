"""He's residual networks for CIFAR: 6n+2 layers, three stages of 16, 32 and 64 channels.

Papers:
    He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016,
    arXiv:1512.03385, section 4.2. Shortcut options A and B: section 3.3 and table 3.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class PadShortcut(nn.Module):
    """Option A: every second pixel, with zero channels put before and behind; no parameters.

    ``[N, C, H, W]`` becomes ``[N, out_channels, H/2, W/2]``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.before = (out_channels - in_channels) // 2
        self.behind = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """The subsampled, padded input."""
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.behind))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut added before the last ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride, option)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in, H, W]`` to ``[N, out, H/stride, W/stride]``."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + identity)  # type: ignore[no-any-return]


def _downsample(in_channels: int, out_channels: int, stride: int, option: str) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    if option == "A":
        return PadShortcut(in_channels, out_channels)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class ResNetTrunk(nn.Module):
    """Everything but the head: ``[N, 3, 32, 32]`` to ``[N, 64]``.

    Args:
        depth: Number of weighted layers, ``6 * n + 2``.
        option: ``"A"`` for padded shortcuts, ``"B"`` for 1x1 convolutions.

    Raises:
        ValueError: If no network has this depth or option.
    """

    def __init__(self, depth: int, option: str) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2, for example 20, not {depth}")
        if option not in ("A", "B"):
            raise ValueError(f"option must be 'A' or 'B', not {option!r}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, 1, blocks, option)
        self.layer2 = _stage(16, 32, 2, blocks, option)
        self.layer3 = _stage(32, 64, 2, blocks, option)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def pooled_features(self, x: Tensor) -> Tensor:
        """``[N, 64]``, the global average of the last stage."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.avgpool(x).flatten(1)  # type: ignore[no-any-return]


def _stage(in_channels: int, channels: int, stride: int, blocks: int, option: str) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride, option)
    rest = [BasicBlock(channels, channels, 1, option) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


class ProjectionResNet(ResNetTrunk):
    """Option B: projection shortcuts; the head is ``fc``. ``[N, 3, 32, 32]`` to ``[N, 10]``."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__(depth, "B")
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.fc(self.pooled_features(x))  # type: ignore[no-any-return]


class PaddingResNet(ResNetTrunk):
    """Option A: padded shortcuts; the head is ``linear``. ``[N, 3, 32, 32]`` to ``[N, 10]``."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__(depth, "A")
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.linear(self.pooled_features(x))  # type: ignore[no-any-return]


def resnet20() -> ProjectionResNet:
    """ResNet-20 with option-B shortcuts."""
    return ProjectionResNet(20)


def resnet32() -> ProjectionResNet:
    """ResNet-32 with option-B shortcuts."""
    return ProjectionResNet(32)


def resnet44() -> ProjectionResNet:
    """ResNet-44 with option-B shortcuts."""
    return ProjectionResNet(44)


def resnet56() -> ProjectionResNet:
    """ResNet-56 with option-B shortcuts."""
    return ProjectionResNet(56)


def resnet110() -> ProjectionResNet:
    """ResNet-110 with option-B shortcuts."""
    return ProjectionResNet(110)


def resnet20_a() -> PaddingResNet:
    """ResNet-20 with option-A shortcuts, as in the paper."""
    return PaddingResNet(20)


def resnet32_a() -> PaddingResNet:
    """ResNet-32 with option-A shortcuts, as in the paper."""
    return PaddingResNet(32)


def resnet44_a() -> PaddingResNet:
    """ResNet-44 with option-A shortcuts, as in the paper."""
    return PaddingResNet(44)


def resnet56_a() -> PaddingResNet:
    """ResNet-56 with option-A shortcuts, as in the paper."""
    return PaddingResNet(56)


def resnet110_a() -> PaddingResNet:
    """ResNet-110 with option-A shortcuts, as in the paper."""
    return PaddingResNet(110)
