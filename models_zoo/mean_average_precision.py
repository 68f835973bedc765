"""Mean average precision of a detector, by torchmetrics and pycocotools.

Papers:
    Lin et al., "Microsoft COCO: common objects in context", arXiv:1405.0312; the measure is
    described at cocodataset.org/#detection-eval.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from fxq.errors import DataError

from .accuracy import device_of, inference
from .coco_folder import DetectionData
from .torchmetrics_import import new_metric

_ANSWERS = ("boxes", "scores", "labels")


def evaluate_map(
    module: nn.Module,
    data: DetectionData,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
    *,
    limit: int | None = None,
) -> dict[str, float]:
    """``{"mAP": …, "mAP50": …}`` in per cent, as COCO defines them.

    The mean over categories of the average precision, at ten overlaps from 0.5 to 0.95 and at 0.5;
    of at most 100 boxes per image. Categories without an object in these images are left out; boxes
    around crowds are neither right nor wrong. Boxes that were found are kept to the end.

    Args:
        module: A list of images ``[3, H, W]`` in 0..1 to one dictionary each, with ``boxes``
            ``[K, 4]`` (corners in pixels of the image), ``scores`` and ``labels`` ``[K]``.
        data: What is where.
        batch_size: Images per forward pass.
        progress: Called after each batch with those done and those there are in all.
        limit: Only the first so many.

    Raises:
        DataError: If the output is something else, there is no object in these images, or
            torchmetrics or pycocotools is not installed.
    """
    count = len(data) if limit is None else min(limit, len(data))
    metric = _metric()
    device, objects, done = device_of(module), 0, 0
    with inference(module):
        for images, wanted in data.batches(batch_size, limit=limit):
            output = module([image.to(device) for image in images])
            metric.update(_answers(output, len(images), data.name), wanted)
            objects += sum(len(one["labels"]) for one in wanted)
            done += len(images)
            if progress is not None:
                progress(done, count)
    if not objects:
        raise DataError("there is no object in these images", where=data.name)
    found = metric.compute()
    return {"mAP": 100 * float(found["map"]), "mAP50": 100 * float(found["map_50"])}


def _metric() -> Any:
    metric = new_metric(
        "detection",
        "MeanAveragePrecision",
        "pycocotools",
        backend="pycocotools",
        # COCO's own; torchmetrics rounds its to float32, where a recall of 0.6 does not reach 0.6.
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
    )
    metric.warn_on_many_detections = False  # the best 100 count, as COCO has it
    return metric


def _answers(output: Any, images: int, name: str) -> list[dict[str, Tensor]]:
    """What was found in each image.

    Raises:
        DataError: The output is something else.
    """
    alike = isinstance(output, list) and len(output) == images
    if not alike or not all(isinstance(one, dict) and {*_ANSWERS} <= {*one} for one in output):
        raise DataError(
            f"the network gives a {type(output).__name__}, not one dictionary of boxes, scores and "
            "labels for every image",
            where=name,
            hint="boxes measure a network that answers as torchvision's detectors do",
        )
    return [{key: one[key].cpu() for key in _ANSWERS} for one in output]
