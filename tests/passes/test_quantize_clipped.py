"""quantize-clipped: every rule against the values themselves, and ranges without data."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.errors import CalibrationError, SpecError
from fxq.models_zoo import tiny_residual
from fxq.numerics.aciq import Prior
from fxq.numerics.affine import fake_quantize, grid_from_range
from fxq.passes import (
    FoldBatchNorm,
    InsertObservers,
    MarkRelu,
    QuantizeAciq,
    QuantizeClipped,
    QuantizeMinmax,
)
from fxq.passes.insert_observers import Statistics
from fxq.passes.quantize_clipped import Clip
from fxq.passes.weights import WeightRange, WeightScheme
from fxq.quant.quantizers import ActivationQuantizer
from fxq.recipe import Recipe

SEARCHED = [Clip.PERCENTILE, Clip.MSE, Clip.KL]
TAILS = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) ** 3


def clipped(clip: Clip, **options: Any) -> QuantizeClipped:
    return QuantizeClipped(clip=clip, weight_bits=4, activation_bits=4, **options)


def test_minmax_is_quantize_minmax(quantized: Any) -> None:
    ours = quantized(clipped(Clip.MINMAX), observers=InsertObservers())
    theirs = quantized(QuantizeMinmax(weight_bits=4, activation_bits=4))
    assert ours.ranges == theirs.ranges
    for name in ours.layers:
        assert torch.equal(ours.codes(name), theirs.codes(name))


@pytest.mark.parametrize("clip", SEARCHED)
def test_long_tails_are_clipped_inside_and_kept_at_the_ends(clip: Clip, quantized: Any) -> None:
    done = quantized(clipped(clip, percentile=0.99), images=TAILS)
    whole = quantized(QuantizeMinmax(activation_bits=4), images=TAILS)
    assert done.ranges["relu_quantizer"][0] == 0
    assert done.ranges["relu_quantizer"][1] < whole.ranges["relu_quantizer"][1] * 0.95
    assert done.ranges["x_quantizer"] == whole.ranges["x_quantizer"]


def test_the_share_of_a_percentile_is_kept(quantized: Any, deep: Any) -> None:
    done = quantized(clipped(Clip.PERCENTILE, percentile=0.97), images=TAILS)
    values = deep.first(TAILS).relu()
    kept = float((values <= done.ranges["relu_quantizer"][1]).float().mean())
    assert kept == pytest.approx(0.97, abs=0.003)


def test_no_other_rule_has_a_smaller_error_than_mse(quantized: Any, deep: Any) -> None:
    values = deep.first(TAILS).relu().detach()
    errors = {}
    for clip in (Clip.MINMAX, *SEARCHED):
        grid = quantized(clipped(clip), images=TAILS).quantizers["relu_quantizer"]
        errors[clip] = float((grid(values) - values).square().mean())
    top = float(values.max())
    for share in range(5, 101, 5):
        scale, zero_point = grid_from_range(0.0, top * share / 100, 4)
        found = fake_quantize(values, scale, zero_point, 0, 15)
        assert errors[Clip.MSE] <= float((found - values).square().mean()) * 1.01
    assert errors[Clip.MSE] == min(errors.values())


@pytest.mark.parametrize("clip", SEARCHED)
def test_a_distribution_is_needed(clip: Clip, quantized: Any) -> None:
    with pytest.raises(SpecError, match=f"clip = {clip} needs the distribution") as caught:
        quantized(clipped(clip), observers=InsertObservers())
    assert caught.value.hint == 'set statistics = "histogram" on insert-observers'


@pytest.mark.parametrize(
    "options", [{"percentile": 0.0}, {"percentile": 1.5}, {"deviations": 0.0}, {"deviations": -1.0}]
)
def test_impossible_options(options: Any, quantized: Any) -> None:
    with pytest.raises(SpecError, match=next(iter(options))) as caught:
        quantized(QuantizeClipped(**options))
    assert caught.value.where == "quantize-clipped"


@pytest.mark.parametrize("clip", SEARCHED)
def test_channels_have_ranges_of_their_own(clip: Clip, quantized: Any) -> None:
    observers = InsertObservers(statistics=Statistics.HISTOGRAM, per_channel=True)
    done = quantized(clipped(clip, first_last_bits=0), images=TAILS, observers=observers)
    assert done.quantizers["x_quantizer"].per_channel
    assert bool((done.quantizers["x_quantizer"].scale > 0).all())


# ---- edges -----------------------------------------------------------------------------------

EVERY = [
    *(clipped(clip, first_last_bits=0) for clip in Clip),
    *(QuantizeAciq(prior=prior, first_last_bits=0) for prior in Prior),
]
KINDS = {"constant": lambda x: x * 0 + 3, "silenced": lambda x: x, "single": lambda x: x[:1]}


@pytest.mark.parametrize("one", EVERY, ids=lambda one: str(getattr(one, "clip", one.name)))
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_values(one: Any, kind: str, quantized: Any, deep: Any, images: Tensor) -> None:
    """A constant input, channels that a ReLU silences, and a single image."""
    with torch.no_grad():
        deep.first.weight[3] = 0  # a dead channel
        if kind == "silenced":
            deep.first.bias.fill_(-100.0)
    done = quantized(one, deep, KINDS[kind](images))
    output = done.ran.program.run(images)
    assert bool(output.isfinite().all())
    for quantizer in done.quantizers.values():
        assert bool((quantizer.scale > 0).all())
    if kind == "silenced":  # the end is 0, or 1 where the range was 0 alone
        end = done.ranges["relu_quantizer"][1]
        assert min(abs(end), abs(end - 1)) < 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight_range", list(WeightRange))
def test_weights_that_are_not_finite_are_refused(bad: float, weight_range: WeightRange) -> None:
    weight = torch.tensor([[1.0, bad], [1.0, 2.0]]).double()
    with pytest.raises(SpecError):
        WeightScheme(weight_range).codes(weight, 4)


@pytest.mark.parametrize("clip", [Clip.KL, Clip.BATCH_NORM])
def test_images_that_are_not_finite_are_refused(clip: Clip, quantized: Any, images: Tensor) -> None:
    images = images.clone()
    images[3, 0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        quantized(clipped(clip), images=images)


# ---- batch norms -----------------------------------------------------------------------------


class Normed(nn.Module):
    """A residual block of batch norms behind a layer that may stay in float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.left, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.right, self.other = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 4, 1)
        for norm in (self.norm, self.other):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last((self.norm(self.left(x)).relu() + self.other(self.right(x))).relu())


