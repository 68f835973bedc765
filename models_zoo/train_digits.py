"""How the embedded digits network came about: ``python -m fxq.models_zoo.train_digits [folder]``.

Needs scikit-learn, which carries the images. Everything is drawn from one seed; on one machine the
same files come out again. Writes ``digits.npz`` and ``digits_convnet.safetensors``.
"""

from __future__ import annotations

import importlib
import io
import math
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from .accuracy import evaluate_top1
from .digits import IMAGES_FILE, WEIGHTS_FILE, DigitsConvNet, digits_images

SEED = 20
EPOCHS = 60
_BATCH = 64
_TEST_SHARE = 0.25
_RATE = 0.1


def images_archive() -> bytes:
    """An ``.npz`` of the digits as uint8 0..255 NCHW, split into train and test class by class."""
    digits = importlib.import_module("sklearn.datasets").load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.uint8)
    held_out = _stratified_mask(labels)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        x_train=images[~held_out],
        y_train=labels[~held_out],
        x_test=images[held_out],
        y_test=labels[held_out],
    )
    return buffer.getvalue()


def _stratified_mask(
    labels: np.ndarray[tuple[int], np.dtype[np.uint8]],
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    random = np.random.Generator(np.random.PCG64(SEED))
    mask = np.zeros(len(labels), dtype=np.bool_)
    for label in range(10):
        members = random.permutation(np.flatnonzero(labels == label))
        mask[members[: round(len(members) * _TEST_SHARE)]] = True
    return mask


def train(images: Tensor, labels: Tensor, epochs: int = EPOCHS, seed: int = SEED) -> DigitsConvNet:
    """A network trained on these images with random rotation, scale and shift, in eval mode.

    The global random generator is left as it was.

    Args:
        images: [N, 1, 8, 8], normalised.
        labels: [N] int64.
        epochs: Passes over the images.
        seed: Of the initial weights, the order and the distortions.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitsConvNet().train()
        optimizer = torch.optim.SGD(
            network.parameters(), lr=_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
            _train_epoch(network, optimizer, images, labels)
    return network.eval()


def _train_epoch(
    network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    for indices in torch.split(torch.randperm(len(images)), _BATCH):
        logits = network(_distorted(images[indices]))
        loss = functional.cross_entropy(logits, labels[indices], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _distorted(images: Tensor) -> Tensor:
    count = len(images)
    angle = (torch.rand(count) - 0.5) * 0.4
    scale = 1 + (torch.rand(count) - 0.5) * 0.2
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = (torch.rand(count, 2) - 0.5) * 0.4  # up to 0.8 pixels: the image spans -1..1
    rows = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], dim=1)
    size = [count, *images.shape[1:]]
    grid = functional.affine_grid(rows.view(count, 2, 3), size, align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def main(folder: Path) -> None:
    """The folder holds freshly written images and weights; the accuracies go to the terminal."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    archive = images_archive()
    (folder / IMAGES_FILE).write_bytes(archive)
    data = digits_images(archive, "train")
    images, labels = next(data.batches(len(data)))
    network = train(images, labels)
    (folder / WEIGHTS_FILE).write_bytes(safetensors.torch.save(network.state_dict()))
    for split in ("train", "test"):
        accuracy = evaluate_top1(network, digits_images(archive, split))
        sys.stdout.write(f"{split} {accuracy}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "weights")
