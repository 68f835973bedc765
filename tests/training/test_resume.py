"""Checkpoints: a training continues bit for bit, and only where it belongs."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import TensorDataset

from fxq.errors import TrainingError
from fxq.training import TrainingOptions, Watch, fit, initialize
from fxq.training.checkpoint import FILE, find_checkpoint

Net = Callable[..., nn.Module]


def stopping(step: int) -> Watch:
    """Ctrl-C is pressed after a step."""
    left = [step]

    def count(_: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    return Watch(on_step=count)


def state(module: nn.Module) -> list[torch.Tensor]:
    return list(module.state_dict().values())


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, state(one), state(other)))


@pytest.mark.parametrize("step", [1, 3, 5, 6, 14, 15])
def test_ctrl_c_after_any_step(
    net: Net, stripes: TensorDataset, options: TrainingOptions, tmp_path: Path, step: int
) -> None:
    whole, model = net(), net()
    expected = fit(whole, stripes, options, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(net(), stripes, options, folder=tmp_path / "part", watch=stopping(step))
    told: list[str] = []
    part = tmp_path / "part"
    found = fit(model, stripes, options, folder=part, watch=Watch(tell=told.append))
    assert told == [f"continued at step {step} of 15"]
    assert (found.losses, same(whole, model)) == (expected.losses, True)
    assert (part / "steps.csv").read_bytes() == (tmp_path / "whole" / "steps.csv").read_bytes()
    for mine, theirs in zip(found.rows, expected.rows, strict=True):
        assert mine | {"seconds": 0} == theirs | {"seconds": 0}


def test_a_finished_training_is_not_repeated(
    net: Net, stripes: TensorDataset, options: TrainingOptions, tmp_path: Path
) -> None:
    model, other = net(), net()
    first = fit(model, stripes, options, folder=tmp_path)
    again = fit(other, stripes, options, folder=tmp_path, watch=stopping(1))
    assert (again.losses, again.rows, again.continued_at) == (first.losses, first.rows, 15)
    assert same(model, other)


def test_time_makes_checkpoints_within_an_epoch(
    net: Net, stripes: TensorDataset, options: TrainingOptions, tmp_path: Path
) -> None:
    seen = []

    def look(_: object) -> None:
        seen.append((tmp_path / FILE).exists())

    fit(
        *(net(), stripes, options),
        folder=tmp_path,
        checkpoint_seconds=0,
        watch=Watch(on_step=look),
    )
    assert seen[:3] == [False, True, True]


SCRIPT = """
import sys, signal, torch
from tests_net import Net, stripes
from fxq.training import TrainingOptions, fit
torch.set_num_threads(1)
torch.manual_seed(5)
options = TrainingOptions(epochs=int(sys.argv[2]), batch_size=16, lr=0.05)
fit(Net(), stripes(), options, folder=sys.argv[1], checkpoint_seconds=0.05)
"""
MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.Flatten(),
                         nn.Linear(144, 3))
def stripes():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(640, 1, 8, 8, generator=generator), torch.arange(640) % 3)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_real_process_continues(tmp_path: Path, how: signal.Signals) -> None:
    """Stopped in the middle of an epoch of 40 steps."""
    (tmp_path / "tests_net.py").write_text(MODULE)

    def start(folder: str) -> subprocess.Popen:
        arguments = [sys.executable, "-c", SCRIPT, folder, "8"]
        return subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE)

    with start("part") as process:
        steps = tmp_path / "part" / "steps.csv"
        while not (tmp_path / "part" / FILE).exists() or len(steps.read_bytes().split()) < 50:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(how)
        process.communicate(timeout=60)
    assert process.returncode == -how
    stopped = len(steps.read_bytes().split()) - 1
    assert 40 < stopped < 320
    for folder in ("part", "whole"):
        with start(folder) as process:
            _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told
    assert steps.read_bytes() == (tmp_path / "whole" / "steps.csv").read_bytes()
    ours, theirs = (load_file(tmp_path / place / FILE) for place in ("part", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {path.name for path in (tmp_path / "part").iterdir()} == {
        *(FILE, "steps.csv", "log.csv", "curves.png")
    }


def test_a_second_thread_is_not_interrupted(
    net: Net, stripes: TensorDataset, options: TrainingOptions
) -> None:
    """Signals belong to the main thread; elsewhere fit leaves them alone."""
    before, losses = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: losses.append(fit(net(), stripes, options).losses))
    thread.start()
    thread.join()
    assert len(losses[0]) == 15
    assert signal.getsignal(signal.SIGINT) is before


# ---- what does not belong ----------------------------------------------------------------------


@pytest.fixture
def kept(net: Net, stripes: TensorDataset, options: TrainingOptions, tmp_path: Path) -> Path:
    """A folder whose training was interrupted after the first epoch."""
    with pytest.raises(KeyboardInterrupt):
        fit(
            *(net(), stripes, options),
            folder=tmp_path,
            identity={"recipe": "apot-4bit"},
            watch=stopping(6),
        )
    return tmp_path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lr": 0.1}, "another lr (0.05, now 0.1)"),
        ({"epochs": 4, "seed": 2}, "another epochs (3, now 4), seed (0, now 2)"),
    ],
)
def test_other_options(
    kept: Path,
    net: Net,
    stripes: TensorDataset,
    options: TrainingOptions,
    change: dict[str, Any],
    told: str,
) -> None:
    before = (kept / FILE).read_bytes()
    with pytest.raises(TrainingError) as caught:
        fit(
            *(net(), stripes, replace(options, **change)),
            folder=kept,
            identity={"recipe": "apot-4bit"},
        )
    assert told in caught.value.what
    assert str(kept) in str(caught.value)
    assert (kept / FILE).read_bytes() == before


def test_another_network_data_or_recipe(
    kept: Path, net: Net, stripes: TensorDataset, options: TrainingOptions
) -> None:
    recipe = {"recipe": "apot-4bit"}
    with pytest.raises(TrainingError, match="another network\n"):
        fit(net(classes=4), stripes, options, folder=kept, identity=recipe)
    fewer = TensorDataset(*(part[:80] for part in stripes.tensors))
    with pytest.raises(TrainingError, match=r"another number of samples \(90, now 80\)"):
        fit(net(), fewer, options, folder=kept, identity=recipe)
    with pytest.raises(TrainingError, match=r"another recipe \(apot-4bit, now apot-2bit\)"):
        fit(net(), stripes, options, folder=kept, identity={"recipe": "apot-2bit"})
    with pytest.raises(TrainingError, match=r"another recipe \(apot-4bit, now None\)"):
        fit(net(), stripes, options, folder=kept)


@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("kind", ["changed", "cut"])
def test_a_damaged_checkpoint(
    kept: Path,
    net: Net,
    stripes: TensorDataset,
    options: TrainingOptions,
    place: float,
    kind: str,
) -> None:
    content = bytearray((kept / FILE).read_bytes())
    where = int(place * len(content))
    content[where] ^= 1
    (kept / FILE).write_bytes(content if kind == "changed" else content[:where])
    with pytest.raises(TrainingError, match=r"damaged|no checkpoint") as caught:
        fit(net(), stripes, options, folder=kept, identity={"recipe": "apot-4bit"})
    assert caught.value.hint


def test_a_foreign_file(
    kept: Path, net: Net, stripes: TensorDataset, options: TrainingOptions
) -> None:
    save_file({"fc.weight": torch.zeros(2)}, kept / FILE)
    with pytest.raises(TrainingError, match="no checkpoint of a training"):
        fit(net(), stripes, options, folder=kept)


# ---- another training's weights ----------------------------------------------------------------


def test_weights_and_norms_are_taken_but_no_alphas(kept: Path, net: Net) -> None:
    model, stored = net(), load_file(kept / FILE)
    alpha = model.clip.alpha.item()
    assert stored["model.clip.alpha"].item() != alpha
    taken = initialize(model, kept / FILE)
    assert taken == len(model.state_dict()) - 1
    assert model.clip.alpha.item() == alpha
    for name, value in model.state_dict().items():
        if name != "clip.alpha":
            assert torch.equal(value, stored[f"model.{name}"]), name


def test_of_another_network(kept: Path, net: Net) -> None:
    model = net(classes=4)
    before = [value.clone() for value in state(model)]
    with pytest.raises(TrainingError, match=r"another network: it has no fc.weight \[4, 256\], fc"):
        initialize(model, kept)
    assert all(map(torch.equal, before, state(model)))


def test_where_there_is_none(tmp_path: Path, net: Net) -> None:
    with pytest.raises(TrainingError, match="there is no checkpoint"):
        initialize(net(), tmp_path)
    with pytest.raises(TrainingError, match="there is no checkpoint"):
        find_checkpoint(tmp_path / "nothing")
