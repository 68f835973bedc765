"""Layers trained with rounded weights: what they compute, what they learn, what they freeze to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq.errors import SpecError
from fxq.numerics.learned_clip import ClipGradient
from fxq.numerics.levels import LevelSet, levels_of, nearest_level
from fxq.quant.learned_layers import AbsmaxWeights, LearnedLayer, LevelWeights, WeightNorm
from fxq.quant.quantizers import QuantizedLayer, rows

pytestmark = pytest.mark.usefixtures("one_thread")

APOT4 = levels_of(LevelSet.APOT, 4)
NORMS = list(WeightNorm)

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (4, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (4, 6, 7, 7)),
    "no bias": (lambda: nn.Conv2d(6, 8, 3, stride=2, bias=False), (4, 6, 7, 7)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2, dilation=2), (4, 6, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (4, 8, 7, 7)),
    "reflected": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (4, 6, 7, 7)),
    "linear": (lambda: nn.Linear(6, 8), (16, 6)),
}


def level_weights(weight: Tensor, alpha: float = 2.4, **options: Any) -> LevelWeights:
    return LevelWeights(weight, alpha, APOT4, **{"bits": 4, **options})


def batch_norm(x: Tensor) -> nn.Module:
    """One that has seen data, with a negative gamma and a zero one."""
    norm: Any = (nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d)(8)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -1, 1)
    with torch.no_grad():
        norm.weight[1:3] = torch.tensor([-0.7, 0.0])
    return norm


def learned(
    name: str, *, norm: bool = True, absmax: bool = False, **options: Any
) -> tuple[LearnedLayer, Tensor]:
    build, shape = LAYERS[name]
    layer: Any = build()
    x = torch.randn(shape)
    weights = AbsmaxWeights(8) if absmax else level_weights(layer.weight, **options)
    return LearnedLayer(layer, batch_norm(x) if norm else None, weights).eval(), x


def one_layer(**options: Any) -> tuple[nn.Linear, LevelWeights]:
    layer = nn.Linear(30, 20)
    return layer, level_weights(layer.weight, **options)


# ---- frozen ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("absmax", [False, True], ids=["levels", "absmax"])
@pytest.mark.parametrize("name", LAYERS)
def test_frozen_is_eval_mode(name: str, absmax: bool, norm: bool) -> None:
    module, x = learned(name, absmax=absmax, norm=norm)
    frozen = module.frozen()
    assert isinstance(frozen, QuantizedLayer)
    torch.testing.assert_close(frozen(x), module(x), rtol=1e-4, atol=2e-4)
    assert frozen.codes.abs().max() <= 127
    assert frozen.bits.tolist() == [8 if absmax else 4] * 8


@pytest.mark.parametrize("norm", NORMS)
def test_frozen_keeps_weight_normalization(norm: WeightNorm) -> None:
    module, x = learned("conv2d", norm=False, alpha=1.7)
    module.weights = level_weights(module.layer.weight + 0.1, 1.7, norm=norm)
    torch.testing.assert_close(module.frozen()(x), module(x), rtol=1e-4, atol=1e-4)


def test_a_negative_gamma_turns_the_codes() -> None:
    module, _ = learned("conv2d")
    codes, _, _ = module.weights.codes(module.layer)
    frozen = module.frozen()
    assert torch.equal(frozen.codes[1].float(), -codes[1])
    assert torch.equal(frozen.codes[0].float(), codes[0])
    assert bool((frozen.scale > 0).all())


def test_what_is_frozen_beside_the_codes_is_what_was_rounded() -> None:
    """Passes that compare the two see the rounding alone, not the training."""
    module, x = learned("conv2d")
    frozen = module.frozen()
    error = (frozen.layer(x) - frozen(x)).norm() / frozen(x).norm()
    assert 0.01 < error < 0.3


def test_freezing_changes_nothing() -> None:
    module, x = learned("conv2d")
    before, output = copy.deepcopy(module.state_dict()), module(x)
    nn.init.zeros_(module.frozen().layer.weight)
    assert torch.equal(module(x), output)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_weight_that_does_not_fit_int8() -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.5, -1.1], [0.1, 0.2, 0.3]]))
    published = LearnedLayer(layer, None, AbsmaxWeights(8, as_published=True))
    with pytest.raises(SpecError, match="a weight is 140 steps large, and int8 holds 127"):
        published.frozen()
    integer = LearnedLayer(layer, None, AbsmaxWeights(8))
    torch.testing.assert_close(integer.frozen().weight(), layer.weight, atol=0.01, rtol=0)


# ---- levels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [WeightNorm.DETACHED, WeightNorm.ATTACHED])
def test_weights_are_levels_of_normalized_weights(norm: WeightNorm) -> None:
    """Computed anew: the weights' mean and unbiased deviation, then the nearest level."""
    layer, module = one_layer(norm=norm)
    weight = layer.weight.detach().double()
    normalized = (weight - weight.mean()) / weight.std()
    unit = 2.4 / int(APOT4[-1])
    wanted = nearest_level(normalized / unit, APOT4).double() * unit * weight.std()
    torch.testing.assert_close(module(layer).double(), wanted, rtol=1e-5, atol=1e-7)
    codes, scale, _ = module.codes(layer)
    assert set(codes.abs().long().unique().tolist()) <= set(APOT4.tolist())
    torch.testing.assert_close((codes * scale.unsqueeze(1)).double(), wanted, rtol=1e-5, atol=1e-7)


