"""Two processes under torchrun, which share every batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

SCRIPT = """
import os, sys, torch
from dataclasses import replace
from torch import nn
from torch.utils.data import TensorDataset
from safetensors.torch import save_file
from fxq.errors import TrainingError
from fxq.quant.augment import Augmentation
from fxq.training import TrainingOptions, Watch, fit
from fxq.world import process_group
torch.set_num_threads(1)

class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(1.5))
    def forward(self, x):
        return torch.minimum(x, self.alpha)

def network(norm):
    torch.manual_seed(3)
    extra = [nn.BatchNorm2d(4)] if norm else []
    return nn.Sequential(nn.Conv2d(1, 4, 3), *extra, Clip(), nn.Flatten(), nn.Linear(144, 3))

generator = torch.Generator().manual_seed(1)
images = torch.randn(96, 1, 8, 8, generator=generator)
labels = torch.arange(96) % 3
data = TensorDataset(images, labels)
options = TrainingOptions(epochs=2, batch_size=16, lr=0.05, augmentation=Augmentation.NONE)
out = sys.argv[1]
with process_group("cpu") as world:
    told = []
    for norm in (False, True):
        model = network(norm)
        calls = []
        training = fit(
            model, data, options, evaluate=lambda m: calls.append(1) or 0.5,
            folder=f"{out}/norm-{norm}", watch=Watch(on_epoch=told.append),
        )
        state = {**model.state_dict(), "losses": torch.tensor(training.losses)}
        save_file(state, f"{out}/{norm}-{world.rank}.safetensors")
        assert len(calls) == (2 if world.is_first else 0)
        assert [row["test_accuracy"] for row in training.rows] == [0.5, 0.5]
    assert len(told) == (4 if world.is_first else 0)
    model, teacher = network(False), network(True)
    training = fit(model, data, replace(options, distill=0.75), teacher=teacher)
    state = {**model.state_dict(), "losses": torch.tensor(training.losses)}
    save_file(state, f"{out}/distilled-{world.rank}.safetensors")
    poisoned = images.clone()
    poisoned[40] = float("nan")  # in one process's share of a batch of the first epoch
    try:
        fit(network(True), TensorDataset(poisoned, labels), options)
    except TrainingError as error:
        with open(f"{out}/error-{world.rank}", "w") as file:
            file.write(str(error))
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote, and in ``alone`` what one did."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "script.py").write_text(SCRIPT)
    (folder / "alone").mkdir()
    for command, out in ((TORCHRUN, "."), ((sys.executable,), "alone")):
        done = subprocess.run(
            [*command, "script.py", out], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    return folder


def tensors(path: Path) -> dict[str, Any]:
    return load_file(path)


@pytest.mark.parametrize("norm", [False, True])
def test_processes_end_with_the_same_parameters(outputs: Path, norm: bool) -> None:
    one, other = (tensors(outputs / f"{norm}-{rank}.safetensors") for rank in (0, 1))
    names = [name for name in one if "running" not in name and "tracked" not in name]
    assert "losses" in names
    assert sum(name.endswith("alpha") for name in names) == 1
    assert all(torch.equal(one[name], other[name]) for name in names)


@pytest.mark.parametrize("case", ["False", "distilled"])
def test_they_compute_what_one_process_does(outputs: Path, case: str) -> None:
    """Without batch norm, whose statistics are those of a share, to float accuracy."""
    shared = tensors(outputs / f"{case}-0.safetensors")
    alone = tensors(outputs / "alone" / f"{case}-0.safetensors")
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_the_first_process_writes(outputs: Path) -> None:
    files = {path.name for path in (outputs / "norm-True").iterdir()}
    assert files == {"checkpoint.safetensors", "log.csv", "steps.csv", "curves.png"}


def test_all_stop_at_the_same_step(outputs: Path) -> None:
    first, second = ((outputs / f"error-{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert "the loss is nan" in first
