"""What went wrong in the user's own code: the kind of error, its message and the user's line."""

from __future__ import annotations

import contextlib
import inspect
import traceback
from pathlib import Path

from fxq.errors import FxqError


def failure(error: BaseException, where: str, what: str) -> FxqError:
    """The error for an exception of the user's code: its kind, its message and the user's line."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        line = (error.text or "").strip()
        place = f"{_shown_path(error.filename)}:{error.lineno}" + (f": {line}" if line else "")
        return FxqError(
            f"{where} {what}: {kind}: {error.msg}", where=place, hint="correct the line"
        )
    place = _user_place(error) or where
    if isinstance(error, SystemExit):
        return FxqError(
            f"{where} {what}: it calls sys.exit()",
            where=place,
            hint='put what the script does under if __name__ == "__main__":',
        )
    first = (str(error).strip().splitlines() or [""])[0]
    shown = f"{kind}: {first}" if first else kind
    shown_what = what if what.endswith("fails") else f"{where} {what}"
    return FxqError(f"{shown_what}: {shown}", where=place, hint=_remedy(error))


def _remedy(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"install {error.name}, or run fxq where it can be imported"
    return "this line is in the model's own code; fxq --traceback shows every frame"


def _user_place(error: BaseException) -> str | None:
    """File, line and text of the innermost frame that is the user's own code."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
    ]
    own = [frame for frame in frames if not _foreign(Path(frame.filename))]
    if not own:
        return None
    frame = own[-1]
    return f"{_shown_path(frame.filename)}:{frame.lineno} in {frame.name}: {frame.line}"


def _foreign(file: Path) -> bool:
    """Whether a file belongs to Python, to an installed package or to fxq."""
    folders = (Path(inspect.__file__).parent, Path(__file__).parent)
    return "site-packages" in file.parts or any(file.is_relative_to(f) for f in folders)


def _shown_path(filename: str) -> str:
    """The path as the user would type it: relative where the file is below the current folder."""
    path = Path(filename)
    with contextlib.suppress(ValueError, OSError):
        return str(path.relative_to(Path.cwd()))
    return filename