def test_a_layer_keeps_its_scale() -> None:
    """What gain is for: without a batch norm nothing else would know it."""
    for size in (1e-3, 1.0, 1e3):
        layer = nn.Linear(30, 20)
        nn.init.normal_(layer.weight, std=size)
        rounded = level_weights(layer.weight)(layer)
        assert (rounded - layer.weight).norm() < 0.2 * layer.weight.norm()


def test_the_scale_is_that_of_the_start() -> None:
    """Weights that grow in training are normalized; that is what normalization does."""
    layer, module = one_layer()
    before = module(layer)
    with torch.no_grad():
        layer.weight.mul_(3).add_(0.1)
    torch.testing.assert_close(module(layer), before, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        free_layer, free = one_layer(norm=WeightNorm.NONE)
        free_layer.weight.mul_(3)
    assert free(free_layer).norm() > 1.5 * free.gain * 20


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [0.0, 0.3, -1e3, 1e-7])
def test_weights_all_alike_are_kept(value: float, norm: WeightNorm) -> None:
    layer = nn.Linear(30, 20)
    nn.init.constant_(layer.weight, value)
    module = level_weights(layer.weight, norm=norm)
    assert module.norm is WeightNorm.NONE
    torch.testing.assert_close(module(layer), layer.weight, rtol=0.1, atol=0)
    frozen = LearnedLayer(layer, None, module).frozen()
    torch.testing.assert_close(frozen.weight(), module(layer), rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_single_weight(norm: WeightNorm) -> None:
    layer = nn.Linear(1, 1)
    module = level_weights(layer.weight, norm=norm)
    assert module(layer).item() == pytest.approx(layer.weight.item(), rel=0.1)


def test_tiny_weights_keep_their_scale() -> None:
    """Deviations below what normalization divides by at least."""
    layer = nn.Linear(30, 20)
    nn.init.normal_(layer.weight, std=1e-7)
    rounded = level_weights(layer.weight)(layer)
    assert (rounded - layer.weight).norm() < 0.2 * layer.weight.norm()


# ---- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", list(ClipGradient))
@pytest.mark.parametrize("norm", NORMS)
def test_everything_gets_gradients(norm: WeightNorm, gradient: ClipGradient) -> None:
    module, x = learned("conv2d", gradient=gradient, alpha=1.0)
    module.weights.norm = norm
    module.train()
    module(x).square().sum().backward()
    found = {name for name, value in module.named_parameters() if value.grad is not None}
    fixed = {"weights.alpha"} if gradient is ClipGradient.NONE else set()
    assert found == {name for name, _ in module.named_parameters()} - fixed


def test_attached_normalization_passes_its_gradient() -> None:
    """Adding a constant to all weights, or scaling them, changes nothing: no gradient there."""

    def gradient(norm: WeightNorm) -> Tensor:
        torch.manual_seed(3)
        layer, module = one_layer(norm=norm, alpha=50.0, straight=True)
        (module(layer) * torch.randn(20, 30)).sum().backward()
        assert layer.weight.grad is not None
        return layer.weight.grad

    size = gradient(WeightNorm.ATTACHED).norm()
    assert abs(gradient(WeightNorm.ATTACHED).sum()) < 1e-4 * size
    assert abs(gradient(WeightNorm.DETACHED).sum()) > 0.1 * size


def test_straight_passes_gradients_beyond_the_clip() -> None:
    for straight in (True, False):
        layer, module = one_layer(alpha=0.5, straight=straight)
        module(layer).sum().backward()
        outside = module.effective(layer).abs() > 0.5 * module.gain
        assert layer.weight.grad is not None
        assert bool(outside.any())
        assert bool((layer.weight.grad[outside] != 0).all()) is straight


def test_absmax_passes_its_gradient_straight_through() -> None:
    layer = nn.Linear(5, 3)
    factor = torch.randn(3, 5)
    (AbsmaxWeights(4)(layer) * factor).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, factor)


