"""The workspace: a folder where long passes keep how far they are, so that a kill costs little.

Each state is one safetensors file, named after the pass and a digest of everything that its result
depends on. A pass with the same digest continues there; any other never finds the file. Files are
written beside their place and renamed, and carry a checksum, so that a damaged one is no state.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxq
from fxq.errors import ArtifactError
from fxq.graph.program import Program, facts
from fxq.graph.rewrite import Editor

MARKER = "what-is-this.txt"
"""The file that tells a folder of ours from any other."""

_ABOUT = """\
fxq keeps here how far a compilation is. The same command continues where it was.
The folder goes away when the compilation is written; it may be deleted at any time.
"""

_FILES = f"*-{'[0-9a-f]' * 32}.safetensors*"  # with those that a kill left half-written

INTERVAL = 20.0
"""Seconds between savings at least."""

_SHARE = 0.02  # of the time that saving may take


def open_workspace(folder: str | Path) -> Path:
    """The folder, in which passes may keep their states; it is made when the first one does.

    Raises:
        ArtifactError: It is a file, or holds what fxq did not write.
    """
    path = Path(folder)
    if not path.exists() or is_workspace(path):
        return path
    if not path.is_dir() or any(path.iterdir()):
        raise ArtifactError(
            "the place for unfinished work is taken by something that fxq did not write",
            where=str(path),
            hint="move it away, or name another folder",
        )
    return path


def is_workspace(folder: Path) -> bool:
    """Whether fxq made the folder to keep states in."""
    return (folder / MARKER).is_file()


def holds_state(folder: Path) -> bool:
    """Whether some pass has kept a state in a folder of ours."""
    return is_workspace(folder) and any(folder.glob(_FILES))


def remove_workspace(folder: Path) -> None:
    """What fxq wrote into a workspace is gone, and the folder where it held nothing else."""
    if not is_workspace(folder):
        return
    with contextlib.suppress(OSError):
        for path in (*folder.glob(_FILES), folder / MARKER):
            path.unlink()
        folder.rmdir()


class Checkpoint:
    """How far one pass is; nothing is kept where the program has no workspace.

    Args:
        program: The program as the pass finds it.
        edit: The pass's editor: its name, and where it is told that a state cannot be written.
        options: The options of the pass, seeds included.
        inputs: The images it works on.
    """

    def __init__(
        self, program: Program, edit: Editor, options: Mapping[str, Any], inputs: tuple[Any, ...]
    ) -> None:
        self._edit = edit
        self._path: Path | None = None
        if program.workspace is not None:
            found = digest(edit.origin, options, inputs, *_content(program))
            self._path = program.workspace / f"{edit.origin}-{found}.safetensors"
        self._due = time.monotonic() + INTERVAL
        self._has_told = False

    def load(self) -> dict[str, Tensor]:
        """The state that was kept last, by name; empty where there is none, or a damaged one."""
        from safetensors import SafetensorError, safe_open

        if self._path is None:
            return {}
        try:
            with safe_open(self._path, "pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                known = (file.metadata() or {}).get("checksum")
        except (OSError, ValueError, LookupError, RuntimeError, SafetensorError):
            return {}
        return tensors if known == digest(tensors) else {}

    @contextlib.contextmanager
    def keeping(self, state: Callable[[], Mapping[str, Tensor]]) -> Iterator[Callable[[], None]]:
        """The state is kept when the body ends or is interrupted.

        Args:
            state: Gives what the pass continues from, by name; empty where it cannot.

        Yields:
            What the body calls now and then; it keeps the state where some time has passed.
        """

        def keep_if_due() -> None:
            if time.monotonic() >= self._due:
                self._save(state())

        try:
            yield keep_if_due
        except KeyboardInterrupt:
            self._save(state())
            raise
        self._save(state())

    def _save(self, state: Mapping[str, Tensor]) -> None:
        from safetensors import SafetensorError

        if self._path is None or not state:
            return
        start = time.monotonic()
        try:
            _write(self._path, {name: value.detach() for name, value in state.items()})
        except (OSError, SafetensorError) as error:
            self._tell(getattr(error, "strerror", None) or str(error))
        end = time.monotonic()
        self._due = end + max(INTERVAL, (end - start) / _SHARE)

    def _tell(self, why: str) -> None:
        if not self._has_told:
            self._edit.note(f"how far it was could not be kept in {self._path}: {why}")
        self._has_told = True


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """The tensors are in the file, or what was there before."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / MARKER).write_text(_ABOUT, encoding="utf-8")
    whole = {name: value.contiguous() for name, value in tensors.items()}
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        save_file(whole, beside, metadata={"checksum": digest(whole)})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


# ---- digests -----------------------------------------------------------------------------------


def _content(program: Program) -> Iterator[Any]:
    """Everything that a pass reads from a program.

    The output on the probe stands for what only the user's code knows.
    """
    yield fxq.__version__, torch.__version__
    yield str(program.graph), repr(program.module), program.overrides, program.simulation
    yield [facts(node) for node in program.nodes()]
    yield program.module.state_dict()
    yield program.run(*program.probe)


def digest(*parts: Any) -> str:
    """32 hex digits that differ where the parts do: tensors in any bit, the rest in its text.

    Example:
        >>> digest(torch.zeros(2), {"seed": 0}) == digest(torch.zeros(2), {"seed": 0})
        True
        >>> digest(torch.zeros(2)) == digest(torch.zeros(1, 2)), digest([1, 2]) == digest([12])
        (False, False)
    """
    found = hashlib.blake2b(digest_size=16)
    for part in _flat(parts):
        if isinstance(part, Tensor):
            found.update(f"{part.dtype} {list(part.shape)}".encode())
            found.update(_bytes(part))
        else:
            found.update(f"{part!r}\n".encode())
    return found.hexdigest()


def _flat(part: Any) -> Iterator[Any]:
    """The leaves of nested containers, mappings by key, and what tells containers apart."""
    if isinstance(part, Mapping):
        yield f"mapping of {len(part)}"
        for key, value in sorted(part.items(), key=lambda item: str(item[0])):
            yield key
            yield from _flat(value)
    elif isinstance(part, (list, tuple)):
        yield f"sequence of {len(part)}"
        for value in part:
            yield from _flat(value)
    else:
        yield part


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
