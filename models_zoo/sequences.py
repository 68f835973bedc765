"""A language to translate into, made up: short rows of tokens, and the rule that rewrites them.

The target reads the source from behind, and each of its tokens is the source's token put through a
permutation that the target's token before chooses. A network must therefore find the right place
in the source and know a table of 17 permutations; nothing shorter gives more than chance.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxq.errors import UnknownNameError

from .catalog import SEQUENCE_LENGTH, VOCABULARY
from .datasets import drawn

START = VOCABULARY
"""The token that stands before the first of a target."""

_RULE_SEED = 11
_SPLITS = {"train": (16384, 1), "test": (2048, 2)}  # sequences and seed


class SequenceData:
    """A sequence of ``(pair, target)``, both int64: pair ``[2, T]``, target ``[T]``.

    A pair is the source, and the target one step late: what a decoder is given while it learns to
    tell the next token. It works as a map-style dataset of ``torch.utils.data.DataLoader``.

    Args:
        name: What it is called, for people.
        source: ``[N, T]`` int64, tokens from 0 to 15.
    """

    unit = "sequences"

    def __init__(self, name: str, source: Tensor) -> None:
        self.name = name
        self.labels = translated(source)
        before = torch.nn.functional.pad(self.labels[:, :-1], (1, 0), value=START)
        self._pairs = torch.stack([source, before], dim=1)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The pair and the target at a position.

        Raises:
            IndexError: If there is no such position.
        """
        return self._pairs[index], self.labels[index]

    def batches(
        self,
        batch_size: int,
        limit: int | None = None,
        start: int = 0,
        seed: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs ``[N, 2, T]`` and targets ``[N, T]``, batch by batch, as `ImageData` gives images.

        Args:
            batch_size: Sequences per batch; the last batch may be smaller.
            limit: At most so many sequences in all.
            start: Position of the first sequence.
            seed: Draw without replacement in the order this seed gives; None takes them in order.

        Raises:
            DataError: If a size is not positive, or the start lies beyond the end.
        """
        chosen = torch.from_numpy(drawn(self.name, len(self), batch_size, limit, start, seed))
        for positions in torch.split(chosen, batch_size):
            yield self._pairs[positions], self.labels[positions]

    def describe(self) -> str:
        """One line: where from, how many, how long, how many tokens."""
        return f"{self.name}: {len(self)} sequences of {SEQUENCE_LENGTH}, {VOCABULARY} tokens"


def sequence_data(split: str) -> SequenceData:
    """The sequences of a split, the same everywhere and each time.

    Args:
        split: ``"train"``: 16384 sequences; ``"test"``: 2048 others.

    Raises:
        UnknownNameError: If there is no such split.

    Example:
        >>> pair, target = sequence_data("test")[0]
        >>> torch.equal(pair[1, 1:], target[:-1]), target.shape
        (True, torch.Size([12]))
    """
    if split not in _SPLITS:
        raise UnknownNameError("split", split, list(_SPLITS), where="rewriting")
    count, seed = _SPLITS[split]
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(VOCABULARY, (count, SEQUENCE_LENGTH), generator=generator)
    return SequenceData(f"rewriting {split}", source)


def translated(source: Tensor) -> Tensor:
    """The target of each source: ``y[i] = rule[y[i - 1], x[T - 1 - i]]``, where ``y[-1] = START``.

    Args:
        source: ``[N, T]`` int64, tokens from 0 to 15.

    Returns:
        ``[N, T]`` int64, tokens from 0 to 15.

    Example:
        >>> both = translated(torch.tensor([[1, 2, 3], [7, 2, 3]]))
        >>> (both[0] == both[1]).tolist()  # what differs is read last
        [True, True, False]
    """
    rule = _rule()
    tokens = [torch.full_like(source[:, 0], START)]
    for read in source.flip(1).unbind(1):
        tokens.append(rule[tokens[-1], read])
    return torch.stack(tokens[1:], dim=1)


def _rule() -> Tensor:
    """``[17, 16]``: for each token that may stand before, a permutation of the tokens."""
    generator = torch.Generator().manual_seed(_RULE_SEED)
    rows = [torch.randperm(VOCABULARY, generator=generator) for _ in range(VOCABULARY + 1)]
    return torch.stack(rows)
