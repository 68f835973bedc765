"""What recording costs: compiling with the record of every run against compiling without it.

With: the probe batch after every pass, its drift, `values.json`; without: ``check=False``, which
keeps the snapshots of the graph, so they are timed apart. Both compile the same network on the same
data in turn, round after round; ratios compare times of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import fxq
from fxq import pipeline
from fxq.cli.load import calibration_of, load_subject

LIMIT = 0.15
"""The share of a compilation that recording may take (issue 7)."""


def main() -> None:
    asked = _arguments()
    torch.set_num_threads(asked.threads)
    subject = load_subject(asked.network)
    drawn = calibration_of(
        subject, asked.calibration, images=asked.images, batch_size=asked.batch, seed=0
    )
    data = list(drawn.data)

    def compiled(check: bool) -> None:
        model = subject.model
        fxq.compile(model.module, model.example_inputs, asked.recipe, calibration=data, check=check)

    compiled(True)  # imports, and the first touch of every kernel
    rounds = [_round(compiled) for _ in range(asked.rounds)]
    _tell(rounds, f"{asked.network}, {asked.recipe}, calibrated on {drawn.source}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", default="torchvision/resnet50")
    parser.add_argument("--recipe", default="aciq-4bit")
    parser.add_argument("--calibration", default="random", help="a path, or random")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _round(compiled: Callable[[bool], None]) -> tuple[float, float, float]:
    """Seconds with the record, without it, and of the snapshots that both take."""
    snapshots = 0.0

    def timed(program: Any) -> Any:
        nonlocal snapshots
        start = time.perf_counter()
        graph = snapshot(program)
        snapshots += time.perf_counter() - start
        return graph

    snapshot = pipeline.snapshot
    with mock.patch.object(pipeline, "snapshot", timed):
        bare = _seconds(lambda: compiled(False))
    return _seconds(lambda: compiled(True)), bare, snapshots


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _tell(rounds: list[tuple[float, float, float]], what: str) -> None:
    shares = [(whole - bare + snapshots) / whole for whole, bare, snapshots in rounds]
    whole, bare, snapshots = (statistics.median(column) for column in zip(*rounds, strict=True))
    middle = statistics.median(shares)
    print(what)
    print(f"with the record {whole:.2f} s; without {bare:.2f} s, {snapshots:.2f} s of it snapshots")
    print(
        f"recording: {middle:.1%} of a compilation ({min(shares):.1%} to {max(shares):.1%} "
        f"over {len(rounds)} rounds); limit {LIMIT:.0%}"
    )


if __name__ == "__main__":
    main()
