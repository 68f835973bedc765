"""Compiled parts of a model as a folder of artifacts, and back into a model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import fxq
from fxq.artifact import Artifact, load
from fxq.errors import ArtifactError
from fxq.graph.capture import copied_for_inference
from fxq.parts.calls import Arguments
from fxq.parts.composition import Part, composed
from fxq.parts.survey import Survey
from fxq.run_folder import check_writable, json_object, replacing, write_json

_FOLDER = re.compile(r"\w[\w.-]*", re.ASCII)


def save_parts(
    path: Path,
    artifacts: Mapping[str, Artifact],
    survey: Survey,
    metadata: Mapping[str, Any],
    *,
    force: bool = False,
) -> Path:
    """The folder at this path holds the artifacts, and what is known about the whole.

    Raises:
        ArtifactError: The folder holds something and force is off, or cannot be written.
    """
    check_writable(path, force=force)
    target = path.resolve() if path.is_symlink() else path
    folders = _folders(artifacts)
    whole = {
        **metadata,
        "fxq": fxq.__version__,
        "class": type(survey.model).__name__,
        "parts": [_entry(survey.parts[name], folders[name]) for name in artifacts],
        "gaps": [vars(gap) for gap in survey.gaps],
        "left": survey.left,
    }
    with replacing(target) as folder:
        write_json(folder / "metadata.json", whole)
        for name, artifact in artifacts.items():
            artifact.save(folder / "parts" / folders[name])
    return target


def load_parts(path: str | Path, model: nn.Module, *, engine: str | None = None) -> nn.Module:
    """A copy of the model, in eval mode, that runs its parts on the artifacts of a folder.

    Nothing in the folder is code; what is not compiled is the given model's own.

    Args:
        path: The folder that `PartialResult.save` or ``fxq compile`` wrote.
        model: The model the parts were compiled from, with its weights.
        engine: Run on this engine rather than the one it was compiled for.

    Raises:
        ArtifactError: The folder is none of parts, is damaged, or the model is another one.
    """
    folder = Path(path)
    entries = [_Entry.of(item, folder) for item in _listed(folder)]
    copied = copied_for_inference(model)
    for entry in entries:
        entry.check(copied, folder)
    modules = {one.path: load(folder / "parts" / one.folder, engine).module for one in entries}
    return composed(copied, modules, {one.path: one.arguments for one in entries})


def _folders(paths: Iterable[str]) -> dict[str, str]:
    """A folder's name for every part: its path, where that can be one."""
    return {
        path: path if _FOLDER.fullmatch(path) else f"part-{index}"
        for index, path in enumerate(paths)
    }


def _entry(part: Part, folder: str) -> dict[str, Any]:
    fixed = {name: _jsonable(value) for name, value in part.arguments.fixed.items()}
    return {
        "path": part.path,
        "folder": folder,
        "class": part.kind,
        "calls": part.calls,
        "tensors": list(part.arguments.tensors),
        "fixed": fixed,
    }


def _jsonable(value: Any) -> Any:
    """A fixed argument as JSON has it; those it has not are not compared later."""
    return value if isinstance(value, (bool, int, float, str, type(None))) else {"text": str(value)}


@dataclass(frozen=True)
class _Entry:
    """What a folder says of one part."""

    path: str
    folder: str
    kind: str
    arguments: Arguments

    @classmethod
    def of(cls, item: Any, folder: Path) -> _Entry:
        """The entry, with nothing in it that leads out of the folder."""
        try:
            path, name, kind = str(item["path"]), str(item["folder"]), str(item["class"])
            tensors, fixed = tuple(map(str, item["tensors"])), dict(item["fixed"])
        except (LookupError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"a part is not described whole: {type(error).__name__} {error}",
                where=str(folder / "metadata.json"),
                hint="the file was changed; compile again",
            ) from error
        if not _FOLDER.fullmatch(name):
            raise ArtifactError(
                f"{name!r} is not the folder of a part", where=str(folder / "metadata.json")
            )
        plain = {key: value for key, value in fixed.items() if not isinstance(value, (dict, list))}
        return cls(path, name, kind, Arguments(tensors, plain))

    def check(self, model: nn.Module, folder: Path) -> None:
        """The model has such a submodule, which takes such arguments.

        Raises:
            ArtifactError: It has not.
        """
        hint = "give the model that the run was compiled from"
        try:
            module = model.get_submodule(self.path)
        except AttributeError as error:
            raise ArtifactError(
                f"{type(model).__name__} has no submodule {self.path}", where=str(folder), hint=hint
            ) from error
        if type(module).__name__ != self.kind:
            raise ArtifactError(
                f"{self.path or 'the model'} is a {type(module).__name__}, not a {self.kind}",
                where=str(folder),
                hint=hint,
            )
        taken = inspect.signature(module.forward).parameters
        unknown = {*self.arguments.tensors, *self.arguments.fixed} - set(taken)
        if unknown:
            raise ArtifactError(
                f"forward of {self.kind} has no argument {', '.join(sorted(unknown))}",
                where=str(folder),
                hint=hint,
            )


def _listed(folder: Path) -> list[Any]:
    whole = json_object(folder / "metadata.json")
    parts = whole.get("parts")
    if not isinstance(parts, list) or not parts:
        raise ArtifactError(
            "this folder holds no parts of a model",
            where=str(folder),
            hint="give the folder that fxq compile made of a model it could not trace whole; "
            "fxq.load opens every other run",
        )
    return parts
