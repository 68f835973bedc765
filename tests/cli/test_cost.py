"""``fxq cost``: what it prints and writes, what it skips, and how bad input ends."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxq.cli.cost import deciding, depends_on_data, depends_on_weights
from fxq.cost import LayerCost
from fxq.recipe import Recipe, builtin_files

DIGITS = ("cost", "digits/convnet")
MACS = 599_360
"""Multiply-adds of digits/convnet: 9,216 + 294,912 + 147,456 + 147,456 + 320."""


def total(found: dict[str, Any], name: str) -> Any:
    return sum(one[name] for one in found["layers"])


def test_the_table(fxq: Callable) -> None:
    done = fxq(*DIGITS, "--set", "level_set=apot")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line.split() for line in lines[2:9]]
    assert rows[1] == ["9.2k", "8", "8", "uniform", "7", "9.2k", "8.1k", "144", "B", "16x8x8", "conv1"]  # fmt: skip  # noqa: E501
    assert rows[2][:7] == ["294.9k", "4", "4", "apot", "2", "73.7k", "36.9k"]
    assert rows[6] == ["599.4k", "157.0k", "82.1k", "11.7", "KiB", "total"]
    for told in ("float     93.6 KiB", "trained   13.5 KiB, 6.9x", "deployed  12.7 KiB, 7.4x"):
        assert told in done.out
    assert "MACs x W x A / 64" in done.out
    assert "MACs x n x A / 64" in done.out
    assert "about 0.75 x W x A / 64" in done.out


def test_a_network_without_apot_is_not_told_about_it(fxq: Callable) -> None:
    assert "0.75" not in fxq(*DIGITS).out


def test_json(fxq: Callable) -> None:
    done = fxq(*DIGITS, "-r", "minmax-int8", "--json")
    found = json.loads(done.out)
    assert (found["name"], found["recipe"]) == ("digits/convnet", "minmax-int8")
    assert found["total"]["macs"] == total(found, "macs") == MACS
    assert found["total"]["fixops"] == total(found, "fixops") == MACS
    assert found["total"]["shift_adds"] == total(found, "shift_adds") == MACS * 7 / 8
    assert found["total"]["weight_bytes"] == total(found, "bytes") == total(found, "weights")
    assert found["bits_chosen_on"] is None


def test_csv(fxq: Callable, tmp_path: Path) -> None:
    found = json.loads(fxq(*DIGITS, "--json", "--csv", "a.csv").out)
    assert "written: a.csv" in fxq(*DIGITS, "--csv", "a.csv").out
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        *rows, last = csv.DictReader(file)
    assert list(last) == list(LayerCost.__dataclass_fields__)
    assert [row["layer"] for row in rows] == [one["layer"] for one in found["layers"]]
    assert float(last["fixops"]) == sum(float(row["fixops"]) for row in rows)
    assert int(last["macs"]) == MACS
    assert last["layer"] == "total"


def test_a_run_costs_what_its_network_does(fxq: Callable, digits_run: Path) -> None:
    run = json.loads(fxq("cost", str(digits_run), "--json").out)
    network = json.loads(fxq(*DIGITS, "-r", "minmax-int8", "--json").out)
    assert run["layers"] == network["layers"]
    assert run["total"]["deployed_bytes"] == network["total"]["deployed_bytes"]
    assert run["total"]["float_bytes"] is None
    told = fxq("cost", str(digits_run)).out
    assert "recipe minmax-int8" in told
    assert "trained" not in told


def test_bits_chosen_on_data(fxq: Callable) -> None:
    mixed = (*DIGITS, "-r", "mixed-4bit", "--set", "choices=[3,5]", "-n", "32")
    done = fxq(*mixed)
    assert "bits chosen on 32 of 1347 images of digits train" in done.out
    found = json.loads(fxq(*mixed, "--json").out)
    assert found["bits_chosen_on"] == "32 of 1347 images of digits train"
    assert {one["weight_bits"] for one in found["layers"]} == {3, 5, 8}


def test_data_that_is_missing(fxq: Callable) -> None:
    done = fxq("cost", "cifar/resnet8", "-r", "mixed-4bit")
    assert (done.code, "there is no calibration data" in done.err) == (2, True)
    assert "the weights are random" in done.err


@pytest.mark.parametrize("name", builtin_files())
def test_every_recipe_ends_where_bits_are_decided(name: str) -> None:
    recipe = deciding(Recipe.load(name))
    assert "weight_bits" in recipe.passes[-1].options()
    assert not {"adaround", "reconstruct", "correct-bias"} & {one.name for one in recipe.passes}


def test_a_recipe_that_decides_no_bits_is_whole(fxq: Callable, write: Callable[..., Path]) -> None:
    write("fold.toml", '[[pass]]\nuse = "fold-batch-norm"\n')
    found = json.loads(fxq(*DIGITS, "-r", "./fold.toml", "--json").out)
    assert {one["levels"] for one in found["layers"]} == {"float"}
    assert found["total"]["fixops"] == 16 * MACS


def test_what_bits_depend_on() -> None:
    plain, mixed = Recipe.load("aciq-4bit"), Recipe.load("mixed-4bit")
    assert not depends_on_weights(plain)
    assert depends_on_data(mixed)
    assert depends_on_data(plain.with_settings(["activation_allocation=bins"]))
    for setting in ("allocation=bins", "level_set=auto"):
        recipe = plain.with_settings([setting])
        assert (depends_on_data(recipe), depends_on_weights(recipe)) == (False, True)


def test_no_data_is_read_where_bits_do_not_depend_on_it(
    fxq: Callable, write: Callable[..., Path]
) -> None:
    text = """
        import torch
        from torch import nn
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
        example_inputs = torch.zeros(2, 1, 8, 8)
        def calibration_data():
            raise AssertionError
    """
    write("net.py", text)
    found = json.loads(fxq("cost", "net.py", "--json").out)
    assert [one["macs"] for one in found["layers"]] == [36 * 2 * 9, 72 * 3]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("digits/convnet", "-r", "nothing"), "there is no recipe named 'nothing'"),
        (("digits/convnet", "--set", "weight_bits=1"), "weight_bits must be 2 to 8, not 1"),
        (("digits/convnet", "--csv", "no/such.csv"), "is in no folder that exists"),
        (("digits/convnet", "--csv", "."), "is a folder"),
        (("digits/convent",), "did you mean 'digits/convnet'?"),
        ((".",), "this folder is no run"),
    ],
)
def test_bad_input(fxq: Callable, arguments: tuple[str, ...], told: str) -> None:
    done = fxq("cost", *arguments)
    assert (done.code, told in done.err, done.out) == (2, True, "")


def test_a_run_takes_no_recipe(fxq: Callable, digits_run: Path) -> None:
    done = fxq("cost", str(digits_run), "-r", "aciq-4bit", "--set", "weight_bits=3")
    assert (done.code, "leave recipe, settings out" in done.err) == (2, True)
