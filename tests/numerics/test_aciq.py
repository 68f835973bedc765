"""The closed forms, against published roots, scipy, and minima found by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, optimize, special, stats

from fxq.errors import SpecError
from fxq.numerics.aciq import (
    Prior,
    aciq_range,
    clip_mse,
    gauss_clip,
    gauss_clip_fused_relu,
    gauss_clip_mean_aware,
    laplace_clip,
    laplace_clip_fused_relu,
    laplace_clip_mean_aware,
    prior_clip,
)
from fxq.numerics.aciq_tables import paper_table_clip

LAWS = (Prior.LAPLACE, Prior.GAUSS)
LAPLACE_ROOTS = (1.0499, 1.8628, 2.8307, 3.8972, 5.0286, 6.2048, 7.4131, 8.6456, 9.8968, 11.1627)
GAUSS_ROOTS = (1.2399, 1.7106, 2.1516, 2.5591, 2.9362, 3.2869, 3.6151, 3.9240, 4.2163)


def test_published_roots() -> None:
    for bits, root in enumerate(LAPLACE_ROOTS):
        assert laplace_clip(1.0, 2**bits) == pytest.approx(root, abs=6e-5)
    for bits, root in enumerate(GAUSS_ROOTS, start=1):
        assert gauss_clip(1.0, 2**bits) == pytest.approx(root, abs=6e-5)


@pytest.mark.parametrize("prior", LAWS)
@pytest.mark.parametrize("fused", [False, True])
def test_the_authors_tables_are_the_roots_truncated(prior: Prior, fused: bool) -> None:
    for bits in range(0 if prior is Prior.LAPLACE else 1, 9):
        root = prior_clip(prior, 1.0, 2**bits, fused)
        assert root - 0.0201 <= paper_table_clip(prior, bits, fused) <= root + 0.0051


@pytest.mark.parametrize("bits", [-1, 9])
def test_the_tables_end(bits: int) -> None:
    with pytest.raises(SpecError):
        paper_table_clip(Prior.LAPLACE, bits)
    with pytest.raises(SpecError):
        paper_table_clip(Prior.GAUSS, 0)


def test_laplace_is_lamberts_w() -> None:
    steps = torch.tensor([0.1, 0.5, 1.0, 3.0, 15.0, 14.0, 255.0, 1e6, 1e100], dtype=torch.float64)
    ours = laplace_clip(torch.tensor(2.0, dtype=torch.float64), steps)
    theirs = [2 * special.lambertw(3 * n * n).real for n in steps.tolist()]
    assert ours.tolist() == pytest.approx(theirs, rel=1e-13)


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 7, 14, 15, 255])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("prior", LAWS)
def test_clip_is_the_minimum_of_the_error_model(prior: Prior, fused: bool, steps: int) -> None:
    found = optimize.minimize_scalar(
        lambda a: clip_mse(prior, a, 1.0, steps, fused_relu=fused),
        bounds=(0.05, 20),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert prior_clip(prior, 1.0, steps, fused) == pytest.approx(found.x, rel=1e-5)


def density(prior: Prior, mean: float) -> stats.rv_frozen:
    law = stats.laplace if prior is Prior.LAPLACE else stats.norm
    return law(loc=mean, scale=1.0)


@pytest.mark.parametrize("mean", [-3.0, -0.5, 0.0, 1.0, 6.0])
@pytest.mark.parametrize("prior", LAWS)
def test_error_model_against_integrals(prior: Prior, mean: float) -> None:
    law, clip, steps = density(prior, mean), 4.0, 7
    tail = sum(
        integrate.quad(lambda x: (x - clip) ** 2 * law.pdf(x), *span)[0]
        for span in ((clip, max(mean, clip)), (max(mean, clip), math.inf))
    )
    expected = (clip / steps) ** 2 / 12 * law.sf(0) + tail
    assert clip_mse(prior, clip, 1.0, steps, fused_relu=True, mean=mean) == pytest.approx(
        expected, rel=1e-6
    )
    two_sided = (2 * clip / steps) ** 2 / 12 + 2 * integrate.quad(
        lambda x: (x - clip) ** 2 * density(prior, 0).pdf(x), clip, math.inf
    )[0]
    assert clip_mse(prior, clip, 1.0, steps) == pytest.approx(two_sided, rel=1e-6)


def true_error(prior: Prior, mean: float, low: float, high: float, steps: int) -> float:
    """Mean squared error of relu(x) (or x) on the real grid of steps + 1 levels, by quadrature."""
    law = density(prior, mean)
    x = torch.linspace(max(low, 0) if low == 0 else mean - 30, max(mean, 0) + 30, 60_001)
    x = x.to(torch.float64)
    weight = torch.from_numpy(law.pdf(x.numpy())) * float(x[1] - x[0])
    step = (high - low) / steps
    quantized = ((x.clamp(low, high) - low) / step).round() * step + low
    return float(((x - quantized).square() * weight).sum())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("mean", [-3.0, -1.0, 0.0, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("prior", LAWS)
def test_mean_aware_clip_is_close_to_the_true_optimum(prior: Prior, mean: float, bits: int) -> None:
    rule = laplace_clip_mean_aware if prior is Prior.LAPLACE else gauss_clip_mean_aware
    steps = 2**bits - 1
    clip = rule(mean, 1.0, steps)
    reached = true_error(prior, mean, 0.0, clip, steps)
    candidates = [clip * (0.76 + 0.03 * i) for i in range(17)]
    best = min(true_error(prior, mean, 0.0, one, steps) for one in candidates)
    # Worst: 1.037, Laplace at mean 6 on 7 steps, where the density varies within a step.
    assert reached <= best * (1.04 if prior is Prior.LAPLACE else 1.005)


@pytest.mark.parametrize("steps", [3, 6, 7, 14, 15])
@pytest.mark.parametrize("prior", LAWS)
def test_plain_clip_is_close_to_the_true_optimum_of_a_real_grid(prior: Prior, steps: int) -> None:
    clip = prior_clip(prior, 1.0, steps)
    reached = true_error(prior, 0.0, -clip, clip, steps)
    candidates = [clip * (0.76 + 0.03 * i) for i in range(17)]
    best = min(true_error(prior, 0.0, -one, one, steps) for one in candidates)
    assert reached <= best * 1.05


@pytest.mark.parametrize("mean", [-1e4, -80.0, -49.9, -5.0, 0.0, 2.0, 7.0, 40.0, 1e4])
@pytest.mark.parametrize("steps", [1, 3, 15, 255])
@pytest.mark.parametrize("prior", LAWS)
def test_mean_aware_clip_minimises_the_model_at_any_mean(
    prior: Prior, steps: int, mean: float
) -> None:
    rule = laplace_clip_mean_aware if prior is Prior.LAPLACE else gauss_clip_mean_aware
    clip = rule(mean, 1.0, steps)
    assert math.isfinite(clip)
    assert clip > 0
    if mean < -5:  # the model's error underflows; its conditional tail has a known shape instead
        if prior is Prior.LAPLACE:
            assert clip == pytest.approx(laplace_clip_fused_relu(1.0, steps), rel=1e-12)
        else:  # a Gaussian that far out is nearly exponential with scale 1/|mean|
            near = laplace_clip_fused_relu(1.0, steps) / -mean
            assert near * 0.9 < clip < near * 1.001
        return
    found = optimize.minimize_scalar(
        lambda a: clip_mse(prior, a, 1.0, steps, fused_relu=True, mean=mean),
        bounds=(clip * 0.3, clip * 3),
        method="bounded",
        options={"xatol": 1e-10 * clip},
    )
    assert clip == pytest.approx(found.x, rel=1e-4)


def test_mean_aware_formula_of_the_notes() -> None:
    for mean in (-2.0, 0.0, 0.5, 3.0):
        mass = 1 - 0.5 * math.exp(-mean) if mean >= 0 else 0.5 * math.exp(mean)
        expected = special.lambertw(6 * 15**2 * math.exp(mean) / mass).real
        assert laplace_clip_mean_aware(mean, 1.0, 15) == pytest.approx(expected, rel=1e-12)


def test_mean_aware_equals_fused_at_mean_zero() -> None:
    for steps in (3, 15, 255):
        assert laplace_clip_mean_aware(0.0, 1.0, steps) == pytest.approx(
            laplace_clip_fused_relu(1.0, steps), rel=1e-12
        )
        assert gauss_clip_mean_aware(0.0, 1.0, steps) == pytest.approx(
            gauss_clip_fused_relu(1.0, steps), rel=1e-12
        )


def test_gauss_mean_aware_is_continuous_where_its_evaluation_switches() -> None:
    for at in (0.0, -50.0, -46.0):
        left = gauss_clip_mean_aware(at - 1e-6, 1.0, 15)
        right = gauss_clip_mean_aware(at + 1e-6, 1.0, 15)
        assert left == pytest.approx(right, rel=1e-5)


def test_tensors_are_floats_elementwise_and_units_scale() -> None:
    b = torch.tensor([0.0, 0.5, 2.0])
    mean = torch.tensor([-1.0, 0.25, 3.0])
    steps = torch.tensor([15.0, 7.0, 255.0])
    for rule in (laplace_clip, gauss_clip, laplace_clip_fused_relu, gauss_clip_fused_relu):
        together = rule(b, steps)
        assert together.dtype == torch.float32
        alone = [rule(x, n) for x, n in zip(b.tolist(), steps.tolist(), strict=True)]
        assert together.tolist() == pytest.approx(alone, rel=1e-6)
        assert rule(3.0, 15) == pytest.approx(3 * rule(1.0, 15))
    for aware in (laplace_clip_mean_aware, gauss_clip_mean_aware):
        together = aware(mean, b, steps)
        rows = zip(mean.tolist(), b.tolist(), steps.tolist(), strict=True)
        assert together.tolist() == pytest.approx([aware(*row) for row in rows], rel=1e-6)
        assert aware(2.0, 0.0, 15) == 2.0


def test_range_is_never_wider_than_observed() -> None:
    mean, b = torch.tensor([1.0, 0.0, -9.0]), torch.tensor([1.0, 0.0, 0.5])
    low, high = torch.tensor([-2.0, 0.0, -12.0]), torch.tensor([30.0, 0.0, -4.0])
    bottom, top = aciq_range(mean, b, low, high, 16)
    assert bottom.tolist() == pytest.approx([-2.0, 0.0, -9 - 0.5 * 5.0286], abs=1e-3)
    assert top.tolist() == pytest.approx([6.0286, 0.0, -9 + 0.5 * 5.0286], abs=1e-3)
    for aware in (False, True):
        bottom, top = aciq_range(mean, b, low, high, 16, fused_relu=True, mean_aware=aware)
        assert bottom.tolist() == [0.0, 0.0, 0.0]
        assert float(top[2]) == 0.0  # a channel that the ReLU silences
        assert bool((top <= high.clamp(min=0)).all())
    assert aciq_range(1.0, 1.0, -2.0, 30.0, 16, fused_relu=True)[1] == pytest.approx(
        1 + 6.2048, abs=1e-4
    )
    aware_top = aciq_range(1.0, 1.0, -2.0, 30.0, 16, Prior.GAUSS, True, True)[1]
    assert aware_top == gauss_clip_mean_aware(1.0, 1.0, 16)


def test_a_law_still_to_be_fitted_has_no_clip() -> None:
    for clip in (
        lambda: prior_clip(Prior.FIT, 1.0, 15),
        lambda: clip_mse(Prior.FIT, 2.0, 1.0, 15),
        lambda: aciq_range(0.0, 1.0, -1.0, 1.0, 15, Prior.FIT, True, True),
        lambda: paper_table_clip(Prior.FIT, 3),
    ):
        with pytest.raises(SpecError):
            clip()


def test_bad_statistics_are_refused() -> None:
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(SpecError):
            laplace_clip(bad, 15)
        with pytest.raises(SpecError):
            gauss_clip(torch.tensor([1.0, bad]), 15)
    for steps in (0.0, -1.0, math.nan):
        with pytest.raises(SpecError):
            laplace_clip(1.0, steps)
    with pytest.raises(SpecError):
        aciq_range(math.nan, 1.0, 0.0, 1.0, 15)
