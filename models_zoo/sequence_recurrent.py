"""Sequence to sequence with LSTM or GRU, whose steps are written out as linears and gates.

Papers:
    Sutskever, Vinyals, Le, "Sequence to sequence learning with neural networks", NeurIPS 2014,
    arXiv:1409.3215. Attention: Luong, Pham, Manning, "Effective approaches to attention-based
    neural machine translation", EMNLP 2015, arXiv:1508.04025, section 3.1, score "dot".
    Residual connections: Wu et al., "Google's neural machine translation system",
    arXiv:1609.08144, section 3.1.
    GRU: Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014,
    arXiv:1406.1078, with the reset gate after the product as in cuDNN and `torch.nn.GRU`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .catalog import SEQUENCE_LENGTH, VOCABULARY

State = tuple[Tensor, ...]
"""What a step hands to the next: each ``[N, width]``, the first of them its output."""


class Cell(nn.Module):
    """One step of a recurrent network: gates of the input, and of the output before.

    Args:
        width: Numbers per step, in and out.
        gates: Number of gates.
    """

    def __init__(self, width: int, gates: int) -> None:
        super().__init__()
        self.input_projection = nn.Linear(width, gates * width)
        self.hidden_projection = nn.Linear(width, gates * width, bias=False)

    def first(self, projected: Tensor) -> State:
        """The state after the first step, as if zeros had come before.

        Args:
            projected: ``[N, gates * width]``, the projection of the input.
        """
        raise NotImplementedError

    def forward(self, projected: Tensor, state: State) -> State:
        """The state after a step.

        Args:
            projected: ``[N, gates * width]``, the projection of the input.
            state: What the step before gave.
        """
        raise NotImplementedError


class LstmCell(Cell):
    """Long short-term memory; its state is the output and the cell."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 4)

    def first(self, projected: Tensor) -> State:
        """The state after the first step, as if zeros had come before."""
        enter, _, out, candidate = projected.chunk(4, dim=1)
        cell = torch.sigmoid(enter) * torch.tanh(candidate)
        return torch.sigmoid(out) * torch.tanh(cell), cell

    def forward(self, projected: Tensor, state: State) -> State:
        """The state after a step."""
        hidden, cell = state
        gates = projected + self.hidden_projection(hidden)
        enter, keep, out, candidate = gates.chunk(4, dim=1)
        cell = torch.sigmoid(keep) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
        return torch.sigmoid(out) * torch.tanh(cell), cell


class GruCell(Cell):
    """Gated recurrent unit; its state is its output."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3)

    def first(self, projected: Tensor) -> State:
        """The state after the first step, as if zeros had come before."""
        _, update, candidate = projected.chunk(3, dim=1)
        return ((1 - torch.sigmoid(update)) * torch.tanh(candidate),)

    def forward(self, projected: Tensor, state: State) -> State:
        """The state after a step."""
        (hidden,) = state
        reset, update, candidate = projected.chunk(3, dim=1)
        old_reset, old_update, old_candidate = self.hidden_projection(hidden).chunk(3, dim=1)
        share = torch.sigmoid(update + old_update)
        fresh = torch.tanh(candidate + torch.sigmoid(reset + old_reset) * old_candidate)
        return ((1 - share) * fresh + share * hidden,)


class Seq2Seq(nn.Module):
    """``[N, 2, T]`` int64, source and the target one step late, to logits ``[N, tokens, T]``.

    The decoder begins where the encoder ended, and attends to what the encoder gave. What both
    give is added to what they read, so that the network need not keep tokens in its state.

    Args:
        encoder: Reads the source.
        decoder: Reads the target; of the same kind and width.
        width: Numbers per step.
    """

    def __init__(self, encoder: Cell, decoder: Cell, width: int) -> None:
        super().__init__()
        self.source_embedding = nn.Embedding(VOCABULARY + 1, width)
        self.target_embedding = nn.Embedding(VOCABULARY + 1, width)
        self.encoder = encoder
        self.decoder = decoder
        self.mix = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, pairs: Tensor) -> Tensor:
        """The logits of the target's tokens."""
        source, target = self.source_embedding(pairs[:, 0]), self.target_embedding(pairs[:, 1])
        encoded, state = _unrolled(self.encoder, source, None)
        decoded, _ = _unrolled(self.decoder, target, state)
        weights = torch.softmax(torch.matmul(decoded, encoded.transpose(1, 2)), dim=-1)
        context = torch.matmul(weights, encoded + source)
        mixed = torch.relu(self.mix(torch.cat([context, decoded + target], dim=2)))
        return self.head(mixed).transpose(1, 2)  # type: ignore[no-any-return]


def _unrolled(cell: Cell, inputs: Tensor, state: State | None) -> tuple[Tensor, State]:
    """The outputs ``[N, T, width]`` of all steps, and the last state."""
    projected = cell.input_projection(inputs)
    outputs = []
    for step in range(SEQUENCE_LENGTH):
        now = projected[:, step]
        state = cell.first(now) if state is None else cell(now, state)
        outputs.append(state[0])
    assert state is not None  # a sequence has a first step
    return torch.stack(outputs, dim=1), state


def lstm(width: int = 128) -> Seq2Seq:
    """LSTM encoder and decoder of one layer, with attention."""
    return Seq2Seq(LstmCell(width), LstmCell(width), width)


def gru(width: int = 128) -> Seq2Seq:
    """GRU encoder and decoder of one layer, with attention."""
    return Seq2Seq(GruCell(width), GruCell(width), width)
