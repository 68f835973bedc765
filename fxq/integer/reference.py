"""The integer reference interpreter: slow, exact, and the definition of what the integers must be.

Accumulators are computed in float64 convolutions of integers, which is exact below 2**53. What
follows is written out in the float32 operations that `fxq.integer.program` lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fxq.integer.arguments import registers_in, substitute
from fxq.integer.float_layers import (
    CONVOLUTIONS,
    dynamic_quantizer,
    fake_quantizer,
    float_layer,
)
from fxq.integer.float_ops import build_module, resolve
from fxq.integer.layers import accumulator_scale
from fxq.integer.program import Grid, Instruction, IntegerProgram
from fxq.numerics.affine import dequantize, quantize


class Reference:
    """Runs an integer program by its definition.

    Args:
        program: The program.

    Example:
        >>> from fxq.integer.arguments import Register
        >>> step = Instruction("q", "quantize", ("x",), grid=Grid(0.5, 1, 2))
        >>> program = IntegerProgram(("x",), [step], Register("q"), {})
        >>> Reference(program)(torch.tensor([-1.0, 0.4, 9.0])).tolist()
        [0, 2, 3]
    """

    def __init__(self, program: IntegerProgram) -> None:
        self.program = program
        self._modules: dict[str, Any] = {}

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """The output of the program."""
        return self.run(*inputs)[0]

    def run(self, *inputs: torch.Tensor) -> tuple[Any, dict[str, Any]]:
        """The output, and the value of every register (codes as int32)."""
        values: dict[str, Any] = dict(zip(self.program.inputs, inputs, strict=True))
        grids = self.program.grids()
        with torch.no_grad():
            for step in self.program:
                values[step.name] = _RULES[step.op](self, step, values, grids)
        return substitute(self.program.output, values), values

    def step(self, step: Instruction, values: dict[str, Any]) -> Any:
        """What one instruction computes from the registers it reads (codes as int32)."""
        with torch.no_grad():
            return _RULES[step.op](self, step, values, self.program.grids())

    # ---- rules -------------------------------------------------------------------------------

    def _quantize(self, step: Instruction, values: Any, grids: Any) -> torch.Tensor:
        return _to_codes(values[step.inputs[0]], _grid(step))

    def _dequantize(self, step: Instruction, values: Any, grids: Any) -> Any:
        return _to_float(values[step.inputs[0]], grids[step.inputs[0]])

    def _requantize(self, step: Instruction, values: Any, grids: Any) -> torch.Tensor:
        return _to_codes(self._dequantize(step, values, grids), _grid(step))

    def _lookup(self, step: Instruction, values: Any, grids: Any) -> torch.Tensor:
        codes = values[step.inputs[0]].long()
        return self.program.tensor(step, "table")[codes].to(torch.int32)

    def _fake_quantize(self, step: Instruction, values: Any, grids: Any) -> torch.Tensor:
        return fake_quantizer(self.program, step)(values[step.inputs[0]])

    def _dynamic_quantize(self, step: Instruction, values: Any, grids: Any) -> torch.Tensor:
        return dynamic_quantizer(step)(values[step.inputs[0]])

    def _conv(self, step: Instruction, values: Any, grids: Any) -> torch.Tensor:
        source = grids.get(step.inputs[0])
        if source is None:
            return self._float_layer(step, values)
        codes = values[step.inputs[0]].double() - source.zero_point
        weight = self.program.tensor(step, "weight").double()
        attributes = step.attributes
        accumulator = CONVOLUTIONS[codes.dim()](
            codes,
            weight,
            None,
            attributes["stride"],
            attributes["padding"],
            attributes["dilation"],
            attributes["groups"],
        )
        return self._rescale(step, accumulator, source, dim=1)

    def _linear(self, step: Instruction, values: Any, grids: Any) -> torch.Tensor:
        source = grids.get(step.inputs[0])
        if source is None:
            return self._float_layer(step, values)
        codes = values[step.inputs[0]].double() - source.zero_point
        weight = self.program.tensor(step, "weight").double()
        accumulator = F.linear(codes, weight)
        if step.grid is not None:
            return self._rescale(step, accumulator, source, dim=-1)
        unit = accumulator_scale(source.scale, self.program.tensor(step, "scale"))
        total = (accumulator + self.program.tensor(step, "bias")).float()
        product = total * unit
        return product.clamp(min=0) if step.attributes["relu"] else product

    def _float_layer(self, step: Instruction, values: Any) -> torch.Tensor:
        if step.name not in self._modules:
            self._modules[step.name] = float_layer(self.program, step)
        result: torch.Tensor = self._modules[step.name](values[step.inputs[0]])
        return result

    def _rescale(
        self, step: Instruction, accumulator: torch.Tensor, source: Grid, dim: int
    ) -> torch.Tensor:
        """Accumulators as codes of the output grid."""
        grid = _grid(step)
        shape = [1] * accumulator.dim()
        shape[dim] = -1
        unit = accumulator_scale(source.scale, self.program.tensor(step, "scale"))
        multiplier = (unit / torch.tensor(grid.scale, dtype=torch.float32)).reshape(shape)
        bias = self.program.tensor(step, "bias").float().reshape(shape)
        rounded = torch.round((accumulator.float() + bias) * multiplier) + grid.zero_point
        low = grid.zero_point if step.attributes["relu"] else 0
        return rounded.clamp(low, grid.top).to(torch.int32)

    def _add(self, step: Instruction, values: Any, grids: Any) -> torch.Tensor:
        grid = _grid(step)
        left, right = (_to_float(values[name], grids[name]) for name in step.inputs)
        total = left + right
        inverse = torch.tensor(1.0) / torch.tensor(grid.scale, dtype=torch.float32)
        rounded = torch.round(total * inverse) + grid.zero_point
        low = grid.zero_point if step.attributes["relu"] else 0
        return rounded.clamp(low, grid.top).to(torch.int32)

    def _global_avg_pool(self, step: Instruction, values: Any, grids: Any) -> torch.Tensor:
        source, grid = grids[step.inputs[0]], _grid(step)
        codes = values[step.inputs[0]].long()
        count = codes.shape[2] * codes.shape[3]
        total = codes.sum((2, 3), keepdim=step.attributes["keepdim"]) - count * source.zero_point
        multiplier = average_multiplier(source, grid, count)
        rounded = torch.round(total.float() * multiplier) + grid.zero_point
        return rounded.clamp(0, grid.top).to(torch.int32)

    def _max_pool(self, step: Instruction, values: Any, grids: Any) -> torch.Tensor:
        pooled: torch.Tensor = F.max_pool2d(values[step.inputs[0]].float(), **step.attributes)
        return pooled.to(torch.int32)

    def _cat(self, step: Instruction, values: Any, grids: Any) -> torch.Tensor:
        return torch.cat([values[name] for name in step.inputs], step.attributes["dim"])

    def _relu(self, step: Instruction, values: Any, grids: Any) -> torch.Tensor:
        codes: torch.Tensor = values[step.inputs[0]]
        return codes.clamp(_grid(step).zero_point, step.attributes["top"])

    def _pad(self, step: Instruction, values: Any, grids: Any) -> torch.Tensor:
        zero = _grid(step).zero_point
        return F.pad(values[step.inputs[0]], step.attributes["pad"], value=zero)

    def _reshape(self, step: Instruction, values: Any, grids: Any) -> Any:
        return reshape(step, values[step.inputs[0]], values)

    def _constant(self, step: Instruction, values: Any, grids: Any) -> torch.Tensor:
        return self.program.tensor(step, "value")

    def _float(self, step: Instruction, values: Any, grids: Any) -> Any:
        return call_float(step, self._callable(step), values)

    def _callable(self, step: Instruction) -> Callable[..., Any]:
        if step.name not in self._modules:
            self._modules[step.name] = float_callable(self.program, step)
        found: Callable[..., Any] = self._modules[step.name]
        return found


_RULES: dict[str, Callable[[Reference, Instruction, Any, Any], Any]] = {
    "quantize": Reference._quantize,
    "dequantize": Reference._dequantize,
    "requantize": Reference._requantize,
    "lookup": Reference._lookup,
    "fake_quantize": Reference._fake_quantize,
    "dynamic_quantize": Reference._dynamic_quantize,
    "conv": Reference._conv,
    "linear": Reference._linear,
    "add": Reference._add,
    "global_avg_pool": Reference._global_avg_pool,
    "max_pool": Reference._max_pool,
    "cat": Reference._cat,
    "relu": Reference._relu,
    "pad": Reference._pad,
    "reshape": Reference._reshape,
    "constant": Reference._constant,
    "float": Reference._float,
    "module": Reference._float,
}


def average_multiplier(source: Grid, grid: Grid, count: int) -> torch.Tensor:
    """``[]`` float32: what turns a sum of ``count`` centred codes into output codes."""
    scale = torch.tensor(source.scale, dtype=torch.float32)
    return scale / (torch.tensor(float(count)) * torch.tensor(grid.scale, dtype=torch.float32))


def float_callable(program: IntegerProgram, step: Instruction) -> Callable[..., Any]:
    """What a float instruction calls: a listed operator, a rebuilt module, or the user's own."""
    foreign = step.attributes.get("foreign")
    if foreign in program.foreign:
        return program.foreign[foreign]
    if step.op == "float":
        return resolve(step.attributes["target"])
    tensors = {role: program.tensors[name] for role, name in step.tensors.items()}
    return build_module(step.attributes["module"], tensors)


