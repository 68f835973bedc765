"""Values of few bits that adds and pools read too: kept at more bits, requantized for layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxq
from fxq.backends.eager import EagerModule
from fxq.backends.onnx import OnnxBackend
from fxq.graph.ops import ANCHORS, PASS_THROUGH, Kind
from fxq.graph.regions import Regions
from fxq.integer.reference import Reference
from fxq.passes import QuantizeAciq, QuantizeMinmax
from fxq.passes.insert_observers import InsertObservers, Placement, Statistics
from fxq.quant.dynamic import DynamicAciqQuantizer
from fxq.recipe import Recipe

from .conftest import Deep
from .test_correct_bias import BEFORE

FOUR = QuantizeMinmax(weight_bits=4, activation_bits=4)
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))

Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """``stem`` and ``head`` are the first layer and the last; between them what is asked for."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.wide, self.fc = nn.Conv2d(16, 8, 1), nn.Linear(8, 8)
        self.written = forward

    def forward(self, x: Tensor) -> Any:
        return self.written(self, torch.relu(self.stem(x)))


def end(m: Any, x: Tensor) -> Any:
    """Layers behind which nothing is split."""
    return m.head(torch.relu(m.b(x)))


SPLIT: dict[str, tuple[Forward, set[str]]] = {
    "residual": (lambda m, y: end(m, m.a(y) + y), {"relu"}),
    "residual, rectified": (lambda m, y: end(m, torch.relu(m.a(y) + y)), {"relu"}),
    "added to itself": (lambda m, y: end(m, m.a(y) + (y + y)), {"relu"}),
    "two layers and a sum": (lambda m, y: end(m, m.a(y) + m.b(y) + y), {"relu"}),
    "two blocks": (
        lambda m, y: end(m, m.b(z := torch.relu(m.a(y) + y)) + z),
        {"relu", "relu_1"},
    ),
    "average pool": (lambda m, y: end(m, m.a(y)[:, :, ::2, ::2] + F.avg_pool2d(y, 2)), {"relu"}),
    "global pool": (lambda m, y: end(m, m.a(y) + F.adaptive_avg_pool2d(y, 1)), {"relu"}),
    "behind a max pool": (
        lambda m, y: end(m, m.a(F.max_pool2d(y, 2)) + F.avg_pool2d(y, 2)),
        {"relu"},
    ),
    "the output": (lambda m, y: (end(m, m.a(y)), y), {"relu"}),
}
WHOLE: dict[str, Forward] = {
    "one layer": lambda m, y: end(m, m.a(y)),
    "layers alone": lambda m, y: end(m, torch.relu(m.a(y)) + torch.relu(m.b(y))),
    "layers behind a max pool": lambda m, y: end(
        m, m.a(F.max_pool2d(y, 2)) + F.avg_pool2d(m.b(y), 2)
    ),
    "adds alone": lambda m, y: end(m, (y + y) + y),
    "concatenation": lambda m, y: end(m, m.wide(torch.cat([y, m.a(y)], 1))),
    "concatenation and sum": lambda m, y: end(m, m.wide(torch.cat([y, m.a(y) + y], 1))),
}
POOLED: Forward = lambda m, y: end(m, m.a(z := F.max_pool2d(y, 2)) + z)  # noqa: E731


def lows(done: Any) -> set[str]:
    """The values that are requantized for layers."""
    found = (name for name in done.quantizers if name.endswith("_low"))
    return {name.removesuffix("_quantizer_low") for name in found}


def integers(forward: Forward, one: Any) -> Any:
    """The integer program after a pass."""
    recipe = Recipe("test", (*BEFORE, one))
    made = fxq.compile(Net(forward), IMAGES[:2], recipe, calibration=[IMAGES], check=False)
    return made.artifact.integers


def rounded_by(program: Any, regions: Regions, layer: fx.Node) -> Any:
    """The quantizer whose codes a layer multiplies."""
    node = regions.ops[layer].inputs[0]
    while regions.kind(node) in PASS_THROUGH | {Kind.CAT}:
        node = regions.ops[node].inputs[0]
    return program.submodule(node)


# ---- which values ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLIT)
def test_what_adds_and_pools_read_is_kept(name: str, quantized: Any) -> None:
    forward, expected = SPLIT[name]
    done = quantized(FOUR, Net(forward))
    assert lows(done) == expected
    for value in expected:
        kept, low = done.quantizers[f"{value}_quantizer"], done.quantizers[f"{value}_quantizer_low"]
        assert (kept.bits, low.bits) == (8, 4)
        node = done.ran.program.node(f"{value}_quantizer_low")
        assert [source.name for source in node.all_input_nodes] == [f"{value}_quantizer"]
        assert f"{value}_quantizer_low" in done.step.hits


@pytest.mark.parametrize("name", WHOLE)
def test_other_values_are_whole(name: str, quantized: Any) -> None:
    assert lows(quantized(FOUR, Net(WHOLE[name]))) == set()


EVERY = {**{name: one for name, (one, _) in SPLIT.items()}, **WHOLE}


