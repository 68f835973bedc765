"""MobileNets as Keras and TensorFlow Lite define them: SAME padding, ReLU6.

The batch-normed MobileNetV2 to train from scratch is torchvision's; the one here has its batch
norm already folded into biased convolutions, as deployed checkpoints do.

Papers:
    Howard et al., "MobileNets: efficient convolutional neural networks for mobile vision
    applications", arXiv:1704.04861, table 1.
    Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018,
    arXiv:1801.04381, table 2.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from .padding import own_padding, pad_same

_V1_CHANNELS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
_V1_STRIDED = (2, 4, 6, 12)
_V2_STAGES = (  # expansion, output channels, blocks, first stride
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV1(nn.Module):
    """Thirteen depthwise separable layers, named as in Keras. ``[N, 3, 224, 224]`` to ``[N, K]``.

    Args:
        width: Channel multiplier alpha; each layer has ``int(channels * width)`` channels.
        num_classes: K.
    """

    def __init__(self, width: float = 1.0, num_classes: int = 1000) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv1 = nn.Conv2d(3, channels, 3, 2, bias=False)
        self.conv1_bn = nn.BatchNorm2d(channels, eps=1e-3)
        self.conv1_relu = nn.ReLU6()
        for k, full in enumerate(_V1_CHANNELS, start=1):
            self._add_separable(k, channels, int(full * width))
            channels = int(full * width)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.conv_preds = nn.Conv2d(channels, num_classes, 1)

    def _add_separable(self, k: int, in_channels: int, out_channels: int) -> None:
        stride = _v1_stride(k)
        depthwise = nn.Conv2d(
            in_channels, in_channels, 3, stride, own_padding(stride), groups=in_channels, bias=False
        )
        self.add_module(f"conv_dw_{k}", depthwise)
        self.add_module(f"conv_dw_{k}_bn", nn.BatchNorm2d(in_channels, eps=1e-3))
        self.add_module(f"conv_dw_{k}_relu", nn.ReLU6())
        self.add_module(f"conv_pw_{k}", nn.Conv2d(in_channels, out_channels, 1, bias=False))
        self.add_module(f"conv_pw_{k}_bn", nn.BatchNorm2d(out_channels, eps=1e-3))
        self.add_module(f"conv_pw_{k}_relu", nn.ReLU6())

    def _layer(self, name: str, x: Tensor) -> Tensor:
        for suffix in ("", "_bn", "_relu"):
            x = self.get_submodule(name + suffix)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = self._layer("conv1", pad_same(x, 2))
        for k in range(1, len(_V1_CHANNELS) + 1):
            x = self._layer(f"conv_dw_{k}", pad_same(x, _v1_stride(k)))
            x = self._layer(f"conv_pw_{k}", x)
        return self.conv_preds(self.avgpool(x)).flatten(1)  # type: ignore[no-any-return]


def _v1_stride(k: int) -> int:
    return 2 if k in _V1_STRIDED else 1


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; added to the input where the shape is kept."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.stride = stride
        self.residual = stride == 1 and in_channels == out_channels
        self.expand = nn.Conv2d(in_channels, hidden, 1) if expansion != 1 else None
        self.expand_relu = nn.ReLU6() if expansion != 1 else None
        self.dw = nn.Conv2d(hidden, hidden, 3, stride, own_padding(stride), groups=hidden)
        self.dw_relu = nn.ReLU6()
        self.project = nn.Conv2d(hidden, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in, H, W]`` to ``[N, out, H/stride, W/stride]``."""
        out = x
        if self.expand is not None and self.expand_relu is not None:
            out = self.expand_relu(self.expand(out))
        out = self.dw_relu(self.dw(pad_same(out, self.stride)))
        out = self.project(out)
        return x + out if self.residual else out  # type: ignore[no-any-return]


class FoldedMobileNetV2(nn.Module):
    """MobileNetV2 with batch norm folded away. ``[N, 3, 224, 224]`` to ``[N, K]``."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2)
        self.stem_relu = nn.ReLU6()
        self.blocks = nn.Sequential(*_inverted_residuals())
        self.head = nn.Conv2d(320, 1280, 1)
        self.head_relu = nn.ReLU6()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = self.stem_relu(self.stem(pad_same(x, 2)))
        x = self.head_relu(self.head(self.blocks(x)))
        return self.classifier(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def _inverted_residuals() -> Iterator[InvertedResidual]:
    in_channels = 32
    for expansion, channels, blocks, first_stride in _V2_STAGES:
        for index in range(blocks):
            stride = first_stride if index == 0 else 1
            yield InvertedResidual(in_channels, channels, stride, expansion)
            in_channels = channels


def mobilenet_v1(width: float = 1.0) -> MobileNetV1:
    """MobileNetV1 for ImageNet's 1000 classes."""
    return MobileNetV1(width)


def mobilenet_v2() -> FoldedMobileNetV2:
    """MobileNetV2 for ImageNet's 1000 classes, batch norm folded."""
    return FoldedMobileNetV2()
