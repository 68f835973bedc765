"""ResNet-20 with published weights, calibrated on training images, scored on test images."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fxq
from fxq.backends.eager import EagerModule
from fxq.compiler import Result
from fxq.integer.reference import Reference
from fxq.models_zoo import ImageData, evaluate_top1, load_weights, lookup, open_images

ENTRY = lookup("cifar/resnet20")
TESTED = 1000


@functools.cache
def opened(path: Path) -> ImageData:
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    assert ENTRY.normalization is not None
    return open_images(path, normalization=ENTRY.normalization, size=ENTRY.size)


@functools.cache
def network(folder: Path) -> torch.nn.Module:
    weights = folder / "resnet20-apot-fp32-cifar10.safetensors"
    if not weights.is_file():
        pytest.skip(f"there is no {weights}")
    model = ENTRY.build()
    load_weights(model, weights)
    return model


@functools.cache
def compiled(folder: Path, recipe: str, settings: tuple[str, ...] = ()) -> Result:
    train = opened(folder / "cifar10-train-20k.npz")
    batches = [images for images, _ in train.batches(64, limit=512, seed=0)]
    example = batches[0][:1]
    return fxq.compile(network(folder), example, recipe, calibration=batches, settings=settings)


@functools.cache
def float_score(folder: Path) -> float:
    return score(network(folder), folder)


def score(module: torch.nn.Module, folder: Path) -> float:
    """Per cent of the first test images."""
    data = opened(folder / "cifar10-test-dev.npz")
    return 100 * evaluate_top1(module, data, limit=TESTED).top1


def first_images(folder: Path, count: int) -> Tensor:
    data = opened(folder / "cifar10-test-dev.npz")
    images, _ = next(iter(data.batches(count)))
    return images


@pytest.mark.parametrize(
    ("recipe", "points"),
    [
        ("minmax-int8", 0.7),
        ("aciq-8bit", 0.7),
        ("aciq-4bit", 2.8),
        ("kld-4bit", 5.0),
        ("mixed-4bit", 2.8),
        ("aciq-3bit", 5.5),
    ],
)
def test_accuracy(recipe: str, points: float, data: Path) -> None:
    result = compiled(data, recipe)
    assert result.artifact.ledger.coverage() == 1.0
    assert score(result.module, data) >= float_score(data) - points


@pytest.mark.slow
def test_training_on_unlabelled_images_helps(data: Path) -> None:
    rounded, trained = (
        score(compiled(data, recipe, settings).module, data)
        for recipe, settings in (
            ("aciq-3bit", ()),
            ("best-4bit", ("weight_bits=3", "activation_bits=3", "reconstruct.iterations=300")),
        )
    )
    assert trained > rounded


@pytest.mark.parametrize(("recipe", "points"), [("aciq-paper-8w4a", 1.5), ("aciq-paper-4w4a", 3.0)])
def test_accuracy_of_the_papers_settings(recipe: str, points: float, data: Path) -> None:
    """Simulated: with bits per channel, and with the network's input and its sums in float."""
    result = compiled(data, recipe)
    assert result.artifact.simulation
    assert score(result.module, data) >= float_score(data) - points


@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-4bit", "aciq-3bit"])
def test_every_register_equals_the_reference(recipe: str, data: Path) -> None:
    program = compiled(data, recipe).artifact.integers
    images = first_images(data, 16)
    _, expected = Reference(program).run(images)
    found = EagerModule(program, "fbgemm").registers(images)
    for name, value in expected.items():
        assert torch.equal(found[name].to(value.dtype), value), name


@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-4bit"])
def test_engines_agree_on_the_answers(recipe: str, data: Path) -> None:
    program = compiled(data, recipe).artifact.integers
    images = first_images(data, 128)
    answers = [EagerModule(program, name)(images).argmax(1) for name in ("fbgemm", "x86")]
    assert float((answers[0] == answers[1]).float().mean()) > 0.93


def test_a_saved_network_scores_the_same(data: Path, tmp_path: Path) -> None:
    result = compiled(data, "aciq-4bit")
    images = first_images(data, 64)
    loaded = fxq.load(result.artifact.save(tmp_path / "run"))
    assert torch.equal(loaded.module(images), result.module(images))
    assert result.artifact.size_after < 160_000  # 270 thousand weights, nearly all of 4 bits
