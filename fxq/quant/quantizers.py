"""Quantizers of activations, and layers with integer weights: what quantize passes insert."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxq.errors import SpecError
from fxq.numerics.affine import fake_quantize
from fxq.numerics.levels import nearest_level

LARGEST_LEVEL, LARGEST_SIGNED_LEVEL = 127, 63
"""Up to these the 256 codes of one byte tell all halves of levels apart, where levels change."""


class ActivationQuantizer(nn.Module):
    """Rounds its input to ``scale * (code - zero_point)``, with codes ``0 .. 2**bits - 1``.

    Args:
        scale: ``[]``, or ``[channels]`` for one scale per index of dimension 1; in the units of
            the tensor.
        zero_point: Code of zero, of the shape of the scale.
        bits: Bits per code, 1 to 8; or ``[channels]``, 0 to 8. A channel of 0 bits has code 0
            alone, so it is the constant ``-scale * zero_point``, with a zero point of 0 or 1.

    Attributes:
        bits: Bits per code; the most that a channel has, where they differ.
        channel_bits: ``[channels]`` int64 where they may differ, else None.

    Raises:
        SpecError: Bits outside 1 to 8, a scale that is not positive, or a zero point out of range.

    Example:
        >>> quantizer = ActivationQuantizer(torch.tensor(0.5), torch.tensor(0), 2)
        >>> quantizer(torch.tensor([-1.0, 0.6, 9.0])).tolist()
        [0.0, 0.5, 1.5]
    """

    fxq_kind = "quantizer"
    scale: torch.Tensor
    zero_point: torch.Tensor
    channel_bits: torch.Tensor | None

    def __init__(
        self, scale: torch.Tensor, zero_point: torch.Tensor, bits: int | torch.Tensor
    ) -> None:
        super().__init__()
        each = bits.to(torch.int64) if isinstance(bits, torch.Tensor) else None
        self.bits = int(bits.max()) if isinstance(bits, torch.Tensor) else bits
        check_bits(self.bits)
        if each is not None and (each.shape != scale.shape or int(each.min()) < 0):
            raise SpecError(f"{each.tolist()} are no bits of {list(scale.shape)} channels")
        if not bool((scale > 0).all()) or not bool(torch.isfinite(scale).all()):
            raise SpecError("a scale must be positive and finite", where=f"scale {scale.tolist()}")
        highest = 2 ** (self.bits if each is None else each.clamp(min=1)) - 1
        if not bool(((zero_point >= 0) & (zero_point <= highest)).all()):
            raise SpecError(f"a {self.bits}-bit zero point must be in 0 .. {2**self.bits - 1}")
        self.register_buffer("channel_bits", each)
        self.register_buffer("scale", scale.to(torch.float32))
        self.register_buffer("zero_point", zero_point.to(torch.int64))

    @property
    def per_channel(self) -> bool:
        """Whether each index of dimension 1 has its own scale."""
        return self.scale.dim() == 1

    @property
    def top(self) -> int | torch.Tensor:
        """The largest code; ``[channels]`` where channels have their own bits."""
        return 2**self.bits - 1 if self.channel_bits is None else 2**self.channel_bits - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest representable values; ``x: [...]``, or ``[n, channels, ...]`` per channel."""
        axis = 1 if self.per_channel else None
        return fake_quantize(x, self.scale, self.zero_point, 0, self.top, axis=axis)

    def describe(self) -> str:
        """Bits, scale and zero point, for listings."""
        if self.per_channel:
            low, high = float(self.scale.min()), float(self.scale.max())
            return f"{self._width()} per-channel scale {low:.4g}..{high:.4g}"
        return f"{self.bits}-bit scale {float(self.scale):.4g} zero {int(self.zero_point)}"

    def _width(self) -> str:
        if self.channel_bits is None or int(self.channel_bits.min()) == self.bits:
            return f"{self.bits}-bit"
        return f"{int(self.channel_bits.min())}..{self.bits}-bit"

    def extra_repr(self) -> str:
        """Shown in the module's repr."""
        return self.describe()


