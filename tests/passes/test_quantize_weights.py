"""Weights: levels, scales, bias correction, bit allocation, and depthwise pairs that are safe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxq.graph.program import facts
from fxq.numerics.saturation import largest_pair_sum, pair_limit
from fxq.passes import QuantizeAciq, QuantizeMinmax
from fxq.passes.quantization import WeightCodes, _unsaturated
from fxq.passes.quantize_aciq import Allocation, BiasCorrection, WeightRange


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
    options = {"allocation": allocation} if build is QuantizeAciq else {}
    done = quantized(build(**options), deep)
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
