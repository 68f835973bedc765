"""Widths of fixed-point trainings: logged, drawn, and continued exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fxq
from fxq.models_zoo import tiny_conv
from fxq.quant.fixed_point_layers import FixedPointModule
from fxq.training import TrainingOptions, Watch, fit
from fxq.training.widths import last_widths, read_widths, width_columns

OPTIONS = TrainingOptions(epochs=3, batch_size=8, lr=0.05)


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 3, 8, 8, generator=generator)
    return TensorDataset(images, (images.mean((1, 2, 3)) > 0).long())


def module(recipe: str = "adaptive-fixed-point") -> nn.Module:
    torch.manual_seed(0)
    return fxq.compile(tiny_conv(), torch.zeros(1, 3, 8, 8), recipe).module


def test_each_epoch_logs_every_controller(tmp_path: Path) -> None:
    training = fit(module(), samples(), OPTIONS, folder=tmp_path)
    rows = read_widths(tmp_path / "widths.csv")
    layers = [m for m in training.module.modules() if isinstance(m, FixedPointModule)]
    assert len(rows) == OPTIONS.epochs * len(layers) * 3
    assert {row["tensor"] for row in rows} == {"weights", "values", "gradients"}
    last = [row for row in rows if row["epoch"] == "3"]
    assert all(row["steps"] == "15" for row in last)
    assert (tmp_path / "widths.png").stat().st_size > 1000


def test_the_log_says_how_wide_gradients_are() -> None:
    row = fit(module(), samples(), OPTIONS).rows[-1]
    shares = [row["int8 gradients"], row["int16 gradients"]]
    assert all(share is not None and 0 <= share <= 1 for share in shares)
    assert 0 < float(row["adjusted"] or 0) <= 1


def test_static_baselines_never_change_their_width() -> None:
    for recipe, bits in (("static-int8", 8), ("static-int16", 16)):
        trained = fit(module(recipe), samples(), OPTIONS).module
        assert last_widths(trained) == {
            name: {bits: 1.0} for name in ("weights", "values", "gradients")
        }


def test_float_networks_have_no_widths(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    row = fit(network, samples(), OPTIONS, folder=tmp_path).rows[-1]
    assert not any("gradients" in name for name in row)
    assert not (tmp_path / "widths.csv").exists()
    assert width_columns(network) == {}


def test_a_tenth_of_the_first_epoch_chooses_at_every_step() -> None:
    own = module()
    data = samples()
    options = TrainingOptions(epochs=1, batch_size=2, lr=0.01)
    fit(own, data, options)
    found = [m for m in own.modules() if isinstance(m, FixedPointModule)]
    assert {layer.gradients.options.initial_steps for layer in found} == {2}
    assert all(layer.gradients.adaptation().adjustments >= 2 for layer in found)


@pytest.mark.parametrize("stop", [4, 7, 12])
def test_an_interrupted_training_continues_to_the_same_bits(tmp_path: Path, stop: int) -> None:
    whole = fit(module(), samples(), OPTIONS, folder=tmp_path / "whole")
    seen = 0

    def interrupt(_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(module(), samples(), OPTIONS, folder=tmp_path / "cut", watch=Watch(on_step=interrupt))
    again = fit(module(), samples(), OPTIONS, folder=tmp_path / "cut")
    assert again.continued_at > 0
    assert again.losses == whole.losses
    ours, theirs = again.module.state_dict(), whole.module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    widths = [(tmp_path / name / "widths.csv").read_text() for name in ("whole", "cut")]
    assert widths[0] == widths[1]
