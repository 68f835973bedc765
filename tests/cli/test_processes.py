"""``fxq compile`` under torchrun: two processes share the calibration, and give what one gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxq
from fxq.models_zoo import tiny_residual

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def together(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *TORCHRUN, str(script), *arguments],
        cwd=script.parent,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def main(tmp_path: Path) -> Path:
    path = tmp_path / "main.py"
    path.write_text(
        "import torch\ntorch.set_num_threads(1)\nfrom fxq.cli.main import main\nmain()\n"
    )
    return path


def test_two_processes_write_the_same_integers(
    main: Path, tmp_path: Path, fxq: Callable[..., Any]
) -> None:
    options = ["digits/convnet", "-r", "aciq-4bit", "-n", "256", "--batch-size", "32"]
    done = together(main, "compile", *options, "-o", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled to two") == 1
    assert "8 batches, 256 images" in done.stdout
    torch.set_num_threads(1)
    assert fxq("compile", *options, "-o", str(tmp_path / "one")).code == 0
    for name in ("weights.safetensors", "structure.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"main.py", "one", "two"}


def test_a_search_runs_in_one_process(main: Path, tmp_path: Path) -> None:
    done = together(main, "compile", "digits/convnet", "--max-drop", "0.5", "-o", "two")
    assert done.returncode != 0
    assert "--max-drop searches in one process" in done.stderr
    assert not (tmp_path / "two").exists()


SHARES = """
import sys
import torch
import torch.distributed as dist
from torch import nn
import fxq
from fxq.models_zoo import tiny_residual

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = tiny_residual()
batches = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]
own = (batch for batch in batches[rank::2])      # a generator, as of a data loader
result = fxq.compile(model, batches[0], sys.argv[1], calibration=own, settings=sys.argv[2:])
result.artifact.save(f"rank{rank}")
"""


@pytest.mark.parametrize("recipe", ["aciq-4bit", "adaround-4bit"])
def test_shares_of_a_python_loader(recipe: str, tmp_path: Path) -> None:
    script = tmp_path / "shares.py"
    script.write_text(SHARES)
    settings = ["adaround.images=16"] if recipe == "adaround-4bit" else []
    done = together(script, recipe, *settings)
    assert done.returncode == 0, done.stderr
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: nn.Module = tiny_residual()
    batches = [
        torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)
    ]
    alone = fxq.compile(model, batches[0], recipe, calibration=batches, settings=settings)
    alone.artifact.save(tmp_path / "alone")
    for name in ("weights.safetensors", "structure.json"):
        wanted = (tmp_path / "alone" / name).read_bytes()
        assert (tmp_path / "rank0" / name).read_bytes() == wanted
        assert (tmp_path / "rank1" / name).read_bytes() == wanted
    journal = json.loads((tmp_path / "rank1" / "journal.json").read_text())
    assert journal
