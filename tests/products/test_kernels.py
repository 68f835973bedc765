"""The self-test of the integer kernels, and the numbers where it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxq.products import kernels
from fxq.products.geometry import Geometry
from fxq.products.gradients import input_gradient, weight_gradient
from fxq.products.kernels import convolution, product, scaled_convolution

pytestmark = pytest.mark.usefixtures("one_thread")

GEOMETRY = Geometry(stride=(2, 1), padding=(1, 1))


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test asks anew whether kernels are exact, and leaves no answer behind."""
    caches = (kernels.int_mm_is_exact, kernels.onednn_is_exact)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def saturated(left: Tensor, right: Tensor) -> Tensor:
    """As without VNNI: the left bytes made unsigned, pairs of products clamped to 16 bits."""
    shifted = (left.int() + 128).unsqueeze(-1) * right.int()
    pairs = F.pad(shifted, (0, 0, 0, left.shape[1] % 2)).unflatten(1, (-1, 2)).sum(2)
    return pairs.clamp(-32768, 32767).sum(1) - 128 * right.int().sum(0)


def missing(*_: Any) -> Tensor:
    raise RuntimeError("not implemented on this machine")


@pytest.fixture
def no_int_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_int_mm", missing)


@pytest.fixture
def no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_onednn_convolution", missing)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- the numbers -----------------------------------------------------------------------------


def check_products() -> None:
    left, right = bytes_of(9, 300), bytes_of(300, 7)
    assert torch.equal(product(left, right).double(), left.double() @ right.double())


def check_convolutions() -> None:
    x, weight = bytes_of(2, 32, 9, 7), bytes_of(8, 32, 3, 3)
    values, taps = x.double().requires_grad_(), weight.double().requires_grad_()
    wanted = F.conv2d(values, taps, None, GEOMETRY.stride, GEOMETRY.padding)
    gradient = bytes_of(2, *wanted.shape)
    assert torch.equal(convolution(x, weight, GEOMETRY).double(), wanted)
    found = weight_gradient(x, gradient, (3, 3), GEOMETRY)
    for limb, one in zip(gradient, found, strict=True):
        to_x, to_weight = torch.autograd.grad(
            wanted, (values, taps), limb.double(), retain_graph=True
        )
        assert torch.equal(input_gradient(limb, weight, (9, 7), GEOMETRY).double(), to_x)
        assert torch.equal(one.double(), to_weight)


def test_kernels_that_are_exact_are_used_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU whose kernels are exact, as on others: what is not told is used."""
    check_products()
    check_convolutions()
    is_exact = {"torch._int_mm": kernels.int_mm_is_exact(), "onednn": kernels.onednn_is_exact()}
    assert len(told(caplog)) == sum(not fine for fine in is_exact.values())
    x, weight = bytes_of(1, 4, 5, 5), bytes_of(2, 4, 3, 3)
    fused = scaled_convolution(x, weight, None, Geometry(), 0, False)
    assert (fused is not None) == is_exact["onednn"]


@pytest.mark.parametrize("wrong", [saturated, missing])
def test_a_wrong_matrix_kernel_is_told_once_and_not_used(
    wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left, right = bytes_of(4, 9), bytes_of(9, 3)
    monkeypatch.setattr(torch, "_int_mm", wrong)
    assert not kernels.int_mm_is_exact()
    check_products()
    check_convolutions()
    assert product(left, right).dtype == torch.float64
    about = [line for line in told(caplog) if line.startswith("torch._int_mm")]
    assert about == [
        "torch._int_mm is not exact on this CPU; floating point computes the same, slower"
    ]


def test_the_stand_in_is_wrong_for_large_weights_only() -> None:
    left, right = bytes_of(9, 31), bytes_of(31, 7)
    small = right.clamp(-64, 64)
    assert torch.equal(saturated(left, small).double(), left.double() @ small.double())
    assert not torch.equal(saturated(left, right).double(), left.double() @ right.double())


@pytest.mark.parametrize("kind", ["wrong", "missing"])
def test_a_wrong_convolution_is_told_once_and_not_used(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        return F.conv2d(x.float(), weight.float(), padding=1).add_(1)

    monkeypatch.setattr(kernels, "_onednn_convolution", wrong if kind == "wrong" else missing)
    assert not kernels.onednn_is_exact()
    check_convolutions()
    x, weight = bytes_of(1, 4, 5, 5), bytes_of(2, 4, 3, 3)
    assert scaled_convolution(x, weight, None, Geometry(), 0, False) is None
    about = [line for line in told(caplog) if line.startswith("onednn")]
    assert about == ["onednn is not exact on this CPU; floating point computes the same, slower"]


@pytest.mark.usefixtures("no_int_mm", "no_onednn")
def test_sums_beyond_float32_without_integer_kernels() -> None:
    """All largest codes of 2048 channels: the fallback is float64 there."""
    x, weight = (torch.full((1, 2048, 1, 3), 127, dtype=torch.int8) for _ in range(2))
    found = convolution(x, weight, Geometry(padding=(0, 1)))
    assert found.flatten().tolist() == [127 * 127 * 4096, 127 * 127 * 6144, 127 * 127 * 4096]
    rows = torch.full((1, 4097), 127, dtype=torch.int8)
    assert float(product(rows, rows.t())) == 127 * 127 * 4097


def test_the_float_fallback_of_one_kernel_equals_it() -> None:
    x, weight = bytes_of(2, 16, 8, 8), bytes_of(4, 16, 3, 3)
    found = kernels.float_convolution(x, weight, GEOMETRY)
    assert found.dtype == torch.float32
    assert torch.equal(found, convolution(x, weight, GEOMETRY).float())
