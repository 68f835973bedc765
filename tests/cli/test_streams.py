"""Pipes, terminals and signals, with real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

MAIN = (sys.executable, "-c", "from fxq.cli.main import main; main()")


def test_a_closed_pipe_is_quiet(digits_run: Path) -> None:
    with subprocess.Popen(
        [*MAIN, "diff", str(digits_run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # the reader is gone before a line is written
        told = process.stderr.read()
        code = process.wait(timeout=60)
    assert (code, told) == (0, "")


def test_interrupting_writes_nothing(tmp_path: Path) -> None:
    command = [*MAIN, "compile", "cifar/resnet56", "-c", "random", "-n", "5000", "-o", "out"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while "fold-batch-norm" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        code = process.wait(timeout=60)
    assert code == 130
    assert told.endswith("interrupted; nothing was written\n")
    assert list(tmp_path.iterdir()) == []
