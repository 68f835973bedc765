"""The graph of a training step, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.errors import CaptureError
from fxq.trail.delta import compare
from fxq.trail.joint import joint_graph, joint_snapshot


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 10),
    )


def batch() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def adaptive() -> nn.Module:
    return fxq.compile(network(), batch()[:1], "adaptive-fixed-point").module


def test_the_step_of_a_float_network_shows_the_backward_of_each_layer() -> None:
    names = set(joint_snapshot(network(), batch()).by_name())
    assert {"_0_fprop", "_0_backward", "_2_fprop", "_2_backward", "_6_weight_gradient"} <= names


def test_every_product_and_quantizer_of_an_adaptive_step_is_a_node() -> None:
    step = joint_snapshot(adaptive(), batch())
    for layer in ("_0", "_2", "_6"):
        for what in ("weight_quantizer", "input_quantizer", "gradient_quantizer", "wtgrad"):
            assert f"{layer}_{what}" in step.by_name()
    census = step.census()
    assert census["fxq.quantize"] == 9  # three layers, three operands
    assert census["fxq.conv_bprop"] == 1  # the first layer's input wants no gradient
    assert census["fxq.conv_wtgrad"] == 2
    assert "aten.convolution" not in census
    assert "aten.convolution_backward" not in census


def test_a_quantizer_shows_the_bits_it_has_now() -> None:
    module = adaptive()
    before = joint_snapshot(module, batch()).by_name()["_2_gradient_quantizer"]
    assert before.arguments.startswith("8 bits of 2**")
    module(batch()).sum().backward()
    conv = module.network.get_submodule("2")
    conv.gradients.state[0] = 16
    after = joint_snapshot(module, batch()).by_name()["_2_gradient_quantizer"]
    assert after.arguments.startswith("16 bits of 2**")
    assert after.value == "i8[2,4,8,3,3]"


def test_the_traced_step_computes_the_gradients_of_the_module() -> None:
    module, images = adaptive(), batch()
    own = copy.deepcopy(module)
    output = own(images)
    flow = torch.ones_like(output)
    output.backward(flow)
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    result, gradients = joint_graph(module, images)(parameters, (images,), flow)
    assert torch.equal(result, output)
    for name, parameter in own.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


def test_the_network_is_not_touched() -> None:
    module = adaptive()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    joint_snapshot(module, batch())
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_float_and_rewritten_steps_can_be_compared() -> None:
    delta = compare(joint_snapshot(network(), batch()), joint_snapshot(adaptive(), batch()))
    kinds = {change.name: change.kind for change in delta.changes}
    assert kinds["_0_gradient_quantizer"] == "added"
    assert kinds["_0_backward"] == "removed"
    assert kinds["_0_fprop"] not in ("added", "removed")


def test_a_network_with_two_outputs_is_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(CaptureError, match="several outputs"):
        joint_snapshot(Two(), torch.ones(1))
