"""Importing torchvision where its compiled extension does not fit the torch beside it.

The torchvision wheel of the package index links CUDA libraries. Beside a CPU build of torch its
extension does not load, the operators ``torchvision::nms`` and ``torchvision::qnms`` stay
undefined, and ``import torchvision`` then fails because it registers shape rules for them.
Defining the two operators first makes the import succeed; everything else in torchvision that a
classification or segmentation network needs is plain Python.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import library

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")
_REGIONS = 64
_fragments: list[library.Library] = []  # an operator lives as long as what defined it


def prepare_torchvision() -> bool:
    """Make ``import torchvision`` succeed; true when the two operators are ours.

    Nothing is defined where torchvision is absent, already imported, or has an extension that
    loads. Calling it again changes nothing. torchvision itself is not imported.
    """
    if _fragments:
        return True
    if "torchvision" in sys.modules or _extension_defines_operators():
        return False
    fragment = library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in _OPERATORS:
        fragment.define(operator + _SCHEMA)  # type: ignore[no-untyped-call]
        for device in ("CPU", "CUDA"):
            fragment.impl(operator, nms, device)  # type: ignore[no-untyped-call]
    _fragments.append(fragment)
    return True


def import_torchvision() -> ModuleType:
    """The torchvision package, imported after ``prepare_torchvision``.

    Where the operators are ours, ``torchvision.ops.nms`` is told that they exist, and ``roi_align``
    computes in torch's operators as they are, a few regions at a time, so that detection networks
    run as well: torchvision would have torch.compile translate it to C++ first, for minutes.

    Raises:
        ImportError: If torchvision is not installed.
    """
    prepared = prepare_torchvision()
    torchvision = importlib.import_module("torchvision")
    if prepared:
        boxes = importlib.import_module("torchvision.ops.boxes")
        vars(boxes)["_assert_has_ops"] = _nothing_to_assert
        regions = importlib.import_module("torchvision.ops.roi_align")
        vars(regions)["_roi_align"] = _in_pieces(inspect.unwrap(vars(regions)["_roi_align"]))
    return torchvision


def nms(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Indices of the boxes that survive greedy non-maximum suppression, best score first.

    A box is dropped when its intersection over union with a kept box of higher score exceeds the
    threshold; of equal scores the earlier box goes first, as in torchvision's CPU kernel.

    Args:
        dets: [N, 4], corners ``x1, y1, x2, y2``.
        scores: [N].
        iou_threshold: Largest overlap two kept boxes may have.

    Returns:
        [K] int64 with K at most N.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
        >>> nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist()
        [1, 2]
    """
    boxes = dets.detach().to(torch.float64 if dets.dtype == torch.float64 else torch.float32)
    order = scores.detach().argsort(stable=True, descending=True)
    boxes = boxes[order]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    kept: list[int] = []
    for index in range(len(boxes)):
        if not alive[index]:
            continue
        kept.append(index)
        corner = torch.maximum(boxes[index, :2], boxes[index + 1 :, :2])
        extent = (torch.minimum(boxes[index, 2:], boxes[index + 1 :, 2:]) - corner).clamp(min=0)
        shared = extent[:, 0] * extent[:, 1]
        union = areas[index] + areas[index + 1 :] - shared
        alive[index + 1 :] &= ~(shared / union > iou_threshold)
    return order[torch.tensor(kept, dtype=torch.int64, device=order.device)]


def _extension_defines_operators() -> bool:
    """Whether nothing needs defining: no torchvision here, or its extension brings the operators.

    The extension is looked for and loaded the way ``torchvision.extension`` does it, so what fails
    here fails there too; loading it twice is harmless.
    """
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    try:
        extension = _extension_path(Path(spec.origin).parent)
        torch.ops.load_library(extension)  # type: ignore[no-untyped-call]
    except (ImportError, OSError):
        return False
    return hasattr(torch.ops.torchvision, "nms")


def _extension_path(folder: Path) -> str:
    if sys.platform == "win32":
        import os

        os.add_dll_directory(str(folder))
    loaders = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    spec = importlib.machinery.FileFinder(str(folder), loaders).find_spec("_C")
    if spec is None or spec.origin is None:
        raise ImportError(f"no extension in {folder}")
    return spec.origin


def _in_pieces(roi_align: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function, on a few regions at a time: it holds all they read in memory at once."""

    @functools.wraps(roi_align)
    def in_pieces(images: torch.Tensor, rois: torch.Tensor, *options: Any) -> torch.Tensor:
        return torch.cat(
            [roi_align(images, piece, *options) for piece in torch.split(rois, _REGIONS)]
        )

    return in_pieces


def _nothing_to_assert() -> None:
    """Stand in for torchvision's check that its compiled operators are there."""
