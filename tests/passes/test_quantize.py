"""quantize-minmax and quantize-aciq: what every option does to the grids and the codes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq.errors import RequirementError, SpecError
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual
from fxq.numerics.aciq import Prior, aciq_range
from fxq.numerics.affine import fake_quantize, grid_from_range
from fxq.passes import (
    Calibrate,
    FoldBatchNorm,
    InsertObservers,
    MarkRelu,
    QuantizeAciq,
    QuantizeMinmax,
)
from fxq.passes.insert_observers import Statistics
from fxq.quant.observers import HistogramObserver, Observer

VECTORS = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
TINY = {
    "tiny-conv": (tiny_conv, False),
    "tiny-residual": (tiny_residual, False),
    "tiny-depthwise": (tiny_depthwise, False),
    "tiny-concat": (tiny_concat, False),
    "tiny-mlp": (tiny_mlp, True),
}


# ---- the three claims on the tiny networks ---------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("one", [QuantizeMinmax(), QuantizeAciq()], ids=lambda one: one.name)
def test_tiny_networks(one: Any, name: str, quantized: Any, images: Any, golden: Any) -> None:
    build, vectors = TINY[name]
    done = quantized(one, build(), VECTORS if vectors else images)
    text = re.sub(r" scale [^)]*", "", done.ran.text())  # scales differ in their last digits
    golden(f"{one.name}--{name}", text)
    census = done.step.census
    count = census.pop("ActivationQuantizer")
    split = sum(quantizer.endswith("_low") for quantizer in done.quantizers)
    assert census.pop("HistogramObserver") == split - count
    for kind in ("Conv2d", "Linear"):
        assert census.pop(f"Quantized{kind}", 0) == -census.pop(kind, 0)
    assert not census
    assert done.step.sqnr > (30 if one.name == "quantize-minmax" else 9)


# ---- activations -----------------------------------------------------------------------------


def test_minmax_covers_what_was_seen(quantized: Any, images: Tensor) -> None:
    done = quantized(QuantizeMinmax())
    low, high = done.ranges["x_quantizer"]
    step = (high - low) / 255
    assert low == pytest.approx(float(images.min()), abs=step)
    assert high == pytest.approx(float(images.max()), abs=step)
    assert done.ranges["relu_quantizer"][0] == 0
    assert {quantizer.bits for quantizer in done.quantizers.values()} == {8}


def test_symmetric_activations_have_zero_in_the_middle(quantized: Any) -> None:
    found = quantized(QuantizeMinmax(symmetric=True, activation_bits=6)).quantizers
    assert int(found["x_quantizer"].zero_point) == 128
    assert int(found["relu_quantizer"].zero_point) == 0  # a ReLU has no negative side
    assert found["relu_quantizer"].bits == 6


def test_a_moving_average_reaches_the_range(quantized: Any, images: Tensor) -> None:
    done = quantized(QuantizeMinmax(), observers=InsertObservers(momentum=0.5))
    assert done.ranges["x_quantizer"][1] == pytest.approx(float(images.max()), rel=0.02)


def test_per_channel_activations(quantized: Any, images: Tensor) -> None:
    done = quantized(QuantizeMinmax(), observers=InsertObservers(per_channel=True))
    found = done.quantizers["x_quantizer"]
    assert found.per_channel
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    scale, zero_point = grid_from_range(low.double(), high.double(), 8)
    assert torch.equal(found.scale, scale.float())
    assert torch.equal(found.zero_point, zero_point)
    assert done.step.sqnr > 30


def test_relu6_bounds_the_range(quantized: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[0].weight.data *= 50
    done = quantized(QuantizeMinmax(), model)
    low, high = done.ranges["_1_quantizer"]
    assert low == 0
    assert high == pytest.approx(6, rel=1e-3)


@pytest.mark.parametrize("prior", [Prior.LAPLACE, Prior.GAUSS])
@pytest.mark.parametrize("mean_aware", [False, True])
def test_aciq_clips_where_the_closed_form_says(
    prior: Prior, mean_aware: bool, run_passes: Any, quantized: Any, deep: Any, images: Tensor
) -> None:
    before = [FoldBatchNorm(), MarkRelu(), InsertObservers(statistics=Statistics.HISTOGRAM)]
    images = images**3  # long tails, worth clipping
    seen = run_passes([*before, Calibrate()], deep, images[:2], calibration=[images])
    observer = seen.program.submodule(seen.program.node("first_observer"))
    assert isinstance(observer, HistogramObserver)
    one = QuantizeAciq(prior=prior, mean_aware=mean_aware, guard=False)
    done = quantized(one, images=images)
    low, high = (end.double() for end in observer.range())
    spread = observer.abs_deviation() if prior is Prior.LAPLACE else observer.std()
    _, clip = aciq_range(
        observer.mean(), spread, low, high, 15, prior=prior, fused_relu=True, mean_aware=mean_aware
    )
    found = done.quantizers["relu_quantizer"]
    assert found.bits == 4
    assert done.ranges["relu_quantizer"] == (0, pytest.approx(float(clip), rel=1e-4))
    assert float(clip) < float(high)


@pytest.mark.parametrize(("power", "law"), [(1, Prior.GAUSS), (5, Prior.LAPLACE)])
def test_the_prior_is_fitted_to_each_value(
    power: int, law: Prior, quantized: Any, deep: Any, images: Tensor
) -> None:
    with torch.no_grad():
        deep.first.weight.zero_()
        deep.first.weight[:, 0, 1, 1] = 1  # the values are those of the images
    images = images**power
    found, expected, other = (
        quantized(QuantizeAciq(prior=prior, guard=False), deep, images).ranges["relu_quantizer"]
        for prior in (Prior.FIT, law, {Prior.GAUSS, Prior.LAPLACE}.difference({law}).pop())
    )
    assert found == expected != other


@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_guard_takes_the_range_of_the_smaller_error(
    power: int, bits: int, quantized: Any, deep: Any, images: Tensor
) -> None:
    images = images**power
    values = deep.first(images).relu().detach()
    errors = {}
    for guard in (False, True):
        one = QuantizeAciq(activation_bits=bits, guard=guard, first_last_bits=8)
        grid = quantized(one, images=images).quantizers["relu_quantizer"]
        errors[guard] = float((grid(values) - values).square().mean())
    scale, zero_point = grid_from_range(0.0, float(values.max()), bits)
    whole = fake_quantize(values, scale, zero_point, 0, 2**bits - 1)
    best = min(errors[False], float((whole - values).square().mean()))
    assert errors[True] == pytest.approx(best, rel=0.02)


def test_aciq_keeps_the_whole_range_at_the_edges(quantized: Any, images: Tensor) -> None:
    assert quantized(QuantizeAciq()).ranges["x_quantizer"] == pytest.approx(
        quantized(QuantizeMinmax()).ranges["x_quantizer"]
    )
    clipped = quantized(QuantizeAciq(first_last_bits=0)).ranges["x_quantizer"]
    assert clipped[1] < float(images.max()) * 0.95


def test_aciq_without_a_distribution(quantized: Any) -> None:
    with pytest.raises(SpecError, match="needs the distribution") as caught:
        quantized(QuantizeAciq(), observers=InsertObservers())
    assert caught.value.hint == 'set statistics = "histogram" on insert-observers'
    assert caught.value.where == "quantize-aciq at %first_observer"


# ---- bits per layer --------------------------------------------------------------------------


def test_the_first_and_the_last_keep_their_bits(quantized: Any) -> None:
    done = quantized(QuantizeAciq(weight_bits=3, activation_bits=5, first_last_bits=7))
    assert {n: int(layer.bits[0]) for n, layer in done.layers.items()} == {
        "first": 7,
        "body_0": 3,
        "body_2": 3,
        "head": 7,
    }
    assert {name: q.bits for name, q in done.quantizers.items()} == {
        "x_quantizer": 7,
        "relu_quantizer": 5,
        "body_1_quantizer": 5,
        "relu_1_quantizer": 8,
        "mean_quantizer": 7,
    }


def test_no_exception_for_the_edges(quantized: Any) -> None:
    done = quantized(QuantizeAciq(weight_bits=3, activation_bits=5, first_last_bits=0))
    assert {int(layer.bits[0]) for layer in done.layers.values()} == {3}
    assert done.quantizers["x_quantizer"].bits == 5


@pytest.mark.parametrize("pattern", ["body.*", "body.0", "*.0", "body_0"])
def test_overrides_by_glob(pattern: str, quantized: Any) -> None:
    done = quantized(
        QuantizeAciq(), layers={pattern: {"weight_bits": 6, "activation_bits": 7, "skip": False}}
    )
    assert int(done.layers["body_0"].bits[0]) == 6
    assert done.quantizers["relu_quantizer"].bits == 7
    assert int(done.layers["body_2"].bits[0]) == (6 if pattern == "body.*" else 4)
    assert int(done.layers["first"].bits[0]) == 8


def test_a_later_override_wins(quantized: Any) -> None:
    overrides = {"body.*": {"weight_bits": 6}, "body.2": {"weight_bits": 5}}
    done = quantized(QuantizeMinmax(weight_bits=4), layers=overrides)
    assert [int(done.layers[name].bits[0]) for name in ("body_0", "body_2")] == [6, 5]


def test_a_skipped_layer_stays_in_float(quantized: Any) -> None:
    done = quantized(QuantizeMinmax(), layers={"body.0": {"skip": True}})
    assert set(done.layers) == {"first", "body_2", "head"}
    assert done.ran.why("body_0") == ["stays in float: the recipe skips it"]
    assert isinstance(done.ran.program.submodule(done.ran.program.node("body_0")), nn.Conv2d)


def test_a_shared_layer_is_quantized_once(quantized: Any) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(self.conv(x).relu()).mean((2, 3)))

    done = quantized(QuantizeMinmax(), Shared())
    assert set(done.layers) == {"conv", "conv_1", "fc"}
    assert done.layers["conv"] is done.layers["conv_1"]
    assert done.step.sqnr > 25


# ---- errors ----------------------------------------------------------------------------------

BITS = [
    ({"weight_bits": 1}, "weight_bits must be 2 to 8, not 1"),
    ({"weight_bits": 9}, "weight_bits must be 2 to 8, not 9"),
    ({"activation_bits": 0}, "activation_bits must be 1 to 8, not 0"),
    ({"activation_bits": 9}, "activation_bits must be 1 to 8, not 9"),
    ({"addend_bits": 16}, "addend_bits must be 1 to 8, not 16"),
    ({"first_last_bits": 9}, "first_last_bits must be 0 to 8, not 9"),
    ({"first_last_bits": -1}, "first_last_bits must be 0 to 8, not -1"),
    ({"weight_bits": 4.0}, "weight_bits must be 2 to 8, not 4.0"),
    ({"weight_bits": True}, "weight_bits must be 2 to 8, not True"),
]


@pytest.mark.parametrize(("options", "what"), BITS, ids=[what for _, what in BITS])
@pytest.mark.parametrize("build", [QuantizeMinmax, QuantizeAciq])
def test_impossible_bits(build: Any, options: Any, what: str, quantized: Any) -> None:
    with pytest.raises(SpecError) as caught:
        quantized(build(**options))
    assert caught.value.what == what
    assert caught.value.where == build.name


def test_a_law_is_fitted_to_calibrated_values_only(quantized: Any) -> None:
    with pytest.raises(SpecError, match="first seen at run time"):
        quantized(QuantizeAciq(prior=Prior.FIT, dynamic=True))


@pytest.mark.parametrize("option", ["weight_bits", "activation_bits"])
def test_impossible_bits_of_a_layer_name_it(option: str, quantized: Any) -> None:
    with pytest.raises(SpecError, match=f"{option} must be") as caught:
        quantized(QuantizeMinmax(), layers={"body.2": {option: 12}})
    assert caught.value.where == "layer body.2"


@pytest.mark.parametrize("build", [QuantizeMinmax, QuantizeAciq])
def test_what_must_run_before(build: Any, run_passes: Any, deep: Any, images: Tensor) -> None:
    with pytest.raises(RequirementError, match="needs insert-observers, calibrate to run before"):
        run_passes([build()], deep, images)


def test_no_observer_is_left(quantized: Any) -> None:
    done = quantized(QuantizeMinmax())
    assert not any(isinstance(module, Observer) for module in done.ran.program.module.modules())
