"""VGG-11 with batch norm for 32x32 images, half as wide, with one linear.

Papers:
    Simonyan, Zisserman, "Very deep convolutional networks for large-scale image recognition",
    ICLR 2015, arXiv:1409.1556, table 1, configuration A.
"""

from __future__ import annotations

from torch import Tensor, nn

_STAGES = ((32,), (64,), (128, 128), (256, 256), (256, 256))
"""Channels of the convolutions; a pooling follows each stage."""


class Vgg(nn.Module):
    """``[N, 3, 32, 32]`` to ``[N, 10]``."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for stage in _STAGES:
            for channels in stage:
                convolution = nn.Conv2d(before, channels, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


def vgg11() -> Vgg:
    """VGG-11 with batch norm for CIFAR-10."""
    return Vgg()
