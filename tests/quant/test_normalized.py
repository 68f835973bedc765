"""A layer and its batch norm as one module, and what eval mode folds them to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxq.quant.normalized import NormalizedLayer, affine_of

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), nn.BatchNorm1d, (4, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d, (4, 6, 7, 7)),
    "no bias": (lambda: nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d, (4, 6, 7, 7)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d, (4, 6, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d, (4, 8, 7, 7)),
    "reflected": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d,
        (4, 6, 7, 7),
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2),
        nn.BatchNorm2d,
        (4, 6, 5, 5),
    ),
    "linear": (lambda: nn.Linear(6, 8), nn.BatchNorm1d, (16, 6)),
}


def joined(name: str, **options: Any) -> tuple[NormalizedLayer, torch.Tensor]:
    """A layer with a batch norm that has seen data, one gamma negative and one zero."""
    build, norm_of, shape = LAYERS[name]
    norm: Any = norm_of(8, **options)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -1, 1)
        with torch.no_grad():
            norm.weight[1:3] = torch.tensor([-0.7, 0.0])
    return NormalizedLayer(build(), norm.eval()), torch.randn(shape)


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_is_eval_mode(name: str) -> None:
    module, x = joined(name)
    frozen = module.frozen()
    assert type(frozen) is type(module.layer)
    torch.testing.assert_close(frozen(x), module(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(module(x), module.norm(module.layer(x)))


@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_a_norm_without_gamma(name: str) -> None:
    module, x = joined(name, affine=False)
    torch.testing.assert_close(module.frozen()(x), module(x), rtol=1e-4, atol=1e-5)


def test_freezing_changes_nothing() -> None:
    module, _ = joined("conv2d")
    before = copy.deepcopy(module.state_dict())
    frozen = module.frozen()
    nn.init.zeros_(frozen.weight)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_norm_learns_in_training() -> None:
    module, x = joined("conv2d")
    mean = module.norm.running_mean.clone()
    module.train()
    module(x).square().sum().backward()
    assert not torch.equal(module.norm.running_mean, mean)
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_norm_in_eval_mode_stays_so() -> None:
    module, x = joined("conv2d")
    assert not module.training
    mean = module.norm.running_mean.clone()
    module(x)
    assert torch.equal(module.norm.running_mean, mean)


def test_affine_is_what_the_norm_does() -> None:
    norm = joined("linear")[0].norm
    scale, shift = affine_of(norm)
    x = torch.randn(5, 8)
    torch.testing.assert_close((x * scale + shift).float(), norm(x), rtol=1e-5, atol=1e-5)


def test_it_is_listed_as_both() -> None:
    assert joined("conv1d")[0].operator == "Conv1d+BatchNorm1d"
    assert joined("linear")[0].fxq_kind == "linear"
