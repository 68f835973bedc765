"""Why a model cannot be traced: the user's file and line, the construct, and what to do about it."""

from __future__ import annotations

import linecache
import re
import traceback
from pathlib import Path

import torch
from torch import fx, nn

from fxq.errors import CaptureError

_LEAF = "pass the module's class in leaf_modules to keep it as one node"

_CONSTRUCTS: tuple[tuple[str, str, str], ...] = (
    (
        r"control flow",
        "a branch or loop that depends on a tensor value",
        "compute the condition from Python values, fix the argument with concrete_args, or "
        f"{_LEAF}",
    ),
    (
        r"cannot be iterated|not iterable|unpack",
        "iteration over a traced value",
        f"index the elements one by one, or {_LEAF}",
    ),
    (
        r"item assignment",
        "assignment into a slice of a tensor",
        f"build the tensor with torch.cat or torch.where, or {_LEAF}",
    ),
    (r"len", "len() of a traced value", "use x.size(0) instead of len(x), or concrete_args"),
    (
        r"cannot be interpreted as an integer|__index__|to int|int\(\)",
        "a traced value used as a Python integer",
        f"take the number from a constant of the module, or {_LEAF}",
    ),
    (
        r"must be real number|to float|float\(\)|must be float",
        "a traced value used as a Python float",
        f"keep the arithmetic on tensors, or {_LEAF}",
    ),
    (
        r"must be Tensor|must be a tensor|argument .* must be",
        "a call that needs a real tensor while tracing",
        _LEAF,
    ),
    (r"forward|_forward_unimplemented", "a module without a forward", "define forward()"),
)


def explain_trace_failure(error: Exception, model: nn.Module) -> CaptureError:
    """The `CaptureError` for an exception raised while tracing: place, construct and remedy."""
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    construct, remedy = _construct(message)
    frame = user_frame(error)
    where = f"{type(model).__name__}" if frame is None else _shown(frame)
    return CaptureError(
        f"{type(model).__name__} cannot be traced symbolically: {construct} ({message})",
        where=where,
        hint=remedy,
    )


def _construct(message: str) -> tuple[str, str]:
    for pattern, construct, remedy in _CONSTRUCTS:
        if re.search(pattern, message):
            return construct, remedy
    return "an operation that symbolic tracing does not follow", _LEAF


def user_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost frame of a traceback that is the user's code, not torch's or fxq's."""
    torch_folder = Path(torch.__file__).parent
    own_folder = Path(__file__).parent
    fx_folder = Path(fx.__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    outside = [
        frame
        for frame in frames
        if not _inside(frame.filename, torch_folder)
        and not _inside(frame.filename, own_folder)
        and not frame.filename.startswith("<")
    ]
    if outside:
        return outside[-1]
    inside_torch = [frame for frame in frames if not _inside(frame.filename, fx_folder)]
    return inside_torch[-1] if inside_torch else None


def _inside(filename: str, folder: Path) -> bool:
    return Path(filename).is_relative_to(folder)


def _shown(frame: traceback.FrameSummary) -> str:
    line = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{frame.filename}:{frame.lineno} in {frame.name}: {line}"