def call_float(step: Instruction, function: Callable[..., Any], values: dict[str, Any]) -> Any:
    """The result of a float instruction."""
    arguments = substitute(step.attributes["arguments"], values)
    keywords = substitute(step.attributes["keywords"], values)
    return function(*arguments, **keywords)


def reshape(step: Instruction, codes: Any, values: dict[str, Any]) -> Any:
    """Codes moved by a reshape instruction."""
    arguments = step.attributes["arguments"]
    keywords = step.attributes.get("keywords", {})
    if next(registers_in((arguments, keywords)), None) is not None:
        arguments, keywords = substitute(arguments, values), substitute(keywords, values)
    call = step.attributes["call"]
    if call == "getitem":
        return codes[arguments[0]]
    if call in ("pixel_shuffle", "pixel_unshuffle"):
        return getattr(F, call)(codes, *arguments, **keywords)
    name = "reshape" if call == "view" else call
    return getattr(codes, name)(*arguments, **keywords)


def in_layout(values: torch.Tensor) -> torch.Tensor:
    """The values with the strides that float islands find them in: images channels-last.

    What an island sums depends on its kernel, and torch chooses kernels by strides: by those of
    sizes of 1, too, which `torch.Tensor.contiguous` leaves alone.
    """
    image = torch.channels_last if values.dim() == 4 else torch.contiguous_format
    result = torch.empty_like(values, memory_format=image)
    return values if values.stride() == result.stride() else result.copy_(values)


def _grid(step: Instruction) -> Grid:
    assert step.grid is not None
    return step.grid


def _to_codes(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    return quantize(x, grid.scale, grid.zero_point, 0, grid.top)


def _to_float(codes: Any, grid: Grid) -> Any:
    if isinstance(codes, (tuple, list)):
        return type(codes)(_to_float(item, grid) for item in codes)
    return in_layout(dequantize(codes, grid.scale, grid.zero_point))
