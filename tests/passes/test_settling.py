"""Residual sums after quantizing: their scales are where every kernel gives the same codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.graph.capture import capture
from fxq.graph.rewrite import Editor
from fxq.integer.program import Grid, IntegerProgram
from fxq.integer.reference import Reference
from fxq.models_zoo import tiny_residual
from fxq.numerics import residual
from fxq.numerics.affine import dequantize, short_scale
from fxq.numerics.residual import Codes, disputed
from fxq.passes import post_training, settling
from fxq.passes.settling import settle_sums
from fxq.quant.quantizers import ActivationQuantizer


def images(seed: int, channels: int = 3) -> Tensor:
    return torch.randn(8, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


class Chain(nn.Module):
    """Sums of sums, with a ReLU behind every other one."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        torch.manual_seed(depth)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for position, layer in enumerate(self.body):
            x = layer(x) + x
            x = x.relu() if position % 2 else x
        return self.head(x)


def codes_of(grid: Grid, relu: bool = False) -> Codes:
    return Codes(grid.scale, grid.zero_point, grid.bits, relu)


def compiled(model: nn.Module, x: Tensor, recipe: str = "minmax-int8") -> IntegerProgram:
    return fxq.compile(model, x[:1], recipe, calibration=[x], check=False).artifact.integers


def disputes(program: IntegerProgram) -> list[int]:
    """For each add, how many pairs of codes its result is disputed for."""
    grids: Any = program.grids()
    return [
        len(disputed(*(codes_of(grids[name]) for name in step.inputs), sum_of(step)))
        for step in program
        if step.op == "add"
    ]


def sum_of(step: Any) -> Codes:
    return codes_of(step.grid, step.attributes["relu"])


# ---- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-8bit", "aciq-4bit"])
@pytest.mark.parametrize("build", [tiny_residual, Chain])
def test_no_sum_is_disputed(build: Any, recipe: str) -> None:
    for seed in range(6):
        counts = disputes(compiled(build(), images(seed), recipe))
        assert counts == [0] * (5 if build is Chain else 1)


def test_unsettled_sums_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_training, "settle_sums", lambda program, edit: None)
    counts = [count for seed in range(6) for count in disputes(compiled(Chain(), images(seed)))]
    assert sum(count > 0 for count in counts) > 2


def test_every_pair_of_codes_of_a_network_adds_up_the_same_in_every_form() -> None:
    """The instruction that was lowered, on all pairs, by the reference and by each form."""
    program = compiled(tiny_residual(), images(0))
    step = next(step for step in program if step.op == "add")
    grids: Any = program.grids()
    left, right = (codes_of(grids[name]) for name in step.inputs)
    qa, qb = torch.cartesian_prod(left.all(), right.all()).unbind(1)
    assert len(qa) == 65536
    values = {name: q.int() for name, q in zip(step.inputs, (qa, qb), strict=True)}
    expected = Reference(program)._add(step, values, grids)
    exact = [dequantize(q, c.scale, c.zero_point).double() for q, c in ((qa, left), (qb, right))]
    total = sum_of(step)
    rounded = ((exact[0] + exact[1]) / total.scale).round() + total.zero_point
    assert int((rounded.clamp(total.low, total.top) - expected).abs().max()) <= 1
    for codes in residual._folded(qa, qb, left, right, total):
        assert bool((codes == expected).all())


