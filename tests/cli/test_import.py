"""``fxq import``: from a checkpoint as APoT's authors publish them to a run, and what stops it."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fxq.models_zoo import lookup

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))

def model():
    return Net()

def images():
    return torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))

example_inputs = torch.zeros(1, 1, 8, 8)
calibration_data = iter([images()])

def evaluate(module):
    return {f"class {place}": value for place, value in enumerate(module(images()).mean(0))}
"""
CLIPS = {"conv2.weight_quant.wgt_alpha": 2.5, "conv2.act_alpha": 1.5}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A checkpoint of `MODEL`."""
    generator = torch.Generator().manual_seed(0)
    made = {"__name__": "model"}
    exec(MODEL, made)
    tensors = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in made["model"]().state_dict().items()
        if not name.endswith("tracked")
    }
    tensors |= {name: value.abs() for name, value in tensors.items() if "running_var" in name}
    return tensors | {name: torch.tensor(value) for name, value in CLIPS.items()}


@pytest.fixture
def files(write: Callable, tmp_path: Path, state: dict[str, Tensor]) -> None:
    """``model.py`` and ``apot.pth``, wrapped as the authors save theirs."""
    write("model.py", MODEL)
    prefixed = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 300, "state_dict": prefixed}, tmp_path / "apot.pth.tar")


def command(*more: str) -> tuple[str, ...]:
    return "import", "model.py", "apot.pth.tar", "-o", "out", *more


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, invoke: Callable) -> tuple[Path, Any]:
    """A run of digits/convnet with made-up clips, and what was told of it; read-only."""
    folder = tmp_path_factory.mktemp("imported")
    tensors = lookup("digits/convnet").build().state_dict()
    layers = [name for name, value in tensors.items() if value.ndim == 4][1:]
    for name in layers:
        tensors[name.replace("weight", "weight_quant.wgt_alpha")] = torch.tensor([2.6])
        tensors[name.replace("weight", "act_alpha")] = torch.tensor([3.0])
    save_file(tensors, folder / "a.safetensors")
    run = folder / "run"
    options = ("-n", "64", "--eval-images", "60", "-o", str(run))
    done = invoke("import", "digits/convnet", str(folder / "a.safetensors"), *options)
    assert done.code == 0, done.err
    return run, done


def test_what_is_written(imported: tuple[Path, Any]) -> None:
    run, done = imported
    about = json.loads((run / "metadata.json").read_text())
    assert about["accuracy"].keys() == {"published", "compiled"}
    assert about["accuracy"]["compiled"]["total"] == 60
    assert about["model"]["weights"] == str(run.parent / "a.safetensors")
    assert not (run.parent / "run.partial").exists()
    for word in ("load-clips", "imported to", "as published", "on integers", "60 of 450 images"):
        assert word in done.out
    assert "random" not in done.err


@pytest.mark.parametrize(
    "after",
    [
        ("eval",),
        ("verify",),
        ("export", "-o", "a.onnx"),
        ("bench", "--rounds", "1"),
        ("diff", "--stat"),
        ("show", "--step", "load-clips"),
        ("explain",),
        ("cost",),
    ],
    ids=lambda after: after[0],
)
def test_the_run_is_an_ordinary_one(
    imported: tuple[Path, Any], fxq: Callable, after: tuple[str, ...]
) -> None:
    done = fxq(after[0], str(imported[0]), *after[1:])
    assert done.code == 0, done.err


@pytest.mark.usefixtures("files")
def test_another_backend(fxq: Callable, tmp_path: Path) -> None:
    done = fxq(*command("--backend", "onnx", "--opset", "22"))
    assert done.code == 0, done.err
    assert "apot-4bit on onnx" in done.out
    assert (tmp_path / "out" / "model.onnx").exists()
    again = fxq(*command())
    assert (again.code, "already" in again.err or "--force" in again.err) == (2, True)
    assert fxq(*command("--force")).code == 0


# ---- as published ------------------------------------------------------------------------------


def levels(bits: int) -> Tensor:
    """The sums of one element of each set, over the largest: what the authors' code builds."""
    sets = {
        3: [(0, 1 / 2, 1 / 4, 1 / 16), (0, 1 / 8)],
        4: [(0, 1 / 2, 1 / 8, 1 / 32), (0, 1 / 4, 1 / 16, 1 / 64)],
    }
    sums = torch.tensor([sum(parts) for parts in itertools.product(*sets[bits])])
    return sums / sums.max()


