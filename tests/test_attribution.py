"""Where errors come from: parts that add up, and that find what was broken on purpose."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

import fxq
from fxq.attribution import (
    INTEGERS,
    PARTS,
    LayerError,
    attribute,
    attribution_json,
    decibels,
    waterfall,
)
from fxq.compiler import Result
from fxq.contracts import output_drift
from fxq.errors import CalibrationError
from fxq.graph.capture import capture
from fxq.models_zoo import tiny_residual
from fxq.trail.drift import Drift
from fxq.trail.journal import Journal

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def small_networks(one_thread: None) -> None:
    """Every test here runs on one thread."""


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return tiny_residual().eval()


def compiled(model: nn.Module, recipe: str = "aciq-4bit", *settings: str) -> Result:
    return fxq.compile(model, IMAGES[:1], recipe, calibration=[IMAGES], settings=settings)


@pytest.fixture
def result(network: nn.Module) -> Result:
    """Fresh for each test, which may break it."""
    return compiled(network)


def by_path(result: Result, images: Any = IMAGES) -> dict[str, LayerError]:
    return {one.path: one for one in attribute(result.program, [images])}


# ---- the waterfall -----------------------------------------------------------------------------


def test_the_waterfall_adds_up_to_the_error_of_the_integers(
    network: nn.Module, result: Result
) -> None:
    falls = waterfall(result.journal)
    assert [one.name for one in falls] == [*(step.name for step in result.journal), INTEGERS]
    with torch.no_grad():
        want = network(*result.program.probe).double()
        error = result.module(*result.program.probe).double() - want
    total = float(error.square().sum() / want.square().sum())
    added = sum(one.part for one in falls)
    assert added == pytest.approx(total, rel=1e-4)  # float32, in another layout
    assert falls[-1].drift.largest == pytest.approx(float(error.abs().max()), rel=1e-3)
    quantizing = next(one for one in falls if one.name == "quantize-aciq")
    assert quantizing.part == max(one.part for one in falls)
    assert all(abs(one.part) < 1e-9 for one in falls[:4])


def test_the_record_survives_being_saved(result: Result, tmp_path: Any) -> None:
    result.journal.save(tmp_path)
    loaded = Journal.load(tmp_path)
    assert waterfall(loaded) == waterfall(result.journal)
    data = json.loads((tmp_path / "journal.json").read_text())
    del data["integers"], data["steps"][0]["drift"]  # as journals were before
    assert len(waterfall(Journal.from_json(data))) == len(result.journal) - 1


def test_nothing_is_measured_without_checks(network: nn.Module) -> None:
    result = fxq.compile(network, IMAGES[:1], "aciq-4bit", calibration=[IMAGES], check=False)
    assert waterfall(result.journal) == []


def test_drift() -> None:
    want = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
    have = torch.tensor([[1.0, 0.5], [4.0, 0.0]])
    drift = output_drift([want], [have])
    assert (drift.largest, drift.flips, drift.decisions) == (1.5, 1, 2)
    assert drift.error == pytest.approx(2.25 / 21)
    lost = output_drift(want, want * math.nan)
    assert (lost.sqnr, lost.largest, lost.error) == (-math.inf, math.inf, math.inf)
    assert Drift.from_json(json.loads(json.dumps(lost.to_json(), allow_nan=False))) == lost
    plain = output_drift(torch.ones(3), torch.ones(3))
    assert (plain.error, plain.decisions) == (0.0, 0)


# ---- layers ------------------------------------------------------------------------------------


def test_parts_add_up_to_the_error_of_the_layer(network: nn.Module, result: Result) -> None:
    """Against a computation by hand for the layer that reads the input."""
    program = result.program
    found = by_path(result)["stem"]
    layer: Any = program.submodule(program.node(found.node))
    quantizer: Any = program.submodule(program.node(found.quantizers[0]))
    with torch.no_grad():
        want = layer.layer(IMAGES).double()
        own = torch.nn.functional.conv2d(
            quantizer(IMAGES), layer.weight(), layer.layer.bias, padding=layer.layer.padding
        )
    error = float((own.double() - want).square().sum() / want.square().sum())
    assert found.error == pytest.approx(error, rel=1e-4)
    assert found.network == pytest.approx(
        float((layer(quantizer(IMAGES)).double() - want).square().sum() / want.square().sum()),
        rel=1e-4,
    )


def test_float_weights_and_wide_ranges_have_no_part(result: Result) -> None:
    program = result.program
    node = program.node(by_path(result)["conv1"].node)
    layer: Any = program.submodule(node)
    quantizer: Any = program.submodule(program.node(by_path(result)["conv1"].quantizers[0]))
    with torch.no_grad():
        layer.layer.weight.copy_(layer.weight())
        quantizer.scale *= 64
    found = by_path(result)["conv1"]
    assert found.weight == pytest.approx(0, abs=1e-9)
    assert found.clipping == pytest.approx(0, abs=1e-9)
    assert found.rounding > 0.01


def test_a_clip_that_is_too_small_is_named(result: Result) -> None:
    before = by_path(result)
    name = before["conv2"].quantizers[0]
    quantizer: Any = result.program.submodule(result.program.node(name))
    quantizer.scale /= 16
    after = by_path(result)
    assert after["conv2"].clipping > 100 * abs(before["conv2"].clipping)
    assert after["conv2"].clipping > 0.9 * after["conv2"].error
    assert after["stem"] == before["stem"]


def test_batches_are_summed(result: Result) -> None:
    whole = by_path(result)
    halves = {one.path: one for one in attribute(result.program, [IMAGES[:5], (IMAGES[5:],)])}
    for path, one in whole.items():
        values = [getattr(one, part) for part in (*PARTS, "network")]
        assert values == pytest.approx(
            [getattr(halves[path], part) for part in (*PARTS, "network")], rel=1e-3, abs=1e-9
        )


def test_data_is_needed_where_there_are_layers(network: nn.Module, result: Result) -> None:
    with pytest.raises(CalibrationError, match="no batches"):
        attribute(result.program, [])
    assert attribute(capture(network, IMAGES[:1]), [IMAGES]) == []


@pytest.mark.parametrize("recipe", ["minmax-int8", "pot-4bit", "aciq-paper-4w4a"])
def test_other_quantizers(recipe: str, network: nn.Module) -> None:
    """Ranges per channel and ranges found in each batch, which clip nothing outside."""
    result = compiled(network, recipe)
    for one in attribute(result.program, [IMAGES]):
        assert 0 <= one.error < 1
        assert math.isfinite(one.network)


def test_the_file_of_a_run_is_strict_json(result: Result) -> None:
    dead = [LayerError("a", "a", (), 0.0, 0.0, 0.0, math.inf)]
    text = json.dumps(attribution_json(result.journal, dead), allow_nan=False)
    assert {"layers", "waterfall"} == set(json.loads(text))


@pytest.mark.parametrize(("error", "db"), [(0.1, 10.0), (-1e-20, math.inf), (1.0, 0.0)])
def test_decibels(error: float, db: float) -> None:
    assert decibels(error) == pytest.approx(db)
