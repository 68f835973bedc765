"""`Artifact`: a compiled model as a folder of plain data, written whole or not at all.

``weights.safetensors`` holds every tensor, ``structure.json`` the integer program, ``ledger.json``
where each node went, ``recipe.toml`` and the journal how it was made, ``metadata.json`` the rest,
``SHA256SUMS`` what they were when they were written. Nothing in the folder is code, and loading it
runs none.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxq
from fxq.checksums import check_regular, check_seal, seal
from fxq.errors import ArtifactError, UnknownNameError
from fxq.integer.ledger import Ledger
from fxq.integer.program import IntegerProgram
from fxq.notebook import artifact_html
from fxq.registry import find_backend
from fxq.trail.journal import Journal

FILES = ("weights.safetensors", "structure.json", "ledger.json", "metadata.json")

_TEXTS = (*FILES[1:], "recipe.toml", "journal.json", "values.json")

_MISFITS = (
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)
"""What kernels and modules raise when they are built from parts that do not fit."""


@dataclass
class Artifact:
    """A compiled model.

    Attributes:
        integers: The integer program.
        ledger: Where each node of the captured graph went.
        module: The module that runs it.
        backend: Name of the backend that made it.
        journal: What each pass did.
        recipe_toml: The recipe it was made with.
        promised_coverage: The share of layers the recipe promised to run on integers.
        simulation: Whether its recipe lets layers without an integer kernel compute in float.
        metadata: Engine, versions, accuracy and whatever else is worth keeping.
    """

    integers: IntegerProgram
    ledger: Ledger
    module: nn.Module
    backend: str = "eager"
    journal: Journal | None = None
    recipe_toml: str = ""
    promised_coverage: float = 1.0
    simulation: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """The output of the module."""
        return self.module(*inputs)

    def _repr_html_(self) -> str:
        return artifact_html(self)

    @property
    def size_after(self) -> int:
        """Bytes of the weights, each integer weight at its nominal number of bits."""
        return self.integers.weight_bytes()

    @property
    def warnings(self) -> list[str]:
        """What the user should be told: coverage below the recipe's promise, or a simulation's."""
        if self.simulation:
            return self.ledger.simulated()
        return self.ledger.warnings(self.promised_coverage)

    def save(
        self,
        path: str | Path,
        *,
        force: bool = False,
        attached: Mapping[str, Path] | None = None,
    ) -> Path:
        """The artifact is a folder at this path.

        It is written beside its place and renamed, so that a half-written one never exists.

        Args:
            path: The folder.
            force: Whether an existing folder that is not empty is replaced.
            attached: Folders to copy into it, by name: the record of its training.

        Raises:
            ArtifactError: The folder holds something and force is off, cannot be written, or the
                module calls code of the user's own.
        """
        target = Path(path)
        check_writable(target, force=force)
        if target.is_symlink():
            target = target.resolve()
        with _replacing(target) as folder:
            self._write(folder)
            for name, source in (attached or {}).items():
                shutil.copytree(source, folder / name)
        return target

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        structure = self.integers.to_json()
        tensors = {
            name: value.contiguous().clone() for name, value in self.integers.tensors.items()
        }
        save_file(tensors, folder / "weights.safetensors")
        (folder / "weights.safetensors").chmod(0o644)  # it is made readable by its owner only
        _dump(folder / "structure.json", structure)
        _dump(folder / "ledger.json", self.ledger.to_json())
        _dump(folder / "metadata.json", self._metadata())
        if self.recipe_toml:
            (folder / "recipe.toml").write_text(self.recipe_toml, encoding="utf-8")
        if self.journal is not None:
            self.journal.save(folder)
        write = getattr(find_backend(self.backend), "write", None)
        if write is not None:
            write(self, folder)
        seal(folder)

    def _metadata(self) -> dict[str, Any]:
        return {
            **self.metadata,
            "backend": self.backend,
            "fxq": fxq.__version__,
            "torch": torch.__version__,
            "promised_coverage": self.promised_coverage,
            "simulation": self.simulation,
        }


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
    if not _is_run(target):
        raise ArtifactError(
            "the output folder holds something that is not an fxq run",
            where=str(target),
            hint="--force replaces runs only; choose another folder",
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _is_run(folder: Path) -> bool:
    """Whether fxq wrote what a folder holds, even if it was damaged since."""
    if all(_is_file(folder / name) for name in FILES):
        return True
    try:
        return "fxq" in _object(folder / "metadata.json")
    except ArtifactError:
        return False


def load(path: str | Path, engine: str | None = None) -> Artifact:
    """The artifact saved at a path, ready to run; no code from it is executed.

    Args:
        path: The folder.
        engine: Run on this engine rather than the one it was compiled for.

    Raises:
        ArtifactError: The folder is missing, incomplete, damaged, or not an fxq artifact.
    """
    folder = Path(path)
    missing = [name for name in FILES if not _is_file(folder / name)]
    if missing:
        raise ArtifactError(
            f"this is not an fxq artifact: {', '.join(missing)} is missing",
            where=str(folder),
            hint="give the run folder that fxq compile printed",
        )
    try:
        return _load(folder, engine)
    except ArtifactError as error:
        error.where = error.where or str(folder)
        raise
    except UnknownNameError as error:
        if engine is not None and repr(engine) in error.what:
            raise
        raise ArtifactError(error.what, where=str(folder / "metadata.json")) from error


def _load(folder: Path, engine: str | None) -> Artifact:
    check_regular(folder, _TEXTS)
    check_seal(folder, FILES)
    metadata = _object(folder / "metadata.json")
    integers = IntegerProgram.from_json(_json(folder / "structure.json"), _tensors(folder))
    backend = str(metadata.get("backend", "eager"))
    if engine is not None:
        metadata["engine"] = engine
    recipe = folder / "recipe.toml"
    return Artifact(
        integers=integers,
        ledger=Ledger.from_json(_json(folder / "ledger.json")),
        module=_build(backend, integers, folder, metadata),
        backend=backend,
        journal=_journal(folder),
        recipe_toml=_text(recipe) if recipe.exists() else "",
        promised_coverage=_share(metadata.get("promised_coverage", 1.0)),
        simulation=metadata.get("simulation") is True,
        metadata=metadata,
    )


def _share(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ArtifactError(f"the promised coverage is {value!r}, not a share")
    return float(value)


def _journal(folder: Path) -> Journal | None:
    if not (folder / "journal.json").exists():
        return None
    try:
        return Journal.load(folder)
    except RecursionError as error:
        raise ArtifactError(
            "the journal is nested too deeply", where=str(folder / "journal.json")
        ) from error


def _build(
    backend: str, integers: IntegerProgram, folder: Path, metadata: dict[str, Any]
) -> nn.Module:
    builder: Any = find_backend(backend)
    known = {name: metadata.get(name) for name in ("engine", "flavor")}
    options = {name: str(value) for name, value in known.items() if value is not None}
    try:
        module: nn.Module = builder.load(integers, folder=folder, **options)
    except _MISFITS as error:
        raise ArtifactError(
            f"the structure does not fit its tensors: {str(error).splitlines()[0]}",
            hint="compile again; a file was changed or belongs to another run",
        ) from error
    return module


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "weights.safetensors"
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"the weights cannot be read: {error}",
            where=str(path),
            hint="the file is truncated or foreign; compile again",
        ) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"the file cannot be read: {error}",
            where=str(path),
            hint="it was changed or cut short; compile again",
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"the file is not valid JSON: {error}",
            where=str(path),
            hint="it was changed or cut short; compile again",
        ) from error


def _object(path: Path) -> dict[str, Any]:
    data = _json(path)
    if not isinstance(data, dict):
        raise ArtifactError("the file does not hold an object", where=str(path))
    return data


def _dump(path: Path, data: Any) -> None:
    try:
        text = json.dumps(data, indent=1)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path.name} cannot be written: {error}") from error
    path.write_text(text + "\n", encoding="utf-8")


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes the target when the body ends well, and vanishes when not."""
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
