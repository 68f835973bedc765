"""Reading weight files, with every way they can be wrong said plainly.

Only tensors are read: ``.safetensors`` holds nothing else, and ``.pt`` / ``.pth`` files go through
``torch.load(weights_only=True)``, which refuses any other object.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fxq.errors import DataError
from fxq.zoo_entry import ZooEntry

from .catalog import CATALOG

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_COUNTER = "num_batches_tracked"  # absent from old files, and not used in eval mode


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
    _check_names(module.state_dict(), weights, file)
    _check_tensors(module.state_dict(), weights, file)
    module.load_state_dict(weights)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a weight file, by name, on the CPU.

    Raises:
        DataError: If the file is missing or damaged, or holds other objects than tensors.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(
            "there is no such weight file", where=str(file), hint="check the path of --weights"
        )
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix in (".pt", ".pth"):
        return _read_torch(file)
    raise DataError(
        f"weight files end in .safetensors, .pt or .pth, not {file.suffix or 'nothing'!r}",
        where=str(file),
    )


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
    return {name: tensor.shape for name, tensor in state.items() if not name.endswith(_COUNTER)}


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"the file is damaged, or no safetensors file: {error}",
            where=str(file),
            hint="download or save it again",
        ) from error


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            "the file holds other objects than tensors, or is damaged; fxq runs no code from it",
            where=str(file),
            hint="save module.state_dict() instead of the module",
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise DataError(
            f"the file is damaged, or no torch file: {error}", where=str(file)
        ) from error
    return _unwrapped(loaded, file)


def _unwrapped(loaded: object, file: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise DataError("the file holds no state dict", where=str(file))
    state = {str(name).removeprefix("module."): value for name, value in loaded.items()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise DataError(
                f"{name!r} is a {type(value).__name__}, not a tensor",
                where=str(file),
                hint="save module.state_dict()",
            )
    return state


def _check_names(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], file: Path) -> None:
    missing = [n for n in expected if n not in weights and not n.endswith(_COUNTER)]
    unexpected = [name for name in weights if name not in expected]
    if not missing and not unexpected:
        return
    parts = [
        f"{len(names)} {kind} (first: {names[0]})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    raise DataError(
        f"the weights are of another network: {', '.join(parts)}",
        where=str(file),
        hint=_other_network_hint(weights),
    )


def _check_tensors(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], file: Path
) -> None:
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise DataError(
                f"{name} has shape {list(tensor.shape)}, the network's has "
                f"{list(expected[name].shape)}",
                where=str(file),
                hint=_other_network_hint(weights),
            )
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise DataError(
                f"{name} holds {tensor.dtype}, the network's {expected[name].dtype}",
                where=str(file),
                hint="dequantize the weights before saving them",
            )
        if not tensor.isfinite().all():
            raise DataError(
                f"{name} holds NaN or infinite values",
                where=str(file),
                hint="the training that saved it had diverged, or the file is damaged",
            )


def _other_network_hint(weights: Mapping[str, Tensor]) -> str | None:
    fitting = fitting_entries(weights)
    return f"they fit {' and '.join(fitting)}" if fitting else None
