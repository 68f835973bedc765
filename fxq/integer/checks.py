"""What a stored instruction must look like before any kernel sees it.

An artifact may have been changed by anyone. A kernel given a stride of zero, or weights of another
dtype, ends the process instead of raising, so the shape of everything is checked first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fxq.errors import ArtifactError, SpecError
from fxq.graph.call_ops import RESHAPES
from fxq.integer.float_layers import dynamic_quantizer

if TYPE_CHECKING:
    from fxq.integer.program import Grid, Instruction, IntegerProgram

RESHAPE_CALLS = frozenset({*RESHAPES, "getitem", "pixel_shuffle", "pixel_unshuffle"})
"""What a reshape instruction may call."""

_LAYERS = frozenset(["conv", "linear"])
_ROUNDS_FLOATS = frozenset(["fake_quantize", "dynamic_quantize"])
_FLOAT_RESULT = frozenset([*_ROUNDS_FLOATS, "dequantize", "float", "module", "constant"])
_FLOAT_INPUT = frozenset(["quantize", "float", "module", "constant"])
_KEEPS_GRID = frozenset(["cat", "max_pool", "relu", "pad", "reshape"])
_INPUTS = {"add": 2, "constant": 0}
_ANY_INPUTS = frozenset(["cat", "float", "module"])
_POOL = frozenset(["kernel_size", "stride", "padding", "dilation", "ceil_mode"])


def check_step(program: IntegerProgram, step: Instruction, grids: dict[str, Grid | None]) -> None:
    """An instruction has what its kernel needs.

    Args:
        program: The program it belongs to.
        step: The instruction.
        grids: The grids of the registers written before it; None for floats.

    Raises:
        ArtifactError: It has not.
    """
    try:
        sources = [grids[name] for name in step.inputs]
        _check_grids(step, sources)
        if step.op in _LAYERS:
            _check_bias(program.tensor(step, "bias"), of_codes=sources[0] is not None)
        _CHECKS.get(step.op, _nothing)(program, step)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtifactError(
            f"the {step.op} instruction is damaged: {type(error).__name__} {error}",
            where=f"%{step.name}",
            hint="compile again; the file was changed",
        ) from error


def _check_grids(step: Instruction, sources: list[Grid | None]) -> None:
    if step.op not in _ANY_INPUTS and len(sources) != _INPUTS.get(step.op, 1):
        raise ValueError(f"it reads {len(sources)} registers")
    if not _reads_what_it_may(step, sources):
        raise ValueError("it reads a float, or should")
    if step.grid is not None:
        _check_grid(step.grid)
    if not _has_grid_if_needed(step, sources):
        raise ValueError("it has a grid too many, or none")
    if step.op in _KEEPS_GRID and any(source != step.grid for source in sources):
        raise ValueError("its grid is not that of its inputs")


def _reads_what_it_may(step: Instruction, sources: list[Grid | None]) -> bool:
    if step.op in _ROUNDS_FLOATS:
        return sources == [None]
    if step.op in _FLOAT_INPUT or (step.op in _LAYERS and sources == [None]):
        return True
    return bool(sources) and None not in sources


def _has_grid_if_needed(step: Instruction, sources: list[Grid | None]) -> bool:
    is_float = step.grid is None
    if step.op in _LAYERS and sources == [None]:
        return is_float
    return step.op == "linear" or is_float == (step.op in _FLOAT_RESULT)


def _check_grid(grid: Grid) -> None:
    if not 1 <= grid.bits <= 8 or not 0 <= grid.zero_point <= grid.top:
        raise ValueError(f"{grid} is no grid")
    if not 0 < grid.scale < float("inf"):
        raise ValueError(f"the scale is {grid.scale}")


def _nothing(program: IntegerProgram, step: Instruction) -> None:
    pass


def _layer(program: IntegerProgram, step: Instruction) -> None:
    weight, scale = program.tensor(step, "weight"), program.tensor(step, "scale")
    bias, bits = program.tensor(step, "bias"), program.tensor(step, "bits")
    types = (weight.dtype, scale.dtype, bits.dtype)
    if types != (torch.int8, torch.float32, torch.uint8):
        raise ValueError(f"its tensors are {', '.join(str(one) for one in types)}")
    out = weight.shape[:1]
    if not (scale.shape == bias.shape == bits.shape == out) or weight.numel() == 0:
        raise ValueError("the shapes of its tensors do not fit each other")
    _check_scales(scale)
    _flag(step, "relu")


def _check_bias(bias: torch.Tensor, *, of_codes: bool) -> None:
    if bias.dtype != (torch.int32 if of_codes else torch.float32):
        raise ValueError(f"its bias is {bias.dtype}")
    if not bool(torch.isfinite(bias).all()):
        raise ValueError("its bias is not finite")


def _check_scales(scale: torch.Tensor) -> None:
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError("one of its scales is not positive")


def _fake_quantize(program: IntegerProgram, step: Instruction) -> None:
    scale, zero_point = program.tensor(step, "scale"), program.tensor(step, "zero_point")
    if (scale.dtype, zero_point.dtype) != (torch.float32, torch.uint8):
        raise ValueError(f"its tensors are {scale.dtype}, {zero_point.dtype}")
    if scale.dim() != 1 or scale.shape != zero_point.shape or scale.numel() == 0:
        raise ValueError("it has no scale and zero point for every channel")
    _check_scales(scale)
    bits, axis = step.attributes["bits"], step.attributes["axis"]
    if type(bits) is not int or not 1 <= bits <= 8 or type(axis) is not int or axis != 1:
        raise ValueError(f"it has {bits!r} bits along dimension {axis!r}")
    if int(zero_point.max()) >= 2**bits:
        raise ValueError("a zero point is none of its codes")
    if "top" in step.tensors:
        _check_tops(program.tensor(step, "top"), zero_point, bits)


def _check_tops(top: torch.Tensor, zero_point: torch.Tensor, bits: int) -> None:
    if top.dtype != torch.uint8 or top.shape != zero_point.shape:
        raise ValueError(f"its largest codes are {top.dtype} {list(top.shape)}")
    if int(top.max()) >= 2**bits or bool((zero_point > top.clamp(min=1)).any()):
        raise ValueError("the largest code of a channel is impossible")


def _lookup(program: IntegerProgram, step: Instruction) -> None:
    table = program.tensor(step, "table")
    if table.dtype != torch.uint8 or table.shape != (256,):
        raise ValueError(f"its table is {table.dtype} {list(table.shape)}")
    if step.grid is not None and int(table.max()) > step.grid.top:
        raise ValueError(f"its table has codes above {step.grid.top}")


def _dynamic_quantize(program: IntegerProgram, step: Instruction) -> None:
    try:
        dynamic_quantizer(step)
    except SpecError as error:
        raise ValueError(error.what) from error
    for name in ("per_channel", "fused_relu", "mean_aware"):
        _flag(step, name)


def _conv(program: IntegerProgram, step: Instruction) -> None:
    _layer(program, step)
    weight, groups = program.tensor(step, "weight"), step.attributes["groups"]
    sizes = weight.dim() - 2
    if sizes not in (1, 2, 3) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{groups} groups of {list(weight.shape)}")
    for name, low in (("stride", 1), ("padding", 0), ("dilation", 1)):
        _integers(step, name, sizes, low)


def _linear(program: IntegerProgram, step: Instruction) -> None:
    _layer(program, step)
    if program.tensor(step, "weight").dim() != 2:
        raise ValueError("its weight is no matrix")


def _max_pool(program: IntegerProgram, step: Instruction) -> None:
    if set(step.attributes) != _POOL:
        raise ValueError(f"its attributes are {sorted(step.attributes)}")
    for name, low in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        _integers(step, name, 2, low)
    _flag(step, "ceil_mode")


def _pad(program: IntegerProgram, step: Instruction) -> None:
    pad = step.attributes["pad"]
    if len(pad) % 2 or not all(isinstance(size, int) for size in pad):
        raise ValueError(f"it pads by {pad}")


def _relu(program: IntegerProgram, step: Instruction) -> None:
    top = step.attributes["top"]
    if not isinstance(top, int) or step.grid is None or not 0 <= top <= step.grid.top:
        raise ValueError(f"its upper bound is {top}")


def _cat(program: IntegerProgram, step: Instruction) -> None:
    if not isinstance(step.attributes["dim"], int):
        raise TypeError("its dim is no integer")


def _reshape(program: IntegerProgram, step: Instruction) -> None:
    if step.attributes["call"] not in RESHAPE_CALLS:
        raise ValueError(f"it calls {step.attributes['call']!r}")
    if not isinstance(step.attributes["arguments"], (tuple, list)):
        raise TypeError("its arguments are no list")


def _constant(program: IntegerProgram, step: Instruction) -> None:
    program.tensor(step, "value")


def _float(program: IntegerProgram, step: Instruction) -> None:
    if not isinstance(step.attributes["arguments"], (tuple, list)):
        raise TypeError("its arguments are no list")
    if not isinstance(step.attributes["keywords"], dict):
        raise TypeError("its keywords are no mapping")


def _flag(step: Instruction, name: str) -> None:
    if not isinstance(step.attributes[name], bool):
        raise TypeError(f"{name} is {step.attributes[name]!r}")


def _integers(step: Instruction, name: str, count: int, low: int) -> None:
    values = step.attributes[name]
    fits = isinstance(values, tuple) and len(values) == count
    if not fits or not all(isinstance(value, int) and value >= low for value in values):
        raise ValueError(f"its {name} is {values!r}")


_CHECKS: dict[str, Callable[[IntegerProgram, Instruction], None]] = {
    "lookup": _lookup,
    "fake_quantize": _fake_quantize,
    "dynamic_quantize": _dynamic_quantize,
    "conv": _conv,
    "linear": _linear,
    "add": lambda program, step: _flag(step, "relu"),
    "global_avg_pool": lambda program, step: _flag(step, "keepdim"),
    "max_pool": _max_pool,
    "pad": _pad,
    "relu": _relu,
    "cat": _cat,
    "reshape": _reshape,
    "constant": _constant,
    "float": _float,
    "module": _float,
}
