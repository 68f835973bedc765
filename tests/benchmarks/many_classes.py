"""A training in which 8 bits are not enough for gradients: a thousand classes.

The gradient of a softmax over many classes is one entry of about -1 and very many of about
1/classes; on a grid of 8 bits the latter are all zero. Generated clusters, a perceptron of three
layers, the same options for all; no data is needed.

Paper: Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020, Fig. 2c (fc2 of AlexNet).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fxq
from fxq.trainable import TrainingModule
from fxq.training import TrainingOptions, fit
from fxq.training.widths import last_widths

FLOAT = "fp32"
RECIPES = (FLOAT, "static-int8", "static-int16", "adaptive-fixed-point", "adaptive-mode1")
CLASSES, WIDTH = 1000, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for name in RECIPES:
        scores = []
        for seed in range(asked.seeds):
            options = TrainingOptions(
                epochs=asked.epochs, lr=0.1, batch_size=128, augmentation="none", seed=seed
            )
            module = _network(name, seed)
            training = fit(module, _clusters(20_000, 1), options)
            scores.append(_accuracy(module))
        told = " ".join(f"{100 * score:.2f}" for score in scores)
        loss = training.rows[0]["train_loss"]
        print(
            f"{name:<22} {told} %  loss of the first epoch {loss:.3f}  "
            f"{last_widths(module).get('gradients', '')}",
            flush=True,
        )


def _network(recipe: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(WIDTH, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, CLASSES),
    )
    if recipe == FLOAT:
        return network
    return fxq.compile(network, torch.zeros(2, WIDTH), recipe).module


def _clusters(count: int, seed: int) -> TensorDataset:
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise: Tensor = torch.randn(count, WIDTH, generator=generator)
    return TensorDataset(centres[labels] + noise, labels)


def _accuracy(module: nn.Module) -> float:
    inputs, labels = _clusters(4000, 2).tensors
    if isinstance(module, TrainingModule):
        module.exact = False
    module.eval()
    with torch.no_grad():
        return float((module(inputs).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
