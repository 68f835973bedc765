"""A quantizer that finds its range in the batch it is given, as ACIQ's authors evaluated it."""

from __future__ import annotations

import math

import torch
from torch import nn

from fxq.numerics.aciq import Prior, aciq_range
from fxq.numerics.affine import channel_grids, fake_quantize, grid_from_range
from fxq.numerics.allocation import Allocation, channel_bits
from fxq.numerics.prior_fit import fitted_prior
from fxq.quant.quantizers import check_bits


class DynamicAciqQuantizer(nn.Module):
    """Clips each batch where ACIQ says, by the statistics of that batch, and rounds it.

    Nothing is calibrated, and a result depends on what else is in its batch. The statistics are of
    values *before* a ReLU, so this stands before the ReLU that it accounts for.

    Args:
        bits: Bits per code, 1 to 8; the average over channels where they are allocated.
        prior: The law values are taken to follow; ``fit`` chooses for each batch.
        per_channel: Whether each index of dimension 1 has its own range.
        fused_relu: Whether a ReLU follows, so that the range begins at 0.
        mean_aware: Whether a range that begins at 0 accounts for the mean in closed form.
        upper: The bound of that ReLU, where it has one.
        allocation: How bits are spread over channels.

    Raises:
        SpecError: Bits outside 1 to 8.

    Example:
        >>> quantizer = DynamicAciqQuantizer(2, fused_relu=True)
        >>> quantizer(torch.tensor([-1.0, 0.0, 1.0])).unique().numel()
        2

    Reference:
        Banner et al. 2019, arXiv:1810.05723, Sec. 2 ("adjusted dynamically at runtime"), and the
        default mode of its code.
    """

    fxq_kind = "quantizer"

    def __init__(
        self,
        bits: int,
        prior: Prior = Prior.LAPLACE,
        *,
        per_channel: bool = False,
        fused_relu: bool = False,
        mean_aware: bool = False,
        upper: float | None = None,
        allocation: Allocation = Allocation.NONE,
    ) -> None:
        super().__init__()
        check_bits(bits)
        self.bits = bits
        self.prior = Prior(prior)
        self.per_channel = per_channel
        self.fused_relu = fused_relu
        self.mean_aware = mean_aware
        self.upper = upper
        self.allocation = Allocation(allocation)

    def options(self) -> dict[str, int | str | float | bool | None]:
        """The arguments it was built with, as plain data."""
        return {
            "bits": self.bits,
            "prior": self.prior.value,
            "per_channel": self.per_channel,
            "fused_relu": self.fused_relu,
            "mean_aware": self.mean_aware,
            "upper": self.upper,
            "allocation": self.allocation.value,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The rounded values; ``x: [...]``, or ``[n, channels, ...]`` per channel."""
        if x.numel() == 0:
            return x
        rows = x.detach().transpose(0, 1).flatten(1) if self.per_channel else x.detach().flatten()
        mean, std = rows.double().mean(-1), _std(rows)
        deviation = (rows.double() - mean.unsqueeze(-1)).abs().mean(-1)
        prior = fitted_prior(self.prior, deviation, std)
        bits = channel_bits(self.allocation, std.reshape(-1), self.bits).reshape(std.shape)
        low, high = aciq_range(
            mean,
            deviation if prior is Prior.LAPLACE else std,
            rows.amin(-1).double(),
            rows.amax(-1).double(),
            steps=(2**bits - 1).clamp(min=1),
            prior=prior,
            fused_relu=self.fused_relu,
            mean_aware=self.mean_aware,
        )
        high = high.clamp(max=math.inf if self.upper is None else self.upper)
        if not self.per_channel:
            scale, zero_point = grid_from_range(low, high, self.bits)
            return fake_quantize(x, scale, zero_point, 0, 2**self.bits - 1)
        scale, zero_point = channel_grids(low, high, bits)
        return fake_quantize(x, scale, zero_point, 0, 2**bits - 1, axis=1)

    def describe(self) -> str:
        """Bits and law, for listings."""
        per = " per-channel" if self.per_channel else ""
        return f"{self.bits}-bit{per} {self.prior.value} range of each batch"

    def extra_repr(self) -> str:
        """Shown in the module's repr."""
        return self.describe()


def _std(rows: torch.Tensor) -> torch.Tensor:
    """``[...]`` float64: the unbiased standard deviation; 0 of a single value."""
    return rows.double().std(-1, correction=min(1, rows.shape[-1] - 1))
