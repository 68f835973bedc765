"""The processes that work on one network together, each on its share of the data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class World:
    """This process among those that work together.

    Attributes:
        rank: Its number, from 0; the first writes the files.
        processes: How many there are.
    """

    rank: int = 0
    processes: int = 1

    @classmethod
    def current(cls) -> World:
        """The world of torch's default process group; one process where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this process writes and tells."""
        return self.rank == 0

    def wrapped(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The network, its gradients averaged over the processes in each backward pass."""
        if self.processes == 1:
            return module
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices)

    def summed(self, values: list[float], device: torch.device) -> list[float]:
        """The sums over the processes, the same in each."""
        if self.processes == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def of_first(self, value: float | None, device: torch.device) -> float | None:
        """What the first process has, in each."""
        if self.processes == 1:
            return value
        known = [0.0, 0.0]
        if self.is_first and value is not None:
            known = [1.0, value]
        has, shared = self.summed(known, device)
        return shared if has else None

    def gathered(self, value: Any) -> list[Any]:
        """What every process has, in the order of their numbers, the same in each."""
        if self.processes == 1:
            return [value]
        values: list[Any] = [None] * self.processes
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Every process has come to this point."""
        if self.processes > 1:
            dist.barrier()


@contextlib.contextmanager
def process_group(device: str) -> Iterator[World]:
    """The processes that ``torchrun`` started work together in the body: gloo, or NCCL on CUDA.

    Without ``torchrun`` there is one process, and no group is made.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World.current()
    finally:
        dist.destroy_process_group()
