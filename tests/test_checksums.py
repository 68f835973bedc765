"""Checksums of artifacts, and artifacts of earlier versions."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fxq
from fxq.artifact import FILES
from fxq.checksums import FILE, check_seal, seal
from fxq.errors import ArtifactError

ARTIFACTS = Path(__file__).parent / "artifacts"
FORMATS = sorted(path for path in ARTIFACTS.iterdir() if path.is_dir() and "format" in path.name)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the newest stored artifact."""
    return Path(shutil.copytree(FORMATS[-1], tmp_path / "run"))


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


# ---- earlier versions ----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("engine", ["fbgemm", "x86", "onednn"])
def test_stored_artifacts_give_what_they_gave(folder: Path, engine: str) -> None:
    known = safetensors.torch.load_file(f"{folder}.safetensors")
    found = fxq.load(folder, engine=engine)(known["x"])
    torch.testing.assert_close(found, known["y"], rtol=0, atol=1e-6 if engine == "fbgemm" else 0.05)


def test_artifacts_without_checksums_are_read(run: Path) -> None:
    expected = fxq.load(run)(torch.ones(1, 2, 6, 6))
    (run / FILE).unlink()
    assert torch.equal(fxq.load(run)(torch.ones(1, 2, 6, 6)), expected)


@pytest.mark.parametrize("number", [3, 99, "3", None])
def test_other_formats_are_refused_with_the_reason(number: object, run: Path) -> None:
    path = run / "structure.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": number}))
    seal(run)
    with pytest.raises(ArtifactError, match=f"structure format {number!r} is not the") as caught:
        fxq.load(run)
    assert "the one that saved it" in str(caught.value.hint)


# ---- what was changed ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, "recipe.toml"])
@pytest.mark.parametrize("bit", [3, 801, 5003])
def test_a_single_bit_is_noticed(bit: int, name: str, run: Path) -> None:
    flip(run / name, bit)
    with pytest.raises(ArtifactError, match="its checksum is wrong") as caught:
        fxq.load(run)
    assert caught.value.where == str(run / name)
    seal(run)
    check_seal(run, FILES)


SEALS: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[:100],
    "foreign": lambda text: "hello\n",
    "outside": lambda text: text.replace("structure.json", "../structure.json"),
    "absolute": lambda text: text.replace("structure.json", "/etc/passwd"),
    "twice": lambda text: text * 2,
    "unnamed": lambda text: text.replace("ledger.json", "other.json"),
    "another": lambda text: text.replace(text[:8], "00000000"),
}


@pytest.mark.parametrize("kind", SEALS)
def test_damaged_checksums_are_errors(kind: str, run: Path) -> None:
    path = run / FILE
    path.write_text(SEALS[kind](path.read_text()))
    with pytest.raises(ArtifactError):
        fxq.load(run)


def test_checksums_that_are_no_text(run: Path) -> None:
    (run / FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="cannot be read"):
        fxq.load(run)


@pytest.mark.parametrize("name", [FILE, "recipe.toml", "journal.json", "values.json"])
def test_devices_are_not_read(name: str, run: Path) -> None:
    """One of them never ends."""
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="is no file"):
        fxq.load(run)


def test_files_of_endless_size_are_not_read(run: Path) -> None:
    with (run / "structure.json").open("r+b") as file:
        file.truncate(2**40)  # a hole, which takes no room
    with pytest.raises(ArtifactError, match="too large"):
        fxq.load(run)


def test_what_is_read_by_nobody_may_go_or_come(run: Path) -> None:
    (run / "recipe.toml").unlink()
    (run / "notes.txt").write_text("mine")
    fxq.load(run)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum")
def test_it_is_the_usual_format(run: Path) -> None:
    command = ["sha256sum", "--check", "--strict", FILE]
    assert subprocess.run(command, cwd=run, check=False, capture_output=True).returncode == 0
    flip(run / "structure.json", 5)
    assert subprocess.run(command, cwd=run, check=False, capture_output=True).returncode != 0
