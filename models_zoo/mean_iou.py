"""Mean intersection over union of a segmentation network, by torchmetrics.

Papers:
    Everingham et al., "The PASCAL visual object classes challenge: a retrospective", IJCV 111,
    2015, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from fxq.errors import DataError

from .accuracy import device_of, inference
from .torchmetrics_import import new_metric
from .voc_folder import UNLABELLED, SegmentationData


def evaluate_iou(
    module: nn.Module,
    data: SegmentationData,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    *,
    limit: int | None = None,
) -> dict[str, float]:
    """``{"mIoU": …}`` in per cent: over all images, the classes' intersections over unions.

    A class that no pixel has, neither in the masks nor in the answers, is left out of the mean.
    Pixels of class 255 do not count.

    Args:
        module: Images ``[N, C, H, W]`` to logits ``[N, classes, h, w]``, or to a dictionary that
            has them as ``"out"``; the logits are resized to the mask.
        data: Normalised as the network expects it.
        batch_size: Images per forward pass.
        progress: Called after each batch with those done and those there are in all.
        limit: Only the first so many.

    Raises:
        DataError: If the output is no logits of this shape, a label lies beyond its classes, no
            pixel has a label, or torchmetrics is not installed.
    """
    count = len(data) if limit is None else min(limit, len(data))
    device, metric, done = device_of(module), None, 0
    with inference(module):
        for images, masks in data.batches(batch_size, limit=limit):
            logits = _logits(module(images.to(device)), masks, data.name)
            if metric is None:
                metric = _metric(logits.shape[1])
            _check_labels(masks, logits.shape[1], data.name)
            metric.update(logits.argmax(1).cpu(), masks)
            done += len(masks)
            if progress is not None:
                progress(done, count)
    if metric is None or not int(metric.confmat.sum()):
        raise DataError("no pixel of the masks has a label", where=data.name)
    return {"mIoU": 100 * float(metric.compute())}


def _metric(classes: int) -> Any:
    return new_metric(
        "classification",
        "MulticlassJaccardIndex",
        num_classes=classes,
        ignore_index=UNLABELLED,
        validate_args=False,  # checked here, in words of our own
    )


def _logits(output: Any, masks: Tensor, name: str) -> Tensor:
    """``[N, classes, H, W]`` of the size of the masks.

    Raises:
        DataError: The output is something else.
    """
    found = output.get("out") if isinstance(output, Mapping) else output
    if not isinstance(found, Tensor) or found.ndim != 4 or len(found) != len(masks):
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise DataError(
            f"the network gives {shape}, not logits [N, classes, H, W] for every image",
            where=name,
            hint="masks measure a network that gives such logits, or {'out': logits}",
        )
    if found.shape[2:] == masks.shape[1:]:
        return found
    return functional.interpolate(found, masks.shape[1:], mode="bilinear", align_corners=False)


def _check_labels(masks: Tensor, classes: int, name: str) -> None:
    known = masks[masks != UNLABELLED]
    if known.numel() and int(known.max()) >= classes:
        raise DataError(
            f"a label is {int(known.max())}, but the network has {classes} classes",
            where=name,
            hint=f"masks have classes from 0, and {UNLABELLED} where nobody says",
        )
