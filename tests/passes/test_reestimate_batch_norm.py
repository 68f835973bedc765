"""reestimate-batch-norm: mean and standard deviation of each layer's output are the float ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxq.errors import SpecError
from fxq.graph.program import Program
from fxq.numerics.affine import short_scale
from fxq.passes import QuantizeMinmax, ReestimateBatchNorm
from fxq.quant.quantizers import QuantizedLayer

from .test_correct_bias import BEFORE, Shared

COARSE = QuantizeMinmax(weight_bits=3)


def spreads(program: Program, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of every layer's output, channel by channel."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(program.submodule(n), nn.Conv2d | nn.Linear | QuantizedLayer):
                flat = value.transpose(0, 1).flatten(1)
                found[n.name] = flat.mean(1), flat.std(1, correction=0)
            return value

    with torch.no_grad():
        Run(program.module).run(images)
    return found


def test_mean_and_deviation_are_those_of_the_float_network(
    run_passes: Any, deep: Any, images: Tensor
) -> None:
    plain = run_passes(BEFORE, deep, images[:2], calibration=[images])
    passes = [*BEFORE, COARSE, ReestimateBatchNorm(largest_factor=10.0)]
    ran = run_passes(passes, deep, images[:2], calibration=list(images.split(5)))
    want, got = spreads(plain.program, images), spreads(ran.program, images)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=1e-3)
    assert ran.step.hits == ("first", "body_0", "body_2", "head")


def test_scales_stay_short_and_codes_as_they_are(
    run_passes: Any, deep: Any, images: Tensor
) -> None:
    plain = run_passes([*BEFORE, COARSE], deep, images[:2], calibration=[images])
    passes = [*BEFORE, COARSE, ReestimateBatchNorm()]
    ran = run_passes(passes, deep, images[:2], calibration=[images])
    for name in ("first", "body.0", "body.2", "head"):
        before, after = (r.program.module.get_submodule(name) for r in (plain, ran))
        assert torch.equal(before.codes, after.codes)
        assert torch.equal(after.scale, short_scale(after.scale))
        assert not torch.equal(before.scale, after.scale)


def test_the_factor_is_bounded(run_passes: Any, deep: Any, images: Tensor) -> None:
    coarse = QuantizeMinmax(weight_bits=2)
    plain = run_passes([*BEFORE, coarse], deep, images[:2], calibration=[images])
    passes = [*BEFORE, coarse, ReestimateBatchNorm(largest_factor=1.1)]
    ran = run_passes(passes, deep, images[:2], calibration=[images])
    scales = [r.program.module.get_submodule("body.0").scale for r in (plain, ran)]
    ratio = scales[1] / scales[0]
    assert float(ratio.max()) <= 1.1001
    assert float(ratio.min()) >= 1 / 1.1
    assert bool(((ratio - 1 / 1.1).abs() < 1e-3).any())


def test_constant_channels_keep_their_scale(run_passes: Any, deep: Any, images: Tensor) -> None:
    with torch.no_grad():
        deep.body[0].weight[3] = 0
    passes = [*BEFORE, COARSE, ReestimateBatchNorm()]
    plain = run_passes([*BEFORE, COARSE], deep, images[:2], calibration=[images])
    ran = run_passes(passes, deep, images[:2], calibration=[images])
    before, after = (r.program.module.get_submodule("body.0") for r in (plain, ran))
    assert before.scale[3] == after.scale[3]
    with torch.no_grad():
        assert bool(ran.program.module(images).isfinite().all())


def test_one_image_of_a_linear_layer_is_constant(run_passes: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(1, 4)
    ran = run_passes([*BEFORE, COARSE, ReestimateBatchNorm()], model, x, calibration=[x])
    assert ran.error(x) < 1e-2


def test_shared_layers_are_refused(run_passes: Any, images: Tensor) -> None:
    passes = [*BEFORE, COARSE, ReestimateBatchNorm()]
    ran = run_passes(passes, Shared(), images[:2], calibration=[images])
    assert ran.why("conv_1") == ["its weights are shared by several calls, whose inputs differ"]


def test_a_factor_below_one_is_refused(run_passes: Any, deep: Any, images: Tensor) -> None:
    with pytest.raises(SpecError, match="largest_factor"):
        run_passes(
            [*BEFORE, COARSE, ReestimateBatchNorm(largest_factor=0.5)],
            deep,
            images[:2],
            calibration=[images],
        )
