"""Levels on integers: grids, tables, where thresholds are placed, and what nodes become."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxq.errors import ArtifactError
from fxq.integer.arguments import Register
from fxq.integer.levels import finest_grid, half_level_grid, level_grid, level_table
from fxq.integer.lowering import lower_to_integers
from fxq.integer.program import Grid, Instruction, IntegerProgram
from fxq.integer.reference import Reference
from fxq.integer.thresholds import level_layer, spare_factor, thresholds_of
from fxq.numerics.affine import dequantize, quantize, short_scale
from fxq.numerics.levels import LevelSet, levels_of, nearest_level
from fxq.quant.quantizers import ActivationQuantizer, LevelQuantizer, QuantizedLayer

level_sets = st.lists(st.integers(1, 63), min_size=1, max_size=16, unique=True).map(
    lambda levels: torch.tensor([0, *sorted(levels)])
)
scales = st.floats(1e-4, 10.0).map(short_scale)


def quantizer(scale: float, levels: Tensor, signed: bool = False) -> LevelQuantizer:
    return LevelQuantizer(torch.tensor(scale), levels, signed, 4)


def apot(bits: int) -> Tensor:
    """The 2**bits levels of an activation without sign."""
    return levels_of(LevelSet.APOT, bits + 1)


# ---- tables --------------------------------------------------------------------------------------


@given(level_sets, scales, st.booleans(), st.floats(1e-3, 1.0), st.integers(0, 255))
def test_tables_of_codes_are_the_module(
    levels: Tensor, scale: float, signed: bool, step: float, zero_point: int
) -> None:
    module, grid = quantizer(scale, levels, signed), Grid(short_scale(step), zero_point, 8)
    values = dequantize(torch.arange(256), grid.scale, grid.zero_point)
    out = level_grid(module)
    found = dequantize(level_table(module, grid), out.scale, out.zero_point)
    assert torch.equal(found, module(values))
    assert int(level_table(module, grid).max()) <= out.top


@given(level_sets, scales, st.booleans())
def test_halves_rounded_down_are_exact(levels: Tensor, scale: float, signed: bool) -> None:
    """Every value that is not a threshold itself."""
    module = quantizer(scale, levels, signed)
    grid = half_level_grid(module)
    x = (torch.arange(-1200, 1200) + 0.5) / 8 * scale
    codes = ((x / grid.scale).floor() + grid.zero_point).clamp(0, 255).long()
    found = level_table(module, grid, floors=True)[codes].long() - module.zero_point
    assert torch.equal(found, module.level_of(x))


@given(level_sets, scales, st.booleans())
def test_the_finest_grid_is_off_by_half_a_step(levels: Tensor, scale: float, signed: bool) -> None:
    module = quantizer(scale, levels, signed)
    grid = finest_grid(module)
    assert grid.scale <= scale / 2 * 1.0001
    x = torch.linspace(-70, 70, 5001) * scale
    codes = quantize(x, grid.scale, grid.zero_point, 0, 255).long()
    found = level_table(module, grid)[codes].long() - module.zero_point
    low, high = (module.level_of(x + side * grid.scale * 0.51) for side in (-1, 1))
    assert bool(((low <= found) & (found <= high)).all())


def test_a_bound_ends_levels() -> None:
    module = quantizer(0.5, torch.tensor([0, 1, 2, 4, 8]))
    table = level_table(module, half_level_grid(module), floors=True, upper=1.6)
    assert table.max() == 4
    assert torch.equal(table[:6], level_table(module, half_level_grid(module), floors=True)[:6])


# ---- thresholds ----------------------------------------------------------------------------------


def dense(codes: Tensor, scale: Tensor, bias: Tensor) -> QuantizedLayer:
    layer = nn.Linear(codes.shape[1], codes.shape[0])
    with torch.no_grad():
        layer.bias.copy_(bias)
    return QuantizedLayer(layer, codes.to(torch.int8), scale, torch.full((len(codes),), 4))


def exact_levels(
    module: QuantizedLayer, source: Grid, levels: LevelQuantizer, sums: Tensor
) -> Tensor:
    """The levels of accumulators, in fractions; ``sums: [n, out]``."""
    step = Fraction(float(levels.scale))
    middles = [Fraction(int(a + b), 2) for a, b in zip(levels.levels, levels.levels[1:], strict=0)]
    result = torch.zeros_like(sums)
    for channel in range(sums.shape[1]):
        unit = Fraction(source.scale) * Fraction(float(module.scale[channel]))
        bias = Fraction(float(module.bias[channel]))
        for row, total in enumerate(sums[:, channel].tolist()):
            value = (total * unit + bias) / step
            above = sum(abs(value) >= middle for middle in middles)
            sign = -1 if value < 0 else 1
            result[row, channel] = sign * int(levels.levels[above])
    return result.clamp(min=-(10**9) if levels.signed else 0)


@given(st.integers(2, 5), st.integers(2, 5), st.booleans(), st.integers(0, 2**31), st.booleans())
def test_thresholds_are_between_the_right_accumulators(
    weight_bits: int, bits: int, signed: bool, seed: int, round_scales: bool
) -> None:
    """Against fractions: levels are exact in every channel that has no misplaced threshold."""
    draw = torch.Generator().manual_seed(seed)
    weights = levels_of(LevelSet.APOT, weight_bits)
    codes = nearest_level(torch.randn(6, 40, generator=draw) * int(weights[-1]) / 2, weights)
    scale = torch.rand(6, generator=draw).add(0.5) / 16
    scale = torch.full((6,), 0.0625) if round_scales else short_scale(scale)
    module = dense(codes, scale, torch.randn(6, generator=draw))
    source = Grid(0.125 if round_scales else short_scale(0.07), 0, 6)
    set_of = levels_of(LevelSet.APOT, bits) if signed else apot(bits)
    x = torch.randint(0, 49, (60, 40), generator=draw)
    sums = x @ codes.T
    reach = float(sums.abs().max()) * float(scale.max()) * source.scale
    levels = quantizer(short_scale(reach / int(set_of[-1])), set_of, signed)
    grid = half_level_grid(levels)

    placed = level_layer(module, source, levels, grid)
    step = Instruction(
        "y", "linear", ("x",), {"relu": False}, {r: r for r in placed.tensors()}, grid
    )
    program = IntegerProgram(("x",), [step], Register("y"), placed.tensors())
    fine = Reference(program)._linear(step, {"x": x}, {"x": source})
    found = level_table(levels, grid, floors=True)[fine.long()].long() - levels.zero_point
    wrong = thresholds_of(module, source, levels, grid).placed()[2]
    expected = exact_levels(module, source, levels, sums)
    assert torch.equal(found[:, wrong == 0], expected[:, wrong == 0])
    if weight_bits <= 3 and bits <= 3:
        assert not bool(wrong.any())
    assert int((found != expected).sum()) <= 2


def test_ties_go_to_the_larger_magnitude() -> None:
    """A sum that is exactly halfway, of either sign, where the rounding of kernels is to even."""
    module = dense(torch.tensor([[1], [-1]]), torch.full((2,), 0.25), torch.zeros(2))
    levels = quantizer(1.0, torch.tensor([0, 1, 2, 3, 6]), signed=True)
    source, grid = Grid(1.0, 0, 8), half_level_grid(levels)
    assert not bool(thresholds_of(module, source, levels, grid).placed()[2].any())


def test_weights_are_multiplied_by_what_is_spare() -> None:
    source = Grid(0.5, 0, 6)
    apot4 = dense(torch.tensor([[10, -3], [1, 0]]), torch.full((2,), 0.1), torch.zeros(2))
    assert spare_factor(apot4, source) == 12
    assert spare_factor(apot4, Grid(0.5, 0, 8)) == 6  # two products of bytes stay below 2**15
    full = dense(torch.tensor([[127, 1]]), torch.ones(1), torch.zeros(1))
    assert spare_factor(full, source) == 1
    ternary = dense(torch.tensor([[1, -1]]), torch.ones(1), torch.zeros(1))
    assert spare_factor(ternary, source) == 127
    wide = dense(torch.ones(1, 200_000), torch.ones(1), torch.zeros(1))
    assert spare_factor(wide, source) == (2**31 - 1 - 2**23) // (255 * 200_000)


def test_scales_and_biases_stay_near() -> None:
    """Dead channels, and biases far beyond the weights, among ordinary ones."""
    codes = torch.randint(-10, 11, (4, 30))
    codes[1] = 0
    scale = torch.tensor([0.05, 2.0**-40, 0.05, 1e-7])
    module = dense(codes, scale, torch.tensor([0.3, 1.7, -0.4, 90.0]))
    source, levels = Grid(0.125, 0, 6), quantizer(0.5, apot(4))
    grid = half_level_grid(levels)
    placed = level_layer(module, source, levels, grid)
    unit = source.scale * placed.scale.double()
    lowered = module.bias.double() - grid.scale / 2
    off = (placed.bias * unit - lowered).abs()
    assert bool((off <= 5 * unit + lowered.abs() * 2.0**-11).all())
    assert bool((placed.bias.abs() <= 2**23).all())
    ratio = placed.scale[0] * spare_factor(module, source) / scale[0]
    assert abs(float(ratio) - 1) <= 2.0**-10
    sums = torch.randint(0, 49, (20, 30)).double() @ placed.weight.double().T
    halves = torch.round((sums + placed.bias) * unit / grid.scale).clamp(0, 255).long()
    found = level_table(levels, grid, floors=True)[halves]
    assert bool((found[:, 1] == 3).all())  # 1.7 / 0.5
    assert bool((found[:, 3] == 48).all())


# ---- the instruction -----------------------------------------------------------------------------


@pytest.fixture
def looked_up() -> tuple[dict[str, Any], dict[str, Tensor]]:
    table = torch.arange(256).clamp(max=15).to(torch.uint8)
    steps = [
        Instruction("q", "quantize", ("x",), grid=Grid(0.5, 0, 8)),
        Instruction("y", "lookup", ("q",), {}, {"table": "y.table"}, Grid(1.0, 0, 4)),
    ]
    tensors = {"y.table": table}
    return IntegerProgram(("x",), steps, Register("y"), tensors).to_json(), tensors


def test_the_reference_looks_up(looked_up) -> None:
    program = IntegerProgram.from_json(*looked_up)
    assert Reference(program)(torch.tensor([-1.0, 2.0, 99.0])).tolist() == [0, 4, 15]


TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "other dtype": lambda table: table.long(),
    "too short": lambda table: table[:255],
    "of pairs": lambda table: table.reshape(128, 2),
    "above the grid": lambda table: table + 1,
}


@pytest.mark.parametrize("name", TABLES)
def test_damaged_tables_are_refused(name: str, looked_up) -> None:
    data, tensors = looked_up
    with pytest.raises(ArtifactError, match="its table"):
        IntegerProgram.from_json(data, {"y.table": TABLES[name](tensors["y.table"])})


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no table": lambda step: step.update(tensors={}),
    "no grid": lambda step: step.pop("grid"),
    "of a float": lambda step: step.update(inputs=["x"]),
    "of two": lambda step: step.update(inputs=["q", "q"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_lookups_are_refused(name: str, looked_up) -> None:
    data = copy.deepcopy(looked_up[0])
    DAMAGE[name](data["instructions"][1])
    with pytest.raises(ArtifactError):
        IntegerProgram.from_json(data, looked_up[1])


# ---- what nodes become ---------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


GRAPHS: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "conv": (lambda n, x: n.b(F.relu(n.a(x))), ""),
    "relu6": (lambda n, x: n.b(F.relu6(n.a(x))), ""),
    "pool": (lambda n, x: n.b(F.max_pool2d(F.relu(n.a(x)), 2)), "max_pool"),
    "average": (lambda n, x: n.b(F.avg_pool2d(F.relu(n.a(x)), 2)), "conv lookup"),
    "float between": (lambda n, x: n.b(torch.sigmoid(n.a(x))), "dequantize float quantize lookup"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_nodes_become_kernels_and_tables(name: str, compiled) -> None:
    function, between = GRAPHS[name]
    x = torch.randn(2, 3, 8, 8)
    result = compiled(Net(lambda n, x: n.head(F.relu(function(n, x)).mean((2, 3)))), x)
    program = result.program
    for node in list(program.nodes()):
        module = program.submodule(node)
        if isinstance(module, ActivationQuantizer):
            signed, top = int(module.zero_point) > 0, float(module.scale) * 200
            levels = quantizer(short_scale(top / 48), apot(4), signed)
            program.module.set_submodule(str(node.target), levels)
    integers, ledger = lower_to_integers(program)
    integers.check()
    ops = " ".join(step.op for step in integers)
    middle = f" {between}" if between else ""
    assert ops == f"quantize lookup conv lookup{middle} conv lookup global_avg_pool lookup linear"
    assert ledger.coverage() == 1.0
    assert len(ledger.in_float()) == ("float" in between)
    written = [step for step in integers if step.op in ("conv", "global_avg_pool")]
    assert all(step.name == f"{step.sources[0]}_fine" for step in written)
    with torch.no_grad():
        want, have = program.run(x), Reference(integers)(x)
    assert float((want - have).norm() / want.norm()) < 0.15
