"""``fxq diff``, ``show``, ``explain``, ``eval``, ``bench`` and the lists."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxq.cli.bench import Contender, Timing, interleaved, ratio

Fxq = Callable[..., Any]
COLOUR = {"FORCE_COLOR": "1", "COLUMNS": "80"}
WIDE = {"FORCE_COLOR": "1", "COLUMNS": "300"}


# ---- diff --------------------------------------------------------------------------------------


def test_diff_shows_every_kind_of_change(fxq: Fxq, digits_run: Path) -> None:
    lines = fxq("diff", str(digits_run)).out.splitlines()
    assert {line[:1] for line in lines} >= set("+-~!#12345")
    assert "- %bn1 = BatchNorm2d:f32[1,16,8,8](%conv1)" in "\n".join(lines)


@pytest.mark.parametrize("which", ["fold-batch-norm", "1"])
def test_diff_of_one_pass(fxq: Fxq, digits_run: Path, which: str) -> None:
    lines = fxq("diff", str(digits_run), "--pass", which, "--stat").out.splitlines()
    assert lines[0].startswith("1 fold-batch-norm    -4 removed  ~4 rewired  #4 retuned")
    assert lines[1:] == [
        "  BatchNorm2d  4  ----",
        "  Conv2d       4  ####",
        "  ReLU         3  ~~~",
        "  add          1  ~",
    ]


def test_diff_as_json(fxq: Fxq, digits_run: Path) -> None:
    data = json.loads(fxq("diff", str(digits_run), "--json").out)
    first = data["sections"][0]
    assert first["name"] == "fold-batch-norm"
    assert first["counts"] == {"removed": 4, "rewired": 4, "retuned": 4}
    assert first["census"] == {"BatchNorm2d": -4}
    removed = next(change for change in first["changes"] if change["kind"] == "removed")
    assert (removed["node"], removed["after"]) == ("bn1", None)


def test_diff_against_another_run(fxq: Fxq, digits_run: Path) -> None:
    same = fxq("diff", str(digits_run), "--against", str(digits_run))
    assert same.out.rstrip().endswith("no change")
    other = ("compile", "digits/convnet", "-r", "minmax-int8", "-n", "32", "-o", "other")
    assert fxq(*other, "--eval-images", "1").code == 0
    changed = fxq("diff", "other", "--against", str(digits_run), "--pass", "4", "--stat").out
    assert "#7 retuned" in changed


def test_diff_in_colour(fxq: Fxq, digits_run: Path) -> None:
    coloured = fxq("diff", str(digits_run), env=WIDE).out
    assert "\x1b[32m+ " in coloured
    plain = fxq("diff", str(digits_run)).out
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


# ---- show --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "file"),
    [
        (("--step", "capture"), "00-capture.txt"),
        (("--step", "0"), "00-capture.txt"),
        (("--step", "mark-relu"), "02-mark-relu.txt"),
        (("--step", "3"), "03-insert-observers.txt"),
        ((), "06-correct-bias.txt"),
    ],
    ids=str,
)
def test_show_is_the_numbered_file(
    fxq: Fxq, digits_run: Path, step: tuple[str, ...], file: str
) -> None:
    assert fxq("show", str(digits_run), *step).out == (digits_run / file).read_text()


def test_show_without_digests(fxq: Fxq, digits_run: Path) -> None:
    assert "#" not in fxq("show", str(digits_run), "--no-digests").out


def test_show_a_network(fxq: Fxq, write: Callable[..., Path]) -> None:
    lines = fxq("show", "tiny/conv", "--no-digests").out.splitlines()
    assert lines[0] == "%x = Input:f32[1,3,8,8]()"
    write("net.py")
    assert "BatchNorm2d:f32[1,4,8,8]" in fxq("show", "net.py", "--step", "capture").out
    wide = fxq("show", "net.py", "--input-shape", "2,1,16,16").out
    assert "%x = Input:f32[2,1,16,16]()" in wide


# ---- explain -----------------------------------------------------------------------------------

REFUSED = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x):
            x = self.conv(x)
            return torch.relu(self.bn(x)) + x

    model = Net()
    example_inputs = torch.zeros(1, 1, 8, 8)
"""


def test_explain_a_network_without_data(fxq: Fxq, write: Callable[..., Path]) -> None:
    write("net.py", REFUSED)
    lines = fxq("explain", "net.py").out.splitlines()
    assert lines[0] == "fold-batch-norm: 1 refused"
    assert lines[1].startswith("  %bn: %conv ")
    assert "nothing refused" in fxq("explain", "tiny/conv", "--pass", "mark-relu").out
    assert fxq("explain", "tiny/conv").out == "no pass refused anything\n"


def test_explain_a_run(fxq: Fxq, digits_run: Path) -> None:
    lines = fxq("explain", str(digits_run)).out.splitlines()
    assert lines[:3] == [
        "no pass refused anything",
        "in float: 0 of 17 nodes",
        "computed in float64 on CPUs without VNNI: 5 layers",
    ]
    assert lines[3].startswith("  %conv1: two weights add up to ")
    assert len(lines) == 8


