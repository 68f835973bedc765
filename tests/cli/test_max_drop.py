"""``fxq compile --max-drop``: layers are raised until accuracy is close to float."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxq.artifact import load
from fxq.models_zoo import builtin_data, digits_convnet

Fxq = Callable[..., Any]
TWO_BITS = ("--set", "weight_bits=2", "--set", "activation_bits=2")
DIGITS = ("compile", "digits/convnet", "-n", "128", "--eval-images", "50", "-o", "out", *TWO_BITS)


def trials(out: str) -> list[float]:
    return [float(found) for found in re.findall(r": ([-\d.]+) points below float", out)]


def test_layers_are_raised(fxq: Fxq, tmp_path: Path) -> None:
    done = fxq(*DIGITS, "--max-drop", "1")
    assert done.code == 0, done.err
    drops = trials(done.out)
    assert drops[0] > 1
    known = json.loads((tmp_path / "out/metadata.json").read_text())["raised"]
    assert known["measured"] == "top-1 on 128 calibration images"
    assert [round(one["drop"], 2) for one in known["trials"]] == drops
    raised = known["raised"]
    assert 1 <= len(raised) < 3
    assert f"{len(raised)} of 3 layers to 8 bits: {', '.join(raised)}" in done.out
    recipe = (tmp_path / "out/recipe.toml").read_text()
    assert all(f'[layer."{name}"]\nweight_bits = 8' in recipe for name in raised)
    # The drop that was told is that of the network that was saved.
    saved, right, have = load(tmp_path / "out").module, 0, 0
    for images, labels in builtin_data("digits", "train").batches(64, limit=128, seed=0):
        right += int((digits_convnet()(images).argmax(1) == labels).sum())
        have += int((saved(images).argmax(1) == labels).sum())
    final = next(one["drop"] for one in known["trials"] if one["raised"] == raised)
    assert final == pytest.approx(100 * (right - have) / 128)
    assert final <= 1


def test_nothing_is_raised_where_the_drop_is_small(fxq: Fxq) -> None:
    done = fxq(*DIGITS[:-4], "-r", "minmax-int8", "--max-drop", "5")
    assert done.code == 0, done.err
    assert len(trials(done.out)) == 1
    assert "no layer had to be" in done.out


def test_what_cannot_be_reached(fxq: Fxq, tmp_path: Path) -> None:
    """Noise lies between the classes, where even 8 bits change some answers."""
    done = fxq(*DIGITS, "-c", "random", "-n", "512", "--max-drop", "0")
    assert done.code == 2
    found = re.search(r"even with every layer at 8 bits the drop is (\d+\.\d\d)", done.err)
    assert found is not None
    assert float(found[1]) == trials(done.out)[-1] > 0
    assert not (tmp_path / "out").exists()


def test_without_labels_agreement_is_measured(fxq: Fxq, write: Callable[..., Path]) -> None:
    write("net.py")
    done = fxq("compile", "net.py", "-o", "out", "--max-drop", "100")
    assert done.code == 0, done.err
    assert "agreement with float, there being no labels, on 12 calibration images" in done.out


def test_labels_of_a_model_file(fxq: Fxq, write: Callable[..., Path]) -> None:
    write(
        "net.py",
        """
        import torch
        from fxq.models_zoo import builtin_data, digits_convnet as model

        example_inputs = torch.zeros(1, 1, 8, 8)

        def calibration_data():
            yield from builtin_data("digits", "train").batches(32, limit=64)
        """,
    )
    done = fxq("compile", "net.py", "-o", "out", *TWO_BITS, "--max-drop", "2")
    assert done.code == 0, done.err
    assert "of top-1 on 64 calibration images" in done.out


def test_only_classifiers(fxq: Fxq, write: Callable[..., Path]) -> None:
    write(
        "net.py",
        "import torch\nmodel = torch.nn.Conv2d(3, 2, 3)\n"
        "example_inputs = torch.zeros(1, 3, 8, 8)\n",
    )
    done = fxq("compile", "net.py", "-c", "random", "-n", "4", "--max-drop", "1")
    assert done.code == 2
    assert "one row of logits per image" in done.err


def test_a_recipe_without_data(fxq: Fxq, write: Callable[..., Path]) -> None:
    write("fold.toml", 'name = "fold"\n[[pass]]\nuse = "fold-batch-norm"\n')
    done = fxq("compile", "digits/convnet", "-r", "fold.toml", "--max-drop", "1")
    assert done.code == 2
    assert "needs a recipe that calibrates" in done.err


def test_no_negative_drop(fxq: Fxq) -> None:
    assert fxq(*DIGITS, "--max-drop", "-1").code == 2
