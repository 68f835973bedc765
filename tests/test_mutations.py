"""Mutants of files: loading one gives the same, or an error of fxq, and touches nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks/mutations.py"


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_no_mutant_is_a_surprise(count: int) -> None:
    """In a process of its own, which a mutant may end."""
    command = [sys.executable, str(SCRIPT), "--count", str(count), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one for one in results if one["outcome"].startswith("bug")] == []
    assert len(results) == count, done.stderr[-2000:]
    kinds = {one["outcome"].partition(":")[0] for one in results}
    assert kinds == {"same", "refused", "other"}
    assert {one["subject"] for one in results} >= {"eager", "onnx", "recipe", "checkpoint"}
