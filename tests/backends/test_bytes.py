"""Codes in bytes: grids below 8 bits, byte offsets, folded zero points, and awkward channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq.backends import _kernels as kernels
from fxq.backends._builder import Builder
from fxq.backends._offsets import byte_offsets
from fxq.backends.eager import EagerModule
from fxq.contracts import output_sqnr
from fxq.integer.arguments import Register
from fxq.integer.program import Grid, Instruction, IntegerProgram
from fxq.integer.reference import Reference
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_residual
from fxq.numerics.saturation import largest_pair_sum, pair_limit

ENGINES = ("x86", "fbgemm", "onednn")
POOL = {"kernel_size": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- codes stay on their grid --------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("build", [tiny_conv, tiny_residual, tiny_depthwise, tiny_concat])
def test_codes_never_leave_their_grid(build: Any, bits: int, engine: str, integers) -> None:
    """Not even for inputs far beyond what was calibrated."""
    names = [f"quantize-minmax.{kind}_bits={bits}" for kind in ("activation", "addend")]
    settings = (*names, "quantize-minmax.first_last_bits=0")
    program = integers(build(), images(2, 3, 8, 8), "minmax-int8", settings).artifact.integers
    grids = program.grids()
    module = EagerModule(program, engine)
    for scale in (1.0, 100.0, -1e6):
        for name, codes in module.registers(images(2, 3, 8, 8) * scale).items():
            if grids.get(name) is not None:
                assert int(codes.max()) <= grids[name].top <= 2**bits - 1


def steps_of(*steps: Instruction) -> IntegerProgram:
    return IntegerProgram(("x",), list(steps), Register(steps[-1].name), {})


def add(name: str, source: str, grid: Grid, relu: bool = True) -> Instruction:
    return Instruction(name, "add", (source, source), {"relu": relu}, grid=grid)


LOW, HIGH = Grid(0.5, 0, 4), Grid(0.5, 0, 8)
QUANTIZE = Instruction("q", "quantize", ("x",), grid=LOW)


def always(step: Instruction) -> bool:
    return True


def test_relu_outputs_sit_at_the_top_of_the_byte() -> None:
    program = steps_of(QUANTIZE, add("a", "q", LOW), Instruction("y", "dequantize", ("a",)))
    assert byte_offsets(program, always) == {"q": 0, "a": 240}


def test_only_bounded_values_are_moved() -> None:
    """A lower bound is needed as much as an upper one, and 8 bits have no room."""
    signed = Grid(0.5, 3, 4)
    program = steps_of(
        QUANTIZE,
        add("plain", "q", LOW, relu=False),
        add("signed", "plain", signed),
        add("full", "signed", HIGH),
        add("moved", "full", LOW),
        Instruction("y", "dequantize", ("moved",)),
    )
    assert byte_offsets(program, always) == {
        "q": 0,
        "plain": 0,
        "signed": 0,
        "full": 0,
        "moved": 240,
    }


def test_readers_can_refuse_an_offset() -> None:
    """Looking through what only moves the bytes."""
    program = steps_of(
        QUANTIZE,
        add("a", "q", LOW),
        Instruction("p", "max_pool", ("a",), {**POOL, "ceil_mode": False}, grid=LOW),
        add("b", "p", LOW),
        Instruction("y", "dequantize", ("b",)),
    )
    assert byte_offsets(program, always) == {"q": 0, "a": 240, "p": 240, "b": 240}
    offsets = byte_offsets(program, lambda step: step.name != "b")
    assert offsets == {"q": 0, "a": 0, "p": 0, "b": 240}


def test_branches_of_a_concatenation_agree() -> None:
    for relu, expected in ((True, 240), (False, 0)):
        program = steps_of(
            QUANTIZE,
            add("a", "q", LOW),
            add("b", "q", LOW, relu=relu),
            Instruction("c", "cat", ("a", "b"), {"dim": 1}, grid=LOW),
            Instruction("p", "max_pool", ("c",), {**POOL, "ceil_mode": False}, grid=LOW),
            Instruction("y", "dequantize", ("p",)),
        )
        offsets = byte_offsets(program, always)
        assert {offsets[name] for name in ("a", "b", "c", "p")} == {expected}
        x = images(1, 2, 4, 4) * 4
        assert torch.equal(EagerModule(program, "fbgemm")(x), Reference(program)(x))


def test_nested_concatenations_agree() -> None:
    program = steps_of(
        QUANTIZE,
        add("a", "q", LOW),
        add("b", "q", LOW),
        Instruction("c", "cat", ("a", "b"), {"dim": 1}, grid=LOW),
        Instruction("d", "cat", ("c", "q"), {"dim": 1}, grid=LOW),
        Instruction("y", "dequantize", ("d",)),
    )
    assert set(byte_offsets(program, always).values()) == {0}


@pytest.mark.parametrize("engine", ENGINES)
def test_offsets_are_used(engine: str, integers) -> None:
    """Of a 4-bit network with ReLUs some registers have one."""
    program = integers(tiny_depthwise(), images(2, 3, 8, 8), "aciq-4bit").artifact.integers
    assert 240 in Builder(program, engine).offsets.values()


# ---- zero points ---------------------------------------------------------------------------------


def test_zero_points_are_folded_where_nothing_is_padded(integers) -> None:
    """A signed input: with the zero point in the bias, x86 computes what fbgemm does."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    x = images(4, 3, 6, 6)
    program = integers(net, x).artifact.integers
    assert any(step.grid and step.grid.zero_point for step in program)
    expected = Reference(program).run(x)[1]
    for engine in ("x86", "onednn"):
        found = EagerModule(program, engine).registers(x)
        for step in program:
            if step.op == "conv":
                difference = (found[step.name].int() - expected[step.name]).abs()
                assert float((difference > 0).float().mean()) < 0.02


