"""Run folders: what may be replaced, how they appear whole or not at all, and their JSON files."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fxq.errors import ArtifactError

FILES = ("weights.safetensors", "structure.json", "ledger.json", "metadata.json")
"""What every artifact has."""


def check_writable(target: Path, *, force: bool = False) -> None:
    """A folder can be made at this path without losing anything.

    Raises:
        ArtifactError: It holds something and force is off, or it, or its parent, is a file.
    """
    try:
        if target.is_dir():
            _check_replaceable(target, force=force)
        elif target.exists():
            raise ArtifactError(
                "the output is a file",
                where=str(target),
                hint="name a folder that does not exist yet",
            )
        existing_parent(target)
    except OSError as error:
        raise _unwritable(target, error) from error


def existing_parent(target: Path) -> Path:
    """The nearest folder above a path that exists.

    Raises:
        ArtifactError: It is a file.
        OSError: It cannot be looked at.
    """
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ArtifactError("the output's parent is a file", where=str(parent))
    return parent


def _check_replaceable(target: Path, *, force: bool) -> None:
    """A folder is empty, or a run that may be replaced."""
    if not any(target.iterdir()):
        return
    if not force:
        raise ArtifactError(
            "the output folder is not empty",
            where=str(target),
            hint="pass --force to replace it, or choose another with -o",
        )
    if not is_run(target):
        raise ArtifactError(
            "the output folder holds something that is not an fxq run",
            where=str(target),
            hint="--force replaces runs only; choose another folder",
        )


def is_file(path: Path) -> bool:
    """Whether there is a file, as far as one may look."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_run(folder: Path) -> bool:
    """Whether fxq wrote what a folder holds, even if it was damaged since."""
    if all(is_file(folder / name) for name in FILES):
        return True
    try:
        return "fxq" in json_object(folder / "metadata.json")
    except ArtifactError:
        return False


def holds_parts(folder: Path) -> bool:
    """Whether a folder holds compiled parts of a model, and no artifact of the whole."""
    try:
        return "parts" in json_object(folder / "metadata.json")
    except ArtifactError:
        return False


def read_text(path: Path) -> str:
    """What a text file holds.

    Raises:
        ArtifactError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"the file cannot be read: {error}",
            where=str(path),
            hint="it was changed or cut short; compile again",
        ) from error


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ArtifactError: It cannot be read, or is none.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"the file is not valid JSON: {error}",
            where=str(path),
            hint="it was changed or cut short; compile again",
        ) from error


def json_object(path: Path) -> dict[str, Any]:
    """The object a JSON file holds.

    Raises:
        ArtifactError: It cannot be read, or holds something else.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise ArtifactError("the file does not hold an object", where=str(path))
    return data


def write_json(path: Path, data: Any) -> None:
    """The file holds the data, indented.

    Raises:
        ArtifactError: JSON cannot express it.
    """
    try:
        text = json.dumps(data, indent=1)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path.name} cannot be written: {error}") from error
    path.write_text(text + "\n", encoding="utf-8")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes the target when the body ends well, and vanishes when not.

    Raises:
        ArtifactError: It cannot be written.
    """
    from safetensors import SafetensorError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}-", dir=target.parent))
    except (OSError, ValueError) as error:
        raise _unwritable(target, error) from error
    try:
        yield folder
        folder.chmod(0o755)
        _swap(folder, target)
    except (OSError, SafetensorError) as error:
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap(folder: Path, target: Path) -> None:
    """The new folder takes the old one's place; the old one is kept until it has."""
    if not target.exists():
        folder.rename(target)
        return
    old = folder.with_name(f"{folder.name}-old")
    target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _unwritable(target: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"the artifact cannot be written: {getattr(error, 'strerror', None) or error}",
        where=str(target),
        hint="check the path, the permissions and the free space; nothing was changed",
    )