def test_scales_stay_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upwards, so that a range is still covered, by 0.2 % at most; and only those of sums."""
    ratios: dict[str, float] = {}

    def remember(program: Any, edit: Any) -> None:
        before = scales(program)
        settle_sums(program, edit)
        ratios.update({name: scale / before[name] for name, scale in scales(program).items()})

    monkeypatch.setattr(post_training, "settle_sums", remember)
    compiled(Chain(9), images(3))
    assert all(1 <= ratio <= 1.002 for ratio in ratios.values())
    moved = {name for name, ratio in ratios.items() if ratio > 1}
    assert moved
    assert all(name.startswith(("add", "relu")) for name in moved)


def scales(program: Any) -> dict[str, float]:
    return {
        name: float(module.scale)
        for name, module in program.module.named_modules()
        if isinstance(module, ActivationQuantizer)
    }


# ---- graphs ------------------------------------------------------------------------------------


def quantizer(scale: float, zero: int = 3, bits: int = 8) -> ActivationQuantizer:
    return ActivationQuantizer(torch.tensor(short_scale(scale)), torch.tensor(zero), bits)


class Graph(nn.Module):
    """Quantizers, and a function that uses them."""

    def __init__(self, forward: Any, **quantizers: ActivationQuantizer) -> None:
        super().__init__()
        self.function = forward
        for name, one in quantizers.items():
            self.add_module(name, one)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(self, x, y)


def settled(forward: Any, **quantizers: ActivationQuantizer) -> tuple[Any, Editor]:
    """The modules after settling, and what the editor was told."""
    program = capture(Graph(forward, **quantizers), (images(0), images(1)))
    edit = Editor(program, "test")
    settle_sums(program, edit)
    return program.module, edit


def codes(module: ActivationQuantizer) -> Codes:
    return Codes(float(module.scale), int(module.zero_point), module.bits)


HALF, ONE = 0.25, 0.5
"""Sums of two addends of one are ties of the other, half of the time."""


def test_a_sum_is_settled_with_the_scale_its_addend_has_in_the_end() -> None:
    module, edit = settled(
        lambda m, x, y: m.u(m.t(m.a(x) + m.b(y)) + m.a(x)),
        a=quantizer(HALF),
        b=quantizer(HALF),
        t=quantizer(ONE, 7),
        u=quantizer(2 * ONE, 9),
    )
    assert float(module.a.scale) == float(module.b.scale) == HALF
    assert float(module.t.scale) > ONE
    assert not len(disputed(codes(module.a), codes(module.b), codes(module.t)))
    assert not len(disputed(codes(module.t), codes(module.a), codes(module.u)))
    assert not edit.misses


def test_addends_behind_pools_and_concatenations() -> None:
    module, edit = settled(
        lambda m, x, y: m.t(
            torch.max_pool2d(torch.cat([m.a(x), m.a(y)], 1), 2)
            + m.b(torch.cat([x, y], 1)).relu()[:, :, ::2, ::2]
        ),
        a=quantizer(HALF),
        b=quantizer(HALF),
        t=quantizer(ONE, 7),
    )
    assert float(module.t.scale) > ONE
    assert not len(disputed(codes(module.a), codes(module.b), codes(module.t)))
    assert not edit.misses


def test_a_scale_that_an_earlier_sum_needs_stays() -> None:
    """The second sum shares the quantizer of an addend of the first."""
    module, edit = settled(
        lambda m, x, y: m.a(m.t(m.a(x) + m.b(y)) + m.c(x)),
        a=quantizer(ONE),
        b=quantizer(ONE),
        c=quantizer(HALF),
        t=quantizer(2 * ONE, 7),
    )
    assert float(module.a.scale) == ONE
    assert not len(disputed(codes(module.a), codes(module.b), codes(module.t)))
    assert len(disputed(codes(module.t), codes(module.c), codes(module.a)))
    (miss,) = edit.misses
    assert (miss.node, "needed by another sum" in miss.why) == ("add_1", True)


def test_a_sum_on_the_scale_of_its_addend() -> None:
    module, edit = settled(
        lambda m, x, y: m.a(m.a(x) + m.b(y)), a=quantizer(ONE), b=quantizer(HALF)
    )
    assert float(module.a.scale) == ONE
    assert [miss.node for miss in edit.misses] == ["add"]
    module, edit = settled(
        lambda m, x, y: m.a(m.a(x) + m.b(y)), a=quantizer(HALF), b=quantizer(HALF)
    )
    assert not edit.misses


def test_no_scale_near_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "STEPS", 1)
    module, edit = settled(
        lambda m, x, y: m.t(m.a(x) + m.b(y)),
        a=quantizer(HALF),
        b=quantizer(HALF),
        t=quantizer(ONE, 7),
    )
    assert float(module.t.scale) == ONE
    assert [miss.why for miss in edit.misses] == [
        "no scale nearby makes its codes the same in every kernel"
    ]


def test_sums_in_float_are_left_alone() -> None:
    """An addend that is not quantized, or per channel; a sum that is read twice."""
    wide = ActivationQuantizer(torch.full((3,), HALF), torch.full((3,), 3), 8)
    module, edit = settled(
        lambda m, x, y: (
            m.t(x + m.b(y)) + m.u(m.b(x) + m.w(y)) + m.v(s := m.b(x) + m.b(y)) + s.relu()
        ),
        b=quantizer(HALF),
        w=wide,
        t=quantizer(ONE, 7),
        u=quantizer(ONE, 7),
        v=quantizer(ONE, 7),
    )
    assert {float(one.scale) for one in (module.t, module.u, module.v)} == {ONE}
    assert not edit.misses


def test_a_fused_relu_is_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = residual.agreeing_scale
    monkeypatch.setattr(
        settling, "agreeing_scale", lambda a, b, t: seen.append(t) or original(a, b, t)
    )
    program = compiled(tiny_residual(), images(2))
    (total,) = seen
    step = next(step for step in program if step.op == "add")
    assert replace(total, scale=step.grid.scale) == sum_of(step)
    assert total.relu
