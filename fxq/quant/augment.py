"""Random variants of images, for passes that optimize on few of them."""

from __future__ import annotations

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

_SHIFT = 8  # images are shifted by up to an eighth of their size: 4 pixels of 32


class Augmentation(StrEnum):
    """What is done to images at random: nothing, mirroring, or mirroring and shifting."""

    NONE = "none"
    FLIP = "flip"
    FLIP_SHIFT = "flip-shift"


def augmented(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Each image left-right mirrored with probability one half, and shifted where asked for.

    What a shift uncovers is zero. Anything but a batch of images passes as it is.

    Args:
        images: ``[n, channels, height, width]``.
        how: What to do.
        generator: Decides, image by image.

    Returns:
        Like ``images``.

    Example:
        >>> image = torch.tensor([[[[1.0, 2.0, 3.0]]]]).expand(8, 1, 1, 3)
        >>> flipped = augmented(image, Augmentation.FLIP, torch.Generator().manual_seed(0))
        >>> sorted({tuple(one.flatten().tolist()) for one in flipped})
        [(1.0, 2.0, 3.0), (3.0, 2.0, 1.0)]
    """
    if how is Augmentation.NONE or images.dim() != 4:
        return images
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    result = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    return _shifted(result, generator) if how is Augmentation.FLIP_SHIFT else result


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    height, width = images.shape[2:]
    most = (height // _SHIFT, width // _SHIFT)
    padded = F.pad(images, (most[1], most[1], most[0], most[0]))
    spans = torch.tensor([2 * m + 1 for m in most])
    # Two numbers per image, as if they were drawn one by one: top, left, top, left, …
    drawn = torch.randint(int(spans.prod()), (len(images), 2), generator=generator) % spans
    top, left = drawn.to(images.device).unsqueeze(-1).unbind(1)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    places = rows.unsqueeze(2) * padded.shape[3] + columns.unsqueeze(1)
    chosen = places.flatten(1).unsqueeze(1).expand(-1, images.shape[1], -1)
    found = padded.flatten(2).gather(2, chosen).view(images.shape)
    return torch.empty_like(images).copy_(found)  # in the memory layout of the images
