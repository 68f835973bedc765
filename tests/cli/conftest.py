from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxq.cli.main import app

MODEL_FILE = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.bn = nn.BatchNorm2d(4)
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            x = torch.relu(self.bn(self.conv(x)))
            return self.fc(x.mean((2, 3)))

    def model():
        return Net()

    example_inputs = torch.zeros(1, 1, 8, 8)
    calibration_data = [torch.randn(4, 1, 8, 8) for _ in range(3)]

    def eval_data():
        for _ in range(2):
            yield torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Fxq = Callable[..., Outcome]


def run_fxq(*arguments: str, env: dict[str, str] | None = None) -> Outcome:
    result = CliRunner().invoke(app, list(arguments), env=env, prog_name="fxq")
    return Outcome(result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="module", autouse=True)
def small_networks(one_thread: None) -> None:
    """Every test here runs on one thread."""


@pytest.fixture(scope="session")
def invoke() -> Fxq:
    """The command line, in whatever folder the test is."""
    return run_fxq


@pytest.fixture(scope="session")
def model_file() -> str:
    """A model file that defines everything."""
    return textwrap.dedent(MODEL_FILE)


@pytest.fixture
def fxq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fxq:
    """The command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return run_fxq


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a file into the folder."""

    def write_file(name: str, text: str = MODEL_FILE) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write_file


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of digits/convnet; read-only."""
    folder = tmp_path_factory.mktemp("session") / "digits"
    done = run_fxq(
        *("compile", "digits/convnet", "-r", "minmax-int8", "-n", "64", "--eval-images", "100"),
        *("-o", str(folder)),
    )
    assert done.code == 0, done.err
    return folder
