"""A small Transformer, encoder and decoder, whose attention is written out as linears and products.

Papers:
    Vaswani et al., "Attention is all you need", NeurIPS 2017, arXiv:1706.03762, sections 3.1 to
    3.3; normalization before each part: Xiong et al., "On layer normalization in the Transformer
    architecture", ICML 2020, arXiv:2002.04745, figure 1b.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .catalog import SEQUENCE_LENGTH, VOCABULARY


class Attention(nn.Module):
    """Multi-head attention of one sequence to another: ``[N, T, width]`` and ``[N, S, width]``.

    Args:
        width: Numbers per token.
        heads: Number of heads; it divides the width.
        is_causal: Whether a token sees only those at its place and before.
    """

    later: Tensor

    def __init__(self, width: int, heads: int, is_causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.is_causal = is_causal
        self.scale = 1 / math.sqrt(width // heads)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        square = torch.ones(SEQUENCE_LENGTH, SEQUENCE_LENGTH, dtype=torch.bool)
        self.register_buffer("later", square.triu(1), persistent=False)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """``[N, T, width]``: for each token of ``x`` a mixture of those of ``memory``."""
        query, key = self._per_head(self.query(x)), self._per_head(self.key(memory))
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scale
        if self.is_causal:
            scores = scores.masked_fill(self.later, -math.inf)
        weights = torch.softmax(scores, dim=-1)
        mixed = torch.matmul(weights, self._per_head(self.value(memory)))
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _per_head(self, x: Tensor) -> Tensor:
        """``[N, T, width]`` to ``[N, heads, T, width / heads]``."""
        return torch.unflatten(x, 2, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Sequential):
    """Two linears with ReLU between, token by token. ``[N, T, width]``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


class EncoderLayer(nn.Module):
    """Attention to itself and feed-forward, each added to its input. ``[N, S, width]``."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, S, width]``."""
        normed = self.norm1(x)
        x = x + self.attention(normed, normed)
        return x + self.feed_forward(self.norm2(x))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention to what came before, attention to the source, and feed-forward."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, is_causal=True)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """``[N, T, width]``, with the encoded source ``[N, S, width]``."""
        normed = self.norm1(x)
        x = x + self.attention(normed, normed)
        x = x + self.cross_attention(self.norm2(x), memory)
        return x + self.feed_forward(self.norm3(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """``[N, 2, T]`` int64, source and the target one step late, to logits ``[N, tokens, T]``.

    Args:
        width: Numbers per token.
        heads: Heads of every attention.
        hidden: Width within feed-forward parts.
        layers: Number of layers of the encoder, and of the decoder.
    """

    def __init__(self, width: int = 64, heads: int = 4, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.source_embedding = nn.Embedding(VOCABULARY + 1, width)
        self.target_embedding = nn.Embedding(VOCABULARY + 1, width)
        self.source_places = nn.Parameter(torch.randn(SEQUENCE_LENGTH, width))
        self.target_places = nn.Parameter(torch.randn(SEQUENCE_LENGTH, width))
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, hidden) for _ in range(layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, hidden) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, pairs: Tensor) -> Tensor:
        """The logits of the target's tokens."""
        memory = self.source_embedding(pairs[:, 0]) + self.source_places
        for layer in self.encoder:
            memory = layer(memory)
        memory = self.encoder_norm(memory)
        x = self.target_embedding(pairs[:, 1]) + self.target_places
        for layer in self.decoder:
            x = layer(x, memory)
        return self.head(self.decoder_norm(x)).transpose(1, 2)  # type: ignore[no-any-return]


def transformer() -> Transformer:
    """Two layers of encoder and decoder, four heads, width 64."""
    return Transformer()
