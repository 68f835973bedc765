"""The checksums of a saved artifact: ``SHA256SUMS``, which ``sha256sum --check`` reads as well.

They tell damage and carelessness, not malice: whoever changes a file can change its checksum. What
a changed file may say is limited by what loading accepts, whether the folder is sealed or not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from fxq.errors import ArtifactError

FILE = "SHA256SUMS"

LARGEST_TEXT = 2**30
"""Bytes of the largest file that is read as text; those of real networks are a thousandth."""

_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\0]+)")
_HINT = "the folder was changed or copied in part; compile again, or restore the file"


def seal(folder: Path) -> None:
    """The folder holds the checksum of every file in it; those of folders in it are their own.

    Raises:
        OSError: A file cannot be read, or the checksums not be written.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != FILE)
    lines = [f"{_checksum(path)}  {path.name}\n" for path in files]
    (folder / FILE).write_text("".join(lines), encoding="utf-8")


def check_seal(folder: Path, needed: Collection[str]) -> None:
    """Every file is as it was when the folder was sealed; folders of older versions have no seal.

    Files that were deleted since are not missed here.

    Args:
        folder: The folder.
        needed: Files that a seal names.

    Raises:
        ArtifactError: A file was changed, or the checksums were.
    """
    seal_file = folder / FILE
    if not seal_file.exists():
        return
    known = _read(seal_file)
    unnamed = [name for name in needed if name not in known]
    if unnamed:
        raise ArtifactError(
            f"there is no checksum of {unnamed[0]}", where=str(seal_file), hint=_HINT
        )
    for name, checksum in known.items():
        _check_file(folder / name, checksum)


def check_regular(folder: Path, texts: Iterable[str]) -> None:
    """What is read as text is a file of a sane size, where it is there.

    Raises:
        ArtifactError: It is a folder, a device, or too large.
    """
    for path in (folder / name for name in (*texts, FILE)):
        if path.exists() and not path.is_file():
            raise ArtifactError(f"{path.name} is no file", where=str(path), hint=_HINT)
        if path.exists() and path.stat().st_size > LARGEST_TEXT:
            raise ArtifactError(f"{path.name} is too large", where=str(path), hint=_HINT)


def _check_file(path: Path, checksum: str) -> None:
    try:
        is_same = not path.exists() or _checksum(path) == checksum
    except OSError as error:
        raise ArtifactError(
            f"{path.name} cannot be read: {error.strerror}", where=str(path), hint=_HINT
        ) from error
    if not is_same:
        raise ArtifactError(
            f"{path.name} is not what was saved: its checksum is wrong",
            where=str(path),
            hint=_HINT,
        )


def _read(path: Path) -> dict[str, str]:
    """The checksums by name of file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"the checksums cannot be read: {error}", where=str(path), hint=_HINT
        ) from error
    known: dict[str, str] = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None or match[2] in known:
            raise ArtifactError(
                f"the checksums are damaged: {line[:80]!r}", where=str(path), hint=_HINT
            )
        known[match[2]] = match[1]
    return known


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
