"""A whole training step on integers against float, side by side: forward, loss, backward, update.

Random images and labels at ImageNet's sizes. Every round makes one step of each contender in turn;
ratios compare steps of the same round. Widths are those that the controllers chose after the
warm-up, whose steps all choose anew.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq.quant.fixed_point_layers import FixedPointModule
from fxq.torchvision_import import import_torchvision

BATCHES = {"alexnet": 128, "resnet18": 32, "vgg16": 16, "mobilenet_v2": 32}
FLOAT, BF16 = "fp32", "bf16"

Step = Callable[[], None]


def main() -> None:
    asked = _arguments()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    batch = asked.batch or BATCHES[asked.network]
    images = torch.randn(batch, 3, asked.size, asked.size)
    labels = torch.randint(0, 1000, (batch,))
    network = getattr(import_torchvision().models, asked.network)()
    trained = {
        name: fxq.compile(network, images[:2], name, check=False).module for name in asked.recipe
    }
    steps = {FLOAT: _step(copy.deepcopy(network), images, labels)}
    if asked.bf16:
        steps[BF16] = _bf16_step(copy.deepcopy(network), images, labels)
    steps |= {name: _step(module, images, labels) for name, module in trained.items()}
    for name, step in steps.items():
        for _ in range(asked.warm_up if name in trained else 2):
            step()
    for name, module in trained.items():
        print(f"{name}: {_widths(module)}", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(asked.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    _tell(asked.network, batch, seconds)
    if asked.profile:
        _profile(steps[asked.recipe[0]])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", default="alexnet", choices=BATCHES)
    parser.add_argument("--recipe", action="append", default=None)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast, channels last, as well")
    parser.add_argument("--profile", action="store_true")
    found = parser.parse_args()
    found.recipe = found.recipe or ["adaptive-fixed-point"]
    return found


def _step(module: nn.Module, images: Tensor, labels: Tensor) -> Step:
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        loss = F.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _bf16_step(module: nn.Module, images: Tensor, labels: Tensor) -> Step:
    last = torch.channels_last
    module.train().to(memory_format=last)  # type: ignore[call-overload]
    wide = images.contiguous(memory_format=last)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = module(wide)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _widths(module: nn.Module) -> str:
    found = Counter(m.describe() for m in module.modules() if isinstance(m, FixedPointModule))
    return ", ".join(f"{count} {what}" for what, count in found.items())


def _tell(network: str, batch: int, seconds: dict[str, list[float]]) -> None:
    print(f"\n{network}, batch {batch}, {torch.get_num_threads()} threads")
    print(f"{'step':<24}{'median s':>10}{'range':>16}   times as fast as fp32 eager")
    for name, own in seconds.items():
        ratios = [one / two for one, two in zip(seconds[FLOAT], own, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        ends = f"{min(own):.2f}..{max(own):.2f}"
        print(f"{name:<24}{statistics.median(own):>10.2f}{ends:>16}   {spread}")


def _profile(step: Step) -> None:
    with torch.profiler.profile() as seen:
        step()
    print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    main()
