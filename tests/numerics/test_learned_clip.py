"""Projection and its gradients, against search, finite differences and plain autograd."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxq.errors import SpecError
from fxq.numerics.learned_clip import ClipGradient, normalized_weight, project
from fxq.numerics.levels import LevelSet, level_table, magnitudes

APOT3 = magnitudes(LevelSet.APOT, 3)  # up to 10
SETS = {
    "ternary": magnitudes(LevelSet.APOT, 1),
    "apot-3": APOT3,
    "apot-4": magnitudes(LevelSet.APOT, 4),
    "pot-4": magnitudes(LevelSet.POT, 4),
    "uniform-3": magnitudes(LevelSet.UNIFORM, 3),
    "lloyd": torch.tensor([0, 13, 26, 40, 56, 73, 95, 127]),
}


def table_of(levels: Tensor, signed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    return level_table(levels, signed=signed).to(dtype)


def nearest_by_search(x: Tensor, alpha: float, levels: Tensor, signed: bool) -> Tensor:
    """Every level tried; of two as near, the larger magnitude."""
    every = torch.cat((levels, -levels)) if signed else levels
    every = every[every.abs().argsort(descending=True)].double() * (alpha / int(levels[-1]))
    return every[(x.double().unsqueeze(-1) - every).abs().argmin(-1)]


# ---- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_level(name: str, signed: bool, dtype: torch.dtype) -> None:
    levels = SETS[name]
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2
    y = project(x, torch.tensor(1.7), table_of(levels, signed), signed=signed)
    assert y.dtype == dtype
    expected = nearest_by_search(x, float(torch.tensor(1.7)), levels, signed).to(dtype)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


@given(
    levels=st.lists(st.integers(1, 127), min_size=1, max_size=20, unique=True),
    halves=st.lists(st.integers(-300, 300), min_size=1, max_size=30),
    exponent=st.integers(-3, 3),
    signed=st.booleans(),
)
def test_halfway_the_larger_magnitude(
    levels: list[int], halves: list[int], exponent: int, signed: bool
) -> None:
    """With an alpha of a power of two times the top, values on halves of a level are exact."""
    magnitude = torch.tensor([0, *sorted(levels)])
    unit = 2.0**exponent
    alpha = float(magnitude[-1]) * unit
    x = torch.tensor(halves).double() * (unit / 2)
    y = project(x, torch.tensor(alpha), table_of(magnitude, signed), signed=signed)
    expected = nearest_by_search(x, alpha, magnitude, signed)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_nan_stays_and_infinity_is_clipped(signed: bool) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 0.0, -0.0])
    y = project(x, torch.tensor(1e-3), table_of(APOT3, signed), signed=signed)
    low = -1e-3 if signed else 0.0
    assert y.isnan().tolist() == [True] + [False] * 6
    assert y[1:].tolist() == pytest.approx([1e-3, low, 1e-3, low, 0, 0])


@pytest.mark.parametrize("alpha", [0.0, -0.5])
def test_a_clip_that_went_too_far_comes_back(alpha: float) -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    clip = torch.tensor([alpha], requires_grad=True)
    y = project(x, clip, table_of(APOT3, True), signed=True)
    assert y.abs().max() <= 2e-8
    (y - x).square().sum().backward()
    assert clip.grad is not None
    assert clip.grad.shape == (1,)
    assert float(clip.grad) < -1


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2, 2), (7,), (4, 5), (2, 3, 4), (2, 3, 4, 5)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = project(x, torch.tensor(1.0, requires_grad=True), table_of(APOT3, True), signed=True)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, ::2],
        lambda x: x[:1].expand(2, -1, -1, -1),
    ],
)
def test_memory_formats(view: Any) -> None:
    plain = torch.randn(2, 3, 4, 6)
    x = view(plain)
    arguments = torch.tensor(1.1), table_of(APOT3, True)
    y = project(x, *arguments, signed=True)
    assert torch.equal(
        y, project(x.clone(memory_format=torch.contiguous_format), *arguments, signed=True)
    )
    if x.is_contiguous(memory_format=torch.channels_last):
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("signed", [True, False])
def test_half_precision_is_computed_in_float32(signed: bool) -> None:
    x = torch.randn(1000).bfloat16().requires_grad_()
    alpha = torch.tensor(1.7, requires_grad=True)
    table = table_of(magnitudes(LevelSet.APOT, 4), signed)
    y = project(x, alpha, table, signed=signed)
    assert torch.equal(y, project(x.float(), alpha, table, signed=signed).bfloat16())
    full = torch.randn(1000)
    expected = project(full, alpha, table, signed=signed)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(project(full, alpha, table, signed=signed), expected)
    to_x, to_alpha = torch.autograd.grad(y.float().sum(), (x, alpha))
    assert to_x.dtype == torch.bfloat16
    assert to_alpha.dtype == torch.float32


# ---- gradients -------------------------------------------------------------------------------


def drawn(signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, generator=generator).double() * 1.5
    grad = torch.randn(400, generator=generator).double()
    return x, grad, table_of(APOT3, signed, torch.float64)


def gradients(x: Tensor, grad: Tensor, table: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    x, alpha = x.clone().requires_grad_(), torch.tensor(1.3, dtype=torch.float64).requires_grad_()
    y = project(x, alpha, table, **options)
    to_x, to_alpha = torch.autograd.grad(y, (x, alpha), grad, allow_unused=True)
    return to_x, torch.zeros(()).double() if to_alpha is None else to_alpha


@pytest.mark.parametrize("signed", [True, False])
def test_rcf_by_finite_differences(signed: bool) -> None:
    """Of the smooth part: rounding adds a constant to the clipped x / alpha."""
    x, grad, table = drawn(signed)
    low = -1.0 if signed else 0.0

    def clipped(alpha: float) -> Tensor:
        return (x / alpha).clamp(low, 1)

    rounding = project(
        x, torch.tensor(1.3, dtype=torch.float64), table, signed=signed
    ) / 1.3 - clipped(1.3)
    step = 1e-6
    above, below = (a * (clipped(a) + rounding) for a in (1.3 + step, 1.3 - step))
    expected = (above - below) / (2 * step) @ grad
    _, to_alpha = gradients(x, grad, table, signed=signed, gradient=ClipGradient.RCF)
    assert float(to_alpha) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("straight", [True, False])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("gradient", list(ClipGradient))
def test_gradients_are_those_of_plain_autograd(
    gradient: ClipGradient, signed: bool, straight: bool
) -> None:
    """Equations 7 (RCF) and 1 (PACT) written with straight-through rounding."""
    values, grad, table = drawn(signed)
    x, alpha = (
        values.clone().requires_grad_(),
        torch.tensor(1.3, dtype=torch.float64).requires_grad_(),
    )
    rounded = project(values, alpha.detach(), table, signed=signed)
    low = -alpha if signed else torch.zeros_like(alpha)
    if gradient is ClipGradient.RCF:
        inner = (x / alpha).clamp(-1.0 if signed else 0.0, 1)
        y = alpha * (inner + (rounded / alpha - inner).detach())
    else:
        inner = torch.maximum(torch.minimum(x, alpha), low)
        y = inner + (rounded - inner).detach()
    expected_x, expected_alpha = torch.autograd.grad(y, (x, alpha), grad)
    if gradient is ClipGradient.NONE:
        expected_alpha = torch.zeros_like(expected_alpha)
    options = {"signed": signed, "gradient": gradient, "straight": straight}
    to_x, to_alpha = gradients(values, grad, table, **options)
    torch.testing.assert_close(to_x, grad if straight else expected_x)
    torch.testing.assert_close(to_alpha, expected_alpha)


@pytest.mark.parametrize("signed", [True, False])
def test_with_uniform_levels_it_is_lsq(signed: bool) -> None:
    """Esser et al., Eq. 3: round(v / s) - v / s inside, -Q_N or Q_P outside; alpha is Q_P * s."""
    top = 7
    table = table_of(torch.arange(top + 1), signed, torch.float64)
    x, grad, _ = drawn(signed)
    steps = x / (1.3 / top)
    inside = steps.round() - steps
    low = -top if signed else 0
    lsq = torch.where(steps >= top, top, torch.where(steps <= low, low, inside)) @ grad
    _, to_alpha = gradients(x, grad, table, signed=signed)
    assert float(to_alpha) * top == pytest.approx(float(lsq), rel=1e-9)


def test_the_end_of_the_clip_belongs_to_it() -> None:
    x = torch.tensor([1.3, -1.3, 1.3 + 1e-9, 0.0, -1e-9], dtype=torch.float64)
    for signed, expected in ((True, [1, 1, 0, 1, 1]), (False, [1, 0, 0, 1, 0])):
        table = table_of(APOT3, signed, torch.float64)
        to_x, _ = gradients(x, torch.ones(5).double(), table, signed=signed)
        assert to_x.tolist() == expected


def test_gradients_only_where_wanted() -> None:
    x, grad, table = drawn(True)
    alpha = torch.tensor(1.3, dtype=torch.float64)
    fixed = x.clone().requires_grad_()
    project(fixed, alpha, table, signed=True).backward(grad)
    assert alpha.grad is None
    alpha.requires_grad_()
    project(x, alpha, table, signed=True).backward(grad)
    assert x.grad is None
    assert torch.equal(alpha.grad, gradients(x, grad, table, signed=True)[1])


def test_differentiating_twice_is_refused() -> None:
    x = torch.randn(5, requires_grad=True)
    y = project(x, torch.tensor(1.0), table_of(APOT3, True), signed=True)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile warns about itself
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("signed", [True, False])
def test_compiled_it_is_the_same(signed: bool) -> None:
    """Forward and backward in one graph, for batches of several sizes."""
    table = table_of(APOT3, signed)
    torch.compiler.reset()
    compiled = torch.compile(project, fullgraph=True)
    for count in (4, 3, 5):
        x = torch.randn(count, 8, 6, 6).contiguous(memory_format=torch.channels_last)
        x[0, 0, 0, 0] = torch.nan
        found = []
        for function in (project, compiled):
            own, alpha = x.clone().requires_grad_(), torch.tensor(1.3, requires_grad=True)
            y = function(own, alpha, table, signed=signed)
            assert y.is_contiguous(memory_format=torch.channels_last)
            y[1:].square().sum().backward()
            found.append((y.detach(), own.grad, alpha.grad))
        for eager, one in zip(*found, strict=True):
            torch.testing.assert_close(one, eager, equal_nan=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_it_is_the_same() -> None:
    x = torch.randn(4, 8, 6, 6)
    x[0, 0, 0, 0] = torch.nan
    table, alpha = table_of(APOT3, True), torch.tensor(1.3)
    here = project(x, alpha, table, signed=True)
    there = project(x.cuda(), alpha.cuda(), table.cuda(), signed=True)
    torch.testing.assert_close(there.cpu(), here, equal_nan=True)


# ---- weight normalization --------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [True, False])
def test_normalized_attached_gradient(unbiased: bool) -> None:
    weight = torch.randn(3, 2, 3, 3).double().requires_grad_()

    def normalized(w: Tensor) -> Tensor:
        return normalized_weight(w, detached=False, unbiased=unbiased)

    assert torch.autograd.gradcheck(normalized, weight)
    flat = weight.detach().numpy().ravel()
    expected = (flat - flat.mean()) / flat.std(ddof=int(unbiased))
    assert normalized(weight).flatten().tolist() == pytest.approx(expected.tolist())


def test_normalized_detached_gradient() -> None:
    weight = torch.randn(3, 2, 3, 3).double().requires_grad_()
    grad = torch.randn(3, 2, 3, 3).double()
    y = normalized_weight(weight, detached=True)
    assert torch.equal(y, normalized_weight(weight, detached=False))
    (to_weight,) = torch.autograd.grad(y, weight, grad)
    torch.testing.assert_close(to_weight, grad / weight.detach().std())


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.3, -70.0])
def test_a_constant_weight_becomes_zeros(value: float, detached: bool) -> None:
    weight = torch.full((4, 3, 3, 3), value, requires_grad=True)
    y = normalized_weight(weight, detached=detached)
    assert y.abs().max() <= 1
    y.sum().backward()
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())


def test_the_floor_leaves_ordinary_weights_alone() -> None:
    weight = torch.randn(64, 9) * 2e-5
    expected = (weight - weight.mean()) / weight.std()
    torch.testing.assert_close(normalized_weight(weight, detached=True), expected)
    small = normalized_weight(weight * 1e-9, detached=True)
    assert small.abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (0, 3)])
def test_too_few_weights_to_normalize(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="no deviation"):
        normalized_weight(torch.ones(shape), detached=True)
