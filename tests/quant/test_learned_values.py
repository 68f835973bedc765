"""Quantizers whose clip is learned, and those whose range follows the batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxq.errors import SpecError
from fxq.numerics.learned_clip import ClipGradient
from fxq.numerics.levels import LevelSet, magnitudes
from fxq.quant.learned_values import LEAST_CLIP, LearnedLevels, MovingRange
from fxq.quant.quantizers import ActivationQuantizer, LevelQuantizer

pytestmark = pytest.mark.usefixtures("one_thread")

APOT, UNIFORM = magnitudes(LevelSet.APOT, 3), magnitudes(LevelSet.UNIFORM, 3)


def levels(alpha: float = 2.5, which: Tensor = APOT, **options: Any) -> LearnedLevels:
    return LearnedLevels(alpha, which, **{"signed": False, "bits": 3, **options})


# ---- learned levels --------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("which", [APOT, UNIFORM], ids=["apot", "uniform"])
@given(alpha=st.floats(1e-4, 1e4))
def test_frozen_is_the_forward(which: Tensor, signed: bool, alpha: float) -> None:
    """But for values within the scale's rounding, 2**-15, of a threshold."""
    module = levels(alpha, which, signed=signed)
    x = torch.linspace(-1.2, 1.2, 801) * alpha
    found, frozen = module(x).detach(), module.frozen()(x)
    unit = alpha / int(which[-1])
    is_close = (frozen - found).abs() < 1e-4 * alpha
    near = x.abs() / unit * 2 % 1
    at_threshold = torch.minimum(near, 1 - near) < 1e-3
    assert bool((is_close | at_threshold).all())
    assert int(at_threshold.sum()) < 100


def test_what_it_freezes_to() -> None:
    assert isinstance(levels().frozen(), LevelQuantizer)
    assert isinstance(levels(which=UNIFORM).frozen(), ActivationQuantizer)  # all codes are levels
    signed = levels(which=UNIFORM, signed=True).frozen()
    assert isinstance(signed, LevelQuantizer)
    assert signed.signed
    assert signed.bits == 3


def test_the_clip_learns() -> None:
    module = levels(1.0)
    module(torch.tensor([3.0, 4.0])).sum().backward()
    assert module.alpha.grad == 2  # both beyond the clip
    module = levels(1.0, gradient=ClipGradient.NONE)
    module(torch.tensor([3.0, 4.0])).sum().backward()
    assert module.alpha.grad is None or module.alpha.grad == 0


@pytest.mark.parametrize("alpha", [0.0, -3.0])
def test_a_clip_is_never_zero(alpha: float) -> None:
    assert levels(alpha).alpha.item() == pytest.approx(LEAST_CLIP)
    module = levels()
    module.alpha.data.fill_(alpha)  # a step too far
    assert bool(module(torch.tensor([-1.0, 0.0, 1.0])).isfinite().all())
    scale = module.frozen().scale
    assert 0 < float(scale) < 1e-6


def test_nan_is_kept() -> None:
    assert levels()(torch.tensor([float("nan"), 1.0])).isnan().tolist() == [True, False]


def test_the_state() -> None:
    module, other = levels(2.5), levels(0.1)
    assert list(module.state_dict()) == ["alpha"]
    other.load_state_dict(module.state_dict())
    x = torch.randn(50) * 3
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_levels_are_described() -> None:
    assert levels().describe() == "3-bit apot clip 2.5"
    assert levels(signed=True, level_set="pot").describe() == "3-bit signed pot clip 2.5"


# ---- moving range ----------------------------------------------------------------------------


def ends(module: MovingRange) -> tuple[float, float]:
    return float(module.low), float(module.high)


def test_the_range_follows_in_training_only() -> None:
    module = MovingRange(-1.0, 1.0, 8, momentum=0.75)
    x = torch.tensor([-5.0, 0.0, 9.0])
    module.eval()(x)
    assert ends(module) == (-1.0, 1.0)
    module.train()(x)
    assert ends(module) == pytest.approx((-2.0, 3.0))  # a quarter of the way
    module(x)
    assert ends(module) == pytest.approx((-2.75, 4.5))


def test_a_range_above_zero_may_go_below() -> None:
    """That calibration saw no negative value does not say there is none."""
    module = MovingRange(0.0, 1.0, 8, momentum=0.0)
    x = torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(module(x), x, atol=0.01, rtol=0)
    assert module.low == -1


@given(
    st.floats(-100, 100), st.floats(0, 100), st.integers(2, 8), st.sampled_from([1e-20, 1.0, 1e6])
)
def test_a_frozen_range_is_eval_mode(low: float, width: float, bits: int, size: float) -> None:
    """Scales differ by 2**-15, thresholds with them: one code in a few hundred values."""
    module = MovingRange(low * size, (low + width) * size, bits).eval()
    frozen = module.frozen()
    x = torch.linspace(-120, 220, 1001) * size
    step = float(frozen.scale)
    difference = (frozen(x) - module(x)).abs()
    assert bool((difference <= 1.01 * step + 1e-4 * 220 * size).all())
    assert int((difference > 0.5 * step).sum()) <= 40


def test_zero_stays_zero() -> None:
    for low, high in ((-1.0, 3.0), (0.5, 3.0), (-3.0, -0.5), (0.0, 0.0)):
        module = MovingRange(low, high, 4).eval()
        assert module(torch.zeros(3)).tolist() == [0, 0, 0]
        assert module.frozen()(torch.zeros(3)).tolist() == [0, 0, 0]


def test_the_gradient_passes_inside_the_range() -> None:
    module = MovingRange(-1.0, 1.0, 8).eval()
    x = torch.tensor([-3.0, 0.2, 3.0], requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 0]


def test_watching_remembers_the_extremes_and_rounds_nothing() -> None:
    module = MovingRange(-100.0, 100.0, 2)
    with module.watching():
        for x in (torch.tensor([0.3, 1.7]), torch.tensor([-0.1, 0.4])):
            assert torch.equal(module(x), x)
    assert ends(module) == pytest.approx((-0.1, 1.7))
    module.eval()
    assert len(module(torch.linspace(-1, 2, 100)).unique()) == 4


def test_watching_ends_with_an_error() -> None:
    module = MovingRange(0.0, 1.0, 8).eval()
    with pytest.raises(TypeError), module.watching():
        module(module(torch.ones(1) * 3), "one input too many")
    assert module(torch.tensor([9.0])) == pytest.approx(3.0, rel=1e-4)


def test_the_state_is_the_range() -> None:
    module, other = MovingRange(-1.5, 4.0, 8), MovingRange(0.0, 1.0, 8)
    other.load_state_dict(module.state_dict())
    x = torch.randn(50) * 3
    assert torch.equal(other.eval()(x), module.eval()(x))
    assert module.describe() == "8-bit range -1.5..4"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    module = MovingRange(0.0, 1.0, 8)
    assert not bool(module(torch.tensor([bad, 0.5])).isfinite().all())
    with pytest.raises(SpecError, match="NaN or infinite"):
        module.frozen()


def test_half_precision_is_rounded_in_float() -> None:
    module = MovingRange(0.0, 1.0, 8).eval()
    x = torch.linspace(0, 1, 50).to(torch.bfloat16)
    assert torch.equal(module(x), module(x.float()))
