"""``fxq compile`` and ``fxq eval`` of networks that cannot be traced whole."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODEL = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
            self.rare = nn.Linear(4, 4)
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            x = self.conv(x).mean((2, 3))
            if x.sum() > 1e9:
                x = self.rare(x)
            return self.fc(x)

    def model():
        return Net()

    example_inputs = torch.zeros(1, 1, 8, 8)
    calibration_data = [torch.randn(4, 1, 8, 8) for _ in range(3)]

    def eval_data():
        for _ in range(2):
            yield torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    (folder / "net.py").write_text(textwrap.dedent(MODEL))
    return folder


@pytest.fixture(scope="module")
def run(place: Path, invoke: Callable[..., Any]) -> Path:
    found = invoke("compile", str(place / "net.py"), "-r", "minmax-int8", "-o", str(place / "r"))
    assert found.code == 0, found.err
    return place / "r"


def test_parts_are_compiled_and_the_rest_is_told(
    place: Path, run: Path, fxq: Callable[..., Any]
) -> None:
    found = fxq(
        "compile", str(place / "net.py"), "--recipe", "minmax-int8", "-o", str(run), "--force"
    )
    assert found.code == 0
    assert "part 1 of 2: conv, a Sequential, called once" in found.out
    assert "66.7 % of layers, in 2 parts" in found.out
    assert "in no part   rare" in found.out
    assert "if x.sum() > 1e9" in found.out
    assert "its largest traceable parts are compiled" in found.err


def test_the_whole_is_measured_with_the_code_the_user_names(
    place: Path, run: Path, fxq: Callable[..., Any]
) -> None:
    refused = fxq("eval", str(run))
    assert refused.code == 2
    assert "--model" in refused.err
    found = fxq("eval", str(run), "--model", str(place / "net.py"))
    assert found.code == 0
    assert "of 10" in found.out


def test_each_part_is_a_run(run: Path, fxq: Callable[..., Any]) -> None:
    assert fxq("diff", str(run / "parts" / "conv"), "--stat").code == 0
    whole = fxq("explain", str(run))
    assert whole.code == 2
    assert "each a run" in whole.err


def test_what_needs_the_whole_network_is_refused(place: Path, fxq: Callable[..., Any]) -> None:
    found = fxq(
        "compile", str(place / "net.py"), "-r", "minmax-int8", "--max-drop", "0.5",
        "-o", str(place / "no"),
    )  # fmt: skip
    assert found.code == 2
    assert "cannot be traced" in found.err
    assert not (place / "no").exists()


def test_nothing_to_compile(tmp_path: Path, fxq: Callable[..., Any]) -> None:
    file = tmp_path / "sums.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\n\nclass Sums(nn.Module):\n"
        "    def forward(self, x):\n        return x if x.sum() > 0 else -x\n\n\n"
        "model = Sums()\nexample_inputs = torch.zeros(1, 4)\n"
        "calibration_data = [torch.zeros(2, 4)]\n"
    )
    found = fxq("compile", str(file), "--recipe", "minmax-int8", "-o", str(tmp_path / "run"))
    assert found.code == 2
    assert "Traceback" not in found.err
