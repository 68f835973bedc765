"""AlexNet for 32x32 images: five convolutions and three linears with dropout, half as wide.

Papers:
    Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural
    networks", NeurIPS 2012; in one tower and without response normalization: Krizhevsky, "One
    weird trick for parallelizing convolutional neural networks", arXiv:1404.5997.
"""

from __future__ import annotations

from torch import Tensor, nn


class AlexNet(nn.Module):
    """``[N, 3, 32, 32]`` to ``[N, 10]``."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(3, 32, 5),
            nn.MaxPool2d(3, 2),
            *_convolution(32, 96, 5),
            nn.MaxPool2d(3, 2),
            *_convolution(96, 192, 3),
            *_convolution(192, 128, 3),
            *_convolution(128, 128, 3),
            nn.MaxPool2d(3, 2),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(128 * 3 * 3, 512),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


def _convolution(in_channels: int, channels: int, kernel: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2), nn.ReLU()


def alexnet() -> AlexNet:
    """AlexNet for CIFAR-10."""
    return AlexNet()
