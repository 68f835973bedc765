"""What post-training quantization costs in accuracy: methods and bit widths on real networks.

Every row is one ``fxq.compile`` on training images and one evaluation on test images, on integer
kernels. Rows are appended to a CSV file; one that is there already is not run again, so a long
table can be stopped and continued, or shared out by naming networks and methods.

    FXQ_DATA=... python tests/benchmarks/accuracy.py accuracy.csv [NETWORK ...] [--methods best]
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import fxq
from fxq.models_zoo import ZooEntry, evaluate_top1, load_weights, lookup, open_images
from fxq.recipe import Recipe

FIELDS = ("network", "method", "weights", "activations", "images", "right", "top1", "seconds")
CIFAR = ("cifar10-train-20k.npz", "cifar10-test-dev.npz", 512)
PHOTOS = ("imagenet-sample-even.npz", "imagenet-nips17-dev.npz", 128)


@dataclass(frozen=True)
class Subject:
    """A network with its weights, calibration and test images."""

    network: str
    weights: str
    data: tuple[str, str, int]


SUBJECTS = {
    "resnet20-apot": Subject("cifar/resnet20", "resnet20-apot-fp32-cifar10", CIFAR),
    "resnet20": Subject("cifar/resnet20-a", "resnet20-cifar10", CIFAR),
    "resnet8": Subject("cifar/resnet8", "resnet8-cifar10", CIFAR),
    "squeezenet1_1": Subject("torchvision/squeezenet1_1", "squeezenet1_1-imagenet", PHOTOS),
    "mobilenetv1_025": Subject("imagenet/mobilenetv1-0.25", "mobilenetv1_025-imagenet", PHOTOS),
    "mobilenetv2_100": Subject(
        "imagenet/mobilenetv2", "mobilenetv2_100-imagenet-qat8dequant", PHOTOS
    ),
}
METHODS = {
    "min-max": ("naive-4bit", "quantize-minmax"),
    "aciq": ("aciq-4bit", "quantize-aciq"),
    "adaround": ("adaround-4bit", "quantize-aciq"),
    "best": ("best-4bit", "quantize-clipped"),
}
WIDTHS = ((8, 8), (4, 8), (8, 4), (4, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("networks", nargs="*", default=list(SUBJECTS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--widths", default="8/8,4/8,8/4,4/4")
    given = parser.parse_args()
    folder = Path(os.environ["FXQ_DATA"])
    widths = [tuple(map(int, one.split("/"))) for one in given.widths.split(",")]
    for name in given.networks:
        rows = [("float", 32, 32)]
        rows += [(method, *pair) for method in given.methods.split(",") for pair in widths]
        for row in rows:
            if (name, *map(str, row)) not in done(given.table):
                append(given.table, measured(name, SUBJECTS[name], folder, *row))


def measured(
    name: str, subject: Subject, folder: Path, method: str, weights: int, activations: int
) -> dict[str, object]:
    """One row of the table."""
    entry = lookup(subject.network)
    model = entry.build()
    load_weights(model, folder / f"{subject.weights}.safetensors")
    model.eval()
    test = opened(entry, folder / subject.data[1])
    start = time.perf_counter()
    module = (
        model
        if method == "float"
        else compiled(entry, model, subject, folder, method, weights, activations)
    )
    seconds = time.perf_counter() - start
    found = evaluate_top1(module, test)
    row = (
        name,
        method,
        weights,
        activations,
        found.total,
        found.correct,
        f"{100 * found.correct / found.total:.2f}",
        f"{seconds:.0f}",
    )
    return dict(zip(FIELDS, row, strict=True))


def compiled(
    entry: ZooEntry,
    model: torch.nn.Module,
    subject: Subject,
    folder: Path,
    method: str,
    weights: int,
    activations: int,
) -> torch.nn.Module:
    recipe, quantizer = METHODS[method]
    train, _, count = subject.data
    count = 1024 if method == "best" else count
    images = [x for x, _ in opened(entry, folder / train).batches(32, limit=count, seed=0)]
    bits = {"weight_bits": weights, "activation_bits": activations}
    chosen = Recipe.load(recipe).with_settings([f"{quantizer}.{k}={v}" for k, v in bits.items()])
    return fxq.compile(model, images[0][:1], chosen, calibration=images, check=False).module


def opened(entry: ZooEntry, path: Path):  # type: ignore[no-untyped-def]
    return open_images(path, normalization=entry.normalization, size=entry.size)


def done(table: Path) -> set[tuple[str, ...]]:
    """The rows that are there."""
    if not table.exists():
        return set()
    with table.open(newline="") as file:
        return {tuple(row[name] for name in FIELDS[:4]) for row in csv.DictReader(file)}


def append(table: Path, row: dict[str, object]) -> None:
    is_new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
