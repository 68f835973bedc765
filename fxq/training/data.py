"""Batches of a map-style data set in an order that a seed decides, each process its share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import default_collate

from fxq.errors import TrainingError


@runtime_checkable
class Samples(Protocol):
    """A map-style data set of ``(input, …, label)``, such as `torch.utils.data.TensorDataset`.

    One that has torch's ``__getitems__`` is asked for a whole batch at once.
    """

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """One sample."""


def derived_seed(*parts: int) -> int:
    """A seed of 63 bits that differs where one of the numbers does.

    Example:
        >>> len({derived_seed(seed, epoch) for seed in range(9) for epoch in range(9)})
        81
    """
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def steps_per_epoch(samples: Any, batch_size: int, processes: int = 1) -> int:
    """Whole batches in a data set.

    Raises:
        TrainingError: There is none, or a batch cannot be shared evenly.
    """
    if not isinstance(samples, Samples):
        raise TrainingError(
            f"training data must have a length and positions, not be a {type(samples).__name__}",
            hint="give a map-style data set of (input, label), such as TensorDataset",
        )
    count = len(samples)
    if not count:
        raise TrainingError("the training data is empty", hint="give at least one batch")
    if batch_size > count:
        raise TrainingError(
            f"a batch of {batch_size} is larger than the training data, which has {count}",
            hint="take a smaller batch size",
        )
    if batch_size % processes:
        raise TrainingError(
            f"a batch of {batch_size} cannot be shared evenly by {processes} processes",
            hint=f"take a multiple of {processes} as batch size",
        )
    return count // batch_size


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch: a permutation that depends on these numbers only."""
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    return torch.randperm(count, generator=generator)


def share_of(batch: Tensor, rank: int, processes: int) -> list[int]:
    """The positions that one process takes of a global batch.

    Example:
        >>> share_of(torch.tensor([7, 3, 5, 1]), 1, 2)
        [5, 1]
    """
    share = len(batch) // processes
    return [int(one) for one in batch[rank * share : (rank + 1) * share]]


def fetch(samples: Any, positions: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """The inputs and the labels of these samples.

    Raises:
        TrainingError: A sample is not made of inputs and a label of whole numbers.
    """
    get_all = getattr(samples, "__getitems__", None)
    rows = get_all(positions) if get_all else [samples[one] for one in positions]
    parts = default_collate(list(rows))
    if not isinstance(parts, (tuple, list)) or len(parts) < 2:
        raise TrainingError(
            f"a training sample is a {type(rows[0]).__name__}", hint="samples are (input, label)"
        )
    *inputs, labels = parts
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise TrainingError(
            "a training label is no whole number", hint="labels are the numbers of classes"
        )
    return inputs, labels.long()


def check_labels(logits: Any, labels: Tensor) -> None:
    """The output is logits ``[N, classes, …]``, and each label ``[N, …]`` is one of the classes.

    Raises:
        TrainingError: It is not so.
    """
    is_logits = isinstance(logits, Tensor) and logits.ndim >= 2
    if not is_logits or (len(logits), *logits.shape[2:]) != tuple(labels.shape):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TrainingError(
            f"the network gives {shape} for labels of shape {list(labels.shape)}",
            hint="a network that is trained gives logits [N, classes] for labels [N]",
        )
    low, high = (int(value) for value in torch.aminmax(labels))
    if low < 0 or high >= logits.shape[1]:
        wrong = low if low < 0 else high
        raise TrainingError(
            f"a label is {wrong}, but the network has {logits.shape[1]} classes",
            hint="labels count from 0; choose the data set that the network is made for",
        )
