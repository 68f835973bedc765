"""Weights: levels, scales, bias correction, bit allocation, and depthwise pairs that are safe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxq.errors import SpecError
from fxq.graph.program import facts
from fxq.numerics.allocation import Allocation
from fxq.numerics.bias_correction import correct_mean_and_variance
from fxq.numerics.levels import MOST_BITS, LevelSet, levels_of
from fxq.numerics.saturation import largest_pair_sum, pair_limit
from fxq.passes import QuantizeAciq, QuantizeClipped, QuantizeMinmax
from fxq.passes.weights import BiasCorrection, WeightCodes, WeightRange, WeightScheme, unsaturated


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("build", [QuantizeMinmax, QuantizeAciq])
def test_a_channel_has_no_more_levels_than_its_bits(build: Any, bits: int, quantized: Any) -> None:
    done = quantized(build(weight_bits=bits, first_last_bits=0))
    assert set(done.layers) == {"first", "body_0", "body_2", "head"}
    for name, layer in done.layers.items():
        assert layer.bits.tolist() == [bits] * len(layer.bits)
        assert max(len(set(row)) for row in done.codes(name).tolist()) <= 2**bits
        assert int(layer.codes.abs().max()) <= 127
        error = (done.after(name) - done.before(name)).abs().amax(1)
        level = done.before(name).abs().amax(1) / (2 ** (bits - 1) - 1)
        assert bool((error <= level * (1.5 if name == "body_2" else 1.01)).all())


def test_weights_per_tensor_share_one_scale(quantized: Any) -> None:
    found = quantized(QuantizeMinmax(per_channel_weights=False)).layers["body_0"]
    assert len(set(found.scale.tolist())) == 1
    assert int(found.codes.abs().max()) == 127
    assert len(set(quantized(QuantizeMinmax()).layers["body_0"].scale.tolist())) == 8


def test_mse_weights_have_a_smaller_error(quantized: Any) -> None:
    errors = {}
    for kind in WeightRange:
        done = quantized(
            QuantizeAciq(weight_range=kind, bias_correction=BiasCorrection.NONE, weight_bits=3)
        )
        errors[kind] = float((done.after("body_0") - done.before("body_0")).square().mean())
    assert errors[WeightRange.MSE] < errors[WeightRange.ABSMAX]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("weight_range", list(WeightRange))
def test_bias_correction_restores_the_mean_of_each_channel(
    bits: int, weight_range: WeightRange, quantized: Any
) -> None:
    options = {"weight_bits": bits, "first_last_bits": 0, "weight_range": weight_range}
    done = quantized(QuantizeAciq(**options))
    plain = quantized(QuantizeAciq(**options, bias_correction=BiasCorrection.NONE))
    for name in ("first", "body_0", "head"):
        want, scale = done.before(name).mean(1), done.layers[name].scale
        error = (done.after(name).mean(1) - want).abs()
        assert bool((error <= scale / 2 * 1.0001).all())
        assert float(error.mean()) < float((plain.after(name).mean(1) - want).abs().mean()) * 1.001


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("weight_range", list(WeightRange))
def test_mean_and_variance_of_each_channel_are_restored(
    bits: int, weight_range: WeightRange, quantized: Any
) -> None:
    done = quantized(
        QuantizeMinmax(
            weight_bits=bits,
            first_last_bits=0,
            weight_range=weight_range,
            bias_correction=BiasCorrection.MEAN_VARIANCE,
        )
    )
    for name in ("first", "body_0", "head"):
        want, have, scale = done.before(name), done.after(name), done.layers[name].scale
        assert bool(((have.mean(1) - want.mean(1)).abs() <= scale / 2 * 1.0001).all())
        torch.testing.assert_close(have.std(1), want.std(1), rtol=1e-4, atol=1e-7)
        assert max(len(set(row)) for row in done.codes(name).tolist()) < 2**bits


def test_mean_and_variance_are_those_of_the_formula() -> None:
    """The integer form is the authors' formula, up to the resolution of the shift."""
    torch.manual_seed(3)
    weight = torch.randn(6, 40).double() * 0.1 + 0.05
    plain = WeightScheme().codes(weight, 4)
    rounded = plain.codes * plain.scale.unsqueeze(1)
    expected = correct_mean_and_variance(weight, rounded)
    scheme = WeightScheme(bias_correction=BiasCorrection.MEAN_VARIANCE)
    found = scheme.codes(weight, 4)
    error = (found.codes * found.scale.unsqueeze(1) - expected).abs()
    assert bool((error <= found.scale.unsqueeze(1) * 0.51).all())


AWKWARD = torch.tensor(
    [
        [0.3, 0.3, 0.3, 0.3, 0.3, 0.3],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.1, 0.11, 0.12, 0.1, 0.1, 5.0],
        [1.0, 1.0, 1.0, 1.0, 1.0, -1.0],
        [9.0, 8.0, 9.0, 8.0, 9.0, 8.0],
    ]
).double()


SETS = [kind for kind in LevelSet if kind is not LevelSet.LLOYD]


def test_lloyd_levels_are_for_training(quantized: Any) -> None:
    with pytest.raises(SpecError, match="lloyd levels are for training"):
        quantized(QuantizeClipped(weight_bits=4, level_set=LevelSet.LLOYD))


