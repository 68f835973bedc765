"""The same passes on torchvision's networks: every batch norm folded or refused, nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxq.passes import Calibrate, FoldBatchNorm, InsertObservers, MarkRelu, QuantizeMinmax
from fxq.torchvision_import import import_torchvision

FAST = ("resnet18", "mobilenet_v2", "shufflenet_v2_x0_5")
SLOW = (
    "vgg11_bn",
    "resnet50",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "googlenet",
    "densenet121",
    "regnet_y_400mf",
    "convnext_tiny",
    "swin_t",
    "deeplabv3_resnet50",
)


def scattered(name: str) -> nn.Module:
    """The untrained network, its batch norms moved away from the identity."""
    models = import_torchvision().models
    options: dict[str, Any] = {"weights_backbone": None} if name.startswith("deeplab") else {}
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, **options, **_extra(name))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval()


def _extra(name: str) -> dict[str, Any]:
    return {"init_weights": False} if name == "googlenet" else {}


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_all_passes(name: str, run_passes: Any) -> None:
    x = torch.randn(2, 3, 64, 64)
    passes = [FoldBatchNorm(), MarkRelu(), InsertObservers(), Calibrate(), QuantizeMinmax()]
    ran = run_passes(passes, scattered(name), x, calibration=[x, torch.randn(2, 3, 64, 64)])
    fold, mark, insert, _, quantize = ran.journal
    assert fold.sqnr > 100
    left = [node.name for node in fold.after.nodes if node.op == "BatchNorm2d"]
    assert left == [miss.node for miss in fold.misses]
    assert (name == "densenet121") == bool(left)
    assert mark.sqnr == insert.sqnr == float("inf")
    layers = sum(
        count for op, count in insert.before.census().items() if op in ("Conv2d", "Linear")
    )
    after = quantize.after.census()
    assert after.get("QuantizedConv2d", 0) + after.get("QuantizedLinear", 0) == layers
    assert quantize.total_sqnr > 20
