"""Random networks: what must hold of every network and recipe holds of a few of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "benchmarks/random_networks.py"
RECIPES = ("minmax-int8", "aciq-3bit", "aciq-paper-4w4a", "apot-4bit", "static-int8")


def run(table: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    """In a process of its own, which a network may end."""
    command = [sys.executable, str(SCRIPT), str(table), "--recipes", ",".join(RECIPES), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return [json.loads(line) for line in table.read_text().splitlines()], done.stdout


def test_everything_holds_and_is_not_run_twice(tmp_path: Path) -> None:
    table = tmp_path / "found.jsonl"
    first, _ = run(table, "--count", "3", "--seed", "100", "--every", "5")
    assert len(first) == 3 * len(RECIPES)
    assert sum(row["onnx"] for row in first) == 3
    rows, told = run(table, "--count", "4", "--seed", "100", "--every", "5")
    assert rows[: len(first)] == first
    assert {row["seed"] for row in rows[len(first) :]} == {103}
    assert told.startswith("4 networks, 20 runs")
    assert not any(row["violation"] for row in rows)
