"""fold-batch-norm: exact for every layer it takes, and a reason for every one it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxq.graph.capture import capture
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual
from fxq.passes import FoldBatchNorm
from fxq.pipeline import Pipeline
from fxq.torchvision_import import import_torchvision

TINY = {
    "tiny-conv": (tiny_conv, (2, 3, 8, 8), {"BatchNorm2d": -2}),
    "tiny-residual": (tiny_residual, (2, 3, 8, 8), {"BatchNorm2d": -3}),
    "tiny-depthwise": (tiny_depthwise, (2, 3, 8, 8), {"BatchNorm2d": -3}),
    "tiny-concat": (tiny_concat, (2, 3, 8, 8), {"BatchNorm2d": -3}),
    "tiny-mlp": (tiny_mlp, (2, 16), {"BatchNorm1d": -1}),
}


def scattered(norm: Any, seed: int = 0) -> Any:
    """A batch norm that is far from the identity, with a negative and a zero gamma."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1, generator=generator)
        norm.running_var.uniform_(0.2, 3, generator=generator)
        if norm.weight is not None:
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.weight[0], norm.weight[1] = -norm.weight[0], 0.0
            norm.bias.uniform_(-1, 1, generator=generator)
    return norm


def norm(channels: int, dims: int = 2, **options: Any) -> Any:
    return scattered(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](channels, **options)
    )


# ---- the three claims on the tiny networks ---------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_tiny_networks(name: str, run_one: Any, golden: Any) -> None:
    build, shape, census = TINY[name]
    x = torch.randn(shape)
    ran = run_one(FoldBatchNorm(), build(), x)
    golden(f"fold-batch-norm--{name}", ran.text())
    assert ran.step.census == census
    assert ran.error(x) < 1e-5
    assert ran.step.delta.counts() == {
        "removed": -sum(census.values()),
        "retuned": -sum(census.values()),
        "rewired": len(ran.step.delta.of("rewired")),
    }
    assert not ran.step.misses
    assert len(ran.step.hits) == -sum(census.values())


# ---- after a layer ---------------------------------------------------------------------------

LAYERS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("Conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    ("Conv2d", lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 7)),
    ("Conv3d", lambda: nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 5, 5)),
    ("strided", lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (0, 1), (1, 2)), (2, 4, 7, 7)),
    ("same", lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 7, 7)),
    ("reflect", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    ("no bias", lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 7, 7)),
    ("grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    ("depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 7, 7)),
    ("multiplied depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 7)),
    ("ConvTranspose1d", lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 9)),
    ("ConvTranspose2d", lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (2, 4, 5, 5)),
    ("ConvTranspose3d", lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3)),
    ("grouped transposed", lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    ("grouped up 1d", lambda: nn.ConvTranspose1d(4, 8, 2, groups=4, bias=False), (2, 4, 5)),
    ("Linear", lambda: nn.Linear(5, 6), (3, 5)),
    ("Linear without bias", lambda: nn.Linear(5, 6, bias=False), (3, 5)),
]
IDS = [name for name, _, _ in LAYERS]


def folded(model: nn.Module, x: Tensor, run_one: Any) -> Any:
    """The model folded in float64, where it must agree to 12 digits."""
    model.double().eval()
    ran = run_one(FoldBatchNorm(), model, x.double())
    fresh = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert ran.error(fresh) < 1e-12
    assert [type(n).__name__ for n in ran.program.module.modules()].count("BatchNorm2d") == 0
    return ran


@pytest.mark.parametrize("options", [{}, {"eps": 0.3}, {"affine": False}], ids=str)
@pytest.mark.parametrize(("name", "build", "shape"), LAYERS, ids=IDS)
def test_after_a_layer(name: str, build: Any, shape: Any, options: Any, run_one: Any) -> None:
    torch.manual_seed(1)
    layer = build()
    channels = layer(torch.zeros(shape)).shape[1]
    model = nn.Sequential(layer, norm(channels, max(len(shape) - 2, 1), **options))
    ran = folded(model, torch.randn(shape), run_one)
    assert sum(ran.step.census.values()) == -1
    assert ran.step.hits == ("_1",)