class LevelQuantizer(nn.Module):
    """Rounds its input to ``scale * level``, with levels from a set of integers.

    Halfway between two levels, the larger magnitude. Kernels multiply codes ``level + zero_point``.

    Args:
        scale: ``[]``; a short scale (`fxq.numerics.affine.short_scale`) keeps all values exact.
        levels: ``[count]`` int64; magnitudes, ascending from 0 to `LARGEST_LEVEL` at most, or to
            `LARGEST_SIGNED_LEVEL` where signed.
        signed: Whether levels have both signs; else what is negative becomes 0.
        bits: Nominal bits per value, 1 to 8, for reports.

    Raises:
        SpecError: A scale that is not positive, bits out of range, or levels that do not fit.

    Example:
        >>> quantizer = LevelQuantizer(torch.tensor(0.5), torch.tensor([0, 1, 2, 4]), False, 2)
        >>> quantizer(torch.tensor([-1.0, 0.2, 0.25, 1.5, 9.0])).tolist()
        [0.0, 0.0, 0.5, 2.0, 2.0]
    """

    fxq_kind = "quantizer"
    per_channel = False
    scale: torch.Tensor
    levels: torch.Tensor

    def __init__(self, scale: torch.Tensor, levels: torch.Tensor, signed: bool, bits: int) -> None:
        super().__init__()
        check_bits(bits)
        check_levels(levels, signed)
        if scale.shape != () or not 0 < float(scale) < float("inf"):
            raise SpecError(
                "the scale of levels must be one number, positive and finite",
                where=f"scale {scale.tolist()}",
            )
        self.signed = signed
        self.bits = bits
        self.register_buffer("scale", scale.detach().to(torch.float32))
        self.register_buffer("levels", levels.clone())

    @property
    def zero_point(self) -> int:
        """The code of level 0."""
        return int(self.levels[-1]) if self.signed else 0

    @property
    def grid_bits(self) -> int:
        """The bits that the codes ``level + zero_point`` take."""
        return (int(self.levels[-1]) + self.zero_point).bit_length()

    def level_of(self, x: torch.Tensor) -> torch.Tensor:
        """``[...]`` int64: the level nearest to each value."""
        steps = (x / self.scale).contiguous()  # torch.bucketize warns of other layouts
        return nearest_level(steps if self.signed else steps.clamp(min=0), self.levels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest representable values; ``x: [...]``."""
        return (self.scale * self.level_of(x)).to(x.dtype)

    def describe(self) -> str:
        """Bits, number and range of the levels, and scale, for listings."""
        top, count = int(self.levels[-1]), len(self.levels)
        levels = f"{2 * count - 1} levels to +-{top}" if self.signed else f"{count} levels to {top}"
        return f"{self.bits}-bit {levels} scale {float(self.scale):.4g}"

    def extra_repr(self) -> str:
        """Shown in the module's repr."""
        return self.describe()


class QuantizedLayer(nn.Module):
    """A convolution or linear whose weights are ``codes * scale``, run in float for simulation.

    The float weights are kept beside the codes until lowering, for passes that compare the two.

    Args:
        layer: The float layer.
        codes: ``[out, in/groups, ...]`` (transposed: ``[in, out/groups, ...]``) int8.
        scale: ``[out]``; in the units of the weights.
        bits: ``[out]``; bits per weight that the codes stand for, for size and reports.

    Attributes:
        bias_shift: ``[out]``; what passes added to the float layer's bias.

    Raises:
        SpecError: The shapes do not fit the layer.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bits: torch.Tensor
    bias_shift: torch.Tensor

    def __init__(
        self, layer: nn.Module, codes: torch.Tensor, scale: torch.Tensor, bits: torch.Tensor
    ) -> None:
        super().__init__()
        weight: Any = layer.weight
        if codes.shape != weight.shape or codes.dtype != torch.int8:
            raise SpecError(
                f"codes must be int8 {list(weight.shape)}, not {codes.dtype} {list(codes.shape)}"
            )
        self.fxq_kind = "linear" if isinstance(layer, nn.Linear) else "conv"
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.to(torch.float32))
        self.register_buffer("bits", bits.to(torch.int64))
        self.register_buffer("bias_shift", torch.zeros_like(self.scale))
        self.layer = layer

    @property
    def bias(self) -> torch.Tensor:
        """``[out]`` float32: the layer's bias with what passes added to it."""
        own: Any = self.layer.bias
        return self.bias_shift if own is None else own.detach() + self.bias_shift

    def weight(self) -> torch.Tensor:
        """The dequantized weights, of the shape of the layer's."""
        return self.codes.float() * channel_view(self.layer, self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer computes with the dequantized weights and the shifted bias."""
        tensors = {"weight": self.weight().to(x.dtype), "bias": self.bias.to(x.dtype)}
        result: torch.Tensor
        if self.layer.bias is not None:
            result = torch.func.functional_call(self.layer, tensors, (x,))
            return result
        result = torch.func.functional_call(self.layer, {"weight": tensors["weight"]}, (x,))
        return result + along_channels(self, tensors["bias"], result)

    @property
    def operator(self) -> str:
        """The operator's name in listings."""
        return f"Quantized{type(self.layer).__name__}"

    def describe(self) -> str:
        """The bits of the weights, for listings."""
        low, high = int(self.bits.min()), int(self.bits.max())
        return f"{low}-bit weights" if low == high else f"{low}..{high}-bit weights"

    def extra_repr(self) -> str:
        """Shown in the module's repr."""
        return self.describe()


def float_counterpart(module: nn.Module | None) -> nn.Module | None:
    """What a quantized module computes in float: a layer itself, a quantizer the identity.

    Returns:
        None for every other module, which computes the same in both.
    """
    if isinstance(module, QuantizedLayer):
        return module.layer
    return nn.Identity() if getattr(module, "fxq_kind", None) == "quantizer" else None


def along_channels(
    layer: QuantizedLayer, values: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """``[out]`` values shaped to be added to the output of a layer."""
    if layer.fxq_kind == "linear":
        return values
    return values.reshape(-1, *[1] * (output.dim() - 2))


def check_bits(bits: int) -> None:
    """The number of bits is one fxq has containers for.

    Raises:
        SpecError: It is not an integer from 1 to 8.
    """
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise SpecError(f"bits must be 1 to 8, not {bits!r}")


def check_levels(levels: torch.Tensor, signed: bool) -> None:
    """Activations on these levels can be rounded and multiplied as bytes.

    Args:
        levels: ``[count]`` int64; magnitudes.
        signed: Whether they have both signs.

    Raises:
        SpecError: They cannot, or are no set of levels.
    """
    is_set = levels.dtype == torch.int64 and levels.dim() == 1 and len(levels) >= 2
    if not is_set or int(levels[0]) != 0 or not bool((levels.diff() > 0).all()):
        raise SpecError(
            f"{levels.tolist()} are no levels",
            hint="give their magnitudes, integers (int64) that ascend from 0",
        )
    largest = LARGEST_SIGNED_LEVEL if signed else LARGEST_LEVEL
    if int(levels[-1]) > largest:
        raise SpecError(
            f"levels to {int(levels[-1])} do not fit the codes of a byte",
            hint=f"{'signed levels' if signed else 'levels'} of activations go to {largest}",
        )


def output_channels(layer: nn.Module) -> int:
    """How many output channels a convolution or linear has."""
    found: Any = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return int(found)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer's weight has its input channels first."""
    return bool(getattr(layer, "transposed", False))


def rows(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """``[out, in/groups * k]``: a weight with one row per output channel, whatever its layout.

    Args:
        layer: The layer the weight belongs to.
        weight: ``[out, in/groups, ...]``, or ``[in, out/groups, ...]`` where it is transposed.
    """
    if not is_transposed(layer):
        return weight.reshape(weight.shape[0], -1)
    groups = int(layer.groups)  # type: ignore[arg-type]
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return split.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def from_rows(layer: nn.Module, flat: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `rows`: a weight of the given shape from one row per output channel."""
    if not is_transposed(layer):
        return flat.reshape(shape)
    groups = int(layer.groups)  # type: ignore[arg-type]
    split = flat.reshape(groups, shape[1], shape[0] // groups, *shape[2:])
    return split.transpose(1, 2).reshape(shape).contiguous()


def channel_view(layer: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """``[out]`` values shaped to multiply the layer's weight."""
    weight: Any = layer.weight
    tail = [1] * (weight.dim() - 2)
    if not is_transposed(layer):
        return values.reshape(-1, 1, *tail)
    groups = int(layer.groups)  # type: ignore[arg-type]
    per_input = values.reshape(groups, 1, weight.shape[1])
    return per_input.expand(groups, weight.shape[0] // groups, -1).reshape(
        weight.shape[0], weight.shape[1], *tail
    )
