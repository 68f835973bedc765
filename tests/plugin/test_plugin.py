"""A real plugin package: installed by pip, found by its entry points, run by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "package"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed the plugin into, from a copy, without any network."""
    pytest.importorskip("setuptools")
    source = tmp_path_factory.mktemp("source") / "package"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--quiet", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def python(code: str, site: Path) -> str:
    """What a program prints, in a process of its own that has the plugin."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "error::DeprecationWarning:fxq", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_is_found_by_name_and_runs(installed: Path, tmp_path: Path) -> None:
    printed = python(
        f"""
        import torch, fxq
        from fxq.registry import catalog, find_backend, find_network, find_pass
        from fxq.recipe import Recipe

        assert find_pass("prune-weights").__module__ == "fxq_example_plugin.prune"
        assert find_backend("reference").summary.startswith("fxq's integer reference")
        assert "fold-batch-norm" in catalog("passes") and "eager" in catalog("backends")
        model = find_network("example/small").build()

        recipe = Recipe.load("minmax-int8").to_toml()
        recipe = recipe.replace("[[pass]]", '[[pass]]\\nuse = "prune-weights"\\n\\n[[pass]]', 1)
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        result = fxq.compile(
            model, images[:1], Recipe.from_toml(recipe), backend="reference",
            calibration=[images], settings=["prune-weights.share=0.5"],
        )
        step = result.journal["prune-weights"]
        print(step.options, step.delta.summary(), len(step.hits))
        zero = [float((m.codes == 0).float().mean()) for m in result.program.module.modules()
                if hasattr(m, "codes")]
        assert all(0.5 <= share < 0.7 for share in zero), zero

        artifact = result.artifact
        assert artifact.backend == "reference"
        torch.testing.assert_close(artifact(images), result.program.run(images),
                                   atol=0.05, rtol=0)
        artifact.save({str(tmp_path / "run")!r})
        loaded = fxq.load({str(tmp_path / "run")!r})
        assert torch.equal(loaded(images), artifact(images))
        print(loaded.backend)
        """,
        installed,
    )
    assert printed.splitlines() == ["{'share': 0.5} #2 retuned 2", "reference"]


def test_without_the_plugin_its_names_suggest_ours(tmp_path: Path) -> None:
    printed = python(
        """
        from fxq.errors import UnknownNameError
        from fxq.registry import find_backend, find_pass
        for find, name in ((find_pass, "prune-weights"), (find_backend, "reference")):
            try:
                find(name)
            except UnknownNameError as error:
                print(error.what)
        """,
        tmp_path,
    )
    assert printed.splitlines() == [
        "there is no pass named 'prune-weights'",
        "there is no backend named 'reference'",
    ]
