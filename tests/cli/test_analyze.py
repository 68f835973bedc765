"""``fxq analyze``: both ways, what it writes, and taking up where it stopped."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxq.cli import analyze
from fxq.contracts import output_sqnr
from fxq.models_zoo import evaluate_top1, lookup

Fxq = Callable[..., Any]
DIGITS = ("analyze", "digits/convnet", "-n", "64", "--sample", "8", "-o", "out")


def record(folder: Path) -> Any:
    return json.loads((folder / "out/analysis.json").read_text())


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, invoke: Fxq) -> tuple[Path, Any]:
    """A folder and what analyzing into it said."""
    folder = tmp_path_factory.mktemp("analyze")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        outcome = invoke(*DIGITS, "--eval-images", "50")
    assert outcome.code == 0, outcome.err
    return folder, outcome


def test_the_most_sensitive_layer_is_first(done: tuple[Path, Any]) -> None:
    folder, outcome = done
    rows = table(folder / "out/analysis.csv")
    sqnrs = [float(row["alone.sqnr"]) for row in rows]
    assert sqnrs == sorted(sqnrs)
    shown = [line.partition(" ")[0] for line in outcome.out.splitlines()]
    paths = [row["path"] for row in rows]
    assert [word for word in shown if word in paths] == paths
    assert {row["weight_bits"] for row in rows} == {"4", "8"}
    assert (folder / "out/analysis.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_figures_are_those_of_networks_made_by_hand(done: tuple[Path, Any]) -> None:
    """Alone and without, by putting float modules into the program by hand."""
    folder, _ = done
    found = record(folder)["layers"]
    request = analyze.Request("digits/convnet", images=64, sample=8, eval_images=50)
    with analyze.Meter() as meter:
        lab = analyze.opened(request, meter)
    module, model = lab.result.program.module, lab.subject.model.module
    inputs = lab.batches[0]
    own = dict(module.named_children())
    layer = next(name for name in own if getattr(own[name], "fxq_kind", "") == "conv")
    reads = next(n for n in module.graph.nodes if n.target == layer).all_input_nodes[0].target
    swaps = {
        "without": {layer: own[layer].layer, reads: torch.nn.Identity()},
        "alone": {
            name: one.layer if hasattr(one, "layer") else torch.nn.Identity()
            for name, one in own.items()
            if name not in (layer, reads) and hasattr(one, "bits")
        },
    }
    for way, changes in swaps.items():
        for name, one in changes.items():
            module.set_submodule(name, one)
        with torch.no_grad():
            sqnr = output_sqnr(model(*inputs), module(*inputs))
        assert found[layer][way]["sqnr"] == pytest.approx(sqnr, rel=1e-4)
        images = analyze_images()
        assert found[layer][way]["score"] == 100 * evaluate_top1(module, images, limit=50).top1
        for name in changes:
            module.set_submodule(name, own[name])


def analyze_images() -> Any:
    from fxq.models_zoo import builtin_data

    return builtin_data(lookup("digits/convnet").data, "test")


def test_parts_and_metrics(done: tuple[Path, Any]) -> None:
    folder, _ = done
    for row in table(folder / "out/analysis.csv"):
        parts = [float(row[part]) for part in ("weight", "clipping", "rounding")]
        assert sum(parts) == pytest.approx(float(row["error"]))
        assert 0 < float(row["weights.m2"]) < 1
        assert 0 <= float(row["values.m1"]) < float(row["values.m2"])
    attribution = json.loads((folder / "out/attribution.json").read_text())
    falls = attribution["waterfall"]
    assert [one["pass"] for one in falls][-1] == "lower"
    assert sum(one["part"] for one in falls) == pytest.approx(falls[-1]["error"])
    assert len(attribution["layers"]) == len(record(folder)["layers"])


def test_what_is_finished_is_not_measured_again(
    fxq: Fxq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[list[str]] = []
    figures = analyze.figures_of

    def counting(lab: Any, nodes: Any, progress: Any) -> Any:
        measured.append(list(nodes))
        for done, one in enumerate(figures(lab, nodes, progress)):
            if len(measured) == 1 and done == 1:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(analyze, "figures_of", counting)
    assert fxq(*DIGITS).code == 130
    kept = record(tmp_path)["layers"]
    assert len(kept) == 1
    done = fxq(*DIGITS)
    assert done.code == 0, done.err
    assert "1 of them known" in done.out
    assert measured[1] == measured[0][1:]
    assert {**record(tmp_path)["layers"], **kept} == record(tmp_path)["layers"]
    assert not list((tmp_path / "out").glob("*.new"))
    other = fxq(*DIGITS, "--set", "weight_bits=3")
    assert (other.code, "another recipe" in other.err) == (2, True)
    (tmp_path / "out/analysis.json").write_text("{")
    assert "--force" in fxq(*DIGITS).err
    assert fxq(*DIGITS, "--force").code == 0


@pytest.mark.slow
def test_processes_find_the_same(fxq: Fxq, tmp_path: Path, done: tuple[Path, Any]) -> None:
    outcome = fxq(*DIGITS, "--eval-images", "50", "--processes", "2")
    assert outcome.code == 0, outcome.err
    assert record(tmp_path)["layers"] == record(done[0])["layers"]


def test_a_run_keeps_its_own_analysis(fxq: Fxq, tmp_path: Path, digits_run: Path) -> None:
    shutil.copytree(digits_run, tmp_path / "run")
    done = fxq("analyze", "run", "--sample", "8", "--eval-images", "50")
    assert done.code == 0, done.err
    assert (tmp_path / "run/attribution.json").is_file()
    falls = json.loads((tmp_path / "run/attribution.json").read_text())["waterfall"]
    steps = json.loads((tmp_path / "run/journal.json").read_text())["steps"]
    assert [one["sqnr_db"] for one in falls[:-1]] == [
        value if isinstance(value := step["total_sqnr"], float) else None for step in steps
    ]
    assert fxq("eval", "run", "--limit", "20").code == 0
    assert fxq("compile", "digits/convnet", "-n", "16", "-o", "run", "--force").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing/here",), "nothing/here"),
        (("digits/convnet", "-r", "apot-4bit"), "to be trained"),
        (("tiny/conv",), "no calibration data"),
        (("digits/convnet", "-c", "nowhere.npz"), "nowhere.npz"),
        (("empty",), "no run"),
    ],
    ids=["name", "training", "no data", "no file", "no run"],
)
def test_errors(fxq: Fxq, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "empty").mkdir()
    done = fxq("analyze", *arguments)
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "analyses").exists()


def test_a_network_without_labels(fxq: Fxq, tmp_path: Path) -> None:
    done = fxq("analyze", "tiny/residual", "-c", "random", "-n", "8", "--sample", "4", "-o", "out")
    assert done.code == 0, done.err
    assert "top-1" not in done.out
    assert set(record(tmp_path)["layers"]["conv1"]["alone"]) == {"sqnr"}


def test_samples_are_cut_small() -> None:
    batches = [torch.zeros(6, 3, 300, 300), (torch.zeros(6, 3, 300, 300), torch.zeros(6))]
    found = analyze.sample_of(batches, 1, 8)
    assert [len(one[0]) for one in found] == [1] * 8
    assert all(len(one) == 1 for one in found)
    assert [len(one[0]) for one in analyze.sample_of([torch.zeros(50, 4)], 1, 20)] == [20]
