"""Programs of `torch.export`: the same graph as tracing gives, and the same integers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq.errors import CaptureError, FxqError
from fxq.graph.capture import capture
from fxq.graph.program import facts
from fxq.model_file import load_model
from fxq.models_zoo import tiny_conv, tiny_depthwise, tiny_residual

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # torch's own, in copying
]

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def exported(model: nn.Module, *inputs: Tensor) -> Any:
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model.eval(), inputs, dynamic_shapes=dynamic)


class Spelled(nn.Module):
    """Operators that change their spelling on the way through ATen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.fc = nn.Linear(4, 4)
        self.layer_norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.conv(x))
        x = F.relu6(x).mul_(2).add_(x)
        x = F.hardtanh(x, -1.0, 2.0, inplace=True)
        x = F.leaky_relu(x, 0.2, inplace=True) + F.hardswish(x) + F.silu(x) + F.gelu(x)
        x = F.interpolate(self.up(x), scale_factor=0.5, mode="bilinear", align_corners=False)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        one, two = torch.split(x, [1, 3], 1)
        x = torch.cat([two, one], 1)
        x = F.adaptive_avg_pool2d(F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 2), 2)
        x = F.dropout(x, 0.5, self.training).softmax(1)
        x = x.permute(0, 2, 3, 1).reshape(x.size(0), -1, 4).transpose(1, 2).contiguous()
        x = self.layer_norm(x.transpose(1, 2)).mean(1)
        return {"scores": self.fc(x), "features": x}


@pytest.mark.parametrize("factory", [tiny_conv, tiny_depthwise, tiny_residual])
def test_exported_networks_give_the_same_integers(factory: Any) -> None:
    model = factory().eval()
    traced = fxq.compile(model, X, "aciq-4bit", calibration=[X])
    found = fxq.compile(exported(model, X), X, "aciq-4bit", calibration=[X])
    assert found.artifact.ledger.counts() == traced.artifact.ledger.counts()
    y = torch.randn(3, 3, 8, 8)
    assert torch.equal(found.module(y), traced.module(y))


def test_every_spelling_computes_the_same() -> None:
    torch.manual_seed(0)
    model = Spelled().eval()
    program = capture(exported(model, X), X)
    y = torch.randn(2, 3, 8, 8)  # another batch size than it was exported with
    with torch.no_grad():
        wanted, found = model(y), program.run(y)
    assert list(found) == list(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])
    left = [node for node in program.nodes() if "aten" in str(node.target)]
    assert not left
    paths = {facts(node).path for node in program.nodes()}
    assert {"conv", "norm", "up", "fc"} <= paths


def test_exported_programs_are_not_touched() -> None:
    program = exported(tiny_residual(), X)
    before = program.module()(X)
    fxq.compile(program, X, "minmax-int8", calibration=[X])
    assert torch.equal(program.module()(X), before)


def test_training_mode_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train(), (X,)
        )
    with pytest.raises(CaptureError, match="training mode"):
        capture(program, X)


def test_files_of_exported_programs(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(exported(tiny_conv(), X), path)
        model = load_model(str(path))
    assert model.name == "net"
    assert model.example_inputs[0].shape == X.shape
    assert (
        fxq.compile(model.module, X, "minmax-int8", calibration=[X]).artifact.ledger.coverage() == 1
    )


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(b"not a program")
    with pytest.raises(CaptureError, match="cannot be read"):
        load_model(str(path))
    with pytest.raises(FxqError, match="no such file"):
        load_model(str(tmp_path / "absent.pt2"))
