"""reconstruct: what it refuses, and networks that are unlike a classifier of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq.errors import CalibrationError, RequirementError, SpecError
from fxq.passes import InsertObservers, QuantizeAciq, QuantizeMinmax
from fxq.passes.insert_observers import Statistics
from fxq.passes.quantize_aciq import BiasCorrection

from .conftest import IMAGES, Deep
from .test_correct_bias import Shared
from .test_reconstruct import COARSE, RATES, error, layers, short, state

# ---- what is refused ---------------------------------------------------------------------------


def test_spread_codes_are_kept_and_named(trained: Any) -> None:
    after = QuantizeAciq(bias_correction=BiasCorrection.MEAN)
    plain, ran = (trained(one, Deep(), after=after) for one in (None, short()))
    assert [miss.node for miss in ran.step.misses] == ["body_0", "body_2"]
    assert ran.why("body_0") == ["its codes are no rounding of its weights to a uniform grid"]
    assert ran.step.hits == ("first", "head")
    before, found = state(plain), state(ran)
    for name in ("body.0", "body.2"):
        for kind in ("codes", "scale", "bias_shift"):
            assert torch.equal(before[f"{name}.{kind}"], found[f"{name}.{kind}"])
    assert not torch.equal(before["first.codes"], found["first.codes"])


def test_without_quantized_layers(trained: Any) -> None:
    ran = trained(short(), Deep(), layers={"*": {"skip": True}})
    assert ran.step.notes == ("nothing to train: no layer is quantized",)
    assert not ran.step.hits


@pytest.mark.parametrize(
    ("observers", "after"),
    [
        (InsertObservers(per_channel=True), COARSE),
        (InsertObservers(Statistics.HISTOGRAM), QuantizeAciq(dynamic=True)),
    ],
    ids=["per channel", "dynamic"],
)
def test_scales_of_channels_or_batches_are_refused(
    observers: Any, after: Any, trained: Any
) -> None:
    with pytest.raises(SpecError, match="one scale per tensor") as caught:
        trained(short(), Deep(), observers=observers, after=after)
    assert "quantizer" in str(caught.value.where)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("images", "iterations", "batch_size") for value in (0, -1)),
        *((name, value) for name in RATES for value in (-0.1, float("nan"), float("inf"))),
        ("feature_weight", -1.0),
        ("feature_weight", float("nan")),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
    ],
)
def test_impossible_options(name: str, value: float, trained: Any) -> None:
    with pytest.raises(SpecError, match=name) as caught:
        trained(short(**{name: value}), Deep())
    assert "reconstruct" in str(caught.value.where)


def test_without_images_or_with_impossible_ones(run_passes: Any, trained: Any) -> None:
    with pytest.raises(RequirementError, match="calibrate"):
        run_passes([short()], Deep(), IMAGES[:2])
    bad = IMAGES.clone()
    bad[3, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="NaN"):
        trained(short(), Deep(), bad)


# ---- awkward networks --------------------------------------------------------------------------


def test_a_single_image(trained: Any) -> None:
    one = IMAGES[:1]
    ran = trained(short(), Deep(), one)
    assert error(ran, one) < error(trained(None, Deep(), one), one)


class TwoInputs(nn.Module):
    """An image and a feature of it, scaled by what is one for all images; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(2, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Any:
        sum_ = (self.left(x) + self.right(y)).relu()
        z = self.last(sum_) * mask
        return {"map": z, "scores": [z.mean((2, 3)), z.argmax(1)]}


def test_several_inputs_and_nested_outputs(trained: Any) -> None:
    x = (IMAGES, torch.randn(16, 2, 8, 8), torch.rand(1, 1, 8, 8))
    after = QuantizeMinmax(weight_bits=3, activation_bits=4, first_last_bits=0)
    plain, ran = (trained(one, TwoInputs(), x, after=after) for one in (None, short()))
    errors = []
    for done in (plain, ran):
        want, have = done.model(*x), done.program.run(*x)
        errors.append(float((want["map"] - have["map"]).square().mean().detach()))
    assert errors[1] < errors[0]


def test_without_float_outputs(trained: Any) -> None:
    class Labels(Deep):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    with pytest.raises(SpecError, match="no float output"):
        trained(short(), Labels())


def test_a_layer_called_twice(trained: Any) -> None:
    plain, ran = (trained(one, Shared()) for one in (None, short()))
    assert ran.step.hits == ("conv", "conv_1", "fc")
    assert len(layers(ran)) == 2
    assert error(ran, IMAGES) < error(plain, IMAGES)


def test_layers_in_float_stay(trained: Any) -> None:
    plain, ran = (
        trained(one, Deep(), layers={"body.0": {"skip": True}}) for one in (None, short())
    )
    found = ran.program.module.get_submodule("body.0")
    assert isinstance(found, nn.Conv2d)
    assert torch.equal(found.weight, plain.program.module.get_submodule("body.0").weight)
    assert error(ran, IMAGES) < error(plain, IMAGES)