def nearest(values: Tensor, clip: float, bits: int) -> Tensor:
    units = levels(bits)
    places = ((values.abs() / clip).clamp(max=1).unsqueeze(-1) - units).abs().argmin(-1)
    return clip * values.sign() * units[places]


def eight_bits(weight: Tensor) -> Tensor:
    return torch.round(weight / weight.max() * 127) / 127 * weight.max()


def authors_logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The network written out by the authors' formulas."""

    def norm(x: Tensor, name: str) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        return torch.relu(F.batch_norm(x, *(state[f"{name}.{key}"] for key in keys)))

    weight = state["conv2.weight"]
    weight = (weight - weight.mean()) / weight.std()
    x = norm(F.conv2d(images, eight_bits(state["conv1.weight"]), padding=1), "bn1")
    x = F.conv2d(nearest(x, CLIPS["conv2.act_alpha"], 4), nearest(weight, 2.5, 3))
    x = norm(x, "bn2").mean((2, 3))
    return F.linear(x, eight_bits(state["fc.weight"]), state["fc.bias"])


@pytest.mark.usefixtures("files")
def test_as_published_it_is_measured_only(
    fxq: Callable, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    before = names(tmp_path)
    done = fxq(*command("--set", "quantize-apot.placement=paper"))
    assert done.code == 0, done.err
    assert "it is not lowered, and no run is written" in done.err
    assert names(tmp_path) - before <= {"__pycache__"}
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = [float(value) for value in re.findall(r"class \d (\S+?),? ", done.out)]
    wanted = authors_logits(state, images).mean(0).tolist()
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def resnet20(data: Path, bits: int) -> tuple[str, ...]:
    """The command for a checkpoint that the authors published."""
    checkpoint = data / f"resnet20-apot-{bits}bit-cifar10.safetensors"
    files = checkpoint, data / "cifar10-train-20k.npz", data / "cifar10-test-dev.npz"
    for path in files:
        if not path.is_file():
            pytest.skip(f"there is no {path}")
    given, train, test = map(str, files)
    options = ("-r", f"apot-{bits}bit", "-n", "128", "-c", train, "-e", test)
    return "import", "cifar/resnet20", given, *options


def test_the_known_answer(fxq: Callable, data: Path, tmp_path: Path) -> None:
    """The published 4-bit ResNet-20, as published and on integers, on the first test images."""
    done = fxq(*resnet20(data, 4), "--eval-images", "500", "-o", "out")
    assert done.code == 0, done.err
    assert "22 of 22 layers on integers" in done.out
    scores = json.loads((tmp_path / "out" / "metadata.json").read_text())["accuracy"]
    assert scores["published"]["top1"] > 0.91
    assert abs(scores["compiled"]["correct"] - scores["published"]["correct"]) <= 5


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "correct"), [(4, 4599), (2, 4527)])
def test_the_published_accuracy(fxq: Callable, data: Path, bits: int, correct: int) -> None:
    """92.16 % and 90.72 % of 4990 images, give or take one image."""
    done = fxq(*resnet20(data, bits), "--set", "quantize-apot.placement=paper")
    assert done.code == 0, done.err
    found = re.search(r"\((\d+) of 4990\)", done.out)
    assert found is not None
    assert abs(int(found[1]) - correct) <= 1


