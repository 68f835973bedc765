"""quantize-apot: which values and weights get which levels, with which clips."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual
from fxq.numerics.learned_clip import ClipGradient, normal_clip
from fxq.numerics.levels import LevelSet, levels_of, magnitudes, nearest_level
from fxq.passes.insert_observers import Placement
from fxq.passes.quantize_apot import ClipInit
from fxq.quant.learned_layers import AbsmaxWeights, LevelWeights, WeightNorm
from fxq.quant.learned_values import LearnedLevels

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Four layers around a function."""

    def __init__(self, function: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.a = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.b, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.a(self.function(self.first(x))))
        return self.head(self.function(self.b(x)).mean((2, 3)))


# ---- placement -------------------------------------------------------------------------------


def test_tiny_residual(learning: Any, golden: Any) -> None:
    done = learning(tiny_residual(), weight_bits=4, activation_bits=4)
    numbers = r" (clip|range) [^)]*"  # which differ in their last digits
    golden("quantize-apot--tiny-residual", re.sub(numbers, "", done.ran.text()))
    assert done.ran.step.notes == (
        "placement: 8-bit weights and inputs of the first and last layer; 4-bit weights and inputs "
        "of 2 layers; the network input, 1 summed or pooled output, 1 sum and 1 pool at 8 bits",
    )
    census = done.ran.step.census
    assert census == {
        "HistogramObserver": -6,
        "LearnedLevels": 2,
        "MovingRange": 5,
        "Conv2d+BatchNorm2d": -3,
        "LearnedConv2d+BatchNorm2d": 3,
        "Linear": -1,
        "LearnedLinear": 1,
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("build", "x"),
    [
        (tiny_conv, IMAGES),
        (tiny_residual, IMAGES),
        (tiny_concat, IMAGES),
        (tiny_depthwise, IMAGES),
        (tiny_mlp, VECTORS),
    ],
)
def test_inner_layers_have_few_bits(build: Any, x: Tensor, bits: int, learning: Any) -> None:
    done = learning(build(), x, weight_bits=bits, activation_bits=bits)
    widths = {name: int(layer.bits[0]) for name, layer in done.layers.items()}
    ends = [name for name, width in widths.items() if width == 8]
    inner = {name: width for name, width in widths.items() if width != 8}
    assert ends[-1] == list(widths)[-1]
    assert set(inner.values()) == {bits}
    for name in inner:
        (source,) = done.ran.program.node(name).all_input_nodes
        while source.name not in done.values:  # through a pool or a concatenation
            source = source.all_input_nodes[0]
        assert done.values[source.name].bits == bits, name
        assert isinstance(done.layers[name].weights, LevelWeights)
    for name in ends:
        assert isinstance(done.layers[name].weights, AbsmaxWeights)


def test_branches_share_one_quantizer(learning: Any) -> None:
    done = learning(tiny_concat(), weight_bits=4, activation_bits=4)
    narrow, wide = (done.values[node.name] for node in done.ran.program.node("cat").args[0])
    assert narrow is wide
    assert isinstance(narrow, LearnedLevels)


def test_sums_keep_their_bits(learning: Any) -> None:
    widths = learning(tiny_residual(), weight_bits=2, activation_bits=2, addend_bits=7).widths()
    assert widths["conv2_quantizer"] == widths["stem_relu_quantizer"] == 7
    assert widths["stem_relu_quantizer_low"] == 2


def test_without_exceptions(learning: Any) -> None:
    done = learning(tiny_conv(), weight_bits=4, activation_bits=4, first_last_bits=0)
    assert {int(layer.bits[0]) for layer in done.layers.values()} == {4}
    assert done.values["x_quantizer"].signed
    assert not done.values["relu1_quantizer"].signed


@pytest.mark.parametrize("bits", [4, 8])
def test_the_authors_placement(bits: int, learning: Any) -> None:
    """Sums and the inputs of the first and last layer stay in float; other inputs do not."""
    placement = Placement.PAPER
    done = learning(tiny_residual(), weight_bits=4, activation_bits=bits, placement=placement)
    low = "_low" if bits < 8 else ""  # where the sum reads it, too, in float
    assert done.widths() == {f"stem_relu_quantizer{low}": bits, "relu1_quantizer": bits}
    (note,) = done.ran.step.notes
    assert "8-bit weights and float inputs of the first and last layer" in note
    assert "1 sum and 1 pool in float" in note
    assert done.layers["fc"].weights.as_published


def test_overrides(learning: Any) -> None:
    layers = {
        "conv1": {"weight_bits": 8, "activation_bits": 8},
        "conv2": {"weight_bits": 3, "activation_bits": 5},
        "fc": {"weight_bits": 4},
    }
    done = learning(tiny_residual(), weight_bits=4, activation_bits=4, layers=layers)
    widths = {name: int(layer.bits[0]) for name, layer in done.layers.items()}
    assert widths == {"stem": 8, "conv1": 8, "conv2": 3, "fc": 4}
    assert done.widths()["relu1_quantizer"] == 5
    assert done.widths()["stem_relu_quantizer"] == 8
    assert not [name for name in done.values if name.endswith("_low")]


def test_a_skipped_layer_stays_in_float(learning: Any) -> None:
    layers = {"conv2": {"skip": True}}
    done = learning(tiny_residual(), weight_bits=4, activation_bits=4, layers=layers)
    assert set(done.layers) == {"stem", "conv1", "fc"}
    (reason,) = done.ran.why("conv2")
    assert reason.startswith("stays in float: ")


