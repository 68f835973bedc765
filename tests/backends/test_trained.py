"""Trained networks on integers: kernels, reference and ONNX Runtime agree to the last bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq.integer.reference import Reference
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual

RECIPES = [
    "apot-5bit",
    "apot-4bit",
    "apot-3bit",
    "apot-2bit",
    "pot-4bit",
    "uniform-qat-4bit",
    "lloyd-4bit",
]


class Signed(nn.Module):
    """Values of both signs between the layers, behind a GELU and behind none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.first(x)))
        return self.head(F.relu(self.b(self.a(x))).mean((2, 3)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (tiny_conv, (16, 3, 8, 8)),
    "residual": (tiny_residual, (16, 3, 8, 8)),
    "concat": (tiny_concat, (16, 3, 8, 8)),
    "depthwise": (tiny_depthwise, (16, 3, 8, 8)),
    "mlp": (tiny_mlp, (64, 16)),
    "signed": (Signed, (16, 3, 8, 8)),
}


def trained(network: str, recipe: str, **options: Any) -> tuple[Any, Tensor]:
    """A network after a few steps, and inputs that it was not calibrated on."""
    build, shape = NETWORKS[network]
    x = torch.randn(shape)
    result = fxq.compile(build().eval(), x[:2], recipe, calibration=[x], check=False, **options)
    module: Any = result.module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(module(x), torch.arange(len(x)) % 10).backward()
        optimizer.step()
    return module.eval(), torch.randn(shape) * 1.5


@pytest.mark.parametrize(
    ("network", "recipe"),
    [
        *itertools.product(("residual", "signed"), RECIPES),
        *itertools.product(("conv", "concat", "depthwise", "mlp"), ("apot-4bit", "apot-2bit")),
    ],
)
def test_every_runtime_computes_the_reference(network: str, recipe: str, mismatches: Any) -> None:
    module, x = trained(network, recipe)
    artifact = fxq.lower(module)
    assert artifact.ledger.coverage() == 1.0
    assert mismatches(artifact.integers, x) == {}
    wanted, _ = Reference(artifact.integers).run(x)
    assert torch.equal(artifact.module(x), wanted)
    with torch.no_grad():
        assert torch.equal(module(x), wanted)
    assert torch.equal(fxq.lower(module, backend="onnx").module(x), wanted)
    module.exact = False
    with torch.no_grad():
        assert (module(x) - wanted).norm() < 0.15 * wanted.norm()


@pytest.mark.parametrize("recipe", ["apot-4bit", "lloyd-4bit"])
def test_saved_and_loaded(recipe: str, tmp_path: Path) -> None:
    module, x = trained("residual", recipe)
    artifact = fxq.lower(module)
    loaded = fxq.load(artifact.save(tmp_path / "run"))
    assert torch.equal(loaded.module(x), artifact.module(x))
    assert loaded.integers.to_json() == artifact.integers.to_json()
    assert [step.name for step in loaded.journal.steps][-1] == "freeze-trained"


def test_weights_have_the_bits_that_were_trained() -> None:
    module, _ = trained("residual", "apot-2bit", settings=["layer:conv2.weight_bits=3"])
    integers = fxq.lower(module).integers
    found = {}
    for step in integers:
        if step.op in ("conv", "linear"):
            layer = step.sources[0]
            weight = integers.tensor(step, "weight").flatten(1)
            found[layer] = max(len(channel.abs().unique()) for channel in weight)
            bits = set(integers.tensor(step, "bits").tolist())
            assert bits == {{"conv1": 2, "conv2": 3}.get(layer, 8)}
    assert found["conv1"] <= 2
    assert found["conv2"] <= 4
