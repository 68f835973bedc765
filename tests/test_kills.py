"""Kills of real processes: the same command ends as if there had been none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks/kills.py"


@pytest.mark.parametrize(
    "kinds", ["compile", pytest.param("calibrate,adaround,train", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("how", ["KILL", pytest.param("INT", marks=pytest.mark.slow)])
def test_a_killed_command_ends_the_same(kinds: str, how: str) -> None:
    command = [sys.executable, str(SCRIPT), "--count", "1", "--kinds", kinds, "--signal", how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-2000:]}"
    assert done.stdout.endswith("0 violations\n")
