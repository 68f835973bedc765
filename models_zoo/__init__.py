"""Networks, weights and image data that fxq brings along, by name.

``CATALOG`` lists our own networks without importing torch; ``lookup`` also knows every
classification, segmentation and detection network of torchvision as ``torchvision/NAME``.
Everything else here is imported when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fxq.errors import UnknownNameError
from fxq.zoo_entry import Normalization, ZooEntry

from .catalog import CATALOG

if TYPE_CHECKING:
    from .accuracy import Accuracy, evaluate_top1
    from .builtin import builtin_data
    from .cifar_alexnet import alexnet
    from .cifar_resnet import (
        resnet20,
        resnet20_a,
        resnet32,
        resnet32_a,
        resnet44,
        resnet44_a,
        resnet56,
        resnet56_a,
        resnet110,
        resnet110_a,
    )
    from .cifar_vgg import vgg11
    from .coco_folder import DetectionData, open_coco
    from .datasets import ImageData, open_images
    from .digits import digits_convnet
    from .layouts import task_of
    from .mean_average_precision import evaluate_map
    from .mean_iou import evaluate_iou
    from .mlperf_tiny import resnet8
    from .mobilenet import mobilenet_v1, mobilenet_v2
    from .sequence_recurrent import gru, lstm
    from .sequence_transformer import transformer
    from .sequences import SequenceData, sequence_data
    from .tiny import tiny_concat, tiny_conv, tiny_depthwise, tiny_mlp, tiny_residual
    from .torchvision_models import torchvision_model, torchvision_names
    from .voc_folder import SegmentationData, open_voc
    from .weights import load_weights

__all__ = [
    "CATALOG",
    "Accuracy",
    "DetectionData",
    "ImageData",
    "Normalization",
    "SegmentationData",
    "SequenceData",
    "ZooEntry",
    "alexnet",
    "builtin_data",
    "digits_convnet",
    "evaluate_iou",
    "evaluate_map",
    "evaluate_top1",
    "gru",
    "load_weights",
    "lookup",
    "lstm",
    "mobilenet_v1",
    "mobilenet_v2",
    "open_coco",
    "open_images",
    "open_voc",
    "resnet8",
    "resnet20",
    "resnet20_a",
    "resnet32",
    "resnet32_a",
    "resnet44",
    "resnet44_a",
    "resnet56",
    "resnet56_a",
    "resnet110",
    "resnet110_a",
    "sequence_data",
    "task_of",
    "tiny_concat",
    "tiny_conv",
    "tiny_depthwise",
    "tiny_mlp",
    "tiny_residual",
    "torchvision_model",
    "torchvision_names",
    "transformer",
    "vgg11",
]

_HOMES = {
    "accuracy": ("Accuracy", "evaluate_top1"),
    "builtin": ("builtin_data",),
    "cifar_alexnet": ("alexnet",),
    "cifar_resnet": tuple(f"resnet{d}{o}" for d in (20, 32, 44, 56, 110) for o in ("", "_a")),
    "cifar_vgg": ("vgg11",),
    "coco_folder": ("DetectionData", "open_coco"),
    "datasets": ("ImageData", "open_images"),
    "digits": ("digits_convnet",),
    "layouts": ("task_of",),
    "mean_average_precision": ("evaluate_map",),
    "mean_iou": ("evaluate_iou",),
    "mlperf_tiny": ("resnet8",),
    "mobilenet": ("mobilenet_v1", "mobilenet_v2"),
    "sequence_recurrent": ("gru", "lstm"),
    "sequence_transformer": ("transformer",),
    "sequences": ("SequenceData", "sequence_data"),
    "tiny": ("tiny_concat", "tiny_conv", "tiny_depthwise", "tiny_mlp", "tiny_residual"),
    "torchvision_models": ("torchvision_model", "torchvision_names"),
    "voc_folder": ("SegmentationData", "open_voc"),
    "weights": ("load_weights",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def lookup(name: str) -> ZooEntry:
    """The entry of this name, ours or ``torchvision/NAME``.

    Raises:
        UnknownNameError: If no network has this name; the hint gives the nearest one.

    Example:
        >>> lookup("cifar/resnet20").input_shape
        (1, 3, 32, 32)
    """
    for entry in CATALOG:
        if entry.name == name:
            return entry
    if name.startswith("torchvision/"):
        from .torchvision_models import torchvision_entry

        return torchvision_entry(name.removeprefix("torchvision/"))
    raise UnknownNameError("network", name, [entry.name for entry in CATALOG])


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
