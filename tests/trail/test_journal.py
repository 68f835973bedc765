"""The journal: written, read back, and told apart from damaged ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fxq.errors import ArtifactError, UnknownNameError
from fxq.graph.capture import capture
from fxq.graph.rewrite import Miss
from fxq.models_zoo import tiny_residual
from fxq.passes import (
    Calibrate,
    FoldBatchNorm,
    InsertObservers,
    MarkRelu,
    QuantizeAciq,
    QuantizeMinmax,
)
from fxq.passes.insert_observers import Statistics
from fxq.pipeline import Pipeline
from fxq.trail.journal import Journal, Step, format_db
from fxq.trail.snapshot import NodeRecord, Snapshot

EMPTY = Snapshot((NodeRecord("x", "Input"),))


@pytest.fixture(scope="module")
def journal() -> Journal:
    program = capture(tiny_residual(), torch.randn(2, 3, 8, 8))
    program.calibration = [torch.randn(4, 3, 8, 8)]
    return Pipeline(
        FoldBatchNorm(),
        MarkRelu(),
        InsertObservers(statistics=Statistics.HISTOGRAM),
        Calibrate(),
        QuantizeAciq(weight_bits=5),
    ).run(program)


def step(**values: Any) -> Step:
    return Step("mine", {}, "same-numbers", EMPTY, EMPTY, **values)


def test_steps_by_name_and_position(journal: Journal) -> None:
    assert len(journal) == 5
    assert journal.steps[0].name == "fold-batch-norm"
    assert journal[0] is journal["fold-batch-norm"]
    assert journal[-1].name == "quantize-aciq"
    with pytest.raises(UnknownNameError) as caught:
        journal["fold-batchnorm"]
    assert caught.value.hint == "did you mean 'fold-batch-norm'?"


def test_the_last_step_of_a_name_is_found() -> None:
    journal = Journal([step(seconds=1.0), step(seconds=2.0)])
    assert journal["mine"].seconds == 2.0


def test_snapshots_are_chained(journal: Journal) -> None:
    for earlier, later in zip(journal, list(journal)[1:], strict=False):
        assert earlier.after is later.before


def test_text(journal: Journal) -> None:
    lines = str(journal).splitlines()
    assert lines[0].split()[:2] == ["1", "fold-batch-norm"]
    assert "-3 removed  ~3 rewired  #3 retuned" in lines[0]
    assert "exact" in lines[1]
    assert lines[4].split()[-4].replace(".", "").isdigit()
    assert str(Journal()) == "no pass has run"


def test_round_trip(journal: Journal, tmp_path: Path) -> None:
    journal.save(tmp_path / "run")
    loaded = Journal.load(tmp_path / "run")
    for want, got in zip(journal, loaded, strict=True):
        assert got.before == want.before
        assert got.after == want.after
        assert got.delta == want.delta
        assert (got.hits, got.misses, got.notes) == (want.hits, want.misses, want.notes)
        assert (got.sqnr, got.total_sqnr) == (want.sqnr, want.total_sqnr)
        assert got.seconds == pytest.approx(want.seconds, abs=1e-4)
        assert got.options == want.options
        assert got.contract == want.contract
    assert journal["quantize-aciq"].options["weight_bits"] == 5
    assert loaded["insert-observers"].options["statistics"] == "histogram"


def test_numbered_files(journal: Journal, tmp_path: Path) -> None:
    journal.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00-capture.txt",
        "01-fold-batch-norm.txt",
        "02-mark-relu.txt",
        "03-insert-observers.txt",
        "04-calibrate.txt",
        "05-quantize-aciq.txt",
        "journal.json",
        "values.json",
    ]
    assert (tmp_path / "02-mark-relu.txt").read_text() == journal["mark-relu"].after.text() + "\n"


def test_the_json_is_strict_and_stores_each_snapshot_once(journal: Journal, tmp_path: Path) -> None:
    journal.save(tmp_path)

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    data = json.loads((tmp_path / "journal.json").read_text(), parse_constant=refuse)
    assert len(data["snapshots"]) == len(data["steps"]) + 1
    assert data["format"] == 1


@pytest.mark.parametrize("value", [None, 12.5, -3.0, math.inf, -math.inf])
def test_every_ratio_survives(value: float | None, tmp_path: Path) -> None:
    Journal([step(sqnr=value, total_sqnr=value)]).save(tmp_path)
    loaded = Journal.load(tmp_path)[0]
    assert loaded.sqnr == value
    assert loaded.total_sqnr == value


def test_ratios_for_people() -> None:
    assert format_db(None) == ""
    assert format_db(31.44) == "31.4 dB"
    assert format_db(math.inf) == "exact"
    assert format_db(-math.inf) == "not finite"


def test_misses_survive(tmp_path: Path) -> None:
    Journal([step(misses=(Miss("bn", "it reads %add — “no” conv"),))]).save(tmp_path)
    assert Journal.load(tmp_path)[0].misses == (Miss("bn", "it reads %add — “no” conv"),)
    assert str(Journal.load(tmp_path)[0].misses[0]).startswith("%bn: it reads")


def test_the_code_survives_and_older_runs_have_none(journal: Journal, tmp_path: Path) -> None:
    journal.save(tmp_path)
    loaded = Journal.load(tmp_path)
    assert [step.after.code for step in loaded] == [step.after.code for step in journal]
    assert "bn1" in loaded[0].before.code
    assert "bn1" not in loaded[0].after.code
    data = json.loads((tmp_path / "journal.json").read_text())
    del data["code"]
    for graph in data["snapshots"]:
        for node in graph:
            del node["path"]
    old = Journal.from_json(data)
    assert old[0].after.code == old[0].after.nodes[0].path == ""


def test_an_empty_journal_survives(tmp_path: Path) -> None:
    Journal().save(tmp_path)
    assert len(Journal.load(tmp_path)) == 0


def test_a_second_run_in_the_folder_leaves_nothing_of_the_first(
    journal: Journal, tmp_path: Path
) -> None:
    journal.save(tmp_path)
    Journal(journal.steps[:1]).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00-capture.txt",
        "01-fold-batch-norm.txt",
        "journal.json",
    ]


# ---- damage ----------------------------------------------------------------------------------


def test_a_missing_journal(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no journal here") as caught:
        Journal.load(tmp_path / "nowhere")
    assert caught.value.where == str(tmp_path / "nowhere" / "journal.json")


DAMAGE = {
    "cut short": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "a number": lambda text: "3",
    "null": lambda text: "null",
    "no format": lambda text: "{}",
    "newer": lambda text: text.replace('"format": 1', '"format": 2'),
    "no snapshots": lambda text: json.dumps({**json.loads(text), "snapshots": []}),
    "foreign snapshots": lambda text: json.dumps(
        {**json.loads(text), "snapshots": [[{"a": 1}]] * 9}
    ),
    "odd code": lambda text: json.dumps({**json.loads(text), "code": [""]}),
    "odd steps": lambda text: json.dumps({**json.loads(text), "steps": [1, 2]}),
    "odd ratio": lambda text: text.replace('"sqnr": "exact"', '"sqnr": "loud"'),
    "odd node": lambda text: json.dumps({**json.loads(text), "snapshots": [[None]] * 9}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal(damage: str, journal: Journal, tmp_path: Path) -> None:
    journal.save(tmp_path)
    path = tmp_path / "journal.json"
    path.write_text(DAMAGE[damage](path.read_text()))
    with pytest.raises(ArtifactError, match="the journal cannot be read") as caught:
        Journal.load(tmp_path)
    assert caught.value.where == str(path)
    assert caught.value.hint


def test_a_journal_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "journal.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="cannot be read"):
        Journal.load(tmp_path)
    (tmp_path / "journal.json").unlink()
    (tmp_path / "journal.json").mkdir()
    with pytest.raises(ArtifactError, match="cannot be read"):
        Journal.load(tmp_path)


def test_every_pass_has_json_ready_options() -> None:
    for one in (InsertObservers(), QuantizeAciq(), QuantizeMinmax(), Calibrate()):
        assert json.loads(json.dumps(one.options())) == one.options()
