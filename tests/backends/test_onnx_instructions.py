"""Each integer instruction as ONNX nodes: ONNX Runtime computes what the reference computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from fxq.backends.onnx import OnnxModule
from fxq.errors import LoweringError
from fxq.integer.arguments import Register
from fxq.integer.program import Example, Grid, Instruction, IntegerProgram
from fxq.integer.reference import Reference
from fxq.registry import find_backend

FLAVORS = ("fast", "packed", "compact")
WIDE = Grid(0.0500030517578125, 128, 8)
OTHER = Grid(0.09375, 100, 8)
NARROW = Grid(0.25, 7, 4)
POSITIVE = Grid(0.3000030517578125, 0, 4)

pytestmark = pytest.mark.usefixtures("one_thread")


def quantized(grid: Grid = WIDE) -> Instruction:
    return Instruction("q", "quantize", ("x",), grid=grid)


def dequantized(name: str) -> Instruction:
    return Instruction("d", "dequantize", (name,))


def layer(
    op: str, grid: Grid | None, shape: tuple[int, ...], **attributes: Any
) -> tuple[Instruction, dict[str, Tensor]]:
    """A layer that reads ``q`` and its tensors, under the name ``layer``."""
    roles = {
        "weight": torch.randint(-127, 128, shape, dtype=torch.int8),
        "scale": torch.full(shape[:1], 2.0**-9),
        "bias": torch.randint(-500, 500, shape[:1], dtype=torch.int32),
        "bits": torch.full(shape[:1], 8, dtype=torch.uint8),
    }
    tensors = {f"layer.{role}": value for role, value in roles.items()}
    names = {role: f"layer.{role}" for role in roles}
    return Instruction("layer", op, ("q",), attributes, names, grid), tensors


def conv(
    grid: Grid,
    shape: tuple[int, ...],
    *,
    relu: bool = False,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> tuple[Instruction, dict[str, Tensor]]:
    rank = len(shape) - 2
    return layer(
        "conv",
        grid,
        shape,
        relu=relu,
        stride=(stride,) * rank,
        padding=(padding,) * rank,
        dilation=(1,) * rank,
        groups=groups,
    )


def check(
    steps: list[Instruction], x: Tensor, tensors: dict[str, Tensor] | None = None
) -> list[OnnxModule]:
    """Every register and the output equal the reference's in every flavour; the modules.

    But for ``compact``, which computes layers in float: there a code may be one off.
    """
    program = IntegerProgram(
        ("x",), steps, Register(steps[-1].name), tensors or {}, {}, (Example(tuple(x.shape)),)
    )
    program.check()
    expected, registers = Reference(program).run(x)
    modules = []
    for flavor in FLAVORS:
        module: Any = find_backend("onnx").load(program, flavor=flavor)  # type: ignore[attr-defined]
        onnx.checker.check_model(module.model, full_check=True)
        onnx.shape_inference.infer_shapes(module.model, strict_mode=True, data_prop=True)
        if flavor != "compact":
            assert torch.equal(module(x), expected), flavor
        observed = module.registers(x)
        assert set(observed) >= {step.name for step in steps if step.op != "reshape"}
        for name, value in observed.items():
            difference = (value.double() - registers[name].double()).abs().max()
            assert difference <= (flavor == "compact"), (flavor, name)
        modules.append(module)
    return modules


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((4, 4, 3, 3), (2, 4, 6, 6), {"padding": 1}),
    "stride": ((4, 4, 3, 3), (2, 4, 7, 7), {"padding": 1, "stride": 2}),
    "three channels": ((4, 3, 3, 3), (2, 3, 7, 7), {"padding": 1, "stride": 2}),
    "depthwise": ((4, 1, 3, 3), (2, 4, 6, 6), {"groups": 4}),
    "multiplied depthwise": ((8, 1, 3, 3), (2, 4, 6, 6), {"groups": 4}),
    "grouped": ((8, 2, 3, 3), (2, 4, 6, 6), {"groups": 2}),
    "1d": ((4, 4, 3), (2, 4, 9), {"padding": 1, "stride": 2}),
    "3d": ((4, 4, 2, 2, 2), (2, 4, 4, 5, 6), {"padding": 1}),
}


@pytest.mark.parametrize("grid", [OTHER, NARROW, POSITIVE], ids=["8 bit", "4 bit", "zero at 0"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, relu: bool, grid: Grid) -> None:
    weight, image, options = CONVOLUTIONS[name]
    step, tensors = conv(grid, weight, relu=relu, **options)
    check([quantized(), step, dequantized("layer")], torch.randn(image) * 3, tensors)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("grid", [OTHER, NARROW, None], ids=["8 bit", "4 bit", "float"])
@pytest.mark.parametrize("shape", [(3, 7), (3, 4, 7), (3, 2, 4, 7)], ids=len)
def test_linears(shape: tuple[int, ...], grid: Grid | None, relu: bool) -> None:
    step, tensors = layer("linear", grid, (5, 7), relu=relu)
    end = [dequantized("layer")] if grid else []
    check([quantized(), step, *end], torch.randn(shape) * 3, tensors)


@pytest.mark.parametrize("middle", [OTHER, NARROW], ids=["8 bit", "4 bit"])
def test_requantizing_is_not_merged_with_what_comes_before(middle: Grid) -> None:
    again = Instruction("again", "requantize", ("q",), grid=middle)
    check([quantized(), again, dequantized("again")], torch.linspace(-7, 7, 600).reshape(2, 300))


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("grid", [OTHER, NARROW], ids=["8 bit", "4 bit"])
def test_global_average_pools(grid: Grid, keepdim: bool) -> None:
    pool = Instruction("p", "global_avg_pool", ("q",), {"keepdim": keepdim}, grid=grid)
    check([quantized(), pool, dequantized("p")], torch.randn(2, 4, 6, 7))


POOLS = {
    "plain": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "padded, ceil": ((3, 3), (2, 2), (1, 1), (1, 1), True),
    "ceil": ((3, 3), (2, 2), (0, 0), (1, 1), True),
    "dilated": ((2, 3), (1, 1), (0, 1), (2, 1), False),
}


@pytest.mark.parametrize("grid", [WIDE, NARROW], ids=["8 bit", "4 bit"])
@pytest.mark.parametrize("name", POOLS)
def test_max_pools(name: str, grid: Grid) -> None:
    keys = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    attributes = dict(zip(keys, POOLS[name], strict=True))
    pool = Instruction("p", "max_pool", ("q",), attributes, grid=grid)
    check([quantized(grid), pool, dequantized("p")], torch.randn(2, 4, 6, 6) * 3)


@pytest.mark.parametrize("pad", [(1, 2, 0, 1), (-1, 2, 0, -1), (0, 0, 0, 0, 2, 1)])
def test_paddings(pad: tuple[int, ...]) -> None:
    step = Instruction("p", "pad", ("q",), {"pad": pad}, grid=WIDE)
    check([quantized(), step, dequantized("p")], torch.randn(2, 4, 6, 6))


def test_a_lone_relu_bounds_codes_from_both_sides() -> None:
    step = Instruction("r", "relu", ("q",), {"top": 200}, grid=WIDE)
    check([quantized(), step, dequantized("r")], torch.randn(2, 4, 6, 6) * 5)


EVERYTHING, ROWS = slice(None), slice(0, 2)
RESHAPES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "permute": ("permute", (0, 2, 3, 1)),
    "permute a tuple": ("permute", ((0, 3, 1, 2),)),
    "transpose": ("transpose", (1, 2)),
    "movedim": ("movedim", (1, -1)),
    "flatten": ("flatten", (1,)),
    "view": ("view", (2, -1)),
    "unsqueeze": ("unsqueeze", (1,)),
    "unflatten": ("unflatten", (1, (2, 2))),
    "contiguous": ("contiguous", ()),
    "slice": ("getitem", ((EVERYTHING, ROWS),)),
    "index": ("getitem", ((EVERYTHING, 1),)),
    "strided slices": ("getitem", ((EVERYTHING, slice(None, None, 2), slice(1, None)),)),
    "new axis": ("getitem", ((Ellipsis, None),)),
    "select": ("select", (1, 2)),
    "narrow": ("narrow", (1, 1, 2)),
    "pixel_shuffle": ("pixel_shuffle", (2,)),
    "pixel_unshuffle": ("pixel_unshuffle", (2,)),
}


def reshaped(call: str, arguments: tuple[Any, ...], name: str = "r", of: str = "q") -> Instruction:
    attributes = {"call": call, "arguments": arguments, "keywords": {}}
    return Instruction(name, "reshape", (of,), attributes, grid=WIDE)


@pytest.mark.parametrize("name", RESHAPES)
def test_reshapes(name: str) -> None:
    step = reshaped(*RESHAPES[name])
    check([quantized(), step, dequantized("r")], torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize(
    ("call", "arguments"), [("chunk", (2, 1)), ("split", (2, 1)), ("split", ([1, 3], 1))]
)
def test_parts_swapped(call: str, arguments: tuple[Any, ...]) -> None:
    parts = [reshaped("getitem", (index,), f"part{index}", "r") for index in range(2)]
    joined = Instruction("j", "cat", ("part1", "part0"), {"dim": 1}, grid=WIDE)
    steps = [quantized(), reshaped(call, arguments), *parts, joined, dequantized("j")]
    check(steps, torch.randn(2, 4, 3, 3))


def test_what_has_no_onnx_form_is_listed_all_at_once() -> None:
    steps = [
        quantized(),
        reshaped("getitem", (0,), "first"),
        reshaped("getitem", (1,), "second"),
        Instruction("j", "cat", ("first", "second"), {"dim": 0}, grid=WIDE),
        dequantized("j"),
    ]
    program = IntegerProgram(("x",), steps, Register("d"), {}, {}, (Example((2, 4, 3)),))
    with pytest.raises(LoweringError, match="cannot express 2 nodes") as caught:
        find_backend("onnx").load(program)  # type: ignore[attr-defined]
    assert "%first: getitem" in str(caught.value)
    assert "%second: getitem" in str(caught.value)


def levels(values: list[int]) -> Callable[[Tensor], Tensor]:
    return lambda index: torch.tensor(values, dtype=torch.int8)[index % len(values)]


APOT = [-48, -36, -18, -9, -6, -4, -3, -1, 0, 1, 3, 4, 6, 9, 18, 36]
STORED = {
    "spread levels": (levels([8 * level + 3 for level in range(-7, 8)]), "INT4"),
    "unshifted levels": (levels([3 * level for level in range(-8, 8)]), "INT4"),
    "levels of APoT": (levels(APOT), "UINT4"),
    "bytes": (levels(list(range(-127, 128))), "INT8"),
}


@pytest.mark.parametrize("name", STORED)
def test_weights_are_packed_where_their_levels_allow(name: str) -> None:
    make, dtype = STORED[name]
    step, tensors = conv(POSITIVE, (6, 4, 5, 5), padding=2)
    tensors["layer.weight"] = make(torch.randperm(600)).reshape(6, 4, 5, 5)
    modules = check([quantized(), step, dequantized("layer")], torch.randn(2, 4, 8, 8) * 3, tensors)
    stored = []
    for module in modules:
        types = {one.name: one.data_type for one in module.model.graph.initializer}
        stored.append(onnx.TensorProto.DataType.Name(types["layer.weight"]))
    assert stored == ["INT8", dtype, dtype]


def test_four_bit_codes_never_meet_eight_bit_weights() -> None:
    step, tensors = conv(OTHER, (6, 4, 3, 3))
    *_, compact = check(
        [quantized(POSITIVE), step, dequantized("layer")], torch.randn(2, 4, 8, 8) * 3, tensors
    )
    types = {one.name: one.data_type for one in compact.model.graph.initializer}
    assert types["q.zero_point"] == onnx.TensorProto.UINT8
    assert types["layer.weight"] == onnx.TensorProto.INT8


def test_a_float_layer_between_codes_stays_in_float() -> None:
    """ONNX Runtime would round its weights and run it on integers, unasked."""
    arguments = (Register("before"), Register("w"))
    steps = [
        quantized(),
        Instruction("before", "dequantize", ("q",)),
        Instruction("w", "constant", (), {}, {"value": "w"}),
        Instruction(
            "y",
            "float",
            ("before", "w"),
            {"target": "functional.conv2d", "arguments": arguments, "keywords": {}},
        ),
        Instruction("again", "quantize", ("y",), grid=WIDE),
        dequantized("again"),
    ]
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3)
    program = IntegerProgram(
        ("x",), steps, Register("d"), {"w": weight}, {}, (Example(tuple(x.shape)),)
    )
    program.check()
    expected = Reference(program)(x)
    for flavor in FLAVORS:
        module: Any = find_backend("onnx").load(program, flavor=flavor)  # type: ignore[attr-defined]
        assert torch.equal(module(x), expected), flavor