def test_a_zero_point_that_would_leave_float32_is_not_folded() -> None:
    """Sums of 2**24 and more are no longer exact there."""
    width = 600
    grid = Grid(0.5, 200, 8)
    tensors = {
        "weight": torch.full((1, width, 1, 1), 127, dtype=torch.int8),
        "scale": torch.ones(1),
        "bias": torch.zeros(1, dtype=torch.int32),
        "bits": torch.full((1,), 8, dtype=torch.uint8),
    }
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    steps = [
        Instruction("q", "quantize", ("x",), grid=grid),
        Instruction(
            "y",
            "conv",
            ("q",),
            {"relu": False, **geometry},
            {role: role for role in tensors},
            Grid(65536.0, 128, 8),
        ),
    ]
    program = IntegerProgram(("x",), steps, Register("y"), tensors)
    builder = Builder(program, "onednn")
    given = {**tensors, "unit": torch.ones(1)}
    assert not builder._fold_zero_point(steps[1], given, 200)
    assert given["bias"] is tensors["bias"]
    x = torch.full((1, width, 2, 2), -100.0)
    for engine in ENGINES:
        found = EagerModule(program, engine).registers(x)["y"].int()
        assert int((found - Reference(program).run(x)[1]["y"]).abs().max()) <= 1


# ---- depthwise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-8bit", "aciq-4bit"])
@pytest.mark.parametrize("size", [3, 5])
def test_depthwise_weights_cannot_saturate(size: int, recipe: str, integers, mismatches) -> None:
    """All weights the same, the worst there are; quantize passes give such channels more room."""
    net = nn.Sequential(
        nn.Conv2d(8, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, size, padding=size // 2, groups=16),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )
    with torch.no_grad():
        net[2].weight.fill_(1.0)
        net[2].weight[8:] *= -1
    x = images(2, 8, 9, 9)
    result = integers(net, x, recipe)
    weight = result.artifact.integers.tensors[_weight_of(result, 1)]
    assert int(largest_pair_sum(weight.flatten(1)).max()) <= pair_limit(255)
    assert mismatches(result.artifact.integers, x * 2) == {}
    for engine in ENGINES:
        module = EagerModule(result.artifact.integers, engine)
        assert output_sqnr(Reference(result.artifact.integers)(x), module(x)) > 25


def _weight_of(result: Any, position: int) -> str:
    convolutions = [step for step in result.artifact.integers if step.op == "conv"]
    return convolutions[position].tensors["weight"]


# ---- channels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-8bit", "aciq-4bit"])
def test_dead_channels_give_their_bias(recipe: str, integers, mismatches) -> None:
    """A batch norm weight of zero, and a layer whose weights are all zero."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 2, 1)
    ).eval()
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.copy_(torch.linspace(-2, 5, 8))
        net[2].weight.zero_()
        net[2].bias.copy_(torch.tensor([0.0, 1.0, -1.0, 3.0]))
    x = images(2, 3, 9, 9)
    result = integers(net, x, recipe)
    assert mismatches(result.artifact.integers, x) == {}
    with torch.no_grad():
        assert output_sqnr(net(x), result.module(x)) > (30 if "8" in recipe else 12)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_huge_bias_is_kept(engine: str, integers) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([1e6, -1e6, 3.0, 1e5, 0.0, 5e5]))
        net[2].bias.fill_(-1e6)
    x = images(16, 6)
    result = integers(net, x, engine=engine)
    with torch.no_grad():
        assert output_sqnr(net(x), result.module(x)) > 40


# ---- labels --------------------------------------------------------------------------------------


def test_labels_share_memory() -> None:
    codes = torch.arange(24, dtype=torch.uint8).reshape(1, 2, 3, 4)
    labelled = kernels.wrap(codes, 0.5, 3)
    assert labelled.dequantize()[0, 1, 2, 3].item() == 0.5 * (23 - 3)
    again = kernels.unwrap(kernels.relabel(labelled, 2.0, 0))
    assert again.data_ptr() == codes.data_ptr()
    part = kernels.wrap(codes[:, 1:, ::2], 1.0, 0)
    assert torch.equal(kernels.unwrap(part), codes[:, 1:, ::2])
    assert torch.equal(part.dequantize(), codes[:, 1:, ::2].float())


def test_engines_are_tried_on_this_cpu() -> None:
    assert set(kernels.supported_engines()) <= set(kernels.ENGINES)
    for engine in kernels.supported_engines():
        assert isinstance(kernels.is_exact(engine), bool)
