"""quantize-minmax and quantize-aciq: what every option does to the grids and the codes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxq.errors import RequirementError, SpecError
from fxq.graph.program import facts
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual
from fxq.numerics.aciq import Prior, aciq_range
from fxq.numerics.affine import grid_from_range
from fxq.numerics.saturation import largest_pair_sum, pair_limit
from fxq.passes import (
    Calibrate,
    FoldBatchNorm,
    InsertObservers,
    MarkRelu,
    QuantizeAciq,
    QuantizeMinmax,
)
from fxq.passes.insert_observers import Statistics
from fxq.passes.quantization import WeightCodes, _unsaturated
from fxq.passes.quantize_aciq import Allocation, BiasCorrection, WeightRange
from fxq.quant.observers import HistogramObserver, Observer
from fxq.quant.quantizers import ActivationQuantizer, QuantizedLayer, rows

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
TINY = {
    "tiny-conv": (tiny_conv, IMAGES),
    "tiny-residual": (tiny_residual, IMAGES),
    "tiny-depthwise": (tiny_depthwise, IMAGES),
    "tiny-concat": (tiny_concat, IMAGES),
    "tiny-mlp": (tiny_mlp, VECTORS),
}


class Deep(nn.Module):
    """Four convolutions, so that two are neither first nor last; the third is depthwise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 5, groups=8))
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.relu(self.first(x)))
        return self.head(self.relu(x).mean((2, 3)))


@pytest.fixture
def quantized(run_passes: Any) -> Any:
    """Call it as ``quantized(pass)``: the deep network after it, on histograms."""

    def run(one: Any, model: Any = None, images: Tensor = IMAGES, **options: Any) -> Any:
        passes = [
            FoldBatchNorm(),
            MarkRelu(),
            options.pop("observers", InsertObservers(statistics=Statistics.HISTOGRAM)),
            Calibrate(),
            one,
        ]
        return run_passes(passes, model or Deep(), images[:2], calibration=[images], **options)

    return run


def layers(ran: Any) -> dict[str, QuantizedLayer]:
    found = {}
    for node in ran.program.nodes():
        module = ran.program.submodule(node)
        if isinstance(module, QuantizedLayer):
            found[node.name] = module
    return found


def quantizers(ran: Any) -> dict[str, ActivationQuantizer]:
    found = {}
    for node in ran.program.nodes():
        module = ran.program.submodule(node)
        if isinstance(module, ActivationQuantizer):
            found[node.name] = module
    return found


def float_rows(ran: Any, name: str) -> Tensor:
    """``[out, taps]``: the weights a layer had before."""
    layer = ran.model.get_submodule(name.replace("body_", "body."))
    return rows(layer, layer.weight.detach()).double()


def code_rows(layer: QuantizedLayer) -> Tensor:
    return rows(layer.layer, layer.codes)


# ---- the three claims on the tiny networks ---------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("one", [QuantizeMinmax(), QuantizeAciq()], ids=lambda one: one.name)
def test_tiny_networks(one: Any, name: str, quantized: Any, golden: Any) -> None:
    build, images = TINY[name]
    ran = quantized(one, build(), images)
    text = re.sub(r" scale [^)]*", "", ran.text())  # scales differ in their last digits
    golden(f"{one.name}--{name}", text)
    census = ran.step.census
    count = census.pop("ActivationQuantizer")
    assert census.pop("HistogramObserver") == -count
    for kind in ("Conv2d", "Linear"):
        assert census.pop(f"Quantized{kind}", 0) == -census.pop(kind, 0)
    assert not census
    assert ran.step.sqnr > (30 if one.name == "quantize-minmax" else 9)


# ---- activations -----------------------------------------------------------------------------


def ranges(ran: Any) -> dict[str, tuple[float, float]]:
    """Quantizer node to the ends of its grid."""
    ends = {}
    for name, quantizer in quantizers(ran).items():
        zero, scale = int(quantizer.zero_point), float(quantizer.scale)
        ends[name] = (-zero * scale, (2**quantizer.bits - 1 - zero) * scale)
    return ends


def test_minmax_covers_what_was_seen(quantized: Any) -> None:
    ran = quantized(QuantizeMinmax())
    low, high = ranges(ran)["x_quantizer"]
    step = (high - low) / 255
    assert low == pytest.approx(float(IMAGES.min()), abs=step)
    assert high == pytest.approx(float(IMAGES.max()), abs=step)
    assert ranges(ran)["relu_quantizer"][0] == 0
    assert {quantizer.bits for quantizer in quantizers(ran).values()} == {8}