# ---- absmax ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_absmax_has_a_grid_per_channel(name: str, bits: int) -> None:
    layer: Any = LAYERS[name][0]()
    module = AbsmaxWeights(bits)
    codes, scale, _ = module.codes(layer)
    top = 2 ** (bits - 1) - 1
    flat = rows(layer, layer.weight.detach())
    assert rows(layer, codes).abs().amax(1).tolist() == [top] * len(flat)
    torch.testing.assert_close(scale, flat.abs().amax(1) / top)
    error = rows(layer, module(layer).detach()) - flat
    assert bool((error.abs() <= 0.501 * scale.unsqueeze(1)).all())


def test_as_published_has_one_grid_up_to_the_largest_signed_weight() -> None:
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.9, 0.2, 0.0], [1.0, -2.0, 0.3, -0.3]]))
    codes, scale, _ = AbsmaxWeights(8, as_published=True).codes(layer)
    assert scale.tolist() == pytest.approx([1 / 127] * 2)
    assert codes.tolist() == torch.round(layer.weight * 127).tolist()
    assert codes.min() == -254


def test_a_dead_channel() -> None:
    layer = nn.Linear(4, 2)
    nn.init.zeros_(layer.weight)
    assert AbsmaxWeights(8)(layer).tolist() == layer.weight.tolist()
    assert bool(LearnedLayer(layer, None, AbsmaxWeights(8)).frozen().weight().eq(0).all())


# ---- modules ---------------------------------------------------------------------------------


def test_the_state() -> None:
    module, x = learned("conv2d")
    torch.manual_seed(9)
    other, _ = learned("conv2d", alpha=0.3)
    assert not torch.allclose(other(x), module(x), rtol=0.1)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert {"layer.weight", "weights.alpha", "weights.gain"} <= set(module.state_dict())


def test_nan_is_kept() -> None:
    module, x = learned("conv2d")
    x[0, 0, 0, 0] = float("nan")
    assert bool(module(x)[0].isnan().any())
    module.layer.weight.data[0] = float("nan")
    assert bool(module(torch.randn_like(x)).isnan().any())


def test_it_is_described() -> None:
    module, _ = learned("conv2d")
    assert module.operator == "LearnedConv2d+BatchNorm2d"
    assert module.describe() == "4-bit apot weights clip 2.4"
    assert (module.level_set, module.fxq_kind) == ("apot", "conv")
    plain, _ = learned("linear", norm=False, absmax=True)
    assert (plain.operator, plain.describe()) == ("LearnedLinear", "8-bit weights")
    assert (plain.level_set, plain.fxq_kind) == ("uniform", "linear")
