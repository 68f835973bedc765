"""From instructions to calls: the kernel and the byte offset of each, with weights packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fxq.integer.arguments import registers_in
from fxq.integer.float_layers import dynamic_quantizer, fake_quantizer, float_layer
from fxq.integer.layers import accumulator_scale
from fxq.integer.program import Instruction, IntegerProgram
from fxq.integer.reference import average_multiplier, call_float, float_callable, in_layout, reshape
from fxq.integer.saturation import is_proven

from . import _kernels as kernels
from ._fusion import fuse_residual_adds, may_overwrite
from ._offsets import byte_offsets
from ._saturation import depthwise_saturates, exact_layer, may_saturate

Run = Callable[[dict[str, Any]], Any]


class Builder:
    """Chooses kernels and byte offsets, and packs weights."""

    def __init__(self, program: IntegerProgram, engine: str) -> None:
        self.engine = engine
        self.program = program  # which layers can add is asked of the unfused program
        self.grids = program.grids()
        self.program = fuse_residual_adds(program, self._can_add)
        self.grids = self.program.grids()
        self.offsets = byte_offsets(self.program, self._tolerates_zero_point)

    def steps(self) -> list[tuple[str, Run, tuple[str, ...]]]:
        """Each instruction as a function of the registers, and those it is the last to read."""
        finished = _last_reads(self.program)
        return [
            (step.name, _BUILDERS[step.op](self, step), finished[step.name])
            for step in self.program
        ]

    def label(self, name: str) -> tuple[float, int]:
        """Scale and zero point of a register's bytes."""
        grid = self.grids[name]
        assert grid is not None
        return grid.scale, grid.zero_point + self.offsets[name]

    def bounded(self, step: Instruction, run: Run) -> Run:
        """The same, with bytes clamped to the codes of the grid where saturation does not do it."""
        grid, offset = self.grids[step.name], self.offsets[step.name]
        assert grid is not None
        if grid.bits == 8 or offset == 255 - grid.top:
            return run
        low, high = offset, offset + grid.top

        def clamped(values: dict[str, Any]) -> torch.Tensor:
            result: torch.Tensor = run(values)
            kernels.unwrap(result).clamp_(low, high)
            return result

        return clamped

    def engine_for(self, step: Instruction) -> str:
        """The kernel library of a layer; ``float`` where all kernels may saturate on this CPU."""
        source = self.grids.get(step.inputs[0])
        if may_saturate(self.engine) and not is_proven(self.program, step, source):
            return "float"
        if depthwise_saturates(self.program, step):
            return "onednn"
        if "onednn" not in kernels.supported_engines() or not self._suits_onednn(step):
            return "fbgemm"
        if self.engine == "x86":
            return "onednn" if kernels.is_exact("onednn") else "fbgemm"
        return self.engine

    def _suits_onednn(self, step: Instruction) -> bool:
        weight = self.program.tensor(step, "weight")
        return step.op == "linear" or kernels.onednn_is_right(weight, step.attributes)

    def _can_add(self, step: Instruction) -> bool:
        """Whether the kernel of a convolution can add a tensor before it rounds."""
        stride = step.attributes["stride"]
        return self.engine_for(step) == "onednn" and len(stride) == 2 and stride[-1] == 1

    def _tolerates_zero_point(self, step: Instruction) -> bool:
        """Whether an instruction reads bytes with any zero point exactly and at full speed."""
        if step.op not in ("conv", "conv_add", "linear"):
            return True
        engine = self.engine_for(step)
        if engine == "float":
            return True
        if not kernels.is_exact(engine):
            return False  # kernels that saturate in 16 bits must see small bytes
        return engine == "fbgemm" or self._pads_nothing(step)

    def _pads_nothing(self, step: Instruction) -> bool:
        return step.op == "linear" or not any(step.attributes["padding"])

    # ---- one builder per instruction ---------------------------------------------------------

    def quantize(self, step: Instruction) -> Run:
        source = step.inputs[0]
        scale, zero_point = self.label(step.name)
        return self.bounded(
            step, lambda values: kernels.quantize(values[source], scale, zero_point)
        )

    def dequantize(self, step: Instruction) -> Run:
        source = step.inputs[0]
        return lambda values: _dequantize(values[source])

    def requantize(self, step: Instruction) -> Run:
        source = step.inputs[0]
        scale, zero_point = self.label(step.name)
        return self.bounded(
            step,
            lambda values: kernels.quantize(values[source].dequantize(), scale, zero_point),
        )

    def lookup(self, step: Instruction) -> Run:
        source = step.inputs[0]
        scale, zero_point = self.label(step.name)
        table = self.program.tensor(step, "table").roll(self.offsets[source])
        table = table + self.offsets[step.name]

        def run(values: dict[str, Any]) -> torch.Tensor:
            codes = kernels.looked_up(kernels.unwrap(values[source]), table)
            return kernels.wrap(codes, scale, zero_point)

        return run

    def fake_quantize(self, step: Instruction) -> Run:
        source, run = step.inputs[0], fake_quantizer(self.program, step)
        return lambda values: run(values[source])

    def dynamic_quantize(self, step: Instruction) -> Run:
        source, run = step.inputs[0], dynamic_quantizer(step)
        return lambda values: run(values[source])

    def _float_layer(self, step: Instruction) -> Run:
        source, run = step.inputs[0], float_layer(self.program, step)
        return lambda values: run(values[source])

    def _exact_layer(self, step: Instruction) -> Run:
        """The layer in float64, where every kernel may saturate."""
        source, is_float = step.inputs[0], step.grid is None
        low, exact = self.offsets[source], exact_layer(self.program, step)

        def run(values: dict[str, Any]) -> torch.Tensor:
            found = exact(kernels.unwrap(values[source]).int() - low)
            if is_float:
                return found
            codes = (found + self.offsets[step.name]).to(torch.uint8)
            return kernels.wrap(_channels_last(codes), *self.label(step.name))

        return run

    def _layer_tensors(self, step: Instruction) -> dict[str, torch.Tensor]:
        source = self.grids[step.inputs[0]]
        assert source is not None
        scale = self.program.tensor(step, "scale")
        return {
            "weight": self.program.tensor(step, "weight"),
            "scale": scale,
            "bias": self.program.tensor(step, "bias"),
            "unit": accumulator_scale(source.scale, scale),
        }

    def conv(self, step: Instruction) -> Run:
        if self.grids.get(step.inputs[0]) is None:
            return self._float_layer(step)
        if self.engine_for(step) == "float":
            return self._exact_layer(step)
        engine, tensors = self.engine_for(step), self._layer_tensors(step)
        source = step.inputs[0]
        input_scale, input_zero = self.label(source)
        folded = engine == "onednn" and self._fold_zero_point(step, tensors, input_zero)
        kernel = kernels.Conv(
            **tensors, geometry=step.attributes, relu=step.attributes["relu"], engine=engine
        )
        scale, zero_point = self.label(step.name)
        if not folded:
            return self.bounded(step, lambda values: kernel(values[source], scale, zero_point))

        def run(values: dict[str, Any]) -> torch.Tensor:
            return kernel(kernels.relabel(values[source], input_scale, 0), scale, zero_point)

        return self.bounded(step, run)

    def _fold_zero_point(
        self, step: Instruction, tensors: dict[str, torch.Tensor], zero_point: int
    ) -> bool:
        """Move ``sum((q - z) w) = sum(q w) - z sum(w)`` into the bias, where nothing is padded.

        onednn convolutions are up to twice as slow where the zero point of the input is not zero.
        """
        if zero_point == 0 or not self._pads_nothing(step):
            return False
        weight = tensors["weight"].flatten(1).long()
        if int(weight.abs().sum(1).max()) * 255 >= kernels.EXACT_LIMIT:
            return False
        tensors["bias"] = tensors["bias"].long() - zero_point * weight.sum(1)
        return True

    def conv_add(self, step: Instruction) -> Run:
        tensors, relu = self._layer_tensors(step), step.attributes["relu"]
        source, addend = step.inputs
        input_scale, input_zero = self.label(source)
        folded = self._fold_zero_point(step, tensors, input_zero)
        kernel = kernels.AddingConv(**tensors, geometry=step.attributes, relu=relu, engine="onednn")
        overwrite = may_overwrite(self.program, step)
        scale, zero_point = self.label(step.name)

        def run(values: dict[str, Any]) -> torch.Tensor:
            total = values[addend] if overwrite else values[addend].clone()
            codes = kernels.relabel(values[source], input_scale, 0) if folded else values[source]
            return kernel.add_to(total, codes, scale, zero_point)

        return self.bounded(step, run)

    def linear(self, step: Instruction) -> Run:
        source = step.inputs[0]
        if self.grids.get(source) is None:
            return self._float_layer(step)
        if self.engine_for(step) == "float":
            return self._exact_layer(step)
        tensors, relu = self._layer_tensors(step), step.attributes["relu"]
        if step.grid is None:
            del tensors["scale"]
            wide = kernels.FloatLinear(**tensors, relu=relu)
            return lambda values: wide(values[source])
        kernel = kernels.Linear(**tensors, relu=relu, engine=self.engine_for(step))
        scale, zero_point = self.label(step.name)
        return self.bounded(step, lambda values: kernel(values[source], scale, zero_point))

    def add(self, step: Instruction) -> Run:
        left, right = step.inputs
        scale, zero_point = self.label(step.name)
        relu = step.attributes["relu"]
        return self.bounded(
            step, lambda values: kernels.add(values[left], values[right], scale, zero_point, relu)
        )

    def global_avg_pool(self, step: Instruction) -> Run:
        source = step.inputs[0]
        grid, input_grid = self.grids[step.name], self.grids[source]
        assert grid is not None
        assert input_grid is not None
        centre = input_grid.zero_point + self.offsets[source]
        scale, zero_point = self.label(step.name)
        keep, low = step.attributes["keepdim"], self.offsets[step.name]
        top = grid.top + low

        multipliers: dict[int, float] = {}

        def run(values: dict[str, Any]) -> torch.Tensor:
            codes = kernels.unwrap(values[source])
            count = codes.shape[2] * codes.shape[3]
            if count not in multipliers:
                multipliers[count] = float(average_multiplier(input_grid, grid, count))
            total = codes.sum((2, 3), keepdim=keep, dtype=torch.int32).sub_(count * centre)
            mean = total.to(torch.float32).mul_(multipliers[count])
            rounded = mean.round_().add_(zero_point).clamp_(low, top)
            return kernels.wrap(rounded.to(torch.uint8), scale, zero_point)

        return run

    def max_pool(self, step: Instruction) -> Run:
        source, attributes = step.inputs[0], step.attributes
        return lambda values: F.max_pool2d(values[source], **attributes)

    def cat(self, step: Instruction) -> Run:
        scale, zero_point = self.label(step.name)
        inputs, dim = step.inputs, step.attributes["dim"]
        return lambda values: kernels.wrap(
            torch.cat([kernels.unwrap(values[name]) for name in inputs], dim), scale, zero_point
        )

    def relu(self, step: Instruction) -> Run:
        scale, zero_point = self.label(step.name)
        source, top = step.inputs[0], step.attributes["top"] + self.offsets[step.name]
        return lambda values: kernels.wrap(
            kernels.unwrap(values[source]).clamp(zero_point, top), scale, zero_point
        )

    def pad(self, step: Instruction) -> Run:
        scale, zero_point = self.label(step.name)
        source, pad = step.inputs[0], step.attributes["pad"]
        return lambda values: kernels.wrap(
            _channels_last(F.pad(kernels.unwrap(values[source]), pad, value=zero_point)),
            scale,
            zero_point,
        )

    def reshape(self, step: Instruction) -> Run:
        source = step.inputs[0]
        scale, zero_point = self.label(step.name)

        def run(values: dict[str, Any]) -> Any:
            value = values[source]
            bytes_: Any = value if isinstance(value, (tuple, list)) else kernels.unwrap(value)
            return _wrap_all(reshape(step, bytes_, values), scale, zero_point)

        return run

    def constant(self, step: Instruction) -> Run:
        value = self.program.tensor(step, "value")
        return lambda values: value

    def float(self, step: Instruction) -> Run:
        function = float_callable(self.program, step)
        return lambda values: call_float(step, function, values)


