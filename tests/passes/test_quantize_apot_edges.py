"""quantize-apot: what it refuses, and values and weights that say little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq.errors import CalibrationError, FxqError, RequirementError, SpecError
from fxq.integer.reference import Reference
from fxq.models_zoo import tiny_residual
from fxq.numerics.levels import LevelSet
from fxq.numerics.lloyd import normal_lloyd_levels
from fxq.passes import InsertObservers, QuantizeApot
from fxq.passes.insert_observers import Statistics

SETS = [LevelSet.UNIFORM, LevelSet.APOT, LevelSet.POT, LevelSet.LLOYD]


class Net(nn.Module):
    """Four layers, of which the first gives the values to look at."""

    def __init__(self, relu: bool = True) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.a = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.b, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.b(F.relu(self.a(F.relu(x) if self.relu else x)))
        return self.head(F.relu(x).mean((2, 3)))


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match", "hint"),
    [
        ({"weight_bits": 1}, "weight_bits must be 2 to 8, not 1", ""),
        ({"weight_bits": 9}, "weight_bits must be 2 to 8, not 9", ""),
        ({"activation_bits": 0}, "activation_bits must be 1 to 8, not 0", ""),
        ({"weight_bits": 7}, "apot weights of 7 bits .* beyond int8", "at most 6 bits with apot"),
        ({"activation_bits": 6}, "apot levels of 6 bits .* beyond int8", "at most 5 bits"),
        ({"activation_bits": 7}, "apot levels of 7 bits .* beyond int8", "at most 5 bits"),
        ({"weight_bits": 5, "level_set": LevelSet.POT}, "pot weights of 5 bits", "4 with pot"),
        ({"activation_bits": 7, "level_set": LevelSet.POT}, "terms of 7 bits", "at most 6"),
        ({"base": 3, "activation_bits": 4}, "4 bits without .* terms of 3 bits", "choose base"),
        ({"base": 2, "weight_bits": 3, "activation_bits": 9}, "must be 1 to 8, not 9", ""),
        ({"base": 3, "weight_bits": 6}, "5 bits without the sign", "choose base"),
        ({"base": 0}, "terms of 0 bits", "choose base"),
        ({"base": -2}, "terms of -2 bits", "choose base"),
        ({"level_set": LevelSet.AUTO}, "auto levels", ""),
    ],
)
def test_impossible_levels(options: dict[str, Any], match: str, hint: str, learning: Any) -> None:
    """Said before anything ran: the observers would refuse this input."""
    options = {"weight_bits": 4, "activation_bits": 4, **options}
    with pytest.raises(SpecError, match=match) as caught:
        learning(Net(), torch.full((4, 3, 8, 8), float("nan")), **options)
    assert caught.value.where == "quantize-apot"
    assert hint in (caught.value.hint or "")


def test_impossible_levels_of_one_layer(learning: Any) -> None:
    for option, value in (("weight_bits", 7), ("activation_bits", 6), ("weight_bits", 1)):
        with pytest.raises(SpecError) as caught:
            learning(Net(), weight_bits=4, activation_bits=4, layers={"a": {option: value}})
        assert caught.value.where == "layer a"


def test_a_layers_levels_from_a_setting() -> None:
    x = torch.randn(4, 3, 8, 8)
    settings = ["layer:a.weight_bits=7"]
    with pytest.raises(SpecError, match="beyond int8") as caught:
        fxq.compile(Net(), x, "apot-4bit", calibration=[x], settings=settings)
    assert caught.value.where == "layer a"


def test_one_bit_for_both_signs(learning: Any) -> None:
    with pytest.raises(SpecError, match="one bit cannot hold values of both signs") as caught:
        learning(Net(relu=False), weight_bits=4, activation_bits=1)
    assert caught.value.where == "quantize-apot at %first_observer"
    assert learning(Net(), weight_bits=4, activation_bits=1).widths()["relu_quantizer"] == 1


def test_observers_without_a_distribution(learning: Any) -> None:
    with pytest.raises(SpecError, match="quantize-apot needs the distribution") as caught:
        learning(Net(), weight_bits=4, activation_bits=4, observers=InsertObservers())
    assert 'statistics = "histogram"' in str(caught.value)


def test_observers_per_channel(learning: Any) -> None:
    observers = InsertObservers(statistics=Statistics.HISTOGRAM, per_channel=True)
    with pytest.raises(SpecError, match="one clip per tensor") as caught:
        learning(Net(), weight_bits=4, activation_bits=4, observers=observers)
    assert "per_channel = false" in str(caught.value)


def test_no_observers(run_passes: Any) -> None:
    with pytest.raises(RequirementError, match="needs insert-observers, calibrate"):
        run_passes([QuantizeApot()], Net(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("calibration", [None, []])
def test_no_calibration_data(calibration: Any) -> None:
    with pytest.raises(CalibrationError, match="calibra"):
        fxq.compile(Net(), torch.randn(2, 3, 8, 8), "apot-4bit", calibration=calibration)


def test_calibration_data_that_is_not_finite() -> None:
    x = torch.randn(4, 3, 8, 8)
    bad = torch.full_like(x, float("nan"))
    with pytest.raises(FxqError, match=r"NaN|not finite"):
        fxq.compile(Net(), x, "apot-4bit", calibration=[x, bad])


# ---- values that say little ------------------------------------------------------------------


def deployed_exactly(model: nn.Module, x: Tensor, recipe: str) -> Tensor:
    """What the deployed network computes, which is the integer reference and what eval mode has."""
    module = fxq.compile(model.eval(), x, recipe, calibration=[x]).module.eval()
    with torch.no_grad():
        found = module(x)
    artifact = fxq.lower(module)
    assert torch.equal(artifact.module(x), found)
    assert torch.equal(Reference(artifact.integers).run(x)[0], found)
    return found


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
def test_dead_values(kind: LevelSet, relu: bool, learning: Any) -> None:
    """All zero: the authors' clip, ready for values that come alive in training."""
    net = Net(relu)
    nn.init.zeros_(net.first.weight)
    nn.init.constant_(net.first.bias, -1.0 if relu else 0.0)
    done = learning(net, weight_bits=4, activation_bits=4, level_set=kind)
    module = done.levels["relu_quantizer" if relu else "first_quantizer"]
    assert module.alpha.item() == 8.0
    assert len(module.levels) > 6
    assert module(torch.tensor([5.0])).item() > 3