def test_symmetric_activations_have_zero_in_the_middle(quantized: Any) -> None:
    found = quantizers(quantized(QuantizeMinmax(symmetric=True, activation_bits=6)))
    assert int(found["x_quantizer"].zero_point) == 128
    assert int(found["relu_quantizer"].zero_point) == 0  # a ReLU has no negative side
    assert found["relu_quantizer"].bits == 6


def test_a_moving_average_reaches_the_range(quantized: Any) -> None:
    observers = InsertObservers(momentum=0.5)
    passes = [observers, Calibrate(), QuantizeMinmax()]
    ran = quantized(QuantizeMinmax(), observers=observers)
    assert ranges(ran)["x_quantizer"][1] == pytest.approx(float(IMAGES.max()), rel=0.02)
    del passes


def test_per_channel_activations(quantized: Any) -> None:
    ran = quantized(QuantizeMinmax(), observers=InsertObservers(per_channel=True))
    found = quantizers(ran)["x_quantizer"]
    assert found.per_channel
    low, high = IMAGES.amin((0, 2, 3)), IMAGES.amax((0, 2, 3))
    scale, zero_point = grid_from_range(low.double(), high.double(), 8)
    assert torch.equal(found.scale, scale.float())
    assert torch.equal(found.zero_point, zero_point)
    assert ran.step.sqnr > 30


