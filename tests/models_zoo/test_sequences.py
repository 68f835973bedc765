"""The generated sequences, and the networks that learn to rewrite them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset

from fxq.errors import DataError, UnknownNameError
from fxq.graph.capture import capture
from fxq.models_zoo import SequenceData, builtin_data, evaluate_top1, lookup, sequence_data
from fxq.models_zoo.sequence_recurrent import GruCell, LstmCell
from fxq.models_zoo.sequence_transformer import Attention
from fxq.models_zoo.sequences import START, translated
from fxq.training import TrainingOptions, fit

NAMES = ("sequence/transformer", "sequence/lstm", "sequence/gru")


@pytest.fixture(scope="module")
def train_data() -> SequenceData:
    return sequence_data("train")


# ---- data --------------------------------------------------------------------------------------


def test_the_rule_is_a_permutation_that_the_token_before_chooses(train_data: SequenceData) -> None:
    """Read off the sequences themselves: nothing but the two tokens decides."""
    known: dict[tuple[int, int], int] = {}
    pairs, targets = next(train_data.batches(4096))
    for source, target in zip(pairs[:, 0].flip(1).tolist(), targets.tolist(), strict=True):
        for before, read, token in zip([START, *target], source, target, strict=False):
            assert known.setdefault((before, read), token) == token
    rows = {before: [known[before, read] for read in range(16)] for before in range(17)}
    assert all(sorted(row) == list(range(16)) for row in rows.values())
    assert len({tuple(row) for row in rows.values()}) == 17


def test_a_pair_is_the_source_and_the_target_one_step_late(train_data: SequenceData) -> None:
    pair, target = train_data[5]
    assert torch.equal(translated(pair[:1])[0], target)
    assert pair[1].tolist() == [START, *target[:-1].tolist()]
    assert (pair.dtype, target.dtype) == (torch.int64, torch.int64)
    assert (len(train_data), len(sequence_data("test"))) == (16384, 2048)
    assert train_data.describe() == "rewriting train: 16384 sequences of 12, 16 tokens"


def test_splits_are_the_same_each_time_and_share_nothing(train_data: SequenceData) -> None:
    before = torch.get_rng_state()
    again = sequence_data("train")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.labels, train_data.labels)
    sources = {tuple(pair[0].tolist()) for pair, _ in sequence_data("test")}
    assert not sources & {tuple(pair[0].tolist()) for pair, _ in train_data}


def test_batches_are_drawn_as_those_of_images(train_data: SequenceData) -> None:
    batches = list(train_data.batches(40, limit=100, seed=3))
    assert [len(labels) for _, labels in batches] == [40, 40, 20]
    again = torch.cat([pairs for pairs, _ in train_data.batches(100, limit=100, seed=3)])
    assert torch.equal(torch.cat([pairs for pairs, _ in batches]), again)
    in_order, _ = next(train_data.batches(4, start=2))
    assert torch.equal(in_order[0], train_data[2][0])


def test_impossible_requests(train_data: SequenceData) -> None:
    with pytest.raises(DataError, match="at least 1"):
        next(train_data.batches(0))
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        sequence_data("trian")
    with pytest.raises(UnknownNameError, match="did you mean 'rewriting'"):
        builtin_data("rewritng", "train")


# ---- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_networks_fit_their_data_and_are_captured(name: str, train_data: SequenceData) -> None:
    entry = lookup(name)
    network, example = entry.build(), entry.example()
    assert (example.dtype, example.shape) == (torch.int64, entry.input_shape)
    program = capture(network, example)
    pairs, targets = next(train_data.batches(5))
    with torch.no_grad():
        logits = network(pairs)
        assert torch.equal(program.module(pairs), logits)  # of another batch size
    assert logits.shape == (5, 16, 12)
    assert type(builtin_data(entry.data, "test")) is SequenceData
    assert int(targets.max()) < logits.shape[1]
    assert 0.2e6 < sum(p.numel() for p in network.parameters()) < 0.5e6


@pytest.mark.parametrize("name", NAMES)
def test_a_token_is_told_from_those_before_it_only(name: str, train_data: SequenceData) -> None:
    network = lookup(name).build()
    pairs, _ = next(train_data.batches(3))
    other = pairs.clone()
    other[:, 1, 7] = (other[:, 1, 7] + 1) % 16
    with torch.no_grad():
        one, two = network(pairs), network(other)
    changed = (one != two).any(dim=1).any(dim=0).tolist()
    assert changed == [False] * 7 + [True] * 5


@pytest.mark.parametrize("name", NAMES)
def test_a_few_sequences_are_learned_by_heart(
    name: str, train_data: SequenceData, one_thread: None
) -> None:
    """Chance is ln 16 = 2.77; the rule itself takes some hundred steps more."""
    options = TrainingOptions(
        epochs=60,
        batch_size=32,
        lr=0.1 if name == "sequence/transformer" else 0.5,
        warmup=10,
        clip_gradients=1.0,
    )
    losses = fit(lookup(name).build(), Subset(train_data, range(32)), options).losses
    assert losses[0] > 2.5
    assert losses[-1] < 1.9


@pytest.mark.parametrize(("cell", "module"), [(LstmCell, "LSTM"), (GruCell, "GRU")])
def test_cells_compute_what_torch_does(cell: type, module: str) -> None:
    ours, theirs = cell(6), getattr(torch.nn, module)(6, 6, batch_first=True)
    order = [0, 1, 3, 2] if module == "LSTM" else [0, 1, 2]  # torch: candidate before output
    with torch.no_grad():
        for name, linear in (("ih", ours.input_projection), ("hh", ours.hidden_projection)):
            weight = getattr(theirs, f"weight_{name}_l0")
            weight.copy_(torch.cat([linear.weight.chunk(len(order))[one] for one in order]))
            getattr(theirs, f"bias_{name}_l0").zero_()
        ours.input_projection.bias.zero_()
        inputs = torch.randn(3, 5, 6)
        expected, _ = theirs(inputs)
        steps = ours.input_projection(inputs).unbind(1)
        states = [ours.first(steps[0])]
        for step in steps[1:]:
            states.append(ours(step, states[-1]))
    found = torch.stack([state[0] for state in states], dim=1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_computes_what_torch_does(is_causal: bool) -> None:
    ours = Attention(8, 2, is_causal)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    parts = [ours.query, ours.key, ours.value]
    x, memory = torch.randn(3, 12, 8), torch.randn(3, 12, 8)
    mask = torch.ones(12, 12, dtype=torch.bool).triu(1) if is_causal else None
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
        expected, _ = theirs(x, memory, memory, attn_mask=mask)
        torch.testing.assert_close(ours(x, memory), expected)


def test_every_token_counts_in_accuracy() -> None:
    data = sequence_data("test")

    class Oracle(torch.nn.Module):
        """Right but for the last token."""

        def forward(self, pairs: Tensor) -> Tensor:
            logits = torch.nn.functional.one_hot(translated(pairs[:, 0]), 16).float()
            logits[:, -1] *= -1
            return logits.transpose(1, 2)

    found = evaluate_top1(Oracle(), data, limit=100)
    assert (found.correct, found.total) == (1100, 1200)
    with pytest.raises(DataError, match=r"gives \[128, 16\]"):
        evaluate_top1(torch.nn.Sequential(Oracle(), Last()), data)


class Last(torch.nn.Module):
    """Keeps the logits of the last token only."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, :, -1]
