"""correct-bias: each layer's mean output on the calibration images is the float one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxq.errors import CalibrationError, RequirementError
from fxq.graph.capture import capture
from fxq.graph.program import Program
from fxq.passes import (
    Calibrate,
    CorrectBias,
    FoldBatchNorm,
    InsertObservers,
    MarkRelu,
    QuantizeAciq,
    QuantizeMinmax,
)
from fxq.passes.correct_bias import Method
from fxq.passes.insert_observers import Statistics
from fxq.pipeline import Pipeline
from fxq.quant.quantizers import QuantizedLayer

BEFORE = (
    FoldBatchNorm(),
    MarkRelu(),
    InsertObservers(statistics=Statistics.HISTOGRAM),
    Calibrate(),
)


def means(program: Program, images: Tensor) -> dict[str, Tensor]:
    """The mean output of every layer, channel by channel."""
    found: dict[str, Tensor] = {}

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(program.submodule(n), nn.Conv2d | nn.Linear | QuantizedLayer):
                found[n.name] = value.transpose(0, 1).flatten(1).mean(1)
            return value

    with torch.no_grad():
        Run(program.module).run(images)
    return found


@pytest.mark.parametrize(
    "one",
    [
        QuantizeAciq(weight_bits=3),
        QuantizeAciq(weight_bits=3, dynamic=True),
        QuantizeMinmax(weight_bits=2),
    ],
)
def test_every_layer_keeps_its_mean(one: Any, run_passes: Any, deep: Any, images: Tensor) -> None:
    ran = run_passes([*BEFORE, one, CorrectBias()], deep, images[:2], calibration=[images])
    plain = run_passes([*BEFORE, one], deep, images[:2], calibration=[images])
    want = means(capture(deep, images), images)
    got, without = means(ran.program, images), means(plain.program, images)
    assert got.keys() == want.keys()
    for name, mean in want.items():
        torch.testing.assert_close(got[name], mean, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(without[name], mean, atol=1e-4)
    assert ran.step.hits == ("first", "body_0", "body_2", "head")
    assert ran.step.delta.counts() == {"retuned": 4}
    assert not ran.step.census


def test_only_the_first_images_count(run_passes: Any, deep: Any, images: Tensor) -> None:
    passes = [*BEFORE, QuantizeAciq(weight_bits=3), CorrectBias(images=4)]
    ran = run_passes(passes, deep, images[:2], calibration=list(images.split(3)))
    want = means(capture(deep, images), images[:4])
    got = means(ran.program, images[:4])
    for name, mean in want.items():
        torch.testing.assert_close(got[name], mean, atol=1e-5, rtol=1e-4)


def test_the_analytic_form_undoes_the_rounding_of_the_weights_alone(
    run_passes: Any, images: Tensor
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    one = CorrectBias(method=Method.ANALYTIC)
    ran = run_passes(
        [*BEFORE, QuantizeMinmax(weight_bits=2), one], model, images, calibration=[images]
    )
    for name, kept in (("_0", "0"), ("_2", "2")):
        layer = ran.program.module.get_submodule(kept)
        read = inputs_of(ran.program, name, images).transpose(0, 1).flatten(1).mean(1)
        rounding = (layer.layer.weight - layer.weight()).sum((2, 3)) @ read
        torch.testing.assert_close(layer.bias_shift, rounding, atol=1e-5, rtol=1e-4)
    assert ran.step.hits == ("_0", "_2")


def inputs_of(program: Program, name: str, images: Tensor) -> Tensor:
    """What a layer reads."""
    seen: list[Tensor] = []
    layer = program.submodule(program.node(name))
    assert layer is not None
    with torch.no_grad(), layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        program.module(images)
    return seen[0]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(self.conv(x).relu()).mean((2, 3)))


def test_a_layer_called_twice_is_refused(run_passes: Any, images: Tensor) -> None:
    passes = [*BEFORE, QuantizeMinmax(weight_bits=4), CorrectBias()]
    ran = run_passes(passes, Shared(), images[:2], calibration=[images])
    why = "its weights are shared by several calls, whose inputs differ"
    assert [(miss.node, miss.why) for miss in ran.step.misses] == [("conv_1", why)]
    assert ran.step.hits == ("fc",)


def test_layers_without_bias_and_in_float(run_passes: Any, images: Tensor) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 4, 1, bias=False),
    )
    ran = run_passes(
        [*BEFORE, QuantizeAciq(weight_bits=3), CorrectBias()],
        model,
        images[:2],
        calibration=[images],
        layers={"2": {"skip": True}},
    )
    want, got = means(capture(model, images), images), means(ran.program, images)
    assert ran.step.hits == ("_0", "_3")
    for name in ("_0", "_3"):
        torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-4)


def test_without_images() -> None:
    with pytest.raises(RequirementError, match="correct-bias needs calibrate"):
        Pipeline(CorrectBias()).run(capture(Shared(), torch.zeros(1, 3, 8, 8)))
    program = capture(Shared(), torch.zeros(1, 3, 8, 8))
    program.passes_run.append("calibrate")
    with pytest.raises(CalibrationError, match="there is no calibration data"):
        Pipeline(CorrectBias()).run(program)


def test_progress_is_reported(deep: Any, images: Tensor) -> None:
    program = capture(deep, images[:2])
    program.calibration = [images]
    seen: list[tuple[str, int, int | None]] = []
    program.progress = lambda *call: seen.append(call)
    Pipeline(*BEFORE, QuantizeMinmax(), CorrectBias()).run(program)
    assert [call for call in seen if call[0] == "correct-bias"] == [
        ("correct-bias", done, 4) for done in (1, 2, 3, 4)
    ]
