"""Every classification and segmentation network of torchvision by name, untrained.

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
_SIZES = {"inception_v3": 299}


def torchvision_model(name: str) -> nn.Module:
    """The randomly initialised network, in eval mode.

    The names in its state dict are those of torchvision's own weights. GoogLeNet goes without its
    auxiliary classifiers, as torchvision's pretrained one does; Inception v3 has its own, unused in
    eval mode.

    Args:
        name: torchvision's name, for example ``"resnet50"``.

    Raises:
        UnknownNameError: If torchvision has no such classification or segmentation network.
        DataError: If torchvision is not installed.
    """
    _check_name(name)
    options = dict(_OPTIONS.get(name, {}))
    if name in _segmentation_names():
        options["weights_backbone"] = None
    network: nn.Module = _models().get_model(name, weights=None, **options)
    return network.eval()


def torchvision_entry(name: str) -> ZooEntry:
    """The zoo entry ``torchvision/NAME``.

    Raises:
        UnknownNameError: If torchvision has no such classification or segmentation network.
        DataError: If torchvision is not installed.
    """
    _check_name(name)
    size = _SIZES.get(name, 224)
    kind = "segmentation" if name in _segmentation_names() else "classification"
    return ZooEntry(
        name=f"torchvision/{name}",
        factory="fxq.models_zoo.torchvision_models:torchvision_model",
        input_shape=(1, 3, size, size),
        summary=f"torchvision's {kind} network {name}",
        normalization=IMAGENET,
        arguments=(name,),
    )


def torchvision_names() -> tuple[str, ...]:
    """Names of all classification and segmentation networks, sorted, without ``torchvision/``.

    Raises:
        DataError: If torchvision is not installed.
    """
    return tuple(sorted({*_classification_names(), *_segmentation_names()}))


def _check_name(name: str) -> None:
    known = torchvision_names()
    if name not in known:
        raise UnknownNameError("torchvision network", name, known)


@functools.cache
def _classification_names() -> frozenset[str]:
    models = _models()
    return frozenset(models.list_models(module=models))


@functools.cache
def _segmentation_names() -> frozenset[str]:
    models = _models()
    return frozenset(models.list_models(module=models.segmentation))


def _models() -> ModuleType:
    try:
        import_torchvision()
    except ImportError as error:
        raise DataError("torchvision is not installed", hint="pip install torchvision") from error
    return importlib.import_module("torchvision.models")
