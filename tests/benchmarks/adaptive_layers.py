"""Layer by layer: forward and backward on integers against float, as Table 3 of the paper.

Each convolution and linear of a network runs alone on inputs of the size it has there, with random
values: its forward, and its backward for inputs (where the network needs them) and weights. Times
are medians of rounds in which every contender runs once.

Paper: Zhang et al., "Fixed-Point Back-Propagation Training", CVPR 2020, Table 3.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxq.numerics.adaptive import AdaptationOptions
from fxq.quant.fixed_point_layers import FixedPointLayer
from fxq.torchvision_import import import_torchvision

BATCHES = {"alexnet": 128, "resnet18": 32, "vgg16": 16}
FLOAT, INT8, INT16 = "fp32", "int8", "int16 gradients"

Times = dict[str, tuple[float, float]]


def main() -> None:
    asked = _arguments()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    batch = asked.batch or BATCHES[asked.network]
    network = getattr(import_torchvision().models, asked.network)()
    shapes = _shapes(network, batch)
    print(f"{asked.network}, batch {batch}, {torch.get_num_threads()} threads; milliseconds")
    head = "".join(f"{name + ' fwd':>12}{'bwd':>8}" for name in (FLOAT, INT8, "int16"))
    print(f"{'layer':<26}{head}   speed-up fwd, bwd int8, bwd int16")
    total: dict[str, list[float]] = {name: [0.0, 0.0] for name in (FLOAT, INT8, INT16)}
    for i, (name, (layer, shape)) in enumerate(shapes.items()):
        found = _measured(layer, shape, asked.rounds, wants_input=i > 0)
        _tell(name, found)
        for contender, times in found.items():
            total[contender] = [a + b for a, b in zip(total[contender], times, strict=True)]
    _tell("all", {name: (times[0], times[1]) for name, times in total.items()})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", default="alexnet", choices=BATCHES)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


def _shapes(network: nn.Module, batch: int) -> dict[str, tuple[nn.Module, list[int]]]:
    """Every convolution and linear, and the shape of its input."""
    found: dict[str, tuple[nn.Module, list[int]]] = {}
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):

            def seen(own: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                found[name] = (own, [batch, *args[0].shape[1:]])

            handles.append(module.register_forward_pre_hook(seen))
    with torch.no_grad():
        network.eval()(torch.randn(1, 3, 224, 224))
    for handle in handles:
        handle.remove()
    return found


def _measured(layer: nn.Module, shape: list[int], rounds: int, *, wants_input: bool) -> Times:
    contenders: dict[str, nn.Module] = {FLOAT: copy.deepcopy(layer)}
    for name, bits in ((INT8, 8), (INT16, 16)):
        eight, wide = AdaptationOptions.static(8), AdaptationOptions.static(bits)
        contenders[name] = FixedPointLayer(copy.deepcopy(layer), None, eight, eight, wide)
    steps = {n: _step(m, shape, wants_input, n != FLOAT) for n, m in contenders.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, step in steps.items():
            taken = step()
            if i > 1:
                times[name].append(taken)
    return {
        name: (statistics.median(t[0] for t in own), statistics.median(t[1] for t in own))
        for name, own in times.items()
    }


def _step(
    module: nn.Module, shape: list[int], wants_input: bool, last: bool
) -> Callable[[], tuple[float, float]]:
    x = torch.randn(shape).relu_()
    if last and len(shape) == 4 and wants_input:  # as the layer before leaves it
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_(wants_input)
    sources: list[Tensor] = [x] * wants_input + list(module.parameters())
    flow = torch.randn_like(module(x.detach()))

    def step() -> tuple[float, float]:
        start = time.perf_counter()
        output = module(x)
        middle = time.perf_counter()
        torch.autograd.grad(output, sources, flow)
        return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)

    return step


def _tell(name: str, found: Times) -> None:
    cells = "".join(f"{forward:>12.1f}{backward:>8.1f}" for forward, backward in found.values())
    base = found[FLOAT]
    ratios = (
        base[0] / found[INT8][0],
        base[1] / found[INT8][1],
        base[1] / found[INT16][1],
    )
    print(f"{name:<26}{cells}   " + ", ".join(f"{ratio:.2f}" for ratio in ratios), flush=True)


if __name__ == "__main__":
    main()
