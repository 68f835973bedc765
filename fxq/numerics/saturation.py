"""When an 8-bit kernel may lose a product: pairs of products summed in 16 bits.

Kernels for unsigned times signed bytes that use ``vpmaddubsw`` add two neighbouring products in a
saturating int16. The sum is exact whatever the data if, in every such pair, the positive weights
and the negative weights each add up to at most ``32767 / largest code``. fbgemm's depthwise kernels
always work this way, with taps (0, 1), (2, 3), … of a channel as the pairs.
"""

from __future__ import annotations

import torch

INT16_MAX = 32767


def pair_limit(largest_code: int = 255) -> int:
    """The largest weight sum of a pair that cannot saturate.

    Example:
        >>> pair_limit(255), pair_limit(15)
        (128, 2184)
    """
    return INT16_MAX // largest_code


def largest_pair_sum(codes: torch.Tensor) -> torch.Tensor:
    """``[out]``: the largest magnitude that two neighbouring weights of one sign add up to.

    Args:
        codes: ``[out, taps]``; the integer weights of each output channel in kernel order.

    Example:
        >>> largest_pair_sum(torch.tensor([[100, 60, -3], [100, -60, -70]])).tolist()
        [160, 100]
    """
    wide = codes.to(torch.int32)
    if wide.shape[1] % 2:
        wide = torch.nn.functional.pad(wide, (0, 1))
    pairs = wide.reshape(wide.shape[0], -1, 2)
    positive = pairs.clamp(min=0).sum(-1).amax(-1)
    negative = (-pairs).clamp(min=0).sum(-1).amax(-1)
    return torch.maximum(positive, negative)


def largest_two_sum(codes: torch.Tensor) -> torch.Tensor:
    """``[out]``: the largest magnitude that any two weights of one sign add up to.

    What holds for it holds whichever products a kernel makes a pair of.

    Args:
        codes: ``[out, taps]``; the integer weights of each output channel.

    Example:
        >>> largest_two_sum(torch.tensor([[100, -3, 60], [100, -60, -70]])).tolist()
        [160, 130]
    """
    wide = codes.to(torch.int32)
    count = min(2, wide.shape[1])
    signs = (wide.clamp(min=0), (-wide).clamp(min=0))
    positive, negative = (one.topk(count, dim=1).values.sum(1) for one in signs)
    return torch.maximum(positive, negative)