@pytest.mark.parametrize("recipe", ["apot-4bit", "pot-4bit", "uniform-qat-4bit", "lloyd-4bit"])
@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_constant_values_are_deployed(value: float, recipe: str) -> None:
    net = Net()
    nn.init.zeros_(net.first.weight)
    nn.init.constant_(net.first.bias, value)
    x = torch.randn(8, 3, 8, 8)
    found = deployed_exactly(net, x, recipe)
    with torch.no_grad():
        assert (found - net(x)).norm() < 0.3 * net(x).norm()


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
def test_too_few_values_for_lloyd(relu: bool, learning: Any) -> None:
    """Five different ones: levels of a normal law, with the clip of the least error."""
    net = Net(relu)
    nn.init.zeros_(net.first.weight)
    with torch.no_grad():
        net.first.weight[:, 0, 1, 1] = 1.0
        net.first.bias.zero_()
    x = torch.randint(0, 5, (4, 3, 8, 8)) / 2
    done = learning(net, x, weight_bits=4, activation_bits=4, level_set=LevelSet.LLOYD)
    module = done.levels["relu_quantizer" if relu else "first_quantizer"]
    wanted = normal_lloyd_levels(16) if relu else normal_lloyd_levels(8, limit=63)
    assert module.levels.tolist() == wanted.levels.tolist()
    assert 1.5 < module.alpha.item() < 3


def test_zeros_are_deployed() -> None:
    deployed_exactly(tiny_residual(), torch.zeros(4, 3, 8, 8), "lloyd-4bit")


def test_constant_weights_are_deployed() -> None:
    """An average of its inputs, which normalization would leave nothing of."""
    net = Net()
    nn.init.constant_(net.a.weight, 1 / 72)
    x = torch.randn(8, 3, 8, 8)
    found = deployed_exactly(net, x, "apot-4bit")
    with torch.no_grad():
        assert (found - net(x)).norm() < 0.3 * net(x).norm()


def test_narrow_layers_are_deployed() -> None:
    """A layer of a single weight has no deviation."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU()),
        nn.Linear(1, 4),
    )
    deployed_exactly(net, torch.randn(16, 3), "apot-4bit")
