"""Placement: what the paper quantizes, what a pass says of it, and bits of channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxq.errors import CalibrationError, SpecError
from fxq.graph.program import facts
from fxq.models_zoo import tiny_conv, tiny_residual
from fxq.numerics.aciq import aciq_range
from fxq.numerics.allocation import Allocation, allocate_mean_bits
from fxq.passes import FoldBatchNorm, InsertObservers, MarkRelu, QuantizeAciq, QuantizeMinmax
from fxq.passes.insert_observers import Placement, Statistics
from fxq.passes.places import Place
from fxq.quant.dynamic import DynamicAciqQuantizer
from fxq.quant.observers import Observer

CHANNELS = InsertObservers(Statistics.HISTOGRAM, per_channel=True)
PAPER = InsertObservers(Statistics.HISTOGRAM, per_channel=True, placement=Placement.PAPER)
AUTHORS = QuantizeAciq(mean_aware=False, guard=False, activation_allocation=Allocation.MEAN_BITS)


def note(done: Any) -> str:
    (found,) = [text for text in done.step.notes if text.startswith("placement: ")]
    return str(found).removeprefix("placement: ")


# ---- the paper's placement ---------------------------------------------------------------------


def test_the_paper_watches_outputs_of_layers_and_pools(run_passes: Any, images: Tensor) -> None:
    ran = run_passes([FoldBatchNorm(), MarkRelu(), PAPER], tiny_residual(), images[:2])
    nodes = {facts(node).observes: ran.program.submodule(node) for node in ran.program.nodes()}
    watched = {name: module for name, module in nodes.items() if isinstance(module, Observer)}
    assert set(watched) == {"stem", "conv1", "conv2", "avgpool", "fc"}  # no input, no ReLU, no sum
    channels = {name: module.channels for name, module in watched.items()}
    assert channels == {"stem": None, "conv1": 8, "conv2": 8, "avgpool": None, "fc": None}
    assert ran.step.sqnr == float("inf")


def test_the_paper_has_the_bits_of_what_made_a_value(quantized: Any, golden: Any) -> None:
    done = quantized(AUTHORS, tiny_residual(), observers=PAPER)
    bits = {name: quantizer.bits for name, quantizer in done.quantizers.items()}
    assert bits.keys() == {
        "stem_relu_quantizer",
        "relu1_quantizer",
        "conv2_quantizer",
        "avgpool_quantizer",
        "fc_quantizer",
    }
    eights = {name for name, q in done.quantizers.items() if q.channel_bits is None}
    assert eights == {"stem_relu_quantizer", "avgpool_quantizer", "fc_quantizer"}
    assert {bits[name] for name in eights} == {8}
    for name in bits.keys() - eights:
        found = done.quantizers[name].channel_bits
        assert float(found.double().mean()) == pytest.approx(4, abs=0.3)
    golden("placement--paper--tiny-residual", note(done))


def test_layers_keep_their_overrides(quantized: Any) -> None:
    done = quantized(QuantizeAciq(), observers=PAPER, layers={"body.0": {"activation_bits": 6}})
    assert done.quantizers["body_1_quantizer"].bits == 6  # the output of body.0
    assert done.quantizers["relu_quantizer"].bits == 8  # of the first layer


# ---- what is said ------------------------------------------------------------------------------

SAID = {
    "integer": (
        QuantizeMinmax(weight_bits=4, activation_bits=5),
        InsertObservers(),
        "8-bit weights and inputs of the first and last layer; 4-bit weights and 5-bit inputs of "
        "2 layers; the network input, 1 summed or pooled output and 1 pool at 8 bits",
    ),
    "no exceptions": (
        QuantizeMinmax(first_last_bits=0),
        InsertObservers(),
        "8-bit weights and inputs of the first and last layer; 8-bit weights and inputs of 2 "
        "layers; the network input, 1 summed or pooled output and 1 pool at 8 bits",
    ),
    "paper": (
        QuantizeMinmax(weight_bits=4, activation_bits=4),
        InsertObservers(placement=Placement.PAPER),
        "8-bit weights and float inputs of the first layer; 4-bit weights and 8-bit inputs of 1 "
        "layer; 4-bit weights and inputs of 1 layer; 8-bit weights and inputs of the last layer; "
        "the network input in float; 1 summed or pooled output at 4 bits; 1 pool and the network "
        "output at 8 bits",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_every_pass_says_its_placement(name: str, quantized: Any) -> None:
    one, observers, text = SAID[name]
    assert note(quantized(one, observers=observers)) == text


def test_sums_are_counted(quantized: Any) -> None:
    assert "1 sum" in note(quantized(QuantizeMinmax(), tiny_residual()))


# ---- bits of channels --------------------------------------------------------------------------


def test_bits_follow_the_spread_and_clips_follow_the_bits(
    run_passes: Any, quantized: Any, deep: Any, images: Tensor
) -> None:
    scale = torch.tensor([0.02, 0.1, 1.0, 1.0, 2.0, 4.0, 8.0, 30.0])
    deep.body[0].weight.data *= scale.view(-1, 1, 1, 1)
    done = quantized(AUTHORS, deep, observers=PAPER)
    values = deep.body[0](deep.relu(deep.first(images))).detach()
    # What is observed is the float network, before any quantizer is in place.
    rows = values.transpose(0, 1).flatten(1).double()
    bits = allocate_mean_bits(rows.std(1), 4)
    found = done.quantizers["body_1_quantizer"]
    assert torch.equal(found.channel_bits, bits)
    assert int(bits.min()) < 4 < int(bits.max())
    mean = rows.mean(1)
    _, clip = aciq_range(
        mean,
        (rows - mean.unsqueeze(1)).abs().mean(1),
        rows.amin(1),
        rows.amax(1),
        (2**bits - 1).clamp(min=1),
        fused_relu=True,
    )
    alive = bits > 0
    top = found.scale.double() * (2**bits - 1)
    torch.testing.assert_close(top[alive], clip[alive], rtol=2e-2, atol=0)


def test_bits_of_channels_need_channels(quantized: Any) -> None:
    with pytest.raises(SpecError, match="need the statistics of channels") as caught:
        quantized(AUTHORS)
    assert "per_channel = true" in str(caught.value.hint)


def test_more_than_four_bits_are_the_same_for_all(quantized: Any) -> None:
    one = QuantizeAciq(activation_bits=5, activation_allocation=Allocation.MEAN_BITS, guard=False)
    done = quantized(one, observers=CHANNELS)
    assert all(quantizer.channel_bits is None for quantizer in done.quantizers.values())
    assert done.quantizers["relu_quantizer"].bits == 5


# ---- ranges found at run time ------------------------------------------------------------------


def test_a_dynamic_range_is_of_values_before_the_relu(
    quantized: Any, deep: Any, images: Tensor
) -> None:
    done = quantized(QuantizeAciq(dynamic=True))
    program = done.ran.program
    node = program.node("first_quantizer")
    module = program.submodule(node)
    assert isinstance(module, DynamicAciqQuantizer)
    assert module.fused_relu
    assert [user.name for user in node.users] == ["relu"]
    assert facts(program.node("first")).fused_relu is None
    assert {q.bits for q in done.quantizers.values()} == {8}  # what keeps its range is calibrated
    assert done.step.sqnr > 5


def test_what_is_dynamic_needs_no_data(quantized: Any, run_passes: Any, images: Tensor) -> None:
    """A value that no calibration batch reaches has no range, unless it is found at run time."""
    program = run_passes([MarkRelu(), PAPER], tiny_conv(), images[:2]).program
    observer = next(m for m in program.module.modules() if isinstance(m, Observer))
    node = program.node("conv1")
    place = Place(node, node, bits=4, relu=True, upper=None, edge=False, addend=False)
    assert isinstance(QuantizeAciq(dynamic=True).quantizer(observer, place), DynamicAciqQuantizer)
    with pytest.raises(CalibrationError, match="has seen no data"):
        QuantizeAciq().quantizer(observer, place)