# ---- levels and clips of values --------------------------------------------------------------


MOST_BITS = {LevelSet.UNIFORM: 7, LevelSet.APOT: 5, LevelSet.POT: 6, LevelSet.LLOYD: 7}
"""Of values, beyond which they are refused."""


@pytest.mark.parametrize(
    ("bits", "kind", "signed"),
    [
        (bits, kind, signed)
        for kind, most in MOST_BITS.items()
        for signed in (False, True)
        for bits in range(1 + signed, most + 1)
    ],
)
def test_every_level_set_fits_integer_kernels(
    bits: int, kind: LevelSet, signed: bool, learning: Any
) -> None:
    """As many levels as bits have, the sign taken off, and none that a byte cannot hold."""
    net = Net(F.gelu if signed else torch.relu)
    done = learning(net, activation_bits=bits, weight_bits=4, level_set=kind, check=False)
    assert len(done.levels) == 2
    for module in done.levels.values():
        frozen: Any = module.frozen()
        assert module.signed is signed
        assert frozen.bits == module.bits == bits
        count, dropped = 2 ** (bits - signed), kind is LevelSet.POT and bits > 3
        assert len(module.levels) <= count if dropped else len(module.levels) == count
        assert int(module.levels[-1]) <= (63 if signed else 127)


def test_powers_of_two_lose_the_smallest(learning: Any) -> None:
    plain = learning(Net(), weight_bits=4, activation_bits=4, level_set=LevelSet.POT)
    signed = learning(Net(F.gelu), weight_bits=4, activation_bits=4, level_set=LevelSet.POT)
    assert plain.levels["relu_quantizer"].levels.tolist() == [0, 1, 2, 4, 8, 16, 32, 64]
    found = next(iter(signed.levels.values())).levels.tolist()
    assert found == [0, 1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("kind", [LevelSet.UNIFORM, LevelSet.APOT, LevelSet.POT, LevelSet.LLOYD])
def test_clips_have_the_least_error(kind: LevelSet, learning: Any) -> None:
    """Against other clips, on the very values; the histogram's bins cost little."""
    net = Net()
    done = learning(net, weight_bits=4, activation_bits=4, level_set=kind)
    module = done.levels["relu_quantizer"]
    values = torch.relu(net.first(IMAGES)).detach()

    def error(clip: float) -> float:
        unit = clip / int(module.levels[-1])
        rounded = nearest_level(values / unit, module.levels) * unit
        return float((rounded - values).square().mean())

    found = error(module.alpha.item())
    assert all(
        found < 1.02 * error(module.alpha.item() * by) for by in (0.5, 0.8, 0.9, 1.1, 1.3, 2)
    )


def test_the_authors_clips(learning: Any) -> None:
    done = learning(Net(), weight_bits=4, activation_bits=4, clip_init=ClipInit.PAPER)
    assert {module.alpha.item() for module in done.levels.values()} == {8.0}
    inner = [one.weights for one in done.layers.values() if isinstance(one.weights, LevelWeights)]
    assert {weights.alpha.item() for weights in inner} == {3.0}


def test_a_bounded_relu_bounds_the_range(learning: Any) -> None:
    net = Net(lambda x: F.relu6(20 * x))
    done = learning(net, weight_bits=4, activation_bits=8)
    ends = {n: (m.low.item(), m.high.item()) for n, m in done.values.items() if "relu6" in n}
    assert len(ends) == 2
    assert set(ends.values()) == {(0.0, 6.0)}
    for kind in (LevelSet.APOT, LevelSet.LLOYD):
        few = learning(net, weight_bits=4, activation_bits=4, level_set=kind).levels
        assert len(few) == 2
        for module in few.values():  # the top is a level, if not the largest
            assert module(torch.tensor([6.0])).item() == pytest.approx(6.0, rel=0.01)
            assert module.alpha.item() < 8.1


# ---- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LevelSet.UNIFORM, LevelSet.APOT, LevelSet.POT])
def test_weights_start_on_the_nearest_levels(kind: LevelSet, learning: Any) -> None:
    layer = learning(Net(), weight_bits=4, activation_bits=4, level_set=kind).layers["a"]
    levels, weight = levels_of(kind, 4), Net().a.weight.detach()
    assert layer.weights.levels.tolist() == levels.tolist()
    assert layer.weights.alpha.item() == pytest.approx(normal_clip(levels))
    assert (layer.weights(layer.layer) - weight).norm() < 0.25 * weight.norm()
    assert layer.level_set == kind.value


def test_options_reach_the_modules(learning: Any) -> None:
    done = learning(
        Net(),
        weight_bits=4,
        activation_bits=3,
        base=3,
        gradient=ClipGradient.PACT,
        weight_norm=WeightNorm.ATTACHED,
        straight=False,
        layers={"b": {"base": 1}},
    )
    weights = done.layers["a"].weights
    assert weights.levels.tolist() == magnitudes(LevelSet.APOT, 3, base=3).tolist()
    assert (weights.gradient, weights.norm) == (ClipGradient.PACT, WeightNorm.ATTACHED)
    assert not weights.straight
    assert {module.gradient for module in done.levels.values()} == {ClipGradient.PACT}
    assert done.layers["b"].weights.levels.tolist() == list(range(8))
