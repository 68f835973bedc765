"""`fxq.plot`: figures show what was measured, without pyplot, and bad input is told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import fxq
from fxq.attribution import attribute, attribution_json
from fxq.attribution import waterfall as falls_of
from fxq.compiler import Result
from fxq.errors import ArtifactError, CalibrationError, SpecError, UnknownNameError
from fxq.models_zoo import tiny_conv
from fxq.quant.observers import HistogramObserver, RangeObserver
from fxq.quant.quantizers import ActivationQuantizer
from fxq.training import TrainingOptions, fit

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def small_networks(one_thread: None) -> None:
    """Every test here runs on one thread."""


@pytest.fixture(scope="module")
def result() -> Result:
    return fxq.compile(tiny_conv(), IMAGES[:1], "aciq-4bit", calibration=[IMAGES])


@pytest.fixture(scope="module")
def run(result: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tiny"
    result.artifact.save(folder)
    layers = attribute(result.program, [IMAGES])
    (folder / "attribution.json").write_text(json.dumps(attribution_json(result.journal, layers)))
    figures = {
        "conv1": {"layer": {"path": "conv1", "bits": "8/8"}, "alone": {"sqnr": 40.0}},
        "conv2": {"layer": {"path": "conv2", "bits": "4/4"}, "alone": {"sqnr": 20.0}},
        "fc": {"alone": {"sqnr": "exact"}},
    }
    (folder / "analysis.json").write_text(json.dumps({"layers": figures}))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    images = torch.randn(20, 3, 8, 8)
    samples = TensorDataset(images, (images.mean((1, 2, 3)) > 0).long())
    recipe = "adaptive-fixed-point"
    module = fxq.compile(tiny_conv(), torch.zeros(1, 3, 8, 8), recipe).module
    fit(module, samples, TrainingOptions(epochs=2, batch_size=8), folder=folder / "training")
    return folder


def words(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


# ---- histograms --------------------------------------------------------------------------------


def test_the_bars_of_a_histogram_hold_every_value() -> None:
    observer = HistogramObserver()
    values = torch.tensor([-1.0, 0.2, 0.2, 0.7, 1.6, 9.0])
    observer(values)
    grid = ActivationQuantizer(torch.tensor(0.5), torch.tensor(0), 2)
    (axes,) = fxq.plot.histogram(observer, quantizer=grid).axes
    held = {bars.get_label(): sum(bar.get_height() for bar in bars) for bars in axes.containers}
    assert held == {"values": 3, "clipped": 3}  # 0 to 1.5: beyond are -1, 1.6 and 9
    assert [line.get_xdata()[0] for line in axes.lines[:2]] == [0.0, 1.5]
    assert list(axes.lines[2].get_xdata()) == [0.0, 0.5, 1.0, 1.5]
    assert sum(bar.get_height() for bar in fxq.plot.histogram(observer).axes[0].patches) == 6


def test_a_histogram_of_a_run_shows_its_quantizer(result: Result, run: Path) -> None:
    quantizers = result.journal.values.quantizers
    name = next(one for one in quantizers if quantizers[one]["bits"] == 4)
    (axes,) = fxq.plot.histogram(run, name).axes
    watched = axes.get_xlabel().removesuffix(f", rounded by {name}")
    seen = result.journal.values.observed[watched]
    assert sum(bar.get_height() for bar in axes.patches) == seen["count"]
    assert "16 levels" in words(axes)
    assert "made 0 by the ReLU" in words(axes)
    ends = [line.get_xdata()[0] for line in axes.lines[:2]]
    assert ends == [quantizers[name]["low"], quantizers[name]["high"]]
    (same,) = fxq.plot.histogram(result, watched).axes
    assert same.get_xlabel() == axes.get_xlabel()


def test_a_histogram_of_weights() -> None:
    plain = ["quantize-aciq.bias_correction=none"]  # 15 codes are few enough to be kept
    result = fxq.compile(tiny_conv(), IMAGES[:1], "aciq-4bit", calibration=[IMAGES], settings=plain)
    (axes,) = fxq.plot.histogram(result.journal, "conv2", weights=True).axes
    layer = result.program.module.get_submodule("conv2")
    assert sum(bar.get_height() for bar in axes.patches) == layer.codes.numel()
    assert set(axes.lines[0].get_xdata()) == set(layer.codes.unique().tolist())


def test_channel_ranges_are_those_of_the_weights(result: Result, run: Path) -> None:
    layer: Any = result.program.module.get_submodule("conv2")
    for above, below in (
        fxq.plot.channel_ranges(layer).axes,
        fxq.plot.channel_ranges(run, "conv2").axes,
    ):
        weights = layer.layer.weight.detach().flatten(1)
        segments = above.collections[0].get_segments()
        lines = torch.tensor([[float(end[1]) for end in segment] for segment in segments])
        wanted = torch.stack([weights.amin(1), weights.amax(1)], dim=1)
        torch.testing.assert_close(lines, wanted, rtol=1e-3, atol=0)
        assert [bar.get_height() for bar in below.patches] == layer.bits.tolist()


# ---- error -------------------------------------------------------------------------------------


def test_the_waterfall_ends_at_the_error_of_the_integers(result: Result, run: Path) -> None:
    falls = falls_of(result.journal)
    for source in (result, result.artifact, run):
        (axes,) = fxq.plot.waterfall(source).axes
        assert [label.get_text() for label in axes.get_yticklabels()] == [f.name for f in falls]
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([f.part for f in falls])
        last = axes.patches[-1]
        assert last.get_x() + last.get_width() == pytest.approx(falls[-1].drift.error)


def test_the_waterfall_of_an_analysis_needs_no_journal(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "attribution.json", tmp_path)
    alone, whole = (fxq.plot.waterfall(one).axes[0].patches for one in (tmp_path, run))
    assert [bar.get_width() for bar in alone] == [bar.get_width() for bar in whole]


def test_an_error_that_is_not_finite_has_no_bar(tmp_path: Path) -> None:
    falls = [{"pass": "a", "error": 0.5}, {"pass": "b", "error": "exact"}]  # an infinity
    (tmp_path / "attribution.json").write_text(json.dumps({"waterfall": falls}))
    (axes,) = fxq.plot.waterfall(tmp_path).axes
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.0]
    assert "not finite" in [text.get_text() for text in axes.texts]


def test_the_most_sensitive_layer_is_at_the_top(run: Path, tmp_path: Path) -> None:
    left, right = fxq.plot.sensitivity(run).axes
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels == ["conv2  4/4", "conv1  8/8", "fc"]
    assert [bar.get_width() for bar in left.patches] == [20.0, 40.0, 0.0]
    assert [text.get_text() for text in left.texts] == ["20.0 dB", "40.0 dB", "exact"]
    assert left.yaxis_inverted()
    assert right.yaxis_inverted()
    assert words(right) == ["weight", "clipping", "rounding"]
    shutil.copy(run / "analysis.json", tmp_path)
    assert len(fxq.plot.sensitivity(tmp_path / "analysis.json").axes) == 1


# ---- training ----------------------------------------------------------------------------------


def test_training_curves_and_widths(trained: Path) -> None:
    for folder in (trained, trained / "training"):
        loss, accuracy, *_ = fxq.plot.training_curves(folder).axes
        assert len(loss.lines[0].get_xdata()) == 2 * 2  # epochs, whole batches of 20 images
        assert words(accuracy) == ["train accuracy", "test accuracy"]
        shares, frequency = fxq.plot.bit_widths(folder).axes
        assert shares.get_ylim() == (0, 1)
        assert words(frequency) == ["weights", "values", "gradients"]


# ---- how -----------------------------------------------------------------------------------------


def test_neither_pyplot_nor_a_display(run: Path) -> None:
    code = f"""
