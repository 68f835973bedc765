"""Help and lists are quick: they import no torch."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from typer.testing import CliRunner
from fxq.cli.main import app

for arguments in ([], ["--help"], ["--version"], ["compile", "--help"], ["bench", "--help"],
                  ["models"], ["models", "resnet20"], ["recipes"], ["recipes", "aciq-4bit"],
                  ["recipes", "nothing"], ["compile"], ["no-such-command"]):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code in (0, 2), (arguments, result.output)
    heavy = {"torch", "torchvision", "numpy"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""


def test_help_and_lists_import_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_fxq_imports_no_terminal() -> None:
    program = "import sys, fxq, fxq.model_file; assert not {'rich', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
