"""Everything that touches ``torch.ops.quantized`` or a quantized dtype.

Torch has announced that quantized tensors will go; when they do, this file changes, nothing else.
Codes travel between kernels as ``quint8`` tensors, which are bytes with a scale and a zero point
attached; `wrap` and `unwrap` change the label without copying the bytes.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fxq.integer.layers import float_bias

ENGINES = ("fbgemm", "x86", "onednn")
DEFAULT_ENGINE = "fbgemm"
"""The one whose results are those of the reference, on every CPU that has it."""
"""``x86`` takes the faster exact kernel of the other two for each layer on this CPU."""

EXACT_LIMIT = 2**24
"""Integers below this are exact in float32."""

_CONV = {1: "conv1d", 2: "conv2d", 3: "conv3d"}


class _EngineSetting:
    """Torch's global engine setting, shared by threads.

    It is what it was before once nobody needs another. Threads that need the same engine run
    together; one that needs another waits for them.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._engine = ""
        self._before = ""

    @contextlib.contextmanager
    def set_to(self, engine: str) -> Iterator[None]:
        """The setting is this engine inside."""
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0 or self._engine == engine)
            if self._users == 0:
                self._before = torch.backends.quantized.engine
                torch.backends.quantized.engine = engine
                self._engine = engine
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                if self._users == 0:
                    torch.backends.quantized.engine = self._before
                    self._changed.notify_all()


engine_setting = _EngineSetting()


@functools.cache
def is_exact(engine: str) -> bool:
    """Whether an engine's dense kernels multiply the largest bytes without 16-bit saturation here.

    Found by running one product of the largest operands, because what a kernel does depends on the
    CPU and on environment variables that restrict its instructions.
    """
    weight = torch.full((1, 64), 127, dtype=torch.int8)
    one = torch.ones(1)
    kernel = Linear(weight, one, torch.zeros(1, dtype=torch.int32), one, False, engine)
    codes = wrap(torch.full((1, 64), 255, dtype=torch.uint8), 1.0, 0)
    total = 64 * 127 * 255
    return int(unwrap(kernel(codes, total / 200.0, 0))) == 200


def supported_engines() -> tuple[str, ...]:
    """The engines this build of torch has."""
    built = torch.backends.quantized.supported_engines
    return tuple(name for name in ENGINES if name in built)


