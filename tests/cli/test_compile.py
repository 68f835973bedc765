"""``fxq compile``: what it takes, what it writes, and what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fxq.artifact import load
from fxq.models_zoo import builtin_data, digits_convnet, evaluate_top1

Fxq = Callable[..., Any]
DIGITS = ("compile", "digits/convnet", "-r", "minmax-int8", "-n", "64", "-o", "out")
TINY = ("compile", "tiny/conv", "-r", "minmax-int8", "-c", "random", "-n", "4", "-o", "out")


def metadata(folder: Path) -> Any:
    return json.loads((folder / "metadata.json").read_text())


def test_a_simulation_is_told_loudly(fxq: Fxq) -> None:
    done = fxq(*(word if word != "minmax-int8" else "aciq-paper-4w4a" for word in TINY))
    assert done.code == 0, done.err
    assert "simulation only: 2 of 3 layers compute in float (" in done.err
    assert "accuracy means something, speed does not" in done.err
    assert "promised" not in done.err
    placement = "8-bit weights and float inputs of the first layer"
    assert re.search(f"^  placement +{placement}$", done.out, re.MULTILINE)


def test_the_summary(fxq: Fxq) -> None:
    done = fxq(*DIGITS)
    assert done.code == 0, done.err
    shown = {line.split("  ")[1]: line for line in done.out.splitlines() if line.startswith("  ")}
    right = evaluate_top1(digits_convnet(), builtin_data("digits", "test"))
    assert str(right) in shown["float"]
    assert re.search(r"\d+\.\d\d % \(\d+ of 450\), [+−]\d\.\d\d points", shown["compiled"])
    assert "95.0 kB in float ->" in shown["weights"]
    assert "5 of 5 layers on integers; nodes: 9 int8, 8 folded, 0 float" in shown["coverage"]
    assert "fxq diff out --stat" in done.out
    assert (done.err, "\x1b" in done.out) == ("", False)


def test_one_line_per_pass(fxq: Fxq) -> None:
    done = fxq(*DIGITS)
    passes = [line for line in done.out.splitlines() if re.match(r" ?\d ", line)]
    names = ["fold-batch-norm", "mark-relu", "insert-observers", "calibrate"]
    names += ["quantize-minmax", "correct-bias"]
    assert [line.split()[1] for line in passes] == names
    assert passes[0].split()[2:5] == ["4", "4", "4"]
    assert "1 batches, 64 images" in done.out or "1 batch, 64 images" in done.out
    assert max(len(line) for line in done.out.splitlines()) <= 80


def test_the_run_folder(fxq: Fxq, tmp_path: Path) -> None:
    assert fxq(*DIGITS).code == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {
        *("weights.safetensors", "structure.json", "recipe.toml", "journal.json", "ledger.json"),
        *("metadata.json", "00-capture.txt", "01-fold-batch-norm.txt", "05-quantize-minmax.txt"),
    }
    known = metadata(tmp_path / "out")
    assert known["model"]["spec"] == "digits/convnet"
    assert known["model"]["data"] == "digits"
    assert known["accuracy"]["float"]["total"] == 450
    images = builtin_data("digits", "test")
    measured = evaluate_top1(load(tmp_path / "out").module, images)
    assert measured.correct == known["accuracy"]["compiled"]["correct"]


def test_the_default_folder(fxq: Fxq, tmp_path: Path) -> None:
    assert fxq(*TINY[:-2]).code == 0
    assert (tmp_path / "runs/tiny-conv-minmax-int8/structure.json").is_file()


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ((), ""),
        (("-v",), "#~-!+"),
        (("--print", "changed"), "#~-!+"),
        (("--print", "all"), "%"),
        (("-v", "--print", "none"), ""),
    ],
    ids=str,
)
def test_printing(fxq: Fxq, options: tuple[str, ...], kinds: str) -> None:
    done = fxq(*TINY, *options)
    found = {line[0] for line in done.out.splitlines() if re.match(r"[-+~!#%]", line)}
    assert found == set(kinds)


def test_a_model_file(fxq: Fxq, write: Callable[..., Path], tmp_path: Path) -> None:
    write("models/net.py")
    done = fxq("compile", "models/net.py", "-r", "minmax-int8")
    assert done.code == 0, done.err
    assert "calibrating on calibration_data of the model file" in done.out
    assert "3 batches, 12 images" in done.out
    assert "measured on  eval_data of the model file" in done.out
    assert re.search(r"\(\d+ of 10\)", done.out)
    assert (tmp_path / "runs/net-minmax-int8").is_dir()


def test_a_model_file_may_import_its_neighbours(fxq: Fxq, write: Callable[..., Path]) -> None:
    write("models/my_layers.py", "from torch import nn\nnet = nn.Linear(4, 2)\n")
    write(
        "models/net.py",
        """
        import torch
        from my_layers import net

        def example_inputs():
            return torch.zeros(1, 4)

        calibration_data = torch.randn(100, 4)

        def evaluate(module):
            return {"mean": module(torch.ones(1, 4)).mean()}
        """,
    )
    done = fxq("compile", "models/net.py:net", "-r", "minmax-int8", "-n", "50")
    assert done.code == 0, done.err
    assert "1 batches, 64 images" in done.out or "1 batch, 64 images" in done.out
    assert "measured on  evaluate() of the model file" in done.out
    assert re.search(r"compiled +mean [-\d.]+, mean [+−]", done.out)


def test_an_importable_network(fxq: Fxq, write: Callable[..., Path]) -> None:
    write("nets_of_mine.py", "from torch import nn\n\ndef net():\n    return nn.Conv2d(3, 2, 3)\n")
    spec = ("compile", "nets_of_mine:net", "-r", "minmax-int8", "-c", "random", "-n", "4")
    assert fxq(*spec).code == 2
    done = fxq(*spec, "--input-shape", "1,3,8,8")
    assert done.code == 0, done.err
    assert "compiled to runs/net-minmax-int8" in done.out


def test_weights_and_images(fxq: Fxq, write: Callable[..., Path], tmp_path: Path) -> None:
    write("net.py", "from fxq.models_zoo import digits_convnet as model")
    torch.manual_seed(0)
    save_file(
        {name: torch.zeros_like(value) for name, value in digits_convnet().state_dict().items()},
        tmp_path / "zero.safetensors",
    )
    images = np.zeros((20, 1, 8, 8), np.uint8)
    np.savez(tmp_path / "images.npz", x=images, y=np.arange(20) % 10)
    done = fxq(
        *("compile", "net.py", "--input-shape", "1,1,8,8", "-w", "zero.safetensors"),
        *("-c", "images.npz", "-e", "images.npz", "--mean", "0.3", "--std", "0.4"),
        *("-r", "minmax-int8", "-n", "8", "-o", "out", "--eval-images", "15", "-b", "4"),
    )
    assert done.code == 0, done.err
    assert "weights: zero.safetensors" in done.out
    assert "calibrating on 8 of 20 images of images.npz" in done.out
    assert "measured on  15 of 20 images of images.npz" in done.out
    assert "(2 of 15)" in done.out  # equal logits: always class 0
    assert metadata(tmp_path / "out")["model"]["mean"] == [0.3]
    again = fxq("eval", "out", "--limit", "15")
    assert again.out == "13.33 % (2 of 15) on 15 of 20 images of images.npz\n"


def test_random_is_said_to_be_random(fxq: Fxq) -> None:
    done = fxq(*TINY)
    assert "the weights are random" in done.err
    assert "not for accuracy" in done.err
    assert re.search(r"accuracy +not measured; --eval DATA", done.out)


def test_the_same_seed_gives_the_same_run(fxq: Fxq, tmp_path: Path) -> None:
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert fxq(*TINY[:-1], folder, "--seed", seed).code == 0
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_settings_are_kept_in_the_recipe(fxq: Fxq, tmp_path: Path) -> None:
    assert fxq(*TINY, "--set", "quantize-minmax.weight_bits=5", "--engine", "fbgemm").code == 0
    assert "weight_bits = 5" in (tmp_path / "out/recipe.toml").read_text()
    assert metadata(tmp_path / "out")["engine"] == "fbgemm"


def test_a_recipe_from_a_file(fxq: Fxq, write: Callable[..., Path]) -> None:
    text = fxq("recipes", "minmax-int8").out
    write("mine.toml", text.replace('"minmax-int8"', '"mine"'))
    done = fxq("compile", "tiny/conv", "-r", "mine.toml", "-c", "random", "-n", "4")
    assert (done.code, "compiled to runs/tiny-conv-mine" in done.out) == (0, True)


def test_falling_short_of_the_promise(fxq: Fxq) -> None:
    skip = ("--set", "layer:conv2.skip=true", "--force")
    loud = fxq(*DIGITS, *skip)
    assert loud.code == 0
    assert "below the promised coverage: 4 of 5" in loud.err
    assert "conv2 stays in float: the recipe skips it" in loud.err
    assert "refused; fxq explain says why" in loud.out
    quiet = fxq(*DIGITS, *skip, "--accept-coverage")
    assert len(quiet.err.splitlines()) == 1
    explained = fxq("explain", "out")
    assert "%conv2: the recipe skips it" in explained.out
    only = fxq("explain", "out", "--pass", "insert-observers", "--node", "conv*").out
    assert only.splitlines() == [
        "insert-observers: 1 refused",
        "  %conv2: stays in float: the recipe skips it",
    ]


def test_a_leaf_is_one_node(fxq: Fxq, write: Callable[..., Path]) -> None:
    write(
        "net.py",
        """
        import torch
        from torch import nn

        class Branch(nn.Module):
            def forward(self, x):
                return x if x.sum() > 0 else -x

        model = nn.Sequential(nn.Conv2d(1, 2, 3), Branch())
        example_inputs = torch.ones(1, 1, 8, 8)
        """,
    )
    parts = fxq("compile", "net.py", "-c", "random", "-n", "4", "-o", "parts")
    assert "largest traceable parts" in parts.err
    done = fxq(
        "compile", "net.py", "-c", "random", "-n", "4", "-o", "whole", "--leaf", "Branch", "-v"
    )
    assert "largest traceable parts" not in done.err
    assert "Branch:" in done.out + done.err


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from fxq.pipeline import Contract, Pass
from fxq.zoo_entry import ZooEntry

@dataclass(frozen=True)
class Note(Pass):
    '''Every node is noted.'''

    name: ClassVar[str] = "note-everything"
    contract: ClassVar[Contract] = Contract.ANNOTATES_ONLY
    word: str = "seen"

    def apply(self, program, edit):
        for node in edit.visit():
            edit.write_facts(node, note=self.word)

CATALOG = (Note,)
"""


