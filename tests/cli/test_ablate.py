"""``fxq ablate``: combinations, what it writes, and taking up where it stopped."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxq.cli import ablate
from fxq.cli.ablate import TABLE3, combinations_of, seeds_of
from fxq.errors import FxqError, RecipeError

Fxq = Callable[..., Any]
DIGITS = ("ablate", "digits/convnet", "-n", "32", "--eval-images", "60", "-o", "out")
WIDTHS = ("--option", "quantize-aciq.weight_bits=2,4", "--option", "guard=true,false")


def record(folder: Path) -> Any:
    return json.loads((folder / "out/ablation.json").read_text())


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "out/ablation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_combination(fxq: Fxq, tmp_path: Path) -> None:
    done = fxq(*DIGITS, *WIDTHS, "--set", "activation_bits=3")
    assert done.code == 0, done.err
    rows = table(tmp_path)
    chosen = [(row["quantize-aciq.weight_bits"], row["guard"]) for row in rows]
    assert chosen == [("2", "true"), ("2", "false"), ("4", "true"), ("4", "false")]
    lines = [line.split() for line in done.out.splitlines() if line[:2] in ("2 ", "4 ")]
    assert [line[:2] for line in lines] == [list(pair) for pair in chosen]
    for row, line in zip(rows, lines, strict=True):
        assert f"{float(row['mean']):.2f}" == line[2]
        change = f"{float(row['mean']) - float(row['float']):+.2f}".replace("-", "−")
        assert line[3] == change
    assert (tmp_path / "out/ablation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "activation_bits = 3" in record(tmp_path)["inputs"]["recipe"]


def test_the_scores_are_those_of_compile(fxq: Fxq, tmp_path: Path) -> None:
    assert fxq(*DIGITS, "--option", "weight_bits=2").code == 0
    compiling = ("compile", *DIGITS[1:-1], "run", "--set", "weight_bits=2")
    assert fxq(*compiling).code == 0
    known = json.loads((tmp_path / "run/metadata.json").read_text())["accuracy"]
    runs = record(tmp_path)["runs"]
    assert runs == {"float": known["float"], "weight_bits=2 seed=0": known["compiled"]}


def test_what_is_finished_is_not_run_again(
    fxq: Fxq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[tuple[str, int]] = []
    measured = ablate._measured

    def counting(request: Any, subject: Any, recipe: Any, *rest: Any) -> Any:
        run.append((recipe.passes[4].weight_bits, rest[1]))
        if len(run) == 2:
            raise KeyboardInterrupt
        return measured(request, subject, recipe, *rest)

    monkeypatch.setattr(ablate, "_measured", counting)
    assert fxq(*DIGITS, "--option", "weight_bits=2,3").code == 130
    assert set(record(tmp_path)["runs"]) == {"float", "weight_bits=2 seed=0"}
    done = fxq(*DIGITS, "--option", "weight_bits=2,3,4", "--seeds", "0,1")
    assert "6 runs, 1 of them known from out" in done.out
    assert sorted(run[2:]) == [(2, 1), (3, 0), (3, 1), (4, 0), (4, 1)]
    assert [sorted(row)[-2:] for row in table(tmp_path)] == [["seed 1", "weight_bits"]] * 3
    assert "spread" in done.out
    again = fxq(*DIGITS, "--option", "weight_bits=4,2")
    assert (again.code, len(run)) == (0, 7)
    assert not list((tmp_path / "out").glob("*.new"))


def test_another_ablation_is_not_mixed_in(fxq: Fxq, tmp_path: Path) -> None:
    option = ("--option", "weight_bits=2")
    assert fxq(*DIGITS, *option).code == 0
    other = fxq(*DIGITS, *option, "--set", "addend_bits=7", "-n", "16")
    assert other.code == 2
    assert "another recipe, calibration" in other.err
    assert fxq(*DIGITS, *option, "--set", "addend_bits=7", "--force").code == 0
    assert "addend_bits = 7" in record(tmp_path)["inputs"]["recipe"]
    (tmp_path / "out/ablation.json").write_text('{"inputs"')
    damaged = fxq(*DIGITS, *option)
    assert (damaged.code, "--force" in damaged.err) == (2, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--option", "quantize-aciq.weigth_bits=2,3"), "did you mean 'weight_bits'?"),
        (("--option", "quantise-aciq.weight_bits=2"), "did you mean 'quantize-aciq'?"),
        (("--option", "weight_bits=many"), "weight_bits must be int"),
        (("--option", "weight_bits="), "an option and different values"),
        (("--option", "weight_bits"), "an option and different values"),
        (("--option", "=2,3"), "an option and different values"),
        (("--option", "weight_bits=2,2"), "an option and different values"),
        (("--option", "weight_bits=2", "--option", "weight_bits=3"), "given twice"),
        (("--option", "weight_bits=2", "--seeds", "a"), "different whole numbers"),
        (("--option", "weight_bits=2", "-r", "nothing"), "no recipe named"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)
def test_errors(fxq: Fxq, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    done = fxq(*DIGITS, *options)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert not (tmp_path / "out").exists()


def test_there_must_be_something_to_measure_with(fxq: Fxq) -> None:
    done = fxq("ablate", "tiny/conv", "-c", "random", "-n", "4", "--option", "weight_bits=2")
    assert done.code == 2
    assert "nothing to measure with" in done.err
    assert "--eval" in done.err


def test_a_measure_of_ones_own(fxq: Fxq, write: Callable[..., Path], tmp_path: Path) -> None:
    text = (
        "import torch\nfrom torch import nn\ntorch.manual_seed(0)\n"
        "model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))\n"
        "example_inputs = torch.randn(4, 3, 8, 8)\n"
        "calibration_data = [torch.randn(4, 3, 8, 8)]\n"
        "def evaluate(module):\n    return {'power': module(example_inputs).square().mean()}\n"
    )
    write("net.py", text)
    done = fxq("ablate", "net.py", "--option", "first_last_bits=3,8", "-o", "out")
    assert done.code == 0, done.err
    assert "power" in done.out
    assert set(record(tmp_path)["runs"]["float"]) == {"power"}


def test_combinations() -> None:
    assert combinations_of([]) == [()]
    assert len(combinations_of(TABLE3)) == 16
    assert all("=" in one for row in combinations_of(TABLE3) for one in row)
    assert [row[-1][-4:] for row in combinations_of(TABLE3)[:2]] == ["none", "mean"]
    with pytest.raises(RecipeError):
        combinations_of(["a=1", "a=2"])
    for text in ("", "1,1", "-1", "1.5"):
        with pytest.raises(FxqError):
            seeds_of(text)


def test_table_3_is_what_is_run_by_default(fxq: Fxq, tmp_path: Path) -> None:
    done = fxq(*DIGITS)
    assert done.code == 0, done.err
    rows = table(tmp_path)
    assert len({tuple(row.values())[:4] for row in rows}) == len(rows) == 16
    assert 'name = "aciq-paper-4w4a"' in record(tmp_path)["inputs"]["recipe"]
