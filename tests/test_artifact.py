"""Artifacts: written whole or not at all, and read back bit for bit."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import fxq
from fxq import artifact as artifact_module
from fxq.artifact import Artifact, load
from fxq.errors import ArtifactError, UnknownNameError
from fxq.models_zoo import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual
from fxq.run_folder import FILES, check_writable
from fxq.trail.journal import Journal


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
    """A saved artifact."""
    return small.save(tmp_path / "run")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["x86", "fbgemm", "onednn"])
@pytest.mark.parametrize("recipe", ["minmax-int8", "aciq-4bit"])
@pytest.mark.parametrize("build", [tiny_conv, tiny_residual, tiny_depthwise, tiny_concat, tiny_mlp])
def test_loading_gives_back_what_was_saved(
    build: Callable[[], nn.Module], recipe: str, engine: str, tmp_path: Path
) -> None:
    x = images(4, 16) if build is tiny_mlp else images(4, 3, 8, 8)
    saved = compiled(build(), x, recipe, engine=engine)
    saved.metadata["model"] = {"spec": "tiny", "input_shape": [1, 3, 8, 8]}
    loaded = load(saved.save(tmp_path / "run"))
    assert torch.equal(loaded(x), saved(x))
    assert torch.equal(loaded.module(x * 3), saved.module(x * 3))
    assert loaded.integers.instructions == saved.integers.instructions
    assert loaded.integers.tensors.keys() == saved.integers.tensors.keys()
    for name, tensor in saved.integers.tensors.items():
        assert tensor.dtype == loaded.integers.tensors[name].dtype
        assert torch.equal(tensor, loaded.integers.tensors[name])
    assert loaded.ledger == saved.ledger
    assert loaded.recipe_toml == saved.recipe_toml
    assert loaded.backend == "eager"
    assert loaded.promised_coverage == saved.promised_coverage
    assert loaded.size_after == saved.size_after
    assert loaded.metadata["model"] == saved.metadata["model"]
    assert loaded.metadata["engine"] == engine
    assert isinstance(loaded.journal, Journal)
    assert isinstance(saved.journal, Journal)
    assert loaded.journal.to_json() == saved.journal.to_json()


def test_an_artifact_can_be_saved_again(run: Path, tmp_path: Path) -> None:
    again = load(run).save(tmp_path / "again")
    assert contents(again) == contents(run)


def test_metadata_says_what_made_it(run: Path) -> None:
    metadata = json.loads((run / "metadata.json").read_text())
    assert metadata["fxq"] == fxq.__version__
    assert metadata["torch"] == torch.__version__
    assert metadata["backend"] == "eager"
    assert (run.stat().st_mode & 0o777) == 0o755


def test_another_engine_may_be_chosen(run: Path) -> None:
    x = images(4, 3, 8, 8)
    assert load(run, "fbgemm").metadata["engine"] == "fbgemm"
    assert torch.equal(load(run, "fbgemm").module(x), load(run, "fbgemm").module(x))
    with pytest.raises(UnknownNameError, match="'fbgem'"):
        load(run, "fbgem")


def test_sizes_count_nominal_bits(small: Artifact) -> None:
    """A 4-bit layer counts half of what the same 8-bit layer counts."""
    bits = {
        name: tensor.numel() * (8 if name.startswith(("stem", "fc")) else 4) // 8
        for name, tensor in small.integers.tensors.items()
        if name.endswith(".weight")
    }
    rest = [t for n, t in small.integers.tensors.items() if n.endswith((".scale", ".bias"))]
    assert small.size_after == sum(bits.values()) + sum(t.numel() * 4 for t in rest)


def test_loading_needs_neither_the_model_nor_its_source(run: Path, tmp_path: Path) -> None:
    x = images(4, 3, 8, 8)
    torch.save({"x": x, "y": load(run).module(x)}, tmp_path / "case.pt")
    script = (
        "import sys, torch, fxq\n"
        "torch.set_num_threads(1)\n"
        "case = torch.load(sys.argv[2], weights_only=True)\n"
        "assert torch.equal(fxq.load(sys.argv[1]).module(case['x']), case['y'])\n"
        "print([name for name in sys.modules if name.startswith(('fxq.models', 'fxq.comp'))])\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(run), str(tmp_path / "case.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# ---- where it may be written ---------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused(small: Artifact, run: Path) -> None:
    before = contents(run)
    with pytest.raises(ArtifactError, match="not empty") as caught:
        small.save(run)
    assert "--force" in str(caught.value.hint)
    assert contents(run) == before


def test_force_replaces_a_run(run: Path) -> None:
    (run / "stale.txt").write_text("from before")
    other = compiled(tiny_mlp(), images(4, 16))
    assert other.save(run, force=True) == run
    assert not (run / "stale.txt").exists()
    assert load(run).integers.inputs == ("x",)
    assert names(run.parent) == ["run"]


def test_an_empty_folder_is_used(small: Artifact, tmp_path: Path) -> None:
    target = tmp_path / "empty"
    target.mkdir()
    small.save(target)
    assert set(FILES) <= set(names(target))


def test_missing_parents_are_made(small: Artifact, tmp_path: Path) -> None:
    assert load(small.save(tmp_path / "a" / "b" / "c")).ledger == small.ledger


@pytest.mark.parametrize("name", ["photo.jpg", "metadata.json", "journal.json"])
def test_a_folder_that_is_no_run_is_never_replaced(
    name: str, small: Artifact, tmp_path: Path
) -> None:
    target = tmp_path / "holiday"
    target.mkdir()
    (target / name).write_text('{"camera": 1}')
    with pytest.raises(ArtifactError, match="not an fxq run"):
        small.save(target, force=True)
    assert contents(target) == {name: b'{"camera": 1}'}


def test_a_damaged_run_can_be_replaced(small: Artifact, run: Path) -> None:
    (run / "structure.json").unlink()
    small.save(run, force=True)
    (run / "metadata.json").write_text("{")
    small.save(run, force=True)
    assert load(run).ledger == small.ledger


def test_files_are_in_the_way(small: Artifact, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(ArtifactError, match="output is a file"):
        small.save(file, force=True)
    with pytest.raises(ArtifactError, match="parent is a file"):
        small.save(file / "run")
    with pytest.raises(ArtifactError, match="parent is a file"):
        small.save(file / "a" / "run")
    with pytest.raises(ArtifactError):
        small.save(tmp_path / ("x" * 300))
    with pytest.raises(ArtifactError):
        small.save(tmp_path / "null\0byte")
    assert names(tmp_path) == ["file"]
    assert file.read_text() == "kept"


def test_a_link_to_a_run_is_followed(small: Artifact, run: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(run)
    small.save(link, force=True)
    assert link.is_symlink()
    assert names(tmp_path) == ["latest", "run"]
    assert load(link).ledger == load(run).ledger


def test_it_can_be_asked_beforehand(run: Path, tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "run")
    check_writable(run, force=True)
    with pytest.raises(ArtifactError):
        check_writable(run)
    assert names(tmp_path) == ["run"]


# ---- when writing fails --------------------------------------------------------------------------


FAILURES: dict[str, Exception] = {
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "broken": OSError(errno.EIO, "Input/output error"),
    "tensors": SafetensorError("Error while serializing: I/O error: No space left on device"),
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("place", ["save_file", "structure.json", "metadata.json", "journal"])
def test_a_failure_while_writing_leaves_nothing(
    kind: str, place: str, small: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a new folder, nor a change of the old one."""
    old = compiled(tiny_mlp(), images(4, 16)).save(tmp_path / "run")
    before = contents(old)
    _break(place, FAILURES[kind], monkeypatch)
    for target, force in ((tmp_path / "other", False), (old, True)):
        with pytest.raises(ArtifactError, match="cannot be written") as caught:
            small.save(target, force=force)
        assert "nothing was changed" in str(caught.value.hint)
    monkeypatch.undo()
    assert names(tmp_path) == ["run"]
    assert contents(old) == before