def test_relu6_bounds_the_range(quantized: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[0].weight.data *= 50
    ran = quantized(QuantizeMinmax(), model)
    low, high = ranges(ran)["_1_quantizer"]
    assert low == 0
    assert high == pytest.approx(6, rel=1e-3)


@pytest.mark.parametrize("prior", list(Prior))
@pytest.mark.parametrize("mean_aware", [False, True])
def test_aciq_clips_where_the_closed_form_says(
    prior: Prior, mean_aware: bool, run_passes: Any
) -> None:
    before = [FoldBatchNorm(), MarkRelu(), InsertObservers(statistics=Statistics.HISTOGRAM)]
    images = IMAGES**3  # long tails, worth clipping
    seen = run_passes([*before, Calibrate()], Deep(), images[:2], calibration=[images])
    observer = seen.program.submodule(seen.program.node("first_observer"))
    assert isinstance(observer, HistogramObserver)
    one = QuantizeAciq(prior=prior, mean_aware=mean_aware)
    ran = run_passes([*before, Calibrate(), one], Deep(), images[:2], calibration=[images])
    low, high = (end.double() for end in observer.range())
    spread = observer.abs_deviation() if prior is Prior.LAPLACE else observer.std()
    _, clip = aciq_range(
        observer.mean(), spread, low, high, 15, prior=prior, fused_relu=True, mean_aware=mean_aware
    )
    found = quantizers(ran)["relu_quantizer"]
    assert found.bits == 4
    assert ranges(ran)["relu_quantizer"] == (0, pytest.approx(float(clip), rel=1e-4))
    assert float(clip) < float(high)


def test_aciq_keeps_the_whole_range_at_the_edges(quantized: Any) -> None:
    assert ranges(quantized(QuantizeAciq()))["x_quantizer"] == pytest.approx(
        ranges(quantized(QuantizeMinmax()))["x_quantizer"]
    )
    clipped = ranges(quantized(QuantizeAciq(first_last_bits=0)))["x_quantizer"]
    assert clipped[1] < float(IMAGES.max()) * 0.95


def test_aciq_without_a_distribution(quantized: Any) -> None:
    with pytest.raises(SpecError, match="needs the distribution") as caught:
        quantized(QuantizeAciq(), observers=InsertObservers())
    assert caught.value.hint == 'set statistics = "histogram" on insert-observers'
    assert caught.value.where == "quantize-aciq at %first_observer"


# ---- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("build", [QuantizeMinmax, QuantizeAciq])
def test_a_channel_has_no_more_levels_than_its_bits(build: Any, bits: int, quantized: Any) -> None:
    ran = quantized(build(weight_bits=bits, first_last_bits=0))
    assert set(layers(ran)) == {"first", "body_0", "body_2", "head"}
    for name, layer in layers(ran).items():
        assert layer.bits.tolist() == [bits] * len(layer.bits)
        assert max(len(set(row)) for row in code_rows(layer).tolist()) <= 2**bits
        assert int(layer.codes.abs().max()) <= 127
        error = (code_rows(layer) * layer.scale.unsqueeze(1) - float_rows(ran, name)).abs().amax(1)
        widest = float_rows(ran, name).abs().amax(1) / (2 ** (bits - 1) - 1)
        assert bool((error <= widest * (1.5 if name == "body_2" else 1.01)).all())


def test_weights_per_tensor_share_one_scale(quantized: Any) -> None:
    found = layers(quantized(QuantizeMinmax(per_channel_weights=False)))["body_0"]
    assert len(set(found.scale.tolist())) == 1
    assert int(found.codes.abs().max()) == 127
    assert len(set(layers(quantized(QuantizeMinmax()))["body_0"].scale.tolist())) == 8


def test_mse_weights_have_a_smaller_error(quantized: Any) -> None:
    errors = {}
    for kind in WeightRange:
        ran = quantized(
            QuantizeAciq(weight_range=kind, bias_correction=BiasCorrection.NONE, weight_bits=3)
        )
        layer = layers(ran)["body_0"]
        found = code_rows(layer) * layer.scale.unsqueeze(1)
        errors[kind] = float((found - float_rows(ran, "body_0")).square().mean())
    assert errors[WeightRange.MSE] < errors[WeightRange.ABSMAX]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("weight_range", list(WeightRange))
def test_bias_correction_restores_the_mean_of_each_channel(
    bits: int, weight_range: WeightRange, quantized: Any
) -> None:
    ran = quantized(QuantizeAciq(weight_bits=bits, first_last_bits=0, weight_range=weight_range))
    plain = quantized(
        QuantizeAciq(
            weight_bits=bits,
            first_last_bits=0,
            weight_range=weight_range,
            bias_correction=BiasCorrection.NONE,
        )
    )
    for name in ("first", "body_0", "head"):
        layer, want = layers(ran)[name], float_rows(ran, name).mean(1)
        error = ((code_rows(layer).double() * layer.scale.unsqueeze(1)).mean(1) - want).abs()
        assert bool((error <= layer.scale / 2 * 1.0001).all())
        other = layers(plain)[name]
        without = ((code_rows(other).double() * other.scale.unsqueeze(1)).mean(1) - want).abs()
        assert float(error.mean()) < float(without.mean()) * 1.001


@pytest.mark.parametrize("allocation", [Allocation.BINS, Allocation.MEAN_BITS])
def test_allocation_gives_wide_channels_more_bits(allocation: Allocation, quantized: Any) -> None:
    model = Deep()
    with torch.no_grad():
        model.body[0].weight *= torch.logspace(-1, 1, 8).reshape(-1, 1, 1, 1)
    ran = quantized(QuantizeAciq(allocation=allocation), model)
    layer = layers(ran)["body_0"]
    bits = layer.bits.tolist()
    assert bits == sorted(bits)
    assert bits[0] < bits[-1]
    assert min(bits) >= 2
    assert max(bits) <= 8
    for row, width in zip(code_rows(layer).tolist(), bits, strict=True):
        assert len(set(row)) <= 2**width
    if allocation is Allocation.MEAN_BITS:
        assert sum(bits) / 8 == pytest.approx(4, abs=0.5)
    assert facts(ran.program.node("body_0")).note == f"w{bits[0]}..{bits[-1]}"


@pytest.mark.parametrize("allocation", list(Allocation))
@pytest.mark.parametrize("build", [QuantizeAciq, QuantizeMinmax])
def test_dead_channels_and_dead_layers(build: Any, allocation: Allocation, quantized: Any) -> None:
    model = Deep()
    with torch.no_grad():
        model.first.weight[2] = 0
        model.body[0].weight.zero_()
        model.head.weight.fill_(0.25)
    options = {"allocation": allocation} if build is QuantizeAciq else {}
    found = layers(quantized(build(**options), model))
    assert not bool(found["first"].codes[2].any())
    assert not bool(found["body_0"].codes.any())
    head = found["head"]
    torch.testing.assert_close(
        head.codes * head.scale.unsqueeze(1), model.head.weight.detach(), rtol=1e-3, atol=0
    )


# ---- depthwise -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("build", [QuantizeMinmax, QuantizeAciq])
def test_depthwise_pairs_never_saturate(build: Any, bits: int, quantized: Any) -> None:
    model = Deep()
    with torch.no_grad():
        model.body[2].weight.abs_()  # all of one sign: the worst case
    layer = layers(quantized(build(weight_bits=bits, first_last_bits=0), model))["body_2"]
    assert int(largest_pair_sum(code_rows(layer)).max()) <= 128


@given(
    seed=st.integers(0, 10_000),
    taps=st.integers(1, 26),
    spread=st.sampled_from([0.0, 0.5, 3.0]),
    bits=st.integers(2, 8),
)
def test_unsaturated_codes(seed: int, taps: int, spread: float, bits: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(3, taps).double() + spread
    found = (QuantizeAciq if bits < 8 else QuantizeMinmax)().weight_codes(weight, bits)
    safe = _unsaturated(weight, found)
    assert int(largest_pair_sum(safe.codes).max()) <= pair_limit(255)
    before = found.codes * found.scale.unsqueeze(1)
    after = safe.codes * safe.scale.unsqueeze(1)
    reference = before if bits < 8 else weight
    assert bool(((after - reference).abs() <= safe.scale.unsqueeze(1) * 0.5001).all())
    for old, new in zip(found.codes.tolist(), safe.codes.tolist(), strict=True):
        assert bits == 8 or len(set(new)) <= len(set(old))
    assert torch.equal(safe.scale.float().double(), safe.scale.double())


def test_what_cannot_saturate_stays() -> None:
    codes = torch.tensor([[100, -100, 28, 100]], dtype=torch.int32)
    found = WeightCodes(codes, torch.ones(1).double(), torch.tensor([8]))
    assert torch.equal(_unsaturated(codes.double(), found).codes, codes)


# ---- bits per layer --------------------------------------------------------------------------


def test_the_first_and_the_last_keep_their_bits(quantized: Any) -> None:
    ran = quantized(QuantizeAciq(weight_bits=3, activation_bits=5, first_last_bits=7))
    assert {n: int(layer.bits[0]) for n, layer in layers(ran).items()} == {
        "first": 7,
        "body_0": 3,
        "body_2": 3,
        "head": 7,
    }
    assert {name: q.bits for name, q in quantizers(ran).items()} == {
        "x_quantizer": 7,
        "relu_quantizer": 5,
        "body_1_quantizer": 5,
        "relu_1_quantizer": 8,
        "mean_quantizer": 7,
    }


def test_no_exception_for_the_edges(quantized: Any) -> None:
    ran = quantized(QuantizeAciq(weight_bits=3, activation_bits=5, first_last_bits=0))
    assert {int(layer.bits[0]) for layer in layers(ran).values()} == {3}
    assert quantizers(ran)["x_quantizer"].bits == 5


@pytest.mark.parametrize("pattern", ["body.*", "body.0", "*.0", "body_0"])
def test_overrides_by_glob(pattern: str, quantized: Any) -> None:
    ran = quantized(
        QuantizeAciq(), layers={pattern: {"weight_bits": 6, "activation_bits": 7, "skip": False}}
    )
    assert int(layers(ran)["body_0"].bits[0]) == 6
    assert quantizers(ran)["relu_quantizer"].bits == 7
    assert int(layers(ran)["body_2"].bits[0]) == (6 if pattern == "body.*" else 4)
    assert int(layers(ran)["first"].bits[0]) == 8


def test_a_later_override_wins(quantized: Any) -> None:
    overrides = {"body.*": {"weight_bits": 6}, "body.2": {"weight_bits": 5}}
    ran = quantized(QuantizeMinmax(weight_bits=4), layers=overrides)
    assert [int(layers(ran)[name].bits[0]) for name in ("body_0", "body_2")] == [6, 5]


def test_a_skipped_layer_stays_in_float(quantized: Any) -> None:
    ran = quantized(QuantizeMinmax(), layers={"body.0": {"skip": True}})
    assert set(layers(ran)) == {"first", "body_2", "head"}
    assert ran.why("body_0") == ["stays in float: the recipe skips it"]
    assert isinstance(ran.program.submodule(ran.program.node("body_0")), nn.Conv2d)


def test_a_shared_layer_is_quantized_once(quantized: Any) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(self.conv(x).relu()).mean((2, 3)))

    ran = quantized(QuantizeMinmax(), Shared())
    assert set(layers(ran)) == {"conv", "conv_1", "fc"}
    assert layers(ran)["conv"] is layers(ran)["conv_1"]
    assert ran.step.sqnr > 25


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


@pytest.mark.parametrize("option", ["weight_bits", "activation_bits"])
def test_impossible_bits_of_a_layer_name_it(option: str, quantized: Any) -> None:
    with pytest.raises(SpecError, match=f"{option} must be") as caught:
        quantized(QuantizeMinmax(), layers={"body.2": {option: 12}})
    assert caught.value.where == "layer body.2"


@pytest.mark.parametrize("build", [QuantizeMinmax, QuantizeAciq])
def test_what_must_run_before(build: Any, run_passes: Any) -> None:
    with pytest.raises(RequirementError, match="needs insert-observers, calibrate to run before"):
        run_passes([build()], Deep(), IMAGES)


def test_no_observer_is_left(quantized: Any) -> None:
    ran = quantized(QuantizeMinmax())
    assert not any(isinstance(module, Observer) for module in ran.program.module.modules())
