"""Bugs put into the compilation of a published ResNet-20 are found: the pass, and the node."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxq
from fxq import registry
from fxq.attribution import attribute, waterfall
from fxq.bisect import Bisection, bisect
from fxq.errors import ContractError
from fxq.measure import Metric, OutputSqnr
from fxq.models_zoo import evaluate_top1, load_weights, lookup, open_images
from fxq.recipe import Recipe

ENTRY = lookup("cifar/resnet20")
INT8 = Recipe.load("minmax-int8")


@pytest.fixture(scope="module", autouse=True)
def broken(one_thread: None) -> Iterator[None]:
    """The passes of ``broken.py`` are known by name."""
    before = dict(registry._plugins)
    registry.load_plugin(Path(__file__).parents[1] / "broken.py")
    yield
    registry._plugins.clear()
    registry._plugins.update(before)


@functools.cache
def network(folder: Path) -> torch.nn.Module:
    weights = folder / "resnet20-apot-fp32-cifar10.safetensors"
    if not weights.is_file():
        pytest.skip(f"there is no {weights}")
    model = ENTRY.build()
    load_weights(model, weights)
    return model.eval()


@functools.cache
def opened(path: Path) -> Any:
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    assert ENTRY.normalization is not None
    return open_images(path, normalization=ENTRY.normalization, size=ENTRY.size)


@functools.cache
def batches(folder: Path) -> list[Tensor]:
    images = opened(folder / "cifar10-train-20k.npz")
    return [inputs for inputs, _ in images.batches(32, limit=64, seed=0)]


def found(
    folder: Path, name: str, bound: float, metric: Metric | None = None, **options: Any
) -> Bisection:
    """A broken pass put after the last pass, or in the place of the fold."""
    one = registry.find_pass(name)(**options)
    rest = INT8.passes
    passes = (one, *rest[1:]) if name.startswith("fold") else (*rest, one)
    data = batches(folder)
    model = network(folder)
    return bisect(
        model,
        data[0][:1],
        replace(INT8, passes=passes),
        metric or OutputSqnr(model, [data[0][:16]]),
        bound,
        calibration=data,
    )


def test_a_wrong_eps(data: Path) -> None:
    result = found(data, "fold-with-wrong-eps", 40.0, norm="layer2.1.bn1", eps=0.01)
    assert result.first == "fold-with-wrong-eps"
    assert [one.node for one in result.culprits] == ["layer2_1_conv1"]


def test_a_clip_that_is_too_small(data: Path) -> None:
    result = found(data, "shrink-clip", 20.0, layer="layer2.1.conv2")
    assert result.first == "shrink-clip"
    (culprit,) = result.culprits
    assert culprit.operator == "ActivationQuantizer"
    assert "layer2_1_relu" in culprit.node


def test_two_swapped_channels(data: Path) -> None:
    result = found(data, "swap-channels", 28.0, layer="layer3.0.conv1")
    assert result.first == "swap-channels"
    assert [one.node for one in result.culprits] == ["layer3_0_conv1"]


def test_two_swapped_channels_by_accuracy(data: Path) -> None:
    images = opened(data / "cifar10-test-dev.npz")

    def top1(module: torch.nn.Module) -> float:
        return 100 * evaluate_top1(module, images, limit=128).top1

    result = found(data, "swap-channels", 93.0, top1, layer="conv1")
    assert result.first == "swap-channels"
    assert [one.node for one in result.culprits] == ["conv1"]


def test_the_waterfall_and_the_split_show_a_broken_clip(data: Path) -> None:
    one = registry.find_pass("shrink-clip")(layer="layer2.1.conv2")
    images = batches(data)
    recipe = replace(INT8, passes=(*INT8.passes, one))
    result = fxq.compile(network(data), images[0][:1], recipe, calibration=images)
    falls = {fall.name: fall.part for fall in waterfall(result.journal)}
    assert max(falls, key=lambda name: falls[name]) == "shrink-clip"
    first = next(iter(result.journal["shrink-clip"].moved))  # where the error begins
    assert first.startswith("layer2_1_relu")
    assert first.endswith("_quantizer")
    errors = attribute(result.program, [images[0][:8]])
    worst = max(errors, key=lambda error: error.clipping)
    assert worst.path == "layer2.1.conv2"
    assert worst.clipping > 0.9 * worst.error


def test_a_fold_that_claims_to_be_exact_fails_the_compile(data: Path) -> None:
    class Claiming(registry.find_pass("fold-with-wrong-eps")):  # type: ignore[misc]
        contract = fxq.pipeline.Contract.SAME_NUMBERS

    images = batches(data)
    recipe = replace(INT8, passes=(Claiming("layer2.1.bn1", 0.01), *INT8.passes[1:]))
    with pytest.raises(ContractError, match="fold-with-wrong-eps promised same-numbers"):
        fxq.compile(network(data), images[0][:1], recipe, calibration=images)