def _break(place: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    if place == "save_file":
        monkeypatch.setattr(safetensors.torch, "save_file", fail)
    elif place == "journal":
        monkeypatch.setattr(Journal, "save", fail)
    else:
        real = artifact_module.write_json
        monkeypatch.setattr(
            artifact_module,
            "write_json",
            lambda path, data: fail() if path.name == place else real(path, data),
        )


def test_a_failure_while_replacing_keeps_the_old_run(
    small: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = compiled(tiny_mlp(), images(4, 16)).save(tmp_path / "run")
    before = contents(old)
    real, calls = Path.rename, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(ArtifactError, match="Input/output error"):
        small.save(old, force=True)
    monkeypatch.undo()
    assert len(calls) == 3
    assert names(tmp_path) == ["run"]
    assert contents(old) == before


def test_an_interruption_leaves_nothing(
    small: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small.save(tmp_path / "run")
    assert names(tmp_path) == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(small: Artifact, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match="cannot be written"):
            small.save(tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)


def test_metadata_must_be_plain(small: Artifact, tmp_path: Path) -> None:
    small.metadata["model"] = object()
    try:
        with pytest.raises(ArtifactError, match=r"metadata\.json cannot be written"):
            small.save(tmp_path / "run")
    finally:
        del small.metadata["model"]
    assert names(tmp_path) == []
