"""Loading weight files into networks, with every way they can be wrong said plainly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fxq.apot_checkpoint import has_clips
from fxq.errors import DataError
from fxq.weight_file import COUNTER, check_fit, read_weights
from fxq.zoo_entry import ZooEntry

from .catalog import CATALOG


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """The module holds the file's weights; nothing is changed when they do not fit.

    Names must match exactly. For ``.pt`` and ``.pth`` a surrounding ``state_dict`` and the prefix
    ``module.`` that data-parallel training adds are taken off first.

    Args:
        module: The network to fill.
        path: A ``.safetensors``, ``.pt`` or ``.pth`` file.

    Raises:
        DataError: If the file is missing or damaged, holds other objects than tensors, has other
            names or shapes than the module, or holds NaN or infinite values.
    """
    file = Path(path)
    weights = read_weights(file)
    try:
        check_fit(module.state_dict(), weights, file)
    except DataError as error:
        error.hint = error.hint or _other_network_hint(weights)
        raise
    module.load_state_dict(weights)


def fitting_entries(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the catalog's networks that these weights fit in every name and shape."""
    return [entry.name for entry in CATALOG if _fits(entry, weights)]


def _fits(entry: ZooEntry, weights: Mapping[str, Tensor]) -> bool:
    if entry.weights == "embedded" or entry.name.startswith("tiny/"):
        return False
    with torch.device("meta"):
        expected = entry.build(seed=None).state_dict()
    return _shapes(expected) == _shapes(weights)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items() if not name.endswith(COUNTER)}


def _other_network_hint(weights: Mapping[str, Tensor]) -> str | None:
    if has_clips(weights):
        return "these weights come with the clips of APoT's authors; fxq import takes such files"
    fitting = fitting_entries(weights)
    return f"they fit {' and '.join(fitting)}" if fitting else None