def _wrap_all(value: Any, scale: float, zero_point: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_wrap_all(item, scale, zero_point) for item in value)
    if value.dtype is torch.quint8:
        return value
    return kernels.wrap(_channels_last(value), scale, zero_point)


def _channels_last(codes: torch.Tensor) -> torch.Tensor:
    return codes.contiguous(memory_format=torch.channels_last) if codes.dim() == 4 else codes


def _dequantize(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_dequantize(item) for item in value)
    return in_layout(value.dequantize())


_BUILDERS: dict[str, Callable[[Builder, Instruction], Run]] = {
    "quantize": Builder.quantize,
    "dequantize": Builder.dequantize,
    "requantize": Builder.requantize,
    "lookup": Builder.lookup,
    "fake_quantize": Builder.fake_quantize,
    "dynamic_quantize": Builder.dynamic_quantize,
    "conv": Builder.conv,
    "conv_add": Builder.conv_add,
    "linear": Builder.linear,
    "add": Builder.add,
    "global_avg_pool": Builder.global_avg_pool,
    "max_pool": Builder.max_pool,
    "cat": Builder.cat,
    "relu": Builder.relu,
    "pad": Builder.pad,
    "reshape": Builder.reshape,
    "constant": Builder.constant,
    "float": Builder.float,
    "module": Builder.float,
}


def _last_reads(program: IntegerProgram) -> dict[str, tuple[str, ...]]:
    """For each instruction, the registers nobody reads after it."""
    last: dict[str, str] = {}
    for step in program:
        for name in step.reads:
            last[name] = step.name
    kept = set(registers_in(program.output))
    finished: dict[str, list[str]] = {step.name: [] for step in program}
    for name, reader in last.items():
        if name not in kept:
            finished[reader].append(name)
    return {name: tuple(names) for name, names in finished.items()}
