"""Importing is cheap and says nothing; every example in a docstring is true."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "torchvision", "numpy", "networkx", "rich", "typer", "onnx", "onnxruntime")


def modules_after(code: str) -> set[str]:
    """The modules that are loaded after a program of one line."""
    program = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    return set(json.loads(line))


def test_importing_fxq_imports_nothing_heavy() -> None:
    loaded = modules_after("import fxq")
    assert not loaded & set(HEAVY)
    assert not any(name.startswith("fxq.") for name in loaded)


def test_errors_and_the_zoo_catalog_need_no_torch() -> None:
    loaded = modules_after("import fxq.errors, fxq.models_zoo; fxq.models_zoo.CATALOG")
    assert not loaded & set(HEAVY)


def test_the_core_and_the_passes_need_neither_terminal_nor_onnx_nor_torchvision() -> None:
    loaded = modules_after("import fxq.passes, fxq.recipe; fxq.recipe.Recipe.load('aciq-4bit')")
    assert "torch" in loaded
    assert not loaded & {"torchvision", "rich", "typer", "onnx", "onnxruntime", "sklearn", "scipy"}
    assert not any(name.startswith("torch.ao.quantization.fx") for name in loaded)


def test_every_public_name_exists() -> None:
    import fxq

    assert dir(fxq) == sorted(fxq.__all__)
    for name in fxq.__all__:
        assert getattr(fxq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fxq.nothing  # noqa: B018


def names_of_modules() -> list[str]:
    found = []
    for folder in ("fxq", "passes", "backends", "models_zoo"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            parts = parts if folder == "fxq" else ["fxq", *parts]
            found.append(".".join(part for part in parts if part != "__init__"))
    return found


@pytest.mark.parametrize("name", names_of_modules())
def test_examples_in_docstrings_are_true(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