@contextlib.contextmanager
def packing_for(engine: str) -> Iterator[None]:
    """Weights packed inside belong to this engine, and torch's warnings about them are silent."""
    with engine_setting.set_to(engine), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def wrap(codes: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """The same bytes, labelled with a scale and zero point; nothing is copied."""
    return relabel(codes, scale, zero_point)


def unwrap(labelled: torch.Tensor) -> torch.Tensor:
    """The bytes of a labelled tensor; nothing is copied."""
    return torch.empty(0, dtype=torch.uint8).set_(
        labelled.untyped_storage(),
        labelled.storage_offset(),
        labelled.shape,
        labelled.stride(),
    )


def relabel(labelled: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """The same bytes with another label; nothing is copied."""
    other: torch.Tensor = torch._empty_affine_quantized(
        [0], scale=scale, zero_point=zero_point, dtype=torch.quint8
    )
    return other.set_(
        labelled.untyped_storage(),
        labelled.storage_offset(),
        labelled.shape,
        labelled.stride(),
    )


def quantize(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """Labelled codes of a float tensor, in its own memory layout; the first layer reorders best.

    Raises:
        RuntimeError: The tensor is not float32.
    """
    if x.dtype is not torch.float32:
        raise RuntimeError(f"codes are made of float32, not {str(x.dtype).removeprefix('torch.')}")
    # Torch's kernel would multiply by 1 / scale and round with the zero point in; what it is given
    # here is in steps already, and rounded wherever there is a zero point to add.
    steps = x / scale
    if zero_point:
        steps.round_()
    codes = torch.quantize_per_tensor(steps, 1.0, zero_point, torch.quint8)
    return relabel(codes, scale, zero_point)


def looked_up(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``table[codes]``, images channels-last.

    Args:
        codes: ``[...]`` uint8.
        table: ``[256]`` uint8.
    """
    is_image = codes.dim() == 4
    ordered = codes.permute(0, 2, 3, 1) if is_image else codes
    # One index per element, of 4 bytes: five times as fast as indexing with a tensor.
    found = table.index_select(0, ordered.reshape(-1).int()).view(ordered.shape)
    return found.permute(0, 3, 1, 2) if is_image else found


def onednn_is_right(weight: torch.Tensor, geometry: dict[str, Any]) -> bool:
    """Whether onednn's kernels compute a convolution; found by comparing random ones.

    Kernels over volumes are wrong, or end the process, where a dimension of size one is padded, and
    kernels over images where a window sees nothing but padding.
    """
    return weight.dim() < 5 and not sees_only_padding(weight, geometry)


def sees_only_padding(weight: torch.Tensor, geometry: dict[str, Any]) -> bool:
    """Whether some window of a convolution can lie in the padding altogether."""
    sizes = zip(geometry["dilation"], weight.shape[2:], geometry["padding"], strict=True)
    return any(pad > step * (size - 1) or pad % step for step, size, pad in sizes)


class Conv:
    """A packed integer convolution.

    Args:
        weight: ``[out, in/groups, ...]`` int8.
        scale: ``[out]`` float32.
        bias: ``[out]`` int32, in accumulator units.
        unit: ``[out]`` float32; value of an accumulator unit.
        geometry: Stride, padding, dilation and groups.
        relu: Whether codes below the zero point are raised to it.
        engine: ``fbgemm`` or ``onednn``.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        unit: torch.Tensor,
        geometry: dict[str, Any],
        relu: bool,
        engine: str,
    ) -> None:
        name = _CONV[weight.dim() - 2]
        pack = getattr(torch.ops.quantized, f"{name}_prepack")
        with packing_for(engine):
            self.packed = pack(
                _labelled_weight(weight, scale),
                _exact_bias(bias, unit),
                list(geometry["stride"]),
                list(geometry["padding"]),
                _meant_dilation(geometry["dilation"], weight.shape[2:]),
                geometry["groups"],
            )
        self.engine = engine
        self.run = getattr(torch.ops.quantized, self.operator(name, relu))
        self._stride = geometry["stride"][-1]
        self._reach = geometry["dilation"][-1] * (weight.shape[-1] - 1) + 1
        self._reach -= 2 * geometry["padding"][-1]
        self._moves = engine == "onednn" and (self._stride > 1 or weight.shape[-1] > 1)

    @staticmethod
    def operator(name: str, relu: bool) -> str:
        """The name of the operator that runs it."""
        return f"{name}_relu" if relu else name

    def __call__(self, codes: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
        """Labelled output codes."""
        narrow = self._is_narrow(codes)
        source = self._widened(codes) if narrow else codes
        result: torch.Tensor = self.run(source, self.packed, scale, zero_point)
        return _first_column(result) if narrow else result

    def _is_narrow(self, codes: torch.Tensor) -> bool:
        """Whether the output is one column wide, which some onednn kernels get wrong."""
        return self._moves and codes.shape[-1] - self._reach < self._stride

    def _widened(self, codes: torch.Tensor) -> torch.Tensor:
        """The codes with as many columns of zero more as make another column of output."""
        scale, zero_point = codes.q_scale(), codes.q_zero_point()
        wide = F.pad(unwrap(codes), (0, self._stride), value=zero_point)
        return wrap(wide, scale, zero_point)


class AddingConv(Conv):
    """A two-dimensional onednn convolution that adds another tensor before it rounds.

    The arguments are those of `Conv`.
    """

    @staticmethod
    def operator(name: str, relu: bool) -> str:
        """The name of the operator that runs it."""
        return f"{name}_add_relu" if relu else f"{name}_add"

    def add_to(
        self, total: torch.Tensor, codes: torch.Tensor, scale: float, zero_point: int
    ) -> torch.Tensor:
        """Labelled codes of the sum of a tensor and the convolution; the tensor is overwritten."""
        narrow = self._is_narrow(codes)
        if narrow:
            codes, total = self._widened(codes), self._widened(total)
        with engine_setting.set_to("onednn"):  # the operator looks at the setting when it runs
            result: torch.Tensor = self.run(codes, total, self.packed, scale, zero_point)
        return _first_column(result) if narrow else result


class Linear:
    """A packed integer linear; the arguments are those of `Conv`, ``weight: [out, in]``."""

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        unit: torch.Tensor,
        relu: bool,
        engine: str,
    ) -> None:
        with packing_for(engine):
            self.packed = torch.ops.quantized.linear_prepack(
                _labelled_weight(weight, scale), _exact_bias(bias, unit)
            )
        self.engine = engine
        self.run = torch.ops.quantized.linear_relu if relu else torch.ops.quantized.linear

    def __call__(self, codes: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
        """Labelled output codes."""
        result: torch.Tensor = self.run(codes, self.packed, scale, zero_point)
        return result


class FloatLinear:
    """A packed integer linear to float32, always on fbgemm.

    The kernel gives ``acc + bias`` as a float, exactly, because all its scales are one and its sums
    are integers below 2**24; wider layers are packed in parts.

    Args:
        weight: ``[out, in]`` int8.
        bias: ``[out]`` int32, in accumulator units.
        unit: ``[out]`` float32; value of an accumulator unit.
        relu: Whether negative results become zero.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, unit: torch.Tensor, relu: bool
    ) -> None:
        whole = largest_sum(weight, bias) < EXACT_LIMIT
        self._width = weight.shape[1] if whole else EXACT_LIMIT // (255 * 128)
        self._bias = None if whole else bias
        self._parts = [
            _unscaled(part, bias if whole else torch.zeros_like(bias))
            for part in torch.split(weight, self._width, 1)
        ]
        self._unit = unit
        self._relu = relu

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        """``[..., out]`` float32: the sums of the products of labelled codes, in real units."""
        zero_point = codes.q_zero_point()
        parts = torch.split(relabel(codes, 1.0, zero_point).dequantize(), self._width, -1)
        sums = [
            torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                part, 1.0, zero_point, packed
            )
            for part, packed in zip(parts, self._parts, strict=True)
        ]
        product: torch.Tensor = self._total(sums).mul_(self._unit)
        return product.clamp_(min=0) if self._relu else product

    def _total(self, sums: list[torch.Tensor]) -> torch.Tensor:
        """The parts and the bias added up, and rounded to float32 once."""
        if self._bias is None:
            return sums[0]
        return sum((part.double() for part in sums), self._bias.double()).float()


def add(
    left: torch.Tensor, right: torch.Tensor, scale: float, zero_point: int, relu: bool
) -> torch.Tensor:
    """Labelled codes of the sum of two labelled tensors."""
    run = torch.ops.quantized.add_relu if relu else torch.ops.quantized.add
    result: torch.Tensor = run(left, right, scale, zero_point)
    return result


def _first_column(codes: torch.Tensor) -> torch.Tensor:
    image = torch.channels_last if codes.dim() == 4 else torch.contiguous_format
    return codes[..., :1].contiguous(memory_format=image)


def _meant_dilation(dilation: tuple[int, ...], sizes: torch.Size) -> list[int]:
    """Dilation, but 1 along kernels of size 1, where it means nothing and onednn can crash."""
    return [step if size > 1 else 1 for step, size in zip(dilation, sizes, strict=True)]


def _labelled_weight(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # The zero points must be integers: float ones select another scheme, and garbage, silently.
    zero_points = torch.zeros(len(scale), dtype=torch.int64)
    labelled: torch.Tensor = torch._make_per_channel_quantized_tensor(
        weight.contiguous(), scale.double(), zero_points, 0
    )
    return labelled


def largest_sum(weight: torch.Tensor, bias: torch.Tensor) -> int:
    """What no sum of products with bytes, or with bytes around a zero point, and a bias exceeds."""
    worst = weight.flatten(1).long().abs().sum(1) * 255 + bias.long().abs()
    return int(worst.max())


def _unscaled(weight: torch.Tensor, bias: torch.Tensor) -> Any:
    """Packed weights of a linear whose results are in accumulator units."""
    with packing_for("fbgemm"):
        one = torch.ones(len(weight))
        return torch.ops.quantized.linear_prepack(_labelled_weight(weight, one), bias.float())


def _exact_bias(bias: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    value, _ = float_bias(bias, unit)
    return value
