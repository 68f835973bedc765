"""What recording costs a compilation: graphs, probe batch and values after every pass, on and off.

Compiles a network with ``check=True``, which is the default, and with ``check=False``, in turn, and
compares times of the same round. Calibration is on random images.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import fxq
from fxq.model_file import load_model

LIMIT = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", default="torchvision/resnet50")
    parser.add_argument("--recipe", default="aciq-4bit")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    model = load_model(asked.network)
    shape = (asked.batch, *model.example_inputs[0].shape[1:])
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(shape, generator=generator) for _ in range(asked.images // asked.batch)]
    shares = []
    for i in range(asked.rounds + 1):
        seconds = {}
        for check in (True, False):
            start = time.perf_counter()
            fxq.compile(
                model.module, model.example_inputs, asked.recipe, calibration=batches, check=check
            )
            seconds[check] = time.perf_counter() - start
        if i:  # the first round warms up
            shares.append(1 - seconds[False] / seconds[True])
            print(f"recorded {seconds[True]:.2f} s, not {seconds[False]:.2f} s", flush=True)
    share = statistics.median(shares)
    ends = f"{100 * min(shares):.1f} to {100 * max(shares):.1f}"
    verdict = "within" if share <= LIMIT else "above"
    print(f"recording is {100 * share:.1f} % of compiling ({ends}), {verdict} {100 * LIMIT:.0f} %")


if __name__ == "__main__":
    main()
