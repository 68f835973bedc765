"""``fxq train`` of networks of the zoo that have no weights: from scratch, images or sequences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fxq.model_file import load_model

SMALL = ("--epochs", "1", "-b", "32", "--threads", "1", "--calibration-images", "32", "-o", "out")


def test_sequences_from_scratch(fxq: Callable, tmp_path: Path) -> None:
    done = fxq(
        "train", "sequence/gru", "-r", "apot-4bit", "-n", "64", "--eval-images", "10", *SMALL
    )
    assert done.code == 0, done.err
    assert "training on 64 of 16384 sequences of rewriting train" in done.out
    assert "the weights are random" not in done.err  # they are what is trained
    model = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert model["model"]["data"] == "rewriting"
    assert model["accuracy"]["trained"]["total"] == 120
    again = fxq("eval", "out", "--limit", "10")
    assert again.code == 0, again.err
    assert f"({model['accuracy']['compiled']['correct']} of 120)" in again.out


def test_a_network_of_tokens_is_given_tokens() -> None:
    (example,) = load_model("sequence/lstm", input_shape=(4, 2, 12)).example_inputs
    assert example.shape == (4, 2, 12)
    assert (example >= 0).all()
    assert (example <= 16).all()
