"""Why a model cannot be traced: the user's file and line, the construct, and the remedy."""

from __future__ import annotations

import inspect
import linecache
import re
import traceback
from pathlib import Path

import torch
from torch import nn

from fxq.errors import CaptureError

_TORCH, _OURS = Path(torch.__file__).parent, Path(__file__).parent
_LEAF = "pass the module's class in leaf_modules to keep it as one node"

_CONSTRUCTS: tuple[tuple[str, str, str], ...] = (
    (
        r"cannot be iterated|not iterable",
        "iteration over a traced value",
        f"index the elements one by one, or {_LEAF}",
    ),
    (
        r"inputs to control flow",
        "a branch or loop that depends on a tensor value",
        "compute the condition from Python values, fix the argument with concrete_args, or "
        f"{_LEAF}",
    ),
    (
        r"not installed as a submodule",
        "a module made inside forward",
        "make it in __init__, or call the function of torch.nn.functional",
    ),
    (
        r"item assignment",
        "assignment into a slice of a tensor",
        f"build the tensor with torch.cat or torch.where, or {_LEAF}",
    ),
    (r"'len' is not", "len() of a traced value", "use x.size(0) instead of len(x)"),
    (
        r"as an integer|__index__|int\(\)|indices must be integers",
        "a traced value used as a Python integer",
        f"take the number from a constant of the module, or {_LEAF}",
    ),
    (
        r"must be real number|float\(\)|must be float",
        "a traced value used as a Python float",
        f"keep the arithmetic on tensors, or {_LEAF}",
    ),
    (
        r"takes 1 positional argument but \d+ were given|must be tuple of ints",
        "a new tensor of a traced size",
        f"make it with a method of a traced tensor, x.new_zeros(...), or {_LEAF}",
    ),
    (
        r"must be Tensor|must be a tensor|argument .* must be",
        "a call that needs a real tensor while tracing",
        _LEAF,
    ),
)


def explain_trace_failure(error: Exception, model: nn.Module) -> CaptureError:
    """The `CaptureError` for an exception raised while tracing: place, construct and remedy."""
    message = (str(error).strip().splitlines() or [""])[0].split(". ")[0]
    construct, remedy = _construct(error, message)
    frame = user_frame(error)
    return CaptureError(
        f"{type(model).__name__} cannot be traced symbolically: {construct} "
        f"({type(error).__name__}: {message})",
        where=class_place(type(model)) if frame is None else _shown(frame),
        hint=remedy,
    )


def _construct(error: Exception, message: str) -> tuple[str, str]:
    if isinstance(error, NotImplementedError) and '"forward"' in message:
        return "a module without a forward", "define forward()"
    for pattern, construct, remedy in _CONSTRUCTS:
        if re.search(pattern, message):
            return construct, remedy
    if "Proxy" not in message and isinstance(error, (NameError, AttributeError, ImportError)):
        return "its forward fails", "call the model on the example; it fails there, too"
    return "an operation that symbolic tracing does not follow", _LEAF


def class_place(cls: type) -> str:
    """The file and line where a class is defined, or its name where that is unknown."""
    try:
        line = inspect.getsourcelines(cls)[1]
        return f"{inspect.getsourcefile(cls)}:{line} in class {cls.__name__}"
    except (OSError, TypeError):
        return cls.__name__


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>.+)')


def traced_line(stack_trace: str | None) -> str | None:
    """The innermost line of the user's code in the stack trace that fx keeps of a node."""
    outside = [
        traceback.FrameSummary(found["file"], int(found["line"]), found["name"])
        for found in _FRAME.finditer(stack_trace or "")
        if _is_users(found["file"])
    ]
    return _shown(outside[-1]) if outside else None


def user_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost frame of a traceback that is the user's code, not torch's or fxq's."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if _is_users(frame.filename)]
    return outside[-1] if outside else None


def _is_users(filename: str) -> bool:
    path = Path(filename)
    ours = any(path.is_relative_to(folder) for folder in (_TORCH, _OURS))
    return not ours and not filename.startswith("<")


def _shown(frame: traceback.FrameSummary) -> str:
    line = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{frame.filename}:{frame.lineno} in {frame.name}: {line}"
