"""TensorFlow's SAME padding for 3x3 convolutions, which is one-sided at stride 2."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def pad_same(x: Tensor, stride: int) -> Tensor:
    """The input as a 3x3 convolution without padding of its own needs it.

    At stride 2 an even-sized image gets one zero column at the right and one zero row below; at
    stride 1 the convolution pads itself and the input stays as it is.

    Args:
        x: [N, C, H, W].
        stride: Stride of the convolution that follows, 1 or 2.

    Returns:
        [N, C, H + 1, W + 1] at stride 2, else the input.
    """
    return functional.pad(x, (0, 1, 0, 1)) if stride == 2 else x


def own_padding(stride: int) -> int:
    """The padding a 3x3 convolution carries itself beside ``pad_same``."""
    return 0 if stride == 2 else 1
