"""What a change costs is what running the whole changed network says it costs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq.errors import CalibrationError
from fxq.graph.capture import capture
from fxq.models_zoo import tiny_residual
from fxq.sensitivity import KeptRun, output_loss

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def divergence(reference: Any, actual: Any) -> float:
    """The same, from torch's own parts."""
    logs = [one(IMAGES).double().log_softmax(1) for one in (actual, reference)]
    return float(F.kl_div(*logs, log_target=True, reduction="batchmean"))


@pytest.fixture(scope="module", autouse=True)
def small_networks(one_thread: None) -> None:
    """Every test here runs on one thread."""


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return tiny_residual().eval()


@pytest.mark.parametrize("target", ["stem", "conv1", "conv2", "fc"])
def test_a_changed_layer_is_a_changed_network(target: str, network: nn.Module) -> None:
    changed = copy.deepcopy(network)
    layer: Any = changed.get_submodule(target)
    layer.weight.data += torch.randn_like(layer.weight)
    program = capture(network, IMAGES[:1])
    node = next(one for one in program.nodes() if one.target == target)
    run = KeptRun(program, (IMAGES,))
    found = run.damage({node: layer})
    assert found == pytest.approx(divergence(network, changed), rel=1e-4)
    assert found > 1e-6
    assert run.damage({node: layer}) == found  # what was kept was not touched
    assert run.damage({}) == 0


def test_changes_add_to_each_other(network: nn.Module) -> None:
    program = capture(network, IMAGES[:1])
    layers = [one for one in program.nodes() if isinstance(program.submodule(one), nn.Conv2d)]
    changed = copy.deepcopy(network)
    modules = {}
    for node in layers:
        module: Any = changed.get_submodule(str(node.target))
        module.weight.data += torch.randn_like(module.weight)
        modules[node] = module
    found = KeptRun(program, (IMAGES,)).damage(modules)
    assert found == pytest.approx(divergence(network, changed), rel=1e-4)


def test_a_quantized_network_is_run_in_float(network: nn.Module) -> None:
    result = fxq.compile(network, IMAGES[:1], "aciq-4bit", calibration=[IMAGES])
    program = result.program
    run = KeptRun(program, (IMAGES,))
    everything: Any = {
        node: program.submodule(node)
        for node in program.nodes()
        if type(program.submodule(node)).__name__ in ("QuantizedLayer", "ActivationQuantizer")
    }
    assert len(everything) > 4
    wanted = divergence(network, program.module)
    assert run.damage(everything) == pytest.approx(wanted, rel=1e-3)


def test_a_change_nobody_reads_costs_nothing() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.zeros_like(x))

    program = capture(Aside(), torch.ones(2, 3))
    node = next(one for one in program.nodes() if one.op == "placeholder")
    assert KeptRun(program, (torch.ones(2, 3),)).damage({node: lambda *_: torch.ones(2, 3)}) == 0


def test_an_output_that_is_not_finite(network: nn.Module) -> None:
    program = capture(network, IMAGES[:1])
    node = next(one for one in program.nodes() if one.op == "call_module")
    broken: Callable[..., Any] = lambda x: torch.full((6, 8, 8, 8), torch.nan)  # noqa: E731
    with pytest.raises(CalibrationError, match="not finite") as caught:
        KeptRun(program, (IMAGES,)).damage({node: broken})
    assert node.name in str(caught.value.where)


def test_outputs_that_are_no_logits() -> None:
    want = {"a": torch.tensor([3.0]), "b": [torch.tensor([[[4.0]]]), "text"]}
    have = {"a": torch.tensor([3.0]), "b": [torch.tensor([[[5.0]]]), "text"]}
    assert output_loss(want, have) == pytest.approx(1 / 25)
    assert output_loss(torch.zeros(3), torch.ones(3)) == 3
    assert output_loss(torch.ones(4, 1), torch.zeros(4, 1)) == 1  # one column is no classes


def test_classes_that_are_ruled_out() -> None:
    want = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert output_loss(want, want) == 0
    assert output_loss(want, torch.tensor([[0.0, 1.0, -torch.inf]])) == pytest.approx(0.12011, 1e-3)
