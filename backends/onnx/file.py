"""ONNX files: written whole or not at all, with the weights beside them where they are too many."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fxq.errors import ArtifactError

if TYPE_CHECKING:
    import onnx

EXTERNAL_ABOVE = 2**31 - 2**20
"""Bytes above which weights go to a file of their own: protobuf ends at 2 GiB."""


def fits_one_file(model: onnx.ModelProto, limit: int = EXTERNAL_ABOVE) -> bool:
    """Whether a model can be one protobuf file."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= limit


def data_file(path: Path) -> Path:
    """The file beside a model that holds its weights, where they are too many for the model's."""
    return path.with_name(f"{path.name}.data")


def write_model(model: onnx.ModelProto, path: Path, *, limit: int = EXTERNAL_ABOVE) -> None:
    """The model is in a file, and its weights beside it if they are more than ``limit`` bytes.

    Raises:
        OSError: It cannot be written.
    """
    import onnx

    if fits_one_file(model, limit):
        path.write_bytes(model.SerializeToString(deterministic=True))
        return
    split = onnx.ModelProto()
    split.CopyFrom(model)
    onnx.save_model(
        split,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=data_file(path).name,
        size_threshold=256,
    )


def save_model(
    model: onnx.ModelProto, path: Path, *, force: bool = False, limit: int = EXTERNAL_ABOVE
) -> None:
    """The model is at a path; nothing half-written ever is.

    Args:
        model: The model.
        path: The file.
        force: Whether an existing file is replaced.
        limit: Bytes of weights above which they go to ``NAME.data`` beside it.

    Raises:
        ArtifactError: The file exists and force is off, or it cannot be written.
    """
    check_file(path, force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}-", dir=path.parent))
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        write_model(model, folder / path.name, limit=limit)
        for written in sorted(folder.iterdir(), reverse=True):  # the data before what reads it
            written.replace(path.with_name(written.name))
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_file(path: Path, *, force: bool = False) -> None:
    """A file can be made at a path without losing anything.

    Raises:
        ArtifactError: It exists and force is off, or it is a folder.
    """
    from fxq.run_folder import existing_parent

    try:
        if path.is_dir():
            raise ArtifactError(
                "the output is a folder", where=str(path), hint="name a file, as in model.onnx"
            )
        if path.exists() and not force:
            raise ArtifactError(
                "the output file exists",
                where=str(path),
                hint="pass --force to replace it, or choose another with -o",
            )
        parent = existing_parent(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ArtifactError(
            "the output's folder is not writable",
            where=str(parent),
            hint="choose another with -o",
        )


def read_model(path: Path) -> onnx.ModelProto:
    """The model in a file, with its weights.

    Raises:
        ArtifactError: It is missing, truncated or no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        return onnx.load(path)
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise ArtifactError(
            f"the ONNX model cannot be read: {str(error).splitlines()[0]}",
            where=str(path),
            hint="the file is missing, truncated or foreign; export again",
        ) from error


def _unwritable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"the ONNX model cannot be written: {error.strerror or error}",
        where=str(path),
        hint="check the path, the permissions and the free space; nothing was changed",
    )