# ---- what is wrong -----------------------------------------------------------------------------


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("-r", "aciq-4bit"), "aciq-4bit quantizes without training"),
        (("-c", "nowhere.npz"), "how pixels become the network's input is unknown"),
        (("--backend", "nothing"), "there is no backend named 'nothing'"),
        (("--set", "quantize-apot.weight_bits=9"), "bits"),
        (("--mean", "0.5"), "--mean and --std go together"),
        (("-o", "."), "the output folder is the current folder"),
    ],
)
def test_options_that_are_refused(
    fxq: Callable, tmp_path: Path, more: tuple[str, ...], told: str
) -> None:
    before = names(tmp_path)
    done = fxq(*command(*more))
    assert done.code == 2
    assert told in " ".join(done.err.split())
    assert names(tmp_path) - before <= {"__pycache__"}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict.fromkeys(CLIPS), "the checkpoint has no clips"),
        ({"conv2.act_alpha": None}, "no levels or no clip for conv2"),
        ({"conv1.weight_quant.wgt_alpha": torch.tensor(1.0)}, "no levels or no clip for conv1"),
        ({"conv2.act_alpha": torch.tensor(-1.0)}, "a clip must be one positive number"),
        ({"conv2.act_alpha": torch.tensor([1.0, 2.0])}, "a clip must be one positive number"),
        ({"fc.weight": None}, "of another network: 1 missing (first: fc.weight)"),
        ({"extra": torch.ones(1)}, "of another network: 1 unexpected (first: extra)"),
        ({"fc.bias": torch.ones(4)}, "fc.bias has shape [4], the network's has [3]"),
        ({"fc.bias": torch.tensor([0, torch.nan, 0])}, "fc.bias holds NaN or infinite values"),
        ({"conv2.weight": torch.ones(8, 4, 3, 3, dtype=torch.int8)}, "holds torch.int8"),
    ],
    ids=str,
)
def test_checkpoints_that_do_not_fit(
    fxq: Callable, tmp_path: Path, state: dict[str, Tensor], change: dict[str, Any], told: str
) -> None:
    changed = {name: value for name, value in (state | change).items() if value is not None}
    torch.save(changed, tmp_path / "apot.pth.tar")
    done = fxq(*command())
    assert done.code == 2
    assert told in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_a_damaged_checkpoint(fxq: Callable, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "apot.pth.tar"
    path.write_bytes(path.read_bytes()[:keep])
    done = fxq(*command())
    assert done.code == 2
    assert "damaged" in done.err
    path.unlink()
    assert "there is no such weight file" in fxq(*command()).err


@pytest.mark.usefixtures("files")
def test_a_name_that_tells_other_bits(fxq: Callable, tmp_path: Path) -> None:
    told = "the checkpoint's name says 2 bits, and apot-4bit has 4"
    assert told not in fxq(*command()).err
    (tmp_path / "apot.pth.tar").rename(tmp_path / "res20_2bit.pth.tar")
    done = fxq("import", "model.py", "res20_2bit.pth.tar", "-o", "two")
    assert done.code == 0
    assert told in done.err


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", ["train", "compile"])
def test_commands_of_float_weights_point_here(fxq: Callable, name: str) -> None:
    done = fxq(name, "model.py", "--weights", "apot.pth.tar")
    assert done.code == 2
    assert "fxq import takes such files" in done.err


@pytest.mark.usefixtures("files")
def test_nothing_to_measure_with(fxq: Callable, write: Callable) -> None:
    write("model.py", MODEL.replace("evaluate", "unused"))
    done = fxq(*command())
    assert done.code == 0, done.err
    assert "not measured; --eval DATA" in done.out
    only = fxq(*command("--set", "quantize-apot.placement=paper", "--force"))
    assert only.code == 2
    assert "there is nothing to measure with" in " ".join(only.err.split())


def test_help_needs_no_torch() -> None:
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fxq.cli.main import app\n"
        "done = CliRunner().invoke(app, ['import', '--help'])\n"
        "assert done.exit_code == 0 and 'CHECKPOINT' in done.output\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
