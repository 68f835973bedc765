"""AlexNet and VGG for CIFAR: their layers, capture, and that they learn from random weights."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import TensorDataset

from fxq.graph.capture import capture
from fxq.models_zoo import lookup
from fxq.quant.augment import Augmentation
from fxq.training import TrainingOptions, fit

LAYERS = {
    "cifar/alexnet": {"Conv2d": 5, "Linear": 3, "Dropout": 2, "MaxPool2d": 3},
    "cifar/vgg11": {"Conv2d": 8, "BatchNorm2d": 8, "Linear": 1, "MaxPool2d": 5},
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_the_paper_and_are_captured(name: str) -> None:
    entry = lookup(name)
    network = entry.build()
    kinds = Counter(type(module).__name__ for module in network.modules())
    assert {kind: kinds[kind] for kind in LAYERS[name]} == LAYERS[name]
    images = torch.randn(3, 3, 32, 32)
    program = capture(network, entry.example())
    with torch.no_grad():
        assert torch.equal(program.module(images), network(images))
    assert entry.normalization == lookup("cifar/resnet20").normalization


@pytest.mark.parametrize("name", LAYERS)
def test_random_weights_keep_the_size_of_values(name: str) -> None:
    """A network without batch norm that begins far too small, or large, learns nothing."""
    with torch.no_grad():
        logits = lookup(name).build().train()(torch.randn(16, 3, 32, 32))
    assert 0.1 < logits.std() < 10


@pytest.mark.parametrize("name", LAYERS)
def test_a_few_images_are_learned_by_heart(name: str, one_thread: None) -> None:
    labels = torch.arange(160) % 10
    images = torch.randn(10, 3, 32, 32)[labels] + 0.3 * torch.randn(160, 3, 32, 32)
    network = lookup(name).build().train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):  # `fit` leaves it so; it only makes this longer
            module.eval()
    options = TrainingOptions(
        epochs=6,
        batch_size=32,
        lr=0.02,
        warmup=1,
        clip_gradients=5.0,
        augmentation=Augmentation.NONE,
    )
    losses = fit(network, TensorDataset(images, labels), options).losses
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