@pytest.fixture
def normed() -> nn.Module:
    """The network, with the running statistics of its images."""
    model = Normed()
    for norm in (model.norm, model.other):
        norm.momentum = None
    model.train()(torch.randn(256, 3, 8, 8))
    return model.eval()


def test_ranges_of_batch_norms(quantized: Any, normed: Any) -> None:
    done = quantized(QuantizeClipped(clip=Clip.BATCH_NORM, deviations=4.0), normed)
    seen = quantized(QuantizeClipped(clip=Clip.MINMAX), normed).ranges
    gamma, beta = normed.norm.weight.abs().double(), normed.norm.bias.double()
    left = float((beta + 4 * gamma).max())
    other = normed.other
    ends = (other.bias - 4 * other.weight.abs(), other.bias + 4 * other.weight.abs())
    found = done.ranges
    assert found["relu_1_quantizer"] == (0, pytest.approx(left, rel=1e-3))
    low, high = found["right_quantizer"]
    step = (high - low) / 255
    assert float(ends[0].min()) - step <= low < 0  # cut where the sum is below zero anyway
    assert high == pytest.approx(float(ends[1].max()), abs=step)
    assert found["x_quantizer"] == seen["x_quantizer"]
    assert found["relu_quantizer"] == seen["relu_quantizer"]  # no batch norm behind the first layer


def test_a_sum_has_the_means_and_variances_of_what_is_added(quantized: Any, normed: Any) -> None:
    done = quantized(QuantizeClipped(clip=Clip.BATCH_NORM, deviations=3.0), normed)
    generator = torch.Generator().manual_seed(0)
    pairs = [
        torch.randn(200_000, 6, generator=generator) * norm.weight.abs() + norm.bias
        for norm in (normed.norm, normed.other)
    ]
    total = pairs[0].relu() + pairs[1]
    expected = float((total.mean(0) + 3 * total.std(0)).max())
    assert done.ranges["relu_2_quantizer"] == (0, pytest.approx(expected, rel=0.02))


def test_no_data_is_needed_where_batch_norms_tell_every_range(run_passes: Any) -> None:
    model = tiny_residual().eval()
    example = torch.randn(2, 3, 8, 8)
    first = next(name for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    one = QuantizeClipped(clip=Clip.BATCH_NORM)
    passes = [FoldBatchNorm(), MarkRelu(), InsertObservers(), one]
    ran = run_passes(passes, model, example, layers={first: {"skip": True}})
    modules = ran.program.module.modules()
    assert any(isinstance(module, ActivationQuantizer) for module in modules)
    with pytest.raises(CalibrationError, match="has seen no data") as caught:
        run_passes(passes, model, example)
    assert "run calibrate" in str(caught.value.hint)


def test_facts_say_what_a_folded_batch_norm_left(run_passes: Any, normed: Any) -> None:
    ran = run_passes([FoldBatchNorm()], normed, torch.randn(2, 3, 8, 8))
    found = fxq.graph.program.facts(ran.program.node("left"))
    x = normed.first(torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(5))).relu()
    values = normed.norm(normed.left(x))
    assert found.norm_mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=0.1)
    assert found.norm_std == pytest.approx(values.std((0, 2, 3)).tolist(), rel=0.1, abs=1e-3)


# ---- recipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["naive-4bit", "kld-4bit"])
def test_baselines_correct_nothing(name: str) -> None:
    recipe = Recipe.load(name)
    quantize = recipe.passes[-1]
    assert isinstance(quantize, QuantizeMinmax | QuantizeClipped)
    options = dataclasses.asdict(quantize)
    assert options["weight_bits"] == options["activation_bits"] == 4
    assert options["first_last_bits"] == 8
    assert options["bias_correction"] == options["allocation"] == "none"
    x = torch.randn(8, 3, 8, 8)
    result = fxq.compile(tiny_residual(), x[:1], name, calibration=[x])
    assert result.artifact.ledger.coverage() == 1.0
