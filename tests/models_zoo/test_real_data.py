"""Known networks on known images: the accuracies their authors' weights give.

The files are looked for in the folder named by ``FXQ_DATA``, else in ``shared/data`` beside the
repository; without them these tests are skipped.
"""

import os
from pathlib import Path

import pytest
import torch

from fxq.models_zoo import evaluate_top1, load_weights, lookup, open_images

FALLBACK = Path(__file__).resolve().parents[2].parent / "shared" / "data"
FOLDER = Path(os.environ.get("FXQ_DATA", FALLBACK))

CIFAR, IMAGENET = "cifar10-test-dev.npz", "imagenet-nips17-dev.npz"
WEIGHTS = {
    "cifar/resnet20": "resnet20-apot-fp32-cifar10.safetensors",
    "cifar/resnet20-a": "resnet20-cifar10.safetensors",
    "cifar/resnet8": "resnet8-cifar10.safetensors",
    "imagenet/mobilenetv1-0.25": "mobilenetv1_025-imagenet.safetensors",
    "imagenet/mobilenetv2": "mobilenetv2_100-imagenet-qat8dequant.safetensors",
    "torchvision/squeezenet1_1": "squeezenet1_1-imagenet.safetensors",
}


def found(name: str) -> Path:
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"{name} is neither in FXQ_DATA nor in shared/data beside the repository")
    return path


def correct(name: str, images: str, limit: int | None = None) -> int:
    entry = lookup(name)
    network = entry.build()
    load_weights(network, found(WEIGHTS[name]))
    assert entry.normalization is not None
    data = open_images(found(images), normalization=entry.normalization, size=entry.size)
    return evaluate_top1(network, data, limit=limit).correct


@pytest.mark.parametrize(
    ("name", "images", "limit", "expected"),
    [
        ("cifar/resnet20", CIFAR, 500, 474),
        ("cifar/resnet20-a", CIFAR, 500, 455),
        ("cifar/resnet8", CIFAR, 500, 445),
        ("imagenet/mobilenetv1-0.25", IMAGENET, 100, 55),
        ("imagenet/mobilenetv2", IMAGENET, 32, 27),
        ("torchvision/squeezenet1_1", IMAGENET, 64, 38),
    ],
)
def test_first_images(name: str, images: str, limit: int, expected: int) -> None:
    assert abs(correct(name, images, limit) - expected) <= 1  # another CPU may round one image over


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "images", "expected"),
    [
        ("cifar/resnet20", CIFAR, 4639),
        ("cifar/resnet20-a", CIFAR, 4565),
        ("cifar/resnet8", CIFAR, 4341),
        ("imagenet/mobilenetv1-0.25", IMAGENET, 279),
        ("imagenet/mobilenetv2", IMAGENET, 427),
        ("torchvision/squeezenet1_1", IMAGENET, 284),
    ],
)
def test_all_images(name: str, images: str, expected: int) -> None:
    assert abs(correct(name, images) - expected) <= 1


def test_training_images_are_drawn_by_seed() -> None:
    entry = lookup("cifar/resnet20")
    assert entry.normalization is not None
    data = open_images(
        found("cifar10-train-20k.npz"), normalization=entry.normalization, size=entry.size
    )
    assert len(data) == 19984
    images, labels = next(data.batches(512, limit=512, seed=0))
    assert images.shape == (512, 3, 32, 32)
    assert labels.bincount(minlength=10).min() > 25
    assert images.mean().abs() < 0.1
    assert images.std().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(labels, next(data.batches(512, limit=512, seed=0))[1])
