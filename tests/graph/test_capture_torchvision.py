"""Every family of torchvision's networks is traced whole, and computes what it computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxq.graph.capture import capture
from fxq.graph.program import Program
from fxq.torchvision_import import import_torchvision

FAST = {
    "alexnet": 64,
    "vgg11": 32,
    "vgg11_bn": 32,
    "resnet18": 32,
    "resnet50": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "efficientnet_b0": 32,
    "googlenet": 32,
    "densenet121": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 48,
    "regnet_y_400mf": 32,
}
SLOW = {
    "inception_v3": 75,
    "convnext_tiny": 64,
    "vit_b_16": 224,
    "swin_t": 64,
    "deeplabv3_resnet50": 32,
    "resnet152": 32,
    "wide_resnet50_2": 32,
    "maxvit_t": 224,
    "efficientnet_v2_s": 64,
    "mobilenet_v3_large": 64,
    "mnasnet1_0": 64,
    "resnext50_32x4d": 32,
    "fcn_resnet50": 32,
    "lraspp_mobilenet_v3_large": 64,
}
CASES = [*FAST.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items())]


def run(program: Program, *inputs: Any) -> Any:
    """The output in the layout the inputs have, so that it equals the model's to the last bit."""
    with torch.no_grad():
        return program.module(*inputs)


def network(name: str) -> nn.Module:
    models = import_torchvision().models
    options = {"weights_backbone": None} if name.startswith(("deeplab", "fcn", "lraspp")) else {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False}
    torch.manual_seed(0)
    return models.get_model(name, weights=None, **options).eval()


@pytest.mark.parametrize(("name", "size"), CASES)
def test_same_numbers(name: str, size: int) -> None:
    model = network(name)
    x = torch.randn(2, 3, size, size)
    program = capture(model, x[:1])
    with torch.no_grad():
        want = model(x)
    got = run(program, x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not any(getattr(module, "inplace", False) for module in program.module.modules())
