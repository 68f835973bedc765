"""How far passes move values: measured against runs of the two networks, and blamed on the pass."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, fx, nn

import fxq
from fxq.contracts import output_drift
from fxq.models_zoo import tiny_concat, tiny_residual
from fxq.passes import Calibrate, FoldBatchNorm, InsertObservers, MarkRelu, QuantizeMinmax
from fxq.trail import probe
from fxq.trail.journal import Journal
from fxq.trail.probe import ProbeValues

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
READS = {"x": (), "y": ("x",)}


@pytest.fixture(scope="module", autouse=True)
def small_networks(one_thread: None) -> None:
    """Every test here runs on one thread."""


def drift_of(want: Tensor, have: Tensor) -> Any:
    before, after = (ProbeValues(READS, {"x": want, "y": value}) for value in (want, have))
    return after.moved_from(before)


floats = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=9))
def test_a_drift_is_that_of_an_output(pairs: list[tuple[float, float]]) -> None:
    """Against `output_drift`, which computes in float64 throughout."""
    want, have = torch.tensor(pairs).unbind(1)
    found = drift_of(want, have)
    if torch.equal(want, have):
        assert found == {}
        return
    known = output_drift(want, have)
    assert found["y"].sqnr == pytest.approx(known.sqnr, abs=1e-4)
    assert found["y"].largest == pytest.approx(known.largest, rel=1e-6)


@pytest.mark.parametrize(
    ("want", "have", "sqnr", "largest"),
    [
        ([0.0, 0.0], [0.0, 3.0], -math.inf, 3.0),
        ([1.0, 1.0], [1.0, math.nan], -math.inf, math.inf),
        ([1.0, -math.inf], [1.0, 5.0], -math.inf, math.inf),
        ([1.0, -math.inf], [0.9, -math.inf], 20.0, 0.1),  # as masks of attention have
    ],
)
def test_what_is_no_number(want: Any, have: Any, sqnr: float, largest: float) -> None:
    found = drift_of(torch.tensor(want), torch.tensor(have))["y"]
    assert found.sqnr == pytest.approx(sqnr, abs=1e-4)
    assert found.largest == pytest.approx(largest)


def test_values_of_another_shape_are_left_out() -> None:
    assert drift_of(torch.ones(4), torch.zeros(2)) == {}


@pytest.mark.parametrize("build", [tiny_residual, tiny_concat])
def test_every_value_is_that_of_the_network(build: Any, run_passes: Any) -> None:
    """The first pass against a run of the model with hooks; later ones add up from it."""
    model = build().eval()
    seen: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        module.register_forward_hook(lambda _, __, out, path=path: seen.update({path: out}))
    with torch.no_grad():
        model(IMAGES[:1])
    ran = run_passes([], model, IMAGES[:1])
    found = ProbeValues.of(ran.program).values
    for name, value in found.items():
        path = name.replace("_", ".") if name.replace("_", ".") in seen else name
        if path in seen:
            assert torch.equal(value, seen[path]), name
    assert len(seen.keys() & found.keys()) > 4


def test_a_folded_convolution_stands_for_its_norm(run_passes: Any) -> None:
    passes = [FoldBatchNorm(), MarkRelu(), InsertObservers(), Calibrate(), QuantizeMinmax()]
    ran = run_passes(passes, tiny_residual().eval(), IMAGES[:1], calibration=[IMAGES])
    fold, mark, insert, calibrate, quantize = ran.journal
    assert "stem" in fold.moved
    assert all(one.sqnr > 100 for one in fold.moved.values())
    assert not mark.moved
    assert not insert.moved
    assert not calibrate.moved
    assert 20 < min(one.sqnr for one in quantize.moved.values()) < 60
    added = {change.name for change in quantize.delta.of("added")}
    assert added <= quantize.moved.keys()
    last = ran.program.graph.output_node().all_input_nodes[0].name
    assert quantize.moved[last].sqnr == pytest.approx(quantize.sqnr, abs=1e-3)


def test_only_what_comes_after_a_change_moves(run_passes: Any) -> None:
    class Nudge(fxq.Pass):
        name = "nudge"

        def apply(self, program: Any, edit: Any) -> None:
            program.module.get_submodule("conv2").weight.data[0] += 0.1

    ran = run_passes([Nudge()], tiny_residual().eval(), IMAGES[:1])
    moved = list(ran.step.moved)
    order = [node.name for node in ran.program.nodes()]
    assert moved[0] == "conv2"
    assert set(moved) <= set(order[order.index("conv2") :])


def test_large_values_are_thinned_but_every_channel_is_met(monkeypatch: Any) -> None:
    monkeypatch.setattr(probe, "LARGEST", 64)
    graph = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    run = probe._Kept(graph)
    value = torch.arange(32.0).view(1, 32, 1, 1).expand(1, 32, 16, 16)
    run.run(value)
    kept = run.values["_0"]
    assert 32 < kept.numel() < 96
    assert set(kept.tolist()) == set(range(32))
    run.run(value[:, :1, :4, :4])
    assert run.values["_0"].shape == (1, 1, 4, 4)


def test_nothing_is_measured_without_checks_and_all_is_saved(tmp_path: Path) -> None:
    arguments = (tiny_residual(), IMAGES[:1], "minmax-int8")
    bare = fxq.compile(*arguments, calibration=[IMAGES], check=False)
    assert not any(step.moved for step in bare.journal)
    journal = fxq.compile(*arguments, calibration=[IMAGES]).journal
    journal.save(tmp_path)
    for want, have in zip(journal, Journal.load(tmp_path), strict=True):
        assert want.moved.keys() == have.moved.keys()
        for name, drift in want.moved.items():
            assert have.moved[name].sqnr == pytest.approx(drift.sqnr, rel=1e-3)
            assert have.moved[name].largest == pytest.approx(drift.largest, rel=1e-3)
    data = json.loads((tmp_path / "journal.json").read_text())
    for one in data["steps"]:
        del one["moved"]  # as older runs
    assert all(not step.moved for step in Journal.from_json(data))