@pytest.mark.parametrize("correction", list(BiasCorrection))
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_awkward_channels(correction: BiasCorrection, kind: LevelSet, bits: int) -> None:
    """Constant, dead, with an outlier, of one sign; and single taps."""
    scheme = WeightScheme(bias_correction=correction, level_set=kind)
    for weight in (AWKWARD, AWKWARD[:, :1]):
        found = scheme.codes(weight, bits)
        assert int(found.codes.abs().max()) <= 127
        assert bool((found.scale > 0).all())
        have = found.codes * found.scale.unsqueeze(1)
        for row in (0, 1):
            torch.testing.assert_close(have[row], weight[row], rtol=2e-4, atol=1e-9)
        has_room = bits < 4 or (bits == 4 and kind in (LevelSet.UNIFORM, LevelSet.APOT))
        if correction is not BiasCorrection.NONE and has_room:
            resolution = found.scale / 2 * 1.0001 + 1e-12
            assert bool(((have.mean(1) - weight.mean(1)).abs() <= resolution).all())


FULL = [(LevelSet.UNIFORM, 7), (LevelSet.UNIFORM, 8), (LevelSet.APOT, 6), (LevelSet.POT, 4)]


def test_what_cannot_be_spread_stays_as_it_is() -> None:
    weight = torch.randn(4, 30).double()
    for kind, bits in FULL:
        plain = WeightScheme(level_set=kind).codes(weight, bits)
        scheme = WeightScheme(level_set=kind, bias_correction=BiasCorrection.MEAN)
        found = scheme.codes(weight, bits)
        assert torch.equal(found.codes, plain.codes)
        assert torch.equal(found.scale, plain.scale)


# ---- level sets ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LevelSet.APOT, LevelSet.POT])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_levels_of_the_set(kind: LevelSet, bits: int, quantized: Any) -> None:
    done = quantized(QuantizeClipped(weight_bits=bits, first_last_bits=8, level_set=kind))
    fits = bits <= MOST_BITS[kind]
    levels = levels_of(kind if fits else LevelSet.UNIFORM, bits).tolist()
    assert set(done.codes("body_0").abs().flatten().tolist()) <= set(levels)
    notes = {name: facts(done.ran.program.node(name)).note for name in ("first", "body_0")}
    assert notes == {"first": "w8 uniform", "body_0": f"w{bits} {kind if fits else 'uniform'}"}


def test_each_layer_gets_the_set_of_the_smallest_error(quantized: Any, deep: Any) -> None:
    with torch.no_grad():
        deep.body[0].weight.copy_(torch.linspace(-1, 1, 576).reshape(8, 8, 3, 3))
        deep.body[2].weight.copy_(torch.randn(8, 1, 5, 5) ** 3)
    done = quantized(
        QuantizeClipped(weight_bits=4, level_set=LevelSet.AUTO, weight_range=WeightRange.MSE), deep
    )
    notes = [facts(done.ran.program.node(name)).note for name in ("body_0", "body_2")]
    assert notes[0] == "w4 uniform"
    assert notes[1] in ("w4 apot", "w4 pot")
    for weight in (done.before("body_0"), done.before("body_2")):
        errors = {}
        for kind in SETS:
            found = WeightScheme(WeightRange.MSE, level_set=kind).codes(weight, 4)
            values = found.codes * found.scale.unsqueeze(1)
            errors[kind] = float((values - weight).square().mean())
        assert errors[LevelSet.AUTO] == min(errors.values())


def test_bits_per_channel_need_ranges_per_channel(quantized: Any) -> None:
    one = QuantizeMinmax(per_channel_weights=False, allocation=Allocation.BINS)
    with pytest.raises(SpecError, match="without ranges of their own"):
        quantized(one)


@pytest.mark.parametrize("allocation", [Allocation.BINS, Allocation.MEAN_BITS])
def test_allocation_gives_wide_channels_more_bits(
    allocation: Allocation, quantized: Any, deep: Any
) -> None:
    with torch.no_grad():
        deep.body[0].weight *= torch.logspace(-1, 1, 8).reshape(-1, 1, 1, 1)
    done = quantized(QuantizeAciq(allocation=allocation), deep)
    bits = done.layers["body_0"].bits.tolist()
    assert bits == sorted(bits)
    assert bits[0] < bits[-1]
    assert min(bits) >= 2
    assert max(bits) <= 8
    for row, width in zip(done.codes("body_0").tolist(), bits, strict=True):
        assert len(set(row)) <= 2**width
    if allocation is Allocation.MEAN_BITS:
        assert sum(bits) / 8 == pytest.approx(4, abs=0.5)
    node = done.ran.program.node("body_0")
    assert facts(node).note == f"w{bits[0]}..{bits[-1]}"


@pytest.mark.parametrize("allocation", list(Allocation))
@pytest.mark.parametrize("build", [QuantizeAciq, QuantizeMinmax])
def test_dead_channels_and_dead_layers(
    build: Any, allocation: Allocation, quantized: Any, deep: Any
) -> None:
    with torch.no_grad():
        deep.first.weight[2] = 0
        deep.body[0].weight.zero_()
        deep.head.weight.fill_(0.25)
    done = quantized(build(weight_bits=4, allocation=allocation), deep)
    assert not bool(done.codes("first")[2].any())
    assert not bool(done.codes("body_0").any())
    torch.testing.assert_close(done.after("head"), done.before("head"), rtol=1e-3, atol=0)


# ---- depthwise -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("build", [QuantizeMinmax, QuantizeAciq])
def test_depthwise_pairs_never_saturate(build: Any, bits: int, quantized: Any, deep: Any) -> None:
    with torch.no_grad():
        deep.body[2].weight.abs_()  # all of one sign: the worst case
    done = quantized(build(weight_bits=bits, first_last_bits=0), deep)
    assert int(largest_pair_sum(done.codes("body_2")).max()) <= 128


def test_a_transposed_or_grouped_layer_is_not_taken_for_depthwise(quantized: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model[1].weight.fill_(1)
    assert int(quantized(QuantizeMinmax(), model).codes("_1").max()) == 127


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
    safe = unsaturated(weight, found)
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
    assert torch.equal(unsaturated(codes.double(), found).codes, codes)
