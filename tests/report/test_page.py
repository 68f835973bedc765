"""The page as a file: whole, alone, true to the journal, and safe whatever a node is called."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fxq.errors import ArtifactError
from fxq.integer.ledger import Ledger, LedgerEntry
from fxq.report import write
from fxq.report.data import Run, page_data, read_run
from fxq.report.page import page
from fxq.trail.journal import Journal, Step
from fxq.trail.snapshot import NodeRecord, Snapshot

HOSTILE = "</script><img src=x onerror=alert(1)><!-- & \u2028 \" ' ${x} $title"
VOID = {"meta", "link", "input", "br", "img"}


class Reader(HTMLParser):
    """Checks that tags nest, and keeps what is in scripts and which addresses are named."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[tuple[dict[str, Any], str]] = []
        self.addresses: list[str] = []
        self.title = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.ids += [str(known["id"])] if "id" in known else []
        self.addresses += [str(v) for k, v in attrs if k in ("src", "href", "action", "data")]
        if tag == "script":
            self.scripts.append((known, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            known, before = self.scripts[-1]
            self.scripts[-1] = (known, before + data)
        if self.open[-1:] == ["title"]:
            self.title += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


def embedded_in(text: str) -> dict[str, Any]:
    (data,) = [body for known, body in read(text).scripts if known.get("id") == "data"]
    return dict(json.loads(data))


def test_the_page_is_well_formed_and_stands_alone(folder: Path) -> None:
    reader = read(page(read_run(folder)))
    assert reader.title == "tiny/residual · fxq"
    assert len(reader.scripts) == 2
    assert len(set(reader.ids)) == len(reader.ids)
    assert all(one.startswith(("#", "data:")) for one in reader.addresses)


def test_what_is_embedded_is_the_journal(folder: Path) -> None:
    data = embedded_in(page(read_run(folder)))
    journal = Journal.load(folder)
    for graph, wanted in zip(data["graphs"], journal.to_json()["snapshots"], strict=True):
        keys = ("name", "op", "inputs", "arguments", "value", "facts", "digest", "path")
        found = [dict(zip(keys, data["records"][one], strict=True)) for one in graph]
        for record in found:
            record["name"] = data["names"][record["name"]]
            record["inputs"] = [data["names"][one] for one in record["inputs"]]
        assert found == json.loads(json.dumps(wanted))
    for step, wanted_step in zip(data["steps"], journal.to_json()["steps"], strict=True):
        named = {kind: [data["names"][n] for n in nodes] for kind, nodes in step["changes"].items()}
        assert {kind: nodes for kind, nodes in named.items() if nodes} == wanted_step["delta"]
        values = {data["names"][node]: drift for node, *drift in step["moved"]}
        assert values == wanted_step["moved"]
        for key in ("name", "options", "contract", "seconds", "sqnr", "total_sqnr", "notes"):
            assert step[key] == wanted_step[key]
    assert data["ledger"] == json.loads((folder / "ledger.json").read_text())
    assert data["recipe"] == (folder / "recipe.toml").read_text()


def test_a_record_that_stays_the_same_is_stored_once(folder: Path) -> None:
    data = page_data(read_run(folder))
    snapshots = Journal.load(folder).to_json()["snapshots"]
    different = {json.dumps(record) for graph in snapshots for record in graph}
    assert len(data["records"]) == len(different) < sum(len(graph) for graph in snapshots)


def hostile_run() -> Run:
    before = Snapshot((NodeRecord(HOSTILE, "Input"), NodeRecord("y", HOSTILE, (HOSTILE,), HOSTILE)))
    after = Snapshot((*before.nodes, NodeRecord("z", "relu", ("y",), facts=(HOSTILE,))))
    step = Step(HOSTILE, {HOSTILE: HOSTILE}, "changes-numbers", before, after, notes=(HOSTILE,))
    ledger = Ledger((LedgerEntry(HOSTILE, HOSTILE, "Conv2d", "float", HOSTILE, layer=True),))
    about = {"model": {"spec": HOSTILE}}
    return Run("run", Journal([step]), ledger, HOSTILE, about, {"layers": [{"node": HOSTILE}]})


def test_no_name_gets_out_of_the_data() -> None:
    text = page(hostile_run())
    reader = read(text)
    assert len(reader.scripts) == 2
    assert "<img" not in text
    assert reader.title == f"{HOSTILE} · fxq"
    data = embedded_in(text)
    assert data["names"][0] == data["recipe"] == HOSTILE


def test_a_journal_without_steps_has_a_page() -> None:
    assert embedded_in(page(Run("empty", Journal([]))))["graphs"] == []


def test_attribution_is_shown_where_it_is_there(folder: Path, tmp_path: Path) -> None:
    assert page_data(read_run(folder))["attribution"] == {}
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "attribution.json").write_text('{"layers": [{"node": "c", "weight": 1.0}]}')
    assert page_data(read_run(tmp_path))["attribution"]["layers"][0]["node"] == "c"


def test_the_report_is_written_into_the_run_and_not_over_anything(
    folder: Path, tmp_path: Path
) -> None:
    path = write(folder, tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(ArtifactError, match="replace"):
        write(folder, path)
    path.write_text("old")
    assert write(folder, path, force=True).stat().st_size > 10_000
    with pytest.raises(ArtifactError, match="replace"):
        write(folder, tmp_path, force=True)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no journal"):
        write(tmp_path)


@pytest.mark.parametrize("file", ["attribution.json", "metadata.json", "ledger.json"])
@pytest.mark.parametrize("content", ["{", '"text"', "\udcff"])
def test_a_damaged_file_is_told(file: str, content: str, folder: Path, tmp_path: Path) -> None:
    for one in folder.iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    (tmp_path / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError):
        write(tmp_path)
