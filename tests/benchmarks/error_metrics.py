"""Which error of a rounded tensor tells most about accuracy: M1 to M4, single layers rounded.

Of a trained network one layer at a time multiplies fixed-point numbers, weights and inputs, at each
of some widths; everything else stays in float. Each metric of the layer's tensors (the mean of that
of the weights and that of the inputs, on the first batch) is set against the accuracy: the squared
correlation of Eq. 4 over all layers and widths, and over those that round to no more than the worst
tenth. Written as CSV, and drawn.

Paper: Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020, section 5.1 and Fig. 5.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxq.models_zoo.accuracy import evaluate_top1
from fxq.models_zoo.datasets import open_images
from fxq.models_zoo.weights import load_weights
from fxq.numerics.fixed_point import fixed_point, resolution_exponent
from fxq.numerics.quantization_error import (
    divergence,
    mean_shift,
    pointwise_error,
    relative_error,
    squared_correlation,
)
from fxq.registry import find_network

METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "M1": mean_shift,
    "M2": relative_error,
    "M3": pointwise_error,
    "M4": divergence,
}
HEAD = ("layer", "bits", "accuracy", *METRICS)


def main() -> None:
    asked = _arguments()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    entry = find_network(asked.network)
    network = entry.build()
    load_weights(network, asked.weights)
    data = open_images(asked.data, normalization=entry.normalization, size=entry.size)
    batch = next(iter(data.batches(64)))[0]
    layers = {n: m for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    rows: list[dict[str, Any]] = []
    for name, layer in layers.items():
        inputs = _inputs(network, layer, batch)
        for bits in asked.bits:
            errors = _errors(layer, inputs, bits)
            with _rounded(layer, bits):
                accuracy = evaluate_top1(network, data, limit=asked.images).top1
            rows.append({"layer": name, "bits": bits, "accuracy": accuracy, **errors})
            print(
                name,
                bits,
                f"{accuracy:.4f}",
                {k: f"{v:.4g}" for k, v in errors.items()},
                flush=True,
            )
    with asked.output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, HEAD)
        writer.writeheader()
        writer.writerows(rows)
    _draw(rows, asked.output.with_suffix(".png"), asked.network)
    print(f"\n{asked.network}, {len(layers)} layers at {asked.bits} bits, {asked.images} images")
    for name in METRICS:
        print(name, *(f"{label} {_correlation(own, name):.3f}" for label, own in _groups(rows)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("error-metrics"))
    return parser.parse_args()


def _inputs(network: nn.Module, layer: nn.Module, batch: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network(batch)
    handle.remove()
    return seen[0]


def _quantized(x: Tensor, bits: int) -> Tensor:
    return fixed_point(x, resolution_exponent(float(x.abs().max()), bits), bits)


def _errors(layer: Any, inputs: Tensor, bits: int) -> dict[str, float]:
    tensors = (layer.weight.detach(), inputs)
    return {
        name: sum(metric(x, _quantized(x, bits)) for x in tensors) / len(tensors)
        for name, metric in METRICS.items()
    }


@contextmanager
def _rounded(layer: Any, bits: int) -> Iterator[None]:
    """Within it a layer multiplies fixed-point numbers."""
    exact = layer.weight.detach().clone()
    handle = layer.register_forward_pre_hook(lambda _, args: (_quantized(args[0], bits),))
    layer.weight.data.copy_(_quantized(exact, bits))
    try:
        yield
    finally:
        handle.remove()
        layer.weight.data.copy_(exact)


def _groups(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    yield "all", rows
    for bits in sorted({row["bits"] for row in rows}):
        yield f"{bits} bits", [row for row in rows if row["bits"] == bits]


def _correlation(rows: list[dict[str, Any]], name: str) -> float:
    values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
    scores = torch.tensor([row["accuracy"] for row in rows], dtype=torch.float64)
    if scores.unique().numel() < 2 or values.unique().numel() < 2:
        return math.nan
    return squared_correlation(values, scores)


def _draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(14, 3.4), layout="constrained")
    FigureCanvasAgg(picture)
    for panel, name in zip(picture.subplots(1, len(METRICS), sharey=True), METRICS, strict=True):
        for bits in sorted({row["bits"] for row in rows}):
            own = [row for row in rows if row["bits"] == bits]
            panel.scatter(
                [row[name] for row in own], [row["accuracy"] for row in own], s=12, label=bits
            )
        panel.set(xlabel=f"{name}, R2 {_correlation(rows, name):.2f}", xscale="log")
        panel.legend(title="bits")
    picture.suptitle(title)
    picture.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
