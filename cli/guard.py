"""The public edge: every way a command can end, as an exit code and a message.

==========  ==========================================================
exit code   meaning
==========  ==========================================================
0           done (also when the reader of a pipe went away)
1           a defect of fxq: a traceback, and a request to report it
2           an `FxqError`, a wrong option, or a disk that refuses
130         interrupted
==========  ==========================================================
"""

from __future__ import annotations

import errno
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from fxq.errors import ArtifactError, FxqError

DONE, DEFECT, REFUSED, INTERRUPTED = 0, 1, 2, 130

_DISK = {
    errno.ENOSPC: "free some space, or choose another folder with --output",
    errno.EDQUOT: "free some space, or choose another folder with --output",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: "choose a folder you may write with --output, or change the permissions",
    errno.EPERM: "choose a folder you may write with --output, or change the permissions",
    errno.EROFS: "the file system is read-only; choose another folder with --output",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EISDIR: "a file was expected, this is a folder",
    errno.ENAMETOOLONG: "choose a shorter path",
}


class Guarded(TyperGroup):
    """A command group whose commands end in one of the ways above."""

    def invoke(self, ctx: Any) -> Any:
        """The command has run, or its failure has been told."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "exit_code"):
                raise
            code = report(error, with_traceback=bool(ctx.params.get("traceback")))
            raise SystemExit(code) from None
        return result


def report(error: BaseException, *, with_traceback: bool = False) -> int:
    """The failure is told on standard error; returns the exit code."""
    from . import show

    if isinstance(error, BrokenPipeError):
        show.silence_stdout()
        return DONE
    if isinstance(error, KeyboardInterrupt):
        show.line(f"interrupted; {str(error) or 'nothing was written'}", show.err())
        return INTERRUPTED
    problem = _as_problem(error)
    if with_traceback or problem is None:
        show.trace(error)
    if problem is None:
        show.warning(
            "this is a defect of fxq; please report it with the lines above, the command and the "
            "output of fxq --version",
            "defect",
        )
        return DEFECT
    show.error(problem)
    return REFUSED


def _as_problem(error: BaseException) -> FxqError | None:
    """The error as one the user can act on; None for a defect."""
    if isinstance(error, FxqError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK:
        return ArtifactError(
            f"a file cannot be written or read: {error.strerror}",
            where=error.filename and str(error.filename),
            hint=_DISK[error.errno],
        )
    if type(error).__name__ == "SafetensorError":  # its own kind, whatever the disk says
        return ArtifactError(
            f"the weights cannot be written or read: {error}",
            hint="check the free space and the permissions; nothing was changed",
        )
    if isinstance(error, MemoryError) or "not enough memory" in str(error):
        return FxqError("there is not enough memory", hint="take a smaller --batch-size")
    return None