def test_a_linear_of_a_batch_of_one(run_one: Any) -> None:
    folded(nn.Sequential(nn.Linear(3, 4), norm(4, 1)), torch.randn(1, 3), run_one)


def test_frozen_batch_norm(run_one: Any) -> None:
    frozen = import_torchvision().ops.FrozenBatchNorm2d
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), scattered(frozen(4, eps=0.01)))
    ran = folded(model, torch.randn(2, 3, 6, 6), run_one)
    assert ran.step.census == {"FrozenBatchNorm2d": -1}


class Functional(nn.Module):
    """A functional batch norm with constant statistics behind a functional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.gamma = nn.Parameter(torch.tensor([-1.0, 0.0, 0.5, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, stride=2)
        return F.batch_norm(x, self.mean, self.var, self.gamma, eps=0.01)


def test_functional_batch_norm(run_one: Any) -> None:
    ran = folded(Functional(), torch.randn(2, 3, 7, 7), run_one)
    assert ran.step.census == {"BatchNorm2d": -1}


def test_two_batch_norms_in_a_row(run_one: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), norm(4, eps=0.1))
    ran = folded(model, torch.randn(2, 3, 6, 6), run_one)
    assert ran.step.census == {"BatchNorm2d": -2}


def test_between_two_layers_the_first_takes_it(run_one: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 4, 3, padding=1))
    ran = folded(model, torch.randn(2, 3, 6, 6), run_one)
    assert [change.name for change in ran.step.delta.of("retuned")] == ["_0"]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.bfloat16, 0.03)])
def test_dtypes_are_kept(dtype: torch.dtype, limit: float, run_one: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False))
    x = torch.randn(2, 3, 8, 8).to(dtype)
    ran = run_one(FoldBatchNorm(), model.to(dtype), x)
    assert ran.error(x) < limit
    assert {p.dtype for p in ran.program.module.parameters()} == {dtype}


def test_parameters_stay_trainable(run_one: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm(4))
    ran = run_one(FoldBatchNorm(), model, torch.randn(1, 3, 6, 6))
    assert [p.requires_grad for p in ran.program.module.parameters()] == [True, True]
    model.requires_grad_(False)
    ran = run_one(FoldBatchNorm(), model, torch.randn(1, 3, 6, 6))
    assert [p.requires_grad for p in ran.program.module.parameters()] == [False, False]


def test_the_users_module_keeps_its_numbers(run_one: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run_one(FoldBatchNorm(), model, torch.randn(1, 3, 6, 6))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


numbers = st.floats(-4, 4, width=32)


@given(
    kernel=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    transposed=st.booleans(),
    bias=st.booleans(),
    eps=st.floats(1e-6, 1),
    gamma=st.lists(numbers, min_size=4, max_size=4),
    beta=st.lists(numbers, min_size=4, max_size=4),
    mean=st.lists(numbers, min_size=4, max_size=4),
    variance=st.lists(st.floats(0, 9, width=32), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_any_parameters_fold_exactly(
    kernel: int,
    groups: int,
    transposed: bool,
    bias: bool,
    eps: float,
    gamma: list[float],
    beta: list[float],
    mean: list[float],
    variance: list[float],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    conv = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = conv(2, 4, kernel, groups=groups, bias=bias)
    batch_norm = nn.BatchNorm2d(4, eps=eps)
    with torch.no_grad():
        batch_norm.weight.copy_(torch.tensor(gamma))
        batch_norm.bias.copy_(torch.tensor(beta))
        batch_norm.running_mean.copy_(torch.tensor(mean))
        batch_norm.running_var.copy_(torch.tensor(variance))
    model = nn.Sequential(layer, batch_norm).double().eval()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    program = capture(model, x)
    assert Pipeline(FoldBatchNorm()).run(program)[0].census == {"BatchNorm2d": -1}
    torch.testing.assert_close(program.run(x), model(x), rtol=1e-10, atol=1e-9)