@pytest.mark.parametrize(
    "forward",
    [
        *(pytest.param(forward, id=name) for name, forward in EVERY.items()),
        pytest.param(POOLED, id="layer and sum behind a max pool"),
    ],
)
def test_every_layer_multiplies_its_bits(forward: Forward, quantized: Any) -> None:
    done = quantized(FOUR, Net(forward))
    program = done.ran.program
    regions = Regions(program)
    first, last = regions.first_and_last()
    for layer in (node for node in regions.ops if regions.kind(node) in ANCHORS):
        wanted = 8 if layer in first | last else 4
        assert rounded_by(program, regions, layer).bits == wanted, layer.name
    assert set(done.step.hits) <= {node.name for node in program.nodes()}


def test_the_graph(quantized: Any, golden: Any) -> None:
    forward, _ = SPLIT["two blocks"]
    text = quantized(FOUR, Net(forward)).ran.text()
    golden("quantize-minmax--two-blocks", re.sub(r" scale [^)]*", "", text))


# ---- options -----------------------------------------------------------------------------------

RESIDUAL = SPLIT["residual"][0]


@pytest.mark.parametrize(("addend_bits", "split"), [(4, False), (3, False), (5, True), (8, True)])
def test_addends_of_no_more_bits_are_not_kept(
    addend_bits: int, split: bool, quantized: Any
) -> None:
    one = QuantizeMinmax(weight_bits=4, activation_bits=4, addend_bits=addend_bits)
    done = quantized(one, Net(RESIDUAL))
    assert lows(done) == ({"relu"} if split else set())
    assert done.quantizers["relu_quantizer"].bits == max(addend_bits, 4)


def test_eight_bits_need_no_more(quantized: Any) -> None:
    assert lows(quantized(QuantizeMinmax(), Net(RESIDUAL))) == set()
    layers = {"a": {"activation_bits": 8}}
    assert lows(quantized(FOUR, Net(RESIDUAL), layers=layers)) == set()


@pytest.mark.parametrize("pass_", [QuantizeMinmax, QuantizeAciq])
def test_each_has_the_range_of_its_bits(pass_: Any, quantized: Any) -> None:
    """What layers read is clipped as if it were alone; what adds read is not clipped."""
    images = IMAGES**3  # long tails, worth clipping
    options = {"weight_bits": 4, "activation_bits": 4}
    split = quantized(pass_(**options), Net(RESIDUAL), images)
    alone = quantized(pass_(**options, addend_bits=4), Net(RESIDUAL), images)
    assert split.ranges["relu_quantizer_low"] == alone.ranges["relu_quantizer"]
    largest = float(Net(RESIDUAL).stem(images).detach().max())
    assert split.ranges["relu_quantizer"] == (0, pytest.approx(largest, rel=1e-3))
    assert split.step.sqnr > alone.step.sqnr


def test_ranges_found_at_run_time_stand_before_the_relu(quantized: Any) -> None:
    done = quantized(QuantizeAciq(dynamic=True), Net(RESIDUAL))
    program = done.ran.program
    assert not lows(done)
    module = program.submodule(program.node("stem_quantizer"))
    assert isinstance(module, DynamicAciqQuantizer)
    assert module.fused_relu


def test_the_papers_placement_is_left_alone(quantized: Any) -> None:
    """There a value has the bits of what made it, whoever reads it."""
    observers = InsertObservers(Statistics.HISTOGRAM, placement=Placement.PAPER)
    for forward, _ in SPLIT.values():
        assert not lows(quantized(FOUR, Net(forward), observers=observers))


def test_a_network_without_such_values_is_as_it_was(quantized: Any) -> None:
    one = QuantizeMinmax(weight_bits=4, activation_bits=4, addend_bits=4)
    assert quantized(FOUR, Deep()).quantizers.keys() == quantized(one, Deep()).quantizers.keys()


# ---- integers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLIT)
def test_codes_are_requantized_the_same_everywhere(name: str) -> None:
    forward, values = SPLIT[name]
    program = integers(forward, FOUR)
    program.check()
    steps = {step.name: step for step in program if step.op == "requantize"}
    assert {f"{value}_quantizer_low" for value in values} <= steps.keys()
    grids: Any = program.grids()
    for value in values:
        step = steps[f"{value}_quantizer_low"]
        assert (step.grid.bits, grids[step.inputs[0]].bits) == (4, 8)
    x = IMAGES * 1.5
    output, expected = Reference(program).run(x)
    check(EagerModule(program, "fbgemm").registers(x), expected)
    for flavor in ("fast", "packed"):
        module: Any = OnnxBackend().load(program, flavor=flavor)
        check(module.registers(x), expected)
        for found, want in zip(each(module(x)), each(output), strict=True):
            assert torch.equal(found, want)


@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-4bit"])
def test_a_pooled_value_that_is_joined_to_an_earlier_one(recipe: str) -> None:
    """The pooled value has the scale of the earlier one, and gets its quantizer with it."""

    def forward(m: Any, y: Tensor) -> Any:
        early, late = torch.relu(m.b(y)), torch.relu(m.a(y))
        joined = torch.cat([F.max_pool2d(early, 2), F.max_pool2d(late, 2)], 1)
        return m.wide(joined), m.head(late)

    artifact = fxq.compile(Net(forward), IMAGES[:1], recipe, calibration=[IMAGES]).artifact
    assert artifact.ledger.coverage() == 1
    for found, wanted in zip(artifact(IMAGES), Reference(artifact.integers)(IMAGES), strict=True):
        assert torch.equal(found, wanted)


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every register is that of the reference."""
    assert found.keys() == expected.keys()
    wrong = [name for name, one in found.items() if not one.double().equal(expected[name].double())]
    assert wrong == []


def each(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)
