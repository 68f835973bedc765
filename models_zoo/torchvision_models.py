"""Every classification, segmentation and detection network of torchvision by name, untrained.

Reference:
    https://pytorch.org/vision/stable/models.html
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from torch import nn

from fxq.errors import DataError, UnknownNameError
from fxq.torchvision_import import import_torchvision
from fxq.zoo_entry import IMAGENET, ZooEntry

_OPTIONS: dict[str, dict[str, object]] = {
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False},
}
_SIZES = {
    "inception_v3": 299,
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
    "fasterrcnn_mobilenet_v3_large_320_fpn": 320,
}
_SIDES = {"classification": 224, "segmentation": 224, "detection": 800}


def torchvision_model(name: str) -> nn.Module:
    """The randomly initialised network, in eval mode.

    The names in its state dict are those of torchvision's own weights. GoogLeNet goes without its
    auxiliary classifiers, as torchvision's pretrained one does; Inception v3 has its own, unused in
    eval mode.

    Args:
        name: torchvision's name, for example ``"resnet50"``.

    Raises:
        UnknownNameError: If torchvision has no such network.
        DataError: If torchvision is not installed.
    """
    options = dict(_OPTIONS.get(name, {}))
    if _task(name) != "classification":
        options["weights_backbone"] = None
    network: nn.Module = _models().get_model(name, weights=None, **options)
    return network.eval()


def torchvision_entry(name: str) -> ZooEntry:
    """The zoo entry ``torchvision/NAME``.

    Raises:
        UnknownNameError: If torchvision has no such network.
        DataError: If torchvision is not installed.
    """
    task = _task(name)
    size = _SIZES.get(name, _SIDES[task])
    return ZooEntry(
        name=f"torchvision/{name}",
        factory="fxq.models_zoo.torchvision_models:torchvision_model",
        input_shape=(1, 3, size, size),
        summary=f"torchvision's {task} network {name}",
        normalization=None if task == "detection" else IMAGENET,  # detectors have it inside
        arguments=(name,),
        takes_list=task == "detection",
    )


def torchvision_names() -> tuple[str, ...]:
    """Names of all these networks, sorted, without ``torchvision/``.

    Raises:
        DataError: If torchvision is not installed.
    """
    return tuple(sorted(_tasks()))


def _task(name: str) -> str:
    """What a network is for.

    Raises:
        UnknownNameError: If torchvision has no such network.
    """
    tasks = _tasks()
    if name not in tasks:
        raise UnknownNameError("torchvision network", name, tasks)
    return tasks[name]


@functools.cache
def _tasks() -> dict[str, str]:
    """What each network is for, by name."""
    models = _models()
    homes = {
        "classification": models,
        "segmentation": models.segmentation,
        "detection": models.detection,
    }
    return {name: task for task, home in homes.items() for name in models.list_models(module=home)}


def _models() -> ModuleType:
    try:
        import_torchvision()
    except ImportError as error:
        raise DataError("torchvision is not installed", hint="pip install torchvision") from error
    return importlib.import_module("torchvision.models")