import sys, fxq
png = fxq.plot.waterfall({str(run)!r})._repr_png_()
assert png.startswith(b"\\x89PNG") and "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


WRONG: dict[str, tuple[Callable[[Path, Result], Any], type[Exception], str]] = {
    "no run": (lambda run, _: fxq.plot.histogram(run / "x", "y"), ArtifactError, "no journal"),
    "no node": (lambda run, _: fxq.plot.histogram(run), UnknownNameError, "watched value"),
    "a typo": (lambda run, _: fxq.plot.histogram(run, "convv1"), UnknownNameError, "convv1"),
    "no layer": (lambda run, _: fxq.plot.channel_ranges(run, "relu"), UnknownNameError, "layer"),
    "a number": (lambda *_: fxq.plot.waterfall(3), SpecError, "a int is nothing"),
    "a program": (lambda _, r: fxq.plot.histogram(r.program, "x"), SpecError, "a Program is"),
    "only a range": (lambda *_: fxq.plot.histogram(seen(RangeObserver())), SpecError, "range"),
    "nothing seen": (lambda *_: fxq.plot.histogram(HistogramObserver()), CalibrationError, "no"),
    "no analysis": (lambda run, _: fxq.plot.sensitivity(run / "x"), ArtifactError, "no such file"),
    "no log": (lambda run, _: fxq.plot.training_curves(run), ArtifactError, "no such file"),
    "no widths": (lambda run, _: fxq.plot.bit_widths(run), ArtifactError, "no such file"),
}


def seen(observer: Any) -> Any:
    observer(IMAGES)
    return observer


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_told(case: str, run: Path, result: Result) -> None:
    draw, kind, what = WRONG[case]
    with pytest.raises(kind, match=what):
        draw(run, result)


def test_a_run_without_checks_has_nothing_to_show() -> None:
    bare = fxq.compile(tiny_conv(), IMAGES[:1], "minmax-int8", calibration=[IMAGES], check=False)
    with pytest.raises(ArtifactError, match="kept no values"):
        fxq.plot.histogram(bare, "conv1")
    with pytest.raises(SpecError, match="no pass was measured"):
        fxq.plot.waterfall(bare)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": {"a": {}}}', '{"layers": 3}'])
def test_damaged_files_are_told(text: str, tmp_path: Path) -> None:
    for name, draw in (
        ("analysis.json", fxq.plot.sensitivity),
        ("attribution.json", fxq.plot.waterfall),
        ("steps.csv", fxq.plot.training_curves),
        ("widths.csv", fxq.plot.bit_widths),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ArtifactError) as caught:
            draw(tmp_path)
        assert name.partition(".")[0] in str(caught.value.where)
