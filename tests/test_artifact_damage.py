"""Artifacts that were damaged or forged: always an `ArtifactError`, and no code ever runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.artifact import FILES, Artifact, load
from fxq.checksums import FILE as SEAL
from fxq.errors import ArtifactError
from fxq.models_zoo import tiny_mlp, tiny_residual


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


pytestmark = pytest.mark.usefixtures("one_thread")


def compiled(model: nn.Module, x: Tensor, recipe: str = "minmax-int8", **options: Any) -> Artifact:
    return fxq.compile(model, x[:1], recipe, calibration=[x], check=False, **options).artifact


@pytest.fixture(scope="module")
def small() -> Artifact:
    return compiled(tiny_residual(), images(4, 3, 8, 8), "aciq-4bit")


@pytest.fixture
def run(small: Artifact, tmp_path: Path) -> Path:
    """A saved artifact without checksums, which would tell every change."""
    folder = small.save(tmp_path / "run")
    (folder / SEAL).unlink()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- when reading fails --------------------------------------------------------------------------

OPTIONAL = ("journal.json", "recipe.toml")


def random_bytes(path: Path) -> None:
    path.write_bytes(b"\xff" + random.Random(0).randbytes(200))


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def other_json(path: Path) -> None:
    path.write_text('{"name": "a package", "version": "1.0.0", "format": 1}')


def other_list(path: Path) -> None:
    path.write_text("[1, 2, 3]")


def nested(path: Path) -> None:
    path.write_text("[" * 100_000)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": truncated,
    "random": random_bytes,
    "other object": other_json,
    "other list": other_list,
    "null": lambda path: path.write_text("null"),
    "nested": nested,
    "folder": folder,
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, *OPTIONAL])
def test_damaged_files_are_errors(name: str, kind: str, run: Path) -> None:
    DAMAGE[kind](run / name)
    if name == "recipe.toml" and kind not in ("random", "folder"):
        load(run)  # it is kept for people, and never read by fxq
        return
    if (name, kind) in (("metadata.json", "other object"), ("journal.json", "missing")):
        load(run)
        return
    with pytest.raises(ArtifactError) as caught:
        load(run)
    assert str(run) in str(caught.value.where)


def test_a_place_that_is_no_artifact(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match="not an fxq artifact"):
            load(place)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ArtifactError, match="not an fxq artifact"):
        load(tmp_path / ("x" * 300))
    with pytest.raises(ArtifactError, match="not an fxq artifact"):
        load(file)


def test_files_of_two_runs_do_not_mix(run: Path, tmp_path: Path) -> None:
    other = compiled(tiny_mlp(), images(4, 16)).save(tmp_path / "other")
    for name in ("weights.safetensors", "structure.json"):
        mixed = tmp_path / f"mixed-{name}"
        shutil.copytree(run, mixed)
        shutil.copy(other / name, mixed / name)
        with pytest.raises(ArtifactError):
            load(mixed)


METADATA: dict[str, dict[str, Any]] = {
    "backend": {"backend": "no-such-backend"},
    "backend number": {"backend": 3},
    "engine": {"engine": "os.system"},
    "engine number": {"engine": 7},
    "coverage": {"promised_coverage": "much"},
    "coverage beyond": {"promised_coverage": 3.0},
    "no coverage": {"promised_coverage": None},
}


@pytest.mark.parametrize("name", METADATA)
def test_other_metadata_is_an_error(name: str, run: Path) -> None:
    path = run / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | METADATA[name]))
    with pytest.raises(ArtifactError):
        load(run)


# ---- no code from a file ever runs ---------------------------------------------------------------


def attack(run: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    path = run / "structure.json"
    data = json.loads(path.read_text())
    change(data["instructions"])
    path.write_text(json.dumps(data))


def call(target: str, *arguments: Any) -> dict[str, Any]:
    attributes = {
        "target": target,
        "arguments": {"tuple": [{"register": "x"}, *arguments]},
        "keywords": {"dict": []},
    }
    return {"name": "evil", "op": "float", "inputs": ["x"], "attributes": attributes}


ATTACKS: dict[str, dict[str, Any]] = {
    "os.system": call("os.system", "touch pwned"),
    "eval": call("builtin.eval", "1"),
    "builtins": call("builtins.exec", "1"),
    "torch.load": call("torch.load", "evil.pt"),
    "torch.save": call("torch.save", "evil.pt"),
    "torch.from_file": call("torch.from_file", "evil"),
    "subprocess": call("subprocess.run", "ls"),
    "operator": call("operator.methodcaller", "x"),
    "dunder": call("method.__reduce_ex__", 2),
    "hook": call("method.register_hook", "x"),
    "foreign": {
        **call("torch.relu"),
        "attributes": {**call("x")["attributes"], "foreign": "os.system"},
    },
    "module": {
        **call("x"),
        "op": "module",
        "attributes": {
            "module": {
                "dict": [
                    ["class", "os.system"],
                    ["attributes", {"dict": []}],
                    ["children", {"dict": []}],
                    ["empty", []],
                ]
            },
            "arguments": {"tuple": []},
            "keywords": {"dict": []},
        },
    },
    "no module": {
        **call("x"),
        "op": "module",
        "attributes": {"arguments": {"tuple": []}, "keywords": {"dict": []}, "module": 3},
    },
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_code_runs(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*args: Any, **kwargs: Any) -> None:
        pytest.fail("code from the file was run")

    for owner, attribute in ((os, "system"), (subprocess, "run"), (torch, "load"), (torch, "save")):
        monkeypatch.setattr(owner, attribute, called)
    attack(run, lambda steps: steps.insert(0, ATTACKS[name]))
    with pytest.raises(ArtifactError):
        load(run)


def test_weights_are_not_unpickled(run: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("false",)

    import pickle

    (run / "weights.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ArtifactError, match="weights cannot be read"):
        load(run)