def test_a_plugin(fxq: Fxq, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxq.registry._plugins", {"passes": [], "backends": [], "models_zoo": []})
    write("plug.py", PLUGIN)
    assert "Every node is noted." in fxq("passes", "--plugin", "plug.py").out
    recipe = fxq("recipes", "minmax-int8").out + '\n[[pass]]\nuse = "note-everything"\n'
    write("noting.toml", recipe)
    monkeypatch.setattr("fxq.registry._plugins", {"passes": [], "backends": [], "models_zoo": []})
    done = fxq(*TINY, "-r", "noting.toml", "--plugin", "plug.py", "-v")
    assert done.code == 0, done.err
    assert "[seen]" in done.out


def test_bars_on_a_terminal(fxq: Fxq) -> None:
    done = fxq(*DIGITS, env={"FORCE_COLOR": "1", "COLUMNS": "80", "TERM": "xterm"})
    assert done.code == 0, done.err
    assert "\x1b[" in done.out
    assert "evaluate" in done.out
    assert "╭─ compiled to out" in re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", done.out)


def test_threads(fxq: Fxq, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert fxq(*TINY, "--threads", "1").code == 0
    assert asked == [1]


def test_as_many_images_as_the_recipe_uses(fxq: Fxq) -> None:
    quick = ("--set", "reconstruct.iterations=1", "--set", "adaround.images=8")
    done = fxq("compile", "digits/convnet", "-r", "best-4bit", *quick, "-o", "out")
    assert done.code == 0, done.err
    assert "calibrating on 1024 of 1347 images" in done.out
    assert re.search(
        r"^  placement +8-bit weights and inputs of the first and last", done.out, re.M
    )


def test_a_recipe_that_trains_is_for_another_command(fxq: Fxq, tmp_path: Path) -> None:
    done = fxq(*(word if word != "minmax-int8" else "apot-4bit" for word in TINY))
    assert done.code == 2
    assert "apot-4bit gives a network to be trained, not integers" in done.err
    assert "fxq train MODEL --recipe apot-4bit" in done.err
    assert not (tmp_path / "out").exists()
