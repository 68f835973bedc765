"""What a run keeps of its observers, its quantizers and its weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from fxq.errors import ArtifactError
from fxq.graph.capture import capture
from fxq.models_zoo import tiny_residual
from fxq.numerics.histogram import Histogram
from fxq.passes import Calibrate, FoldBatchNorm, InsertObservers, MarkRelu, QuantizeAciq
from fxq.passes.insert_observers import Statistics
from fxq.pipeline import Pipeline
from fxq.trail.journal import Journal
from fxq.trail.values import BINS, FILE, Values, binned

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def compiled(check: bool = True, per_channel: bool = False) -> tuple[nn.Module, Journal]:
    program = capture(tiny_residual(), IMAGES[:1])
    program.calibration = [IMAGES]
    passes = (
        FoldBatchNorm(),
        MarkRelu(),
        InsertObservers(Statistics.HISTOGRAM, per_channel=per_channel),
        Calibrate(),
        QuantizeAciq(),
    )
    return program.module, Pipeline(*passes, check=check).run(program)


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_ranges_are_those_of_the_data_though_the_observers_are_gone(per_channel: bool) -> None:
    _, journal = compiled(per_channel=per_channel)
    seen = journal.values.observed["x"]
    assert seen["count"] == IMAGES.numel()
    assert sum(seen["counts"]) == IMAGES.numel()
    assert seen["low"] == pytest.approx(float(IMAGES.min()), rel=1e-3)
    assert seen["high"] == pytest.approx(float(IMAGES.max()), rel=1e-3)
    if per_channel:
        assert seen["channels"]["high"] == pytest.approx(IMAGES.amax((0, 2, 3)).tolist(), rel=1e-3)


def test_quantizers_and_weights_are_those_of_the_module() -> None:
    module, journal = compiled()
    kept = journal.values
    assert kept.quantizers
    for name, spec in kept.quantizers.items():
        quantizer = module.get_submodule(name)
        reached = quantizer(torch.tensor([-1e6, 1e6])).tolist()
        assert [spec["low"], spec["high"]] == pytest.approx(reached, rel=1e-3, abs=1e-9)
        assert spec["bits"] == quantizer.bits
    assert {"conv1", "conv2"} <= set(kept.layers)
    for name, spec in kept.layers.items():
        layer = module.get_submodule(name)
        weight = layer.layer.weight.detach().flatten(1)
        assert spec["low"] == pytest.approx(weight.amin(1).tolist(), rel=1e-3)
        assert spec["high"] == pytest.approx(weight.amax(1).tolist(), rel=1e-3)
        assert sum(spec["counts"]) == weight.numel()
        assert set(spec.get("levels", [])) <= set(layer.codes.unique().tolist())


def test_nothing_is_kept_without_checks() -> None:
    assert not compiled(check=False)[1].values


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50), st.integers(1, 3))
def test_bins_hold_every_value_where_it_belongs(values: list[float], rows: int) -> None:
    x = torch.tensor(values)
    histogram = Histogram(channels=rows) if rows > 1 else Histogram()
    histogram.update(x.repeat(rows, 1).t() if rows > 1 else x)
    found = binned(histogram)
    assert len(found["counts"]) <= BINS
    assert sum(found["counts"]) == len(values) * rows
    assert math.log2(found["width"]).is_integer()
    for index, count in enumerate(found["counts"]):
        left = found["start"] + index * found["width"]
        inside = int(((x.double() >= left) & (x.double() < left + found["width"])).sum())
        assert count == inside * rows


def test_values_are_read_back_with_the_journal(tmp_path: Path) -> None:
    _, journal = compiled()
    journal.save(tmp_path)
    assert Journal.load(tmp_path).values == journal.values
    (tmp_path / FILE).unlink()
    assert not Journal.load(tmp_path).values


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 9}', '{"format": 1, "layers": 2}'])
def test_damage_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ArtifactError, match="values"):
        Values.load(tmp_path)


def test_later_values_win() -> None:
    early = Values(observed={"x": {"low": 0}, "y": {"low": 1}})
    assert early.joined(Values(observed={"x": {"low": 2}})).observed == {
        "x": {"low": 2},
        "y": {"low": 1},
    }


def test_what_is_kept_is_json() -> None:
    text = json.dumps(compiled()[1].values.to_json(), allow_nan=False)
    assert "NaN" not in text