# ---- eval and bench ----------------------------------------------------------------------------


def test_eval(fxq: Fxq, digits_run: Path) -> None:
    done = fxq("eval", str(digits_run), "--limit", "100")
    known = json.loads((digits_run / "metadata.json").read_text())["accuracy"]["compiled"]
    percent = 100 * known["top1"]
    assert (
        done.out
        == f"{percent:.2f} % ({known['correct']} of 100) on 100 of 450 images of digits test\n"
    )


def test_bench_a_run_against_all(fxq: Fxq, digits_run: Path) -> None:
    against = f"float,torch.ao,{digits_run}"
    done = fxq("bench", str(digits_run), "--against", against, "--rounds", "2", "-n", "8")
    assert done.code == 0, done.err
    assert "input 8x1x8x8, 1 thread, 2 interleaved rounds" in done.out
    names = [line.split()[0] for line in done.out.splitlines()[2:6]]
    assert names == ["digits", "float", "torch.ao", "digits"]
    sentences = re.findall(r"digits: \d+\.\d\dx the speed of (\S+) \(per round", done.out)
    assert sentences == ["float", "torch.ao", "digits"]


def test_bench_compile_time(fxq: Fxq) -> None:
    done = fxq(
        *("bench", "tiny/conv", "-r", "minmax-int8", "-a", "torch.ao", "--compile-time"),
        *("--rounds", "1", "-n", "8"),
    )
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["minmax-int8", "torch.ao"]
    assert all(row[2] == "s" and row[4] == "MB" for row in rows)


def test_bench_calibrates_on_what_a_file_brings(fxq: Fxq, write: Callable[..., Path]) -> None:
    write("net.py")
    done = fxq("bench", "net.py", "-r", "minmax-int8", "--rounds", "1")
    assert done.code == 0, done.err
    assert "calibrated on calibration_data of the model file" in done.err


def test_bench_needs_one_tensor(fxq: Fxq, write: Callable[..., Path]) -> None:
    write("net.py", REFUSED.replace("torch.zeros(1, 1, 8, 8)", "(torch.zeros(1), torch.zeros(1))"))
    done = fxq("bench", "net.py", "-r", "minmax-int8")
    assert (done.code, "one tensor as its input" in done.err) == (2, True)


def test_rounds_are_interleaved() -> None:
    calls: list[str] = []

    class Noted(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(self.name)
            return x

    contenders = [Contender("a", Noted("a")), Contender("b", Noted("b"), peer=True)]
    timings = interleaved(contenders, torch.zeros(1), rounds=3)
    order = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert order == ["a", "b"] * 4  # the warm-up, then three rounds
    assert [len(one.seconds) for one in timings] == [3, 3]


def test_ratios_are_taken_within_rounds() -> None:
    found = ratio(Timing("a", (1.0, 10.0, 1.0)), Timing("b", (2.0, 20.0, 3.0)))
    assert (found.median, found.low, found.high) == (2.0, 2.0, 3.0)


# ---- lists -------------------------------------------------------------------------------------


def test_passes(fxq: Fxq) -> None:
    listing = fxq("passes").out
    assert re.search(r"^fold-batch-norm +same-numbers +Every batch norm", listing, re.M)
    one = fxq("passes", "quantize-aciq").out
    assert re.search(r"^weight_bits +int +4 +Bits per weight", one, re.M)
    assert re.search(r"^prior +laplace \| gauss \| fit +laplace +The law", one, re.M)


def test_every_option_of_every_pass_is_explained(fxq: Fxq) -> None:
    from fxq.cli.listing import option_rows
    from fxq.passes import CATALOG

    blank = [(one.name, row[0]) for one in CATALOG for row in option_rows(one) if not row[3]]
    assert blank == []


def test_recipes(fxq: Fxq) -> None:
    assert re.search(r"^aciq-4bit +arXiv:1810.05723.* 4-bit", fxq("recipes").out, re.M)
    from fxq.recipe import Recipe

    assert Recipe.from_toml(fxq("recipes", "aciq-4bit").out) == Recipe.load("aciq-4bit")


def test_models(fxq: Fxq) -> None:
    assert re.search(r"^digits/convnet +1x8x8 +included ", fxq("models").out, re.M)
    some = fxq("models", "*resnet8").out
    assert [line.split()[0] for line in some.splitlines()[1:2]] == ["cifar/resnet8"]
    assert "torchvision/resnet50 " in fxq("models", "torchvision/resnet").out


def test_backends(fxq: Fxq) -> None:
    assert fxq("backends").out.startswith("eager ")


def test_lists_fit_the_terminal(fxq: Fxq) -> None:
    for command in ("passes", "recipes", "models"):
        shown = re.sub(r"\x1b\[[\d;]*m", "", fxq(command, env=COLOUR).out)
        assert max(len(line) for line in shown.splitlines()) <= 80, command


def test_an_ascii_terminal() -> None:
    """Characters it does not have are replaced; nothing fails."""
    done = subprocess.run(
        [sys.executable, "-c", "from fxq.cli.main import main; main()", "models", "nothing…"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 2
    assert b"there is no network" in done.stderr
