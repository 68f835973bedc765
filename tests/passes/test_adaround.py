"""adaround: codes of the quantize pass, chosen anew by the error of the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq.errors import SpecError
from fxq.numerics.saturation import largest_pair_sum, pair_limit
from fxq.passes import Adaround, QuantizeAciq, QuantizeMinmax
from fxq.passes.adaround import Solver
from fxq.passes.patches import moments, patches, products, samples
from fxq.passes.quantize_aciq import BiasCorrection
from fxq.passes.side_by_side import Meeting
from fxq.quant.quantizers import QuantizedLayer, rows

from .test_correct_bias import BEFORE, Shared, means

QUICK = Adaround(iterations=200, learning_rate=0.05)
DESCENT = Adaround(solver=Solver.DESCENT)
COARSE = QuantizeMinmax(weight_bits=3)


def output_error(ran: Any, images: Tensor) -> float:
    """The mean squared error of the network's output."""
    with torch.no_grad():
        return float((ran.model.eval()(images) - ran.program.module(images)).square().mean())


# ---- patches ---------------------------------------------------------------------------------

LAYERS = [
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 9, 7)),
    (nn.Conv2d(4, 8, (3, 2), padding=(1, 0), groups=4, dilation=2, bias=False), (3, 4, 9, 7)),
    (nn.Conv2d(6, 8, (4, 3), padding="same", groups=2), (2, 6, 9, 7)),
    (nn.Conv2d(4, 6, 3, padding="valid"), (1, 4, 9, 7)),
    (nn.Conv1d(6, 8, 3), (2, 6, 9)),
    (nn.Linear(5, 3), (2, 4, 5)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_layer_is_its_weights_times_patches(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with torch.no_grad():
        groups = getattr(layer, "groups", 1)
        found = patches(layer, x) @ layer.weight.flatten(1).unflatten(0, (groups, -1)).mT
        torch.testing.assert_close(found, products(layer, x))
        codes = torch.zeros_like(layer.weight, dtype=torch.int8)
        out = torch.ones(len(layer.weight))
        at = Meeting(Any, QuantizedLayer(layer, codes, out, 8 * out), [x, x], [x, x])
        seen, (inputs, outputs) = moments(at), samples(at, 10_000, seed=0)
    assert seen.samples == inputs.shape[1] == 2 * found.shape[1]
    x64, y64 = inputs.double(), outputs.double()
    centred = x64 - x64.mean(1, keepdim=True)
    close = {"atol": 1e-5, "rtol": 1e-5}  # products are summed in float32
    torch.testing.assert_close(seen.gram, x64.mT @ x64 / seen.samples, **close)
    torch.testing.assert_close(seen.correlation, y64.mT @ x64 / seen.samples, **close)
    torch.testing.assert_close(seen.centred().gram, centred.mT @ centred / seen.samples, **close)


# ---- the pass --------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [QUICK, DESCENT, Adaround(solver=Solver.DESCENT, relaxed=1)])
def test_the_output_is_nearer_to_the_float_network(
    one: Any, run_passes: Any, deep: Any, images: Tensor
) -> None:
    plain = run_passes([*BEFORE, COARSE], deep, images[:2], calibration=[images])
    ran = run_passes([*BEFORE, COARSE, one], deep, images[:2], calibration=[images])
    assert output_error(ran, images) < 0.7 * output_error(plain, images)
    assert ran.step.hits == ("first", "body_0", "body_2", "head")
    assert not ran.step.misses


def test_codes_are_neighbours_of_their_weights_and_means_are_kept(
    run_passes: Any, deep: Any, images: Tensor
) -> None:
    ran = run_passes([*BEFORE, COARSE, QUICK], deep, images[:2], calibration=[images])
    changed = 0
    for layer in (m for m in ran.program.module.modules() if isinstance(m, QuantizedLayer)):
        steps = rows(layer.layer, layer.layer.weight) / layer.scale.unsqueeze(1)
        codes = rows(layer.layer, layer.codes)
        assert bool(((codes - steps).abs() < 1.001).all())
        assert bool((codes.abs() <= 2 ** (layer.bits - 1).unsqueeze(1) - 1).all())
        changed += int((codes != steps.round()).sum())
    assert changed
    got, want = means(ran.program, images), means(_float(run_passes, deep, images), images)
    for name, mean in want.items():
        torch.testing.assert_close(got[name], mean, atol=1e-5, rtol=1e-4)


def _float(run_passes: Any, model: Any, images: Tensor) -> Any:
    return run_passes(BEFORE, model, images[:2], calibration=[images]).program


def test_it_is_deterministic(run_passes: Any, deep: Any, images: Tensor) -> None:
    one = Adaround(iterations=50, refine_iterations=20, seed=3)
    runs = [
        run_passes([*BEFORE, COARSE, one], deep, images[:2], calibration=[images]) for _ in "ab"
    ]
    first, second = (
        [m.codes for m in r.program.module.modules() if hasattr(m, "codes")] for r in runs
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_layers_too_wide_for_moments(
    monkeypatch: pytest.MonkeyPatch, run_passes: Any, deep: Any, images: Tensor
) -> None:
    monkeypatch.setattr("fxq.passes.adaround.GRAM_COLUMNS", 0)
    monkeypatch.setattr("fxq.passes.adaround.BLOCK_ELEMENTS", 300)
    plain = run_passes([*BEFORE, COARSE], deep, images[:2], calibration=[images])
    ran = run_passes([*BEFORE, COARSE, QUICK], deep, images[:2], calibration=[images])
    assert output_error(ran, images) < 0.8 * output_error(plain, images)


def test_spread_levels_are_refused(run_passes: Any, deep: Any, images: Tensor) -> None:
    for correction, refused in ((BiasCorrection.MEAN, 2), (BiasCorrection.NONE, 0)):
        one = QuantizeAciq(weight_bits=4, bias_correction=correction)
        ran = run_passes([*BEFORE, one, DESCENT], deep, images[:2], calibration=[images])
        assert len(ran.step.misses) == refused
        assert all("no rounding of its weights" in miss.why for miss in ran.step.misses)


def test_shared_layers_are_refused(run_passes: Any, images: Tensor) -> None:
    ran = run_passes([*BEFORE, COARSE, DESCENT], Shared(), images[:2], calibration=[images])
    assert ran.why("conv_1") == ["its weights are shared by several calls, whose inputs differ"]
    assert ran.step.hits == ("fc",)


def test_depthwise_layers_stay_safe_from_saturating(
    run_passes: Any, deep: Any, images: Tensor
) -> None:
    passes = [*BEFORE, QuantizeMinmax(), Adaround(solver=Solver.DESCENT, relaxed=100)]
    ran = run_passes(passes, deep, images[:2], calibration=[images])
    codes = ran.program.module.get_submodule("body.2").codes.flatten(1)
    assert bool((largest_pair_sum(codes) <= pair_limit(255)).all())


def test_one_image(run_passes: Any, deep: Any, images: Tensor) -> None:
    for one in (QUICK, DESCENT):
        ran = run_passes([*BEFORE, COARSE, one], deep, images[:1], calibration=[images[:1]])
        assert len(ran.step.hits) == 4
        assert output_error(ran, images[:1]) < 1


@pytest.mark.parametrize(
    "wrong", [{"relaxed": -1}, {"refine_iterations": -1}, {"damping": -1.0}, {"iterations": 0}]
)
def test_impossible_options(
    wrong: dict[str, Any], run_passes: Any, deep: Any, images: Tensor
) -> None:
    with pytest.raises(SpecError):
        run_passes([*BEFORE, COARSE, Adaround(**wrong)], deep, images[:2], calibration=[images])
