"""What rounding costs a training step: float and apot-4bit, eager and compiled, side by side.

ResNet-20 on random images. A step is forward, loss, backward and the optimizer's; every round makes
one of each contender in turn, and ratios compare steps of the same round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq.models_zoo import resnet20
from fxq.training import TrainingOptions
from fxq.training.optimizer import make_optimizer

FLOAT, APOT, EAGER, COMPILED = "fp32", "apot-4bit", "eager", "compiled"
WARM_UP = 3
LIMIT = 1.6
"""How often the time of a compiled float step a compiled apot-4bit step may take."""

Step = Callable[[], None]


def main() -> None:
    asked = _arguments()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    steps = _steps(asked.device, asked.batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        start = time.perf_counter()
        for _ in range(WARM_UP):
            step()
        print(f"{name}: warm after {time.perf_counter() - start:.1f} s", flush=True)
    for _ in range(asked.rounds):
        for name, step in steps.items():
            seconds[name].append(_timed(step, asked.device))
    _tell(seconds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=0, help="as torch chooses if not given")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=128)
    return parser.parse_args()


def _steps(device: str, batch: int) -> dict[str, Step]:
    """A step of each contender, by name."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    network = resnet20()
    quantized = fxq.compile(network, images[:1], APOT, calibration=[images[:64]]).module
    made = {}
    for how, (name, module) in product((EAGER, COMPILED), ((FLOAT, network), (APOT, quantized))):
        own = copy.deepcopy(module).train().to(device)
        forward = own if how == EAGER else torch.compile(own, fullgraph=True)
        made[f"{name} {how}"] = _step(own, forward, images.to(device), labels.to(device))
    return made


def _step(
    module: nn.Module, forward: Callable[..., Tensor], images: Tensor, labels: Tensor
) -> Step:
    optimizer = make_optimizer(module, TrainingOptions(lr=0.001))

    def step() -> None:
        loss = F.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _timed(step: Step, device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _tell(seconds: dict[str, list[float]]) -> None:
    """The medians and ranges of the times, and of their ratios within rounds."""
    print(f"\n{'step':<20}{'median ms':>11}{'range':>19}   to fp32 eager       to fp32 compiled")
    for name, own in seconds.items():
        to = [_ratio(own, seconds[f"{FLOAT} {how}"]) for how in (EAGER, COMPILED)]
        ends = f"{1e3 * min(own):.1f}..{1e3 * max(own):.1f}"
        print(f"{name:<20}{1e3 * statistics.median(own):>11.1f}{ends:>19}   {to[0]:<20}{to[1]}")
    pairs = zip(seconds[f"{APOT} {COMPILED}"], seconds[f"{FLOAT} {COMPILED}"], strict=True)
    found = statistics.median(one / other for one, other in pairs)
    verdict = "within" if found <= LIMIT else "above"
    print(f"\ncompiled, apot-4bit takes {found:.2f}x the time of fp32: {verdict} {LIMIT}x")


def _ratio(own: list[float], other: list[float]) -> str:
    ratios = [one / two for one, two in zip(own, other, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"


if __name__ == "__main__":
    main()
