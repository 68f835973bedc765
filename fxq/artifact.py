"""`Artifact`: a compiled model as a folder of plain data, written whole or not at all.

``weights.safetensors`` holds every tensor, ``structure.json`` the integer program, ``ledger.json``
where each node went, ``recipe.toml`` and the journal how it was made, ``metadata.json`` the rest,
``SHA256SUMS`` what they were when they were written. Nothing in the folder is code, and loading it
runs none.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
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
from fxq.integer.saturation import unproven
from fxq.notebook import artifact_html
from fxq.registry import find_backend
from fxq.run_folder import (
    FILES,
    check_writable,
    holds_parts,
    is_file,
    json_object,
    read_json,
    read_text,
    replacing,
    write_json,
)
from fxq.trail.journal import Journal

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

    @property
    def unproven(self) -> dict[str, str]:
        """Layers that need VNNI to be exact on int8 kernels, and why; float64 does it elsewhere."""
        return unproven(self.integers)

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
        with replacing(target) as folder:
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
        write_json(folder / "structure.json", structure)
        write_json(folder / "ledger.json", self.ledger.to_json())
        write_json(folder / "metadata.json", self._metadata())
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
            "unproven": self.unproven,
        }


def _check_whole(folder: Path) -> None:
    """The folder holds one artifact.

    Raises:
        ArtifactError: It holds something else, or the parts of a model.
    """
    missing = [name for name in FILES if not is_file(folder / name)]
    if not missing:
        return
    if holds_parts(folder):
        raise ArtifactError(
            "this run holds parts of a model, whose code goes with them",
            where=str(folder),
            hint="fxq.load_parts(folder, model) puts them together; each folder below parts/ is "
            "an artifact of its own",
        )
    raise ArtifactError(
        f"this is not an fxq artifact: {', '.join(missing)} is missing",
        where=str(folder),
        hint="give the run folder that fxq compile printed",
    )


def load(path: str | Path, engine: str | None = None) -> Artifact:
    """The artifact saved at a path, ready to run; no code from it is executed.

    Args:
        path: The folder.
        engine: Run on this engine rather than the one it was compiled for.

    Raises:
        ArtifactError: The folder is missing, incomplete, damaged, or not an fxq artifact.
    """
    folder = Path(path)
    _check_whole(folder)
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
    metadata = json_object(folder / "metadata.json")
    integers = IntegerProgram.from_json(read_json(folder / "structure.json"), _tensors(folder))
    backend = str(metadata.get("backend", "eager"))
    if engine is not None:
        metadata["engine"] = engine
    recipe = folder / "recipe.toml"
    return Artifact(
        integers=integers,
        ledger=Ledger.from_json(read_json(folder / "ledger.json")),
        module=_build(backend, integers, folder, metadata),
        backend=backend,
        journal=_journal(folder),
        recipe_toml=read_text(recipe) if recipe.exists() else "",
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
