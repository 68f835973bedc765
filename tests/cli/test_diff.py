"""``fxq diff``: two steps of a run, two runs, every view and every way it can be asked wrongly."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Fxq = Callable[..., Any]
Golden = Callable[[str, str], None]

COLUMNS = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, invoke: Fxq) -> Path:
    """Runs of two recipes on one network, their machine-dependent scales made equal."""
    place = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, recipe in (("eight", "minmax-int8"), ("four", "aciq-4bit")):
            done = invoke(
                *("compile", "digits/convnet", "-r", recipe, "-n", "64", "--eval-images", "1"),
                *("-o", f"runs/{name}"),
            )
            assert done.code == 0, done.err
            path = place / "runs" / name / "journal.json"
            text = re.sub(r"scale [\d.e-]+ zero \d+", "scale 0.5 zero 0", path.read_text())
            text = re.sub(r'"(seconds|sqnr)": [^,]+,', r'"\1": 1.5,', text)
            data = json.loads(text)
            for step in data["steps"]:
                step["moved"] = {name: [1.5, 0.25] for name in step["moved"]}
            path.write_text(json.dumps(data))
    return place


@pytest.fixture
def diff(folder: Path, monkeypatch: pytest.MonkeyPatch, invoke: Fxq) -> Fxq:
    """``fxq diff`` beside the two runs."""
    monkeypatch.chdir(folder)
    return lambda *arguments, **options: invoke("diff", *arguments, **options)


# ---- the text ----------------------------------------------------------------------------------

VIEWS = {
    "unified": ("runs/eight", "runs/four"),
    "unified-context": ("runs/eight", "runs/four", "--context", "1"),
    "side-by-side": ("runs/eight", "runs/four", "--side-by-side"),
    "stat": ("runs/eight", "runs/four", "--stat"),
    "passes": ("runs/four", "--stat"),
    "one-pass": ("runs/four", "quantize-aciq"),
    "values": ("runs/four", "quantize-aciq", "--values", "--node", "conv*"),
    "code": ("runs/four", "capture", "last", "--code"),
    "code-side-by-side": ("runs/four", "fold-batch-norm", "--code", "-y", "-U", "1"),
    "dot": ("runs/eight", "runs/four", "--dot", "--context", "1"),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(diff: Fxq, golden: Golden, view: str) -> None:
    done = diff(*VIEWS[view], "--no-digests", "--width", str(COLUMNS))
    assert done.code == 0, done.err
    golden(f"diff--{view}", done.out)
    if view != "dot":
        assert max(len(line) for line in done.out.splitlines()) <= COLUMNS


def test_piped_lines_stay_whole_and_plain(diff: Fxq) -> None:
    out = diff("runs/eight", "runs/four").out
    assert "\x1b" not in out
    assert max(len(line) for line in out.splitlines()) > COLUMNS


def test_a_terminal_is_filled_and_not_more(diff: Fxq) -> None:
    for view in ((), ("--stat",), ("-y",), ("-U", "2")):
        terminal = {"FORCE_COLOR": "1", "COLUMNS": "60"}
        out = diff("runs/eight", "runs/four", *view, env=terminal).out
        assert "\x1b[" in out
        plain = re.sub(r"\x1b\[[\d;]*m", "", out)
        assert max(len(line) for line in plain.splitlines()) <= 60


def test_folding_loses_nothing(diff: Fxq) -> None:
    whole = diff("runs/four", "capture", "last").out
    narrow = diff("runs/four", "capture", "last", "--width", "60").out
    assert narrow.split() == whole.split()


# ---- what is compared --------------------------------------------------------------------------


def test_two_steps_are_the_passes_between_them(diff: Fxq) -> None:
    one = diff("runs/four", "capture", "fold-batch-norm").out.splitlines()
    assert one[0].startswith("capture -> fold-batch-norm  -4 removed  ~4 rewired  #4 retuned")
    assert one[1:] == diff("runs/four", "1").out.splitlines()[1:]
    assert diff("runs/four:0", "1").out.splitlines() == one
    back = diff("runs/four", "fold-batch-norm", "capture").out
    assert "+4 added" in back


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (("runs/four:calibrate",), ("runs/four", "calibrate")),
        (("runs/four", "--pass", "5"), ("runs/four", "quantize-aciq")),
        (("runs/four", "--against", "runs/eight"), ("runs/eight", "runs/four")),
        (("runs/eight", "runs/four", "--pass", "3"), ("runs/eight:3", "runs/four:3")),
        (("runs/four", "1", "6"), ("runs/four", "fold-batch-norm", "last")),
        (("runs/four", "runs/four"), ("runs/four", "last", "correct-bias")),
    ],
)
def test_ways_to_say_the_same(diff: Fxq, short: tuple[str, ...], long: tuple[str, ...]) -> None:
    assert diff(*short).out == diff(*long).out != ""


def test_identical_graphs(diff: Fxq) -> None:
    done = diff("runs/four", "runs/four")
    assert (done.code, done.out) == (0, "correct-bias -> correct-bias  no change\n")
    for view in ("--stat", "-y", "--code"):
        same = diff("runs/four", "runs/four", view)
        assert (same.code, same.out.count("\n"), "no change" in same.out) == (0, 1, True)
    assert json.loads(diff("runs/four", "runs/four", "--json").out)["sections"][0]["changes"] == []


def test_two_networks_are_told_apart(diff: Fxq, folder: Path, tmp_path: Path) -> None:
    data = json.loads((folder / "runs" / "four" / "journal.json").read_text())
    for node in (node for graph in data["snapshots"] for node in graph):
        node["name"] = f"other_{node['name']}"
    (tmp_path / "journal.json").write_text(json.dumps(data))
    done = diff("runs/four", str(tmp_path), "--stat")
    assert done.code == 0
    assert "no node is in both graphs" in done.err
    assert "no node" not in diff("runs/four", "runs/eight", "--stat").err


def test_json(diff: Fxq) -> None:
    data = json.loads(diff("runs/eight", "runs/four", "--only", "added", "--json").out)
    (section,) = data["sections"]
    assert (section["from"], section["to"]) == ("runs/eight", "runs/four")
    assert "- pass quantize-minmax" in section["recipe"]
    (change,) = section["changes"]
    assert (change["kind"], change["node"], change["before"]) == ("added", "pool_low", None)
    assert (change["op"], change["path"]) == ("ActivationQuantizer", "pool")


def test_values_of_each_pass(diff: Fxq) -> None:
    out = diff("runs/four", "--values").out
    names = [line.split()[1] for line in out.splitlines() if line[:1].isdigit()]
    assert names == ["fold-batch-norm", "quantize-aciq", "correct-bias"]
    sections = json.loads(diff("runs/four", "--json").out)["sections"]
    told = [line.split()[0] for line in out.splitlines() if line.startswith("  %")]
    assert told == [f"%{name}" for one in sections for name in one["moved"]]
    filtered = diff("runs/four", "5", "--values", "--only", "added").out
    assert "%pool_low" in filtered
    assert "%conv1" not in filtered
    assert diff("runs/four", "mark-relu", "--values").out == "no value moved\n"


# ---- filters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "nodes"),
    [
        (("--node", "conv*"), ["conv2", "conv3", "conv4"]),
        (("--node", "%fc", "--node", "pool_low"), ["pool_low", "fc"]),
        (("--op", "QuantizedLinear"), ["fc"]),
        (("--only", "added", "--only", "retuned"), ["pool_low", "fc"]),
        (("--op", "Quantized*", "--only", "retuned"), ["fc"]),
        (("--node", "conv1"), []),
    ],
)
def test_filters(diff: Fxq, filters: tuple[str, ...], nodes: list[str]) -> None:
    data = json.loads(diff("runs/eight", "runs/four", *filters, "--json").out)
    assert [change["node"] for change in data["sections"][0]["changes"]] == nodes
    told = diff("runs/eight", "runs/four", *filters).out
    assert (told == "no change matches\n") is not bool(nodes)


def test_passes_without_a_match_are_left_out(diff: Fxq) -> None:
    lines = diff("runs/four", "--node", "bn1", "--stat").out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["fold-batch-norm"]


# ---- asked wrongly -----------------------------------------------------------------------------

WRONG = {
    "run": (("runs/fuor",), "did you mean 'runs/four'?"),
    "second run": (("runs/four", "runs/eigth"), "did you mean 'runs/eight'?"),
    "no run": (("runs",), "this folder is no run"),
    "step": (("runs/four", "calibrat"), "did you mean 'calibrate'?"),
    "step of a run": (("runs/four", "runs/eight:calibrat"), "did you mean 'calibrate'?"),
    "position": (("runs/four", "7"), "the run has 6 passes"),
    "capture": (("runs/four", "capture"), "fxq diff runs/four capture last"),
    "three steps": (("runs/four", "1", "2", "3"), "not three"),
    "three runs": (("runs/four", "runs/eight", "runs/four"), "not three"),
    "twice": (("runs/four", "1", "--against", "runs/eight"), "given twice"),
    "step twice": (("runs/four", "1", "--pass", "2"), "given twice"),
    "node": (("runs/four", "--node", "conv9"), "did you mean 'conv"),
    "operator": (("runs/four", "--op", "conv2d"), "did you mean 'Conv2d'?"),
    "kind": (("runs/four", "--only", "moved"), "not one of"),
    "two views": (("runs/four", "--stat", "--dot"), "one way at a time"),
    "code as json": (("runs/four", "--code", "--json"), "drop --json"),
    "values of two runs": (("runs/four", "runs/eight", "--values"), "recorded for each pass"),
    "values of many passes": (("runs/four", "1", "5", "--values"), "fxq diff RUN STEP --values"),
    "code of a node": (("runs/four", "--code", "--node", "fc"), "code has lines"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(diff: Fxq, case: str) -> None:
    arguments, told = WRONG[case]
    done = diff(*arguments)
    assert (done.code, done.out) == (2, "")
    assert told in " ".join(done.err.replace("│", " ").split())


def test_a_damaged_journal(diff: Fxq, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "runs" / "four", run)
    text = (run / "journal.json").read_text()
    (run / "journal.json").write_text(text[: len(text) // 2])
    done = diff("runs/four", str(run))
    assert (done.code, "the journal cannot be read" in done.err) == (2, True)


def test_an_empty_journal(diff: Fxq, tmp_path: Path) -> None:
    empty = {"format": 1, "snapshots": [], "steps": []}
    (tmp_path / "journal.json").write_text(json.dumps(empty))
    assert diff(str(tmp_path)).out == "no pass has run\n"
    for more in (("capture", "last"), ("--dot",)):
        done = diff(str(tmp_path), *more)
        assert (done.code, "no pass has run" in done.err) == (2, True)


def test_a_run_of_an_older_fxq(diff: Fxq, folder: Path, tmp_path: Path) -> None:
    data = json.loads((folder / "runs" / "four" / "journal.json").read_text())
    del data["code"]
    (tmp_path / "journal.json").write_text(json.dumps(data))
    assert diff(str(tmp_path), "1").code == 0
    done = diff(str(tmp_path), "1", "--code")
    assert (done.code, "was not recorded" in done.err) == (2, True)


# ---- the documentation -------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "inspecting.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^```console\n\$ fxq diff (.*)\n((?:.*\n)*?)```$", PAGE, re.M)


def test_the_documentation_shows_something() -> None:
    assert len(SHOWN) >= 4


@pytest.mark.parametrize(("command", "output"), SHOWN)
def test_the_documentation_is_what_is_printed(diff: Fxq, command: str, output: str) -> None:
    assert diff(*shlex.split(command)).out == output
