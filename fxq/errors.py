"""Every error fxq raises on purpose: what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class FxqError(Exception):
    """An error the user can act on.

    Args:
        what: One sentence that says what is wrong.
        where: The file, node, option or tensor it was found in.
        hint: What to do next.

    Example:
        >>> print(FxqError("the output folder is not empty", where="runs/a", hint="pass --force"))
        the output folder is not empty
          where runs/a
          hint  pass --force
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where {self.where}")
        if self.hint:
            lines.append(f"  hint  {self.hint}")
        return "\n".join(lines)


class CaptureError(FxqError):
    """The model cannot be turned into a graph.

    Attributes:
        node: Name of the node in the way, where there is a graph already.
    """

    node: str | None = None


class RecipeError(FxqError):
    """A recipe, or an option given to one, is wrong."""


class UnknownNameError(FxqError):
    """A name is not registered; the hint carries the nearest spelling.

    Example:
        >>> error = UnknownNameError("pass", "mark-rleu", ["mark-relu", "calibrate"])
        >>> error.hint
        "did you mean 'mark-relu'?"
    """

    def __init__(
        self, kind: str, name: str, known: Iterable[str], *, where: str | None = None
    ) -> None:
        choices = sorted(known)
        super().__init__(
            f"there is no {kind} named {name!r}", where=where, hint=nearest_hint(name, choices)
        )


class PassError(FxqError):
    """A pass failed; says the pass, the node, its neighbourhood and the passes that had run."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        passes_run: Sequence[str] = (),
    ) -> None:
        self.passes_run = tuple(passes_run)
        super().__init__(what, where=where, hint=hint)


class RequirementError(PassError):
    """A pass was scheduled before one it needs."""


class ContractError(PassError):
    """A pass moved the output further than its declared contract allows."""


class VerifyError(FxqError):
    """The graph broke an invariant."""


class LoweringError(FxqError):
    """A backend cannot express the program; every obstacle is listed at once."""

    def __init__(self, what: str, obstacles: Sequence[object] = (), *, hint: str | None = None):
        self.obstacles = tuple(obstacles)
        where = "\n        ".join(str(obstacle) for obstacle in self.obstacles) or None
        super().__init__(what, where=where, hint=hint)


class CalibrationError(FxqError):
    """Calibration data is missing, empty, not finite or of the wrong shape."""


class ArtifactError(FxqError):
    """A saved artifact is missing, damaged, foreign, or cannot be written."""


class DataError(FxqError):
    """A dataset or weight file is missing, damaged or of the wrong shape."""


class TrainingError(FxqError):
    """Training cannot begin, go on, or continue from a checkpoint."""


class MismatchError(FxqError):
    """A runtime computes something else than the integer reference, where it must not."""


class SpecError(FxqError, ValueError):
    """A quantization spec asks for something that does not exist."""


def nearest_hint(name: str, choices: Sequence[str]) -> str:
    """The hint that names the closest choice, or lists the choices when none is close."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(choices[:12]) + (", …" if len(choices) > 12 else "")
    return f"known: {shown}" if choices else "nothing is registered"
